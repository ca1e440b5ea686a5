import os

PARENT_PID = os.getppid()
"""The process's parent when it began: read before anything slow is imported, as the parent may die meanwhile."""
