"""The file of API keys: its lines, what is refused, and how it is read again."""

import logging
import os
import resource
from pathlib import Path

import pytest

from tandem_shared.errors import ConfigError, InvalidApiKey, PermissionDenied
from tandem_shared.host import reloaded
from tandem_shared.rpc.api_keys import KeyFile, Scope, read_keys

ALICE, OPS = "alices-key-00000001", "operators-key-000002"
LINES = f"# name scopes key\n\n  alice\tinference {ALICE} priority=-3..10\nops control,inference {OPS}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(LINES)
    return path


def replace(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def test_a_line_is_a_name_scopes_a_key_and_priorities(path: Path) -> None:
    alice, ops = read_keys(str(path))
    assert (alice.name, alice.scopes) == ("alice", {Scope.INFERENCE})
    assert (alice.min_priority, alice.max_priority) == (-3, 10)
    assert (ops.name, ops.scopes, ops.min_priority, ops.max_priority) == ("ops", set(Scope), 0, 0)
    assert alice.cache_salt != ops.cache_salt
    assert ALICE not in repr(alice) and repr(alice.digest) not in repr(alice)


def test_salts_are_of_name_and_key_together(path: Path) -> None:
    texts = (LINES, LINES.replace("alice\t", "bob\t"), LINES.replace(ALICE, ALICE + "x"), LINES)
    salts = []
    for text in texts:
        path.write_text(text)
        salts.append(read_keys(str(path))[0].cache_salt)
    assert salts[0] == salts[3] and len(set(salts)) == 3


def test_a_token_finds_its_key(path: Path) -> None:
    keys = KeyFile(str(path))
    for value in (f"Bearer {ALICE}", f"bearer  {ALICE}", f"BEARER {ALICE}"):
        assert keys.find([value]).name == "alice"
    assert keys.find([f"Bearer {OPS}"]).name == "ops"
    wrong = (ALICE, f"Basic {ALICE}", "Bearer ", f"Bearer {ALICE} {OPS}", f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}é")
    for values in ([], *([value] for value in wrong), [f"Bearer {ALICE}"] * 2, [f"Bearer {ALICE}".encode()]):
        with pytest.raises(InvalidApiKey) as caught:
            keys.find(values)
        assert "key" in str(caught.value) and ALICE[:-1] not in str(caught.value)


def test_a_key_is_for_its_scopes_and_priorities_alone(path: Path) -> None:
    alice, ops = read_keys(str(path))
    alice.check_scope(Scope.INFERENCE)
    with pytest.raises(PermissionDenied, match="'alice' is not for control"):
        alice.check_scope(Scope.CONTROL)
    for key, allowed, refused in ((alice, (-3, 0, 10), (-4, 11)), (ops, (0,), (-1, 1))):
        for priority in allowed:
            key.check_priority(priority)
        for priority in refused:
            with pytest.raises(PermissionDenied, match=f"not {priority}$"):
                key.check_priority(priority)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"alice inference {OPS}", "same name or key"),
        (f"bob inference {ALICE}", "same name or key"),
        ("bob inference", "must be NAME SCOPES KEY"),
        (f"b/ob inference {OPS}", "a name has"),
        (f"bob admin {OPS}", "scopes must be inference, control"),
        (f"bob inference, {OPS}", "scopes must be inference, control"),
        ("bob inference short-key", "a key has 16 to 256"),
        ("bob inference key-with-an-ümlaut", "a key has 16 to 256"),
        (f"bob inference {OPS} priority=1", "priority=LOWEST..HIGHEST"),
        (f"bob inference {OPS} priority=2..1", "priority=LOWEST..HIGHEST"),
        (f"bob inference {OPS} priority=1..2 more", "priority=LOWEST..HIGHEST"),
    ],
)
def test_what_is_wrong_is_named_by_its_line_and_not_quoted(path: Path, line: str, problem: str) -> None:
    path.write_text(f"alice inference {ALICE}\n{line}\n")
    with pytest.raises(ConfigError, match=f"--api-key-file {path}, line 2: .*{problem}") as caught:
        KeyFile(str(path))
    assert OPS not in str(caught.value) and ALICE not in str(caught.value)


def test_a_file_that_is_missing_or_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# no keys\n")
    (tmp_path / "binary").write_bytes(b"alice inference \xff\xfe")
    (tmp_path / "large").write_text("#" * 2**20 + "\n")
    problems = {"none": "No such file", "empty": "has no keys", "binary": "is not a text", "large": "more than"}
    for name, problem in problems.items():
        with pytest.raises(ConfigError, match=problem):
            KeyFile(str(tmp_path / name))


def test_a_changed_file_is_read_again(path: Path) -> None:
    keys = KeyFile(str(path))
    replace(path, f"carol inference {ALICE}\n")
    assert keys.find([f"Bearer {ALICE}"]).name == "carol"
    with pytest.raises(InvalidApiKey):
        keys.find([f"Bearer {OPS}"])
    # As Kubernetes does it: the file is a link to one in a folder that is replaced.
    path.unlink()
    path.symlink_to(path.with_name("first"))
    path.with_name("first").write_text(f"ops control {OPS}\n")
    assert keys.find([f"Bearer {OPS}"]).name == "ops"


def test_a_file_that_is_wrong_or_gone_changes_nothing_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeyFile(str(path))
    replace(path, f"alice nothing {OPS}\n")
    for _ in range(3):
        assert keys.find([f"Bearer {ALICE}"]).name == "alice"
    path.unlink()
    for _ in range(3):
        assert keys.find([f"Bearer {OPS}"]).name == "ops"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2 and "line 1" in errors[0] and "No such file" in errors[1]
    assert OPS not in caplog.text and ALICE not in caplog.text


def test_a_withdrawn_key_goes_once_the_process_can_open_files_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloaded, "RETRY_S", 0.0)
    keys = KeyFile(str(path))
    replace(path, f"ops control {OPS}\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No descriptor is left, as the lowest free one is always taken.
    free = os.open(path, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        assert keys.find([f"Bearer {ALICE}"]).name == "alice"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(InvalidApiKey):
        keys.find([f"Bearer {ALICE}"])


def test_a_file_without_keys_lets_nobody_in(path: Path) -> None:
    keys = KeyFile(str(path))
    replace(path, "# all keys are withdrawn\n")
    with pytest.raises(InvalidApiKey):
        keys.find([f"Bearer {ALICE}"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads any file")
def test_a_file_that_may_not_be_read_is_refused(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        KeyFile(str(path))
