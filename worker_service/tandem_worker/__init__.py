import os

PARENT_PID = os.getppid()
"""What this process began under: taken before anything slow is imported, as the parent may die meanwhile."""
