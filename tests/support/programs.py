"""Programs that some tests need and that no Python package brings."""

import os
import shutil

import pytest


def require_programs(*names: str) -> None:
    """Skips a test where a program is missing. Under CI, which installs all of them, the test fails instead."""
    if missing := [name for name in names if shutil.which(name) is None]:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {', '.join(missing)}")
