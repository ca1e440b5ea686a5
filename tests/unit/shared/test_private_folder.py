"""Temporary folders, and what becomes of them when their processes end in different ways."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tandem_shared.host.private_folder import LOCK_NAME, PrivateFolder, remove_abandoned

OWNER = """
import sys
from tandem_shared.host.private_folder import PrivateFolder
folder = PrivateFolder(sys.argv[1])
(folder.path / "engine.sock").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def owners() -> Iterator[list["subprocess.Popen[str]"]]:
    """Two processes, each with a folder."""
    with ExitStack() as stack:
        processes = []
        for prefix in ("tandem-", "tandem-ranks-"):
            command = [sys.executable, "-c", OWNER, prefix]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def test_what_a_killed_process_left_is_removed_when_the_next_folder_is_made(
    owners: list["subprocess.Popen[str]"],
) -> None:
    dead, alive = (Path(process.stdout.readline().strip()) for process in owners if process.stdout is not None)
    owners[0].kill()
    owners[0].wait()
    assert dead.exists()
    with PrivateFolder() as folder:
        assert not dead.exists()
        assert (alive / "engine.sock").exists()
        assert folder.stat().st_mode & 0o777 == 0o700
        remove_abandoned()
        assert folder.exists()
    assert not folder.exists()
    assert alive.exists()


def test_a_child_does_not_hold_its_parents_folder(temporary_folder: Path) -> None:
    """The child is a process that the folder's process has started and that outlives it."""
    code = OWNER + "import os, subprocess; subprocess.Popen(['sleep', '10']); os._exit(1)"
    done = subprocess.run([sys.executable, "-c", code, "tandem-"], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 1
    assert len(list(temporary_folder.iterdir())) == 1
    remove_abandoned()
    assert list(temporary_folder.iterdir()) == []


def test_what_is_not_ours_stays(temporary_folder: Path) -> None:
    (temporary_folder / "tandem-models").mkdir()
    (temporary_folder / "tandem-file").touch()
    (temporary_folder / "tandem-dangling").symlink_to("nowhere")
    target = temporary_folder / "elsewhere"
    target.mkdir()
    (target / LOCK_NAME).touch()
    (temporary_folder / "tandem-link").symlink_to(target)
    (temporary_folder / "tandem-linked-lock").mkdir()
    (temporary_folder / "tandem-linked-lock" / LOCK_NAME).symlink_to(target / LOCK_NAME)
    before = sorted(temporary_folder.rglob("*"))
    remove_abandoned()
    assert sorted(temporary_folder.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make folders of another user")
def test_folders_of_other_users_stay(temporary_folder: Path) -> None:
    foreign = temporary_folder / "tandem-foreign"
    foreign.mkdir()
    (foreign / LOCK_NAME).touch()
    os.chown(foreign, 12345, 12345)
    remove_abandoned()
    assert (foreign / LOCK_NAME).exists()


def test_a_folder_that_a_cleaner_takes_while_it_is_made_is_made_again(
    temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem_shared.host import private_folder

    made: list[Path] = []
    mkdtemp = tempfile.mkdtemp

    def mkdtemp_with_a_cleaner(prefix: str) -> str:
        path = Path(mkdtemp(prefix=prefix))
        made.append(path)
        if len(made) == 1:
            # What a cleaner sees between the lock file's making and its locking.
            (path / LOCK_NAME).touch()
            flock = private_folder.fcntl.flock

            def flock_after_a_cleaner(descriptor: int, operation: int) -> None:
                monkeypatch.setattr(private_folder.fcntl, "flock", flock)
                remove_abandoned()
                flock(descriptor, operation)

            monkeypatch.setattr(private_folder.fcntl, "flock", flock_after_a_cleaner)
        return str(path)

    monkeypatch.setattr(private_folder.tempfile, "mkdtemp", mkdtemp_with_a_cleaner)
    with PrivateFolder() as folder:
        assert folder == made[1]
        assert list(temporary_folder.iterdir()) == [folder]
