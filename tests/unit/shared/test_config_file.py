"""Settings from a file: what it means, who wins over it, and what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest

from tandem import cli
from tandem.commands import serve
from tandem_shared.config import SchedulerSettings, ServiceSettings, WorkerSettings, read_command_line
from tandem_shared.config_file import MAX_BYTES
from tandem_shared.gateway_settings import GatewaySettings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TANDEM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tandem.yaml"


def read(
    file: Path, *arguments: str, settings_class: type[ServiceSettings | GatewaySettings] = SchedulerSettings
) -> Any:
    return read_command_line(settings_class, "tandem-scheduler", "Tests.", ["--config", str(file), *arguments])


SHARED = """\
# One file for all services.
model: Qwen/Qwen3-0.6B
revision: 1e5          # a commit
served_model_name: no  # a name
max-num-seqs: 128
max-chunk-tokens:
tokenizer: ~
enable-prefix-caching: False
worker-wait-s: 1.5
tensor-parallel-size: 2
enforce-eager: true
http-workers: 3
interceptor: [one:A, "two:B"]
"""


def test_each_service_takes_its_own_settings_of_a_file(file: Path) -> None:
    file.write_text(SHARED)
    same = {"model": "Qwen/Qwen3-0.6B", "revision": "1e5", "served_model_name": "no"}
    assert read(file) == SchedulerSettings(
        **same, max_num_seqs=128, enable_prefix_caching=False, worker_wait_s=1.5, interceptor="one:A,two:B"
    )
    worker = read(file, settings_class=WorkerSettings)
    assert worker == WorkerSettings(**same, max_num_seqs=128, tp_size=2, enforce_eager=True)
    assert read(file, settings_class=GatewaySettings) == GatewaySettings(http_workers=3)


def test_a_flag_wins_over_a_variable_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port: 1\nmax-num-seqs: 2\nmax-num-waiting: 3\nenable-prefix-caching: true\n")
    monkeypatch.setenv("TANDEM_PORT", "10")
    monkeypatch.setenv("TANDEM_MAX_NUM_SEQS", "20")
    monkeypatch.setenv("TANDEM_MAX_NUM_WAITING", "")
    settings = read(file, "--port", "100", "--no-enable-prefix-caching")
    assert (settings.port, settings.max_num_seqs, settings.max_num_waiting) == (100, 20, 3)
    assert not settings.enable_prefix_caching


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "\ufeff{}"])
def test_a_file_of_nothing_sets_nothing(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert read(file) == SchedulerSettings()


BOMB = "a: &a [x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a'] * 9)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max-num-seq: 1", "line 1: tandem-scheduler has no setting 'max-num-seq'; did you mean max-num-seqs?"),
        ("\nconfig: other.yaml", "line 2: tandem-scheduler has no setting 'config'"),
        ("xyzzy: 1", "line 1: tandem-scheduler has no setting 'xyzzy'\n"),
        ("max-num-seqs: 0", "line 1: max-num-seqs must be at least 1, is 0"),
        ("port: 70000", "line 1: port must be at most 65535, is 70000"),
        ("max_num_seqs: many", "line 1: max_num_seqs must be of type int, is 'many'"),
        ("enable-prefix-caching: yes", "line 1: enable-prefix-caching must be true or false, is 'yes'"),
        ("log-level: loud", "line 1: log-level must be one of debug, info, warning, error, is 'loud'"),
        ("tp-size: 1\ntensor_parallel_size: 1", "line 2: tensor_parallel_size is given twice"),
        ("port: [1, 2]", "line 1: port takes one value, not a list"),
        ("interceptor: [[a]]", "line 1: interceptor: a list must hold plain values"),
        ("interceptor: {a: b}", "line 1: interceptor: must have a plain value or a list of them"),
        ("- port", "must hold lines such as max-num-seqs: 128"),
        ("port", "must hold lines such as max-num-seqs: 128"),
        ("[a]: 1", "line 1: must hold lines such as max-num-seqs: 128"),
        ("port: 1\n---\nport: 2", "line 2: must hold one document"),
        ("port: [", "is no YAML: "),
        ("port: 1\n\tport: 2", "is no YAML: "),
        ("port: \x07", "is no YAML: "),
        (BOMB, "line 1: anchors, aliases and tags are not taken"),
        ("port: !!python/object/apply:os.getpid []", "line 1: anchors, aliases and tags are not taken"),
        ("[" * 50_000, "must hold lines such as"),
        ("interceptor: " + "[" * 50_000, "line 1: interceptor: a list must hold plain values"),
        ("#" * MAX_BYTES + "\n", f"is larger than {MAX_BYTES} bytes"),
    ],
)
def test_what_is_refused_says_file_line_and_key(
    file: Path, text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    with pytest.raises(SystemExit) as caught:
        read(file)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and problem in said
    assert said.startswith("tandem-scheduler: ") and str(file) in said and said.count("\n") == 1


@pytest.mark.parametrize("data", [b"port: \xff", b"\xff\xfe\x00", os.urandom(300)])
def test_bytes_that_are_no_text_are_refused(file: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(data)
    with pytest.raises(SystemExit):
        read(file)
    assert str(file) in capsys.readouterr().err


def test_a_file_that_is_not_there_or_a_folder_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in ((file, "No such file or directory"), (file.parent, "Is a directory")):
        with pytest.raises(SystemExit):
            read(path)
        assert capsys.readouterr().err == f"tandem-scheduler: --config {path}: {problem}\n"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `tandem serve` would start."""
    started: list[Any] = []

    def note(*settings: Any, **others: Any) -> None:
        started.extend([*settings, *others.values()])
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "Services", note)
    # run() sets a handler that the tests' own process must not keep.
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    return started


def test_serve_has_model_and_ports_from_the_file(file: Path, served: list[Any]) -> None:
    file.write_text("model: embedded\nport: 0\nhttp-port: 0\nblock-size: 8\nmax-num-seqs: 4\n")
    assert cli.main(["serve", "--config", str(file)]) == 0
    assert served == [
        WorkerSettings(port=0, block_size=8, max_num_seqs=4),
        SchedulerSettings(port=0, max_num_seqs=4),
        None,
    ]
    served.clear()
    assert cli.main(["serve", "folder", "--config", str(file)]) == 0
    assert served[0].model == served[1].model == "folder"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("port: 0", "give a MODEL"),
        ("model: embedded\nworker-address: host:1", "line 2: tandem serve has no setting 'worker-address'"),
        ("model: embedded\nhttp-port: x", "line 2: http-port must be of type int, is 'x'"),
        ("model: embedded\nblock-size: 0", "line 2: block-size must be at least 1, is 0"),
    ],
)
def test_serve_refuses_what_it_has_no_use_for(
    file: Path, served: list[Any], text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert cli.main(["serve", "--config", str(file)]) == 2
    assert problem in capsys.readouterr().err
    assert not served
