"""The file with the secret that a worker's callers must show."""

import os
import stat
import threading
from pathlib import Path

import pytest

from tandem_shared.errors import ConfigError
from tandem_shared.rpc.session_secret import read_secret


def test_no_file_is_no_secret() -> None:
    assert read_secret("") == b""


def test_it_is_made_for_this_user_alone_and_then_stays(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = read_secret(str(path))
    assert len(secret) == 64 and read_secret(str(path)) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_services_that_start_at_once_have_the_same(tmp_path: Path) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait()
        found.append(read_secret(str(tmp_path / "secret")))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_white_space_at_the_ends_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("  a secret that someone wrote\n\n")
    assert read_secret(str(path)) == b"a secret that someone wrote"


@pytest.mark.parametrize("contents", ["", "short", "x" * 5000])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "secret"
    path.write_text(contents)
    with pytest.raises(ConfigError, match=f"--session-secret-file {path}: must hold"):
        read_secret(str(path))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, problem in ((tmp_path / "fifo", "is not a regular file"), (tmp_path / "no" / "folder", "No such file")):
        with pytest.raises(ConfigError, match=f"--session-secret-file.*{problem}"):
            read_secret(str(path))
