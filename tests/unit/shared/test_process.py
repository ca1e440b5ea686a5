"""How a process ends itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAVE = "from tandem_shared.host.process import leave; print('last words'); leave(70)"


@pytest.mark.parametrize("where", ["> /dev/full", ">&-", "2>&-", "> /dev/null"])
def test_a_process_leaves_with_its_status_wherever_its_output_goes(where: str) -> None:
    if where == "> /dev/full" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    # So that print() itself does not fail.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["sh", "-c", f'exec "$0" -c "$1" {where}', sys.executable, LEAVE]
    ended = subprocess.run(command, env=environment, timeout=60)
    assert ended.returncode == 70
