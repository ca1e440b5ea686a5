"""Settings: flags, environment variables, and what is refused."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem import cli
from tandem_shared.config import SchedulerSettings, WorkerSettings, model_name, read_command_line
from tandem_shared.errors import ConfigError
from tandem_shared.options import refuse_unknown_variables, to_arguments, variable_of


def read(*arguments: str) -> WorkerSettings:
    return read_command_line(WorkerSettings, "tandem-worker", "Tests.", arguments)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TANDEM_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    assert read() == WorkerSettings()


def test_flags_and_variables_and_who_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BLOCK_SIZE", "32")
    monkeypatch.setenv("TANDEM_MAX_MODEL_LEN", "100")
    settings = read("--block-size", "64", "--gpu-memory-utilization", "0.5")
    assert (settings.block_size, settings.max_model_len, settings.gpu_memory_utilization) == (64, 100, 0.5)


def test_settings_go_to_a_child_process_and_come_back_equal() -> None:
    settings = WorkerSettings(
        block_size=3, num_blocks=7, dtype="float64", kv_cache_memory_gib=0.25, served_model_name="-a --b=c"
    )
    assert read(*to_arguments(settings)) == settings
    scheduler = SchedulerSettings(enable_prefix_caching=False, max_chunk_tokens=5, worker_wait_s=1.5)
    arguments = to_arguments(scheduler)
    assert read_command_line(SchedulerSettings, "tandem-scheduler", "Tests.", arguments) == scheduler


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--block-size", "0"], "--block-size must be at least 1, is 0"),
        (["--block-size", "many"], "--block-size must be of type int, is 'many'"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization must be at most 1.0, is 1.5"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization must be at least 0.05, is nan"),
        (["--dtype", "float8"], "--dtype must be one of auto, float64, float32, bfloat16, is 'float8'"),
        (["--port", "70000"], "--port must be at most 65535, is 70000"),
        (["--tls-cert", "a.pem"], "--tls-cert and --tls-key go together"),
        (["--no-such-flag", "1"], "unrecognized arguments: --no-such-flag"),
        (["--block", "16"], "unrecognized arguments: --block"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_and_says_what(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*arguments)
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("TANDEM_BLOCK_SIZE", "x", "TANDEM_BLOCK_SIZE must be of type int, is 'x'"),
        ("TANDEM_BLOCKSIZE", "16", "unknown environment variable TANDEM_BLOCKSIZE; did you mean TANDEM_BLOCK_SIZE?"),
    ],
)
def test_a_wrong_variable_ends_with_status_2_and_says_what(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        read()
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_variable_of_the_other_service_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_WORKER_WAIT_S", "5")
    assert read() == WorkerSettings()


@pytest.mark.parametrize("module", ["tandem_worker", "tandem_scheduler"])
def test_help_says_units_defaults_and_variables(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert "most tokens that a step computes [in tokens;" in text
    assert "in tokens; default 8192; environment TANDEM_MAX_NUM_BATCHED_TOKENS" in text


KUBERNETES = {
    "TANDEM_SERVICE_HOST": "10.96.7.7",
    "TANDEM_SERVICE_PORT": "50051",
    "TANDEM_SERVICE_PORT_GRPC": "50051",
    "TANDEM_PORT": "tcp://10.96.7.7:50051",
    "TANDEM_PORT_50051_TCP": "tcp://10.96.7.7:50051",
    "TANDEM_PORT_50051_TCP_PROTO": "tcp",
    "TANDEM_PORT_50051_TCP_PORT": "50051",
    "TANDEM_PORT_50051_TCP_ADDR": "10.96.7.7",
    "TANDEM_WORKER_SERVICE_HOST": "10.96.7.8",
    "TANDEM_WORKER_PORT": "udp://[fd00::8]:50052",
    "TANDEM_WORKER_PORT_50052_UDP_ADDR": "fd00::8",
}
"""The variables of a container in a namespace that has Services named tandem and tandem-worker."""


def test_kubernetes_variables_of_a_service_named_tandem_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert read() == WorkerSettings()
    assert read_command_line(SchedulerSettings, "tandem-scheduler", "Tests.", []) == SchedulerSettings()


def test_no_setting_is_called_as_kubernetes_calls_its_variables() -> None:
    for settings_class in (SchedulerSettings, WorkerSettings):
        for field in dataclasses.fields(settings_class):
            environment = {variable_of(field.name): "true"}
            with pytest.raises(ConfigError, match="unknown"):
                refuse_unknown_variables(environment, [])


@pytest.mark.parametrize("name", ["TANDEM_PROT", "TANDEM_SERVICE", "TANDEM_SERVICE_HOSTS", "TANDEM_PORT_50051"])
def test_what_only_looks_like_them_is_a_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "tcp://10.96.7.7:50051")
    with pytest.raises(SystemExit):
        read()


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUM_BLOCKS", "HOST", "MODEL", "ENFORCE_EAGER", "DTYPE", "NO_SUCH_SETTING"):
        monkeypatch.setenv(f"TANDEM_{name}", "")
    assert read() == WorkerSettings()
    assert read("--num-blocks", "7").num_blocks == 7


@pytest.mark.parametrize(
    ("flag", "value", "most"),
    [
        ("--kv-cache-memory-gib", "inf", 2**31 - 1),
        ("--kv-cache-memory-gib", "1e300", 2**31 - 1),
        ("--num-blocks", "9" * 30, 2**31 - 1),
        ("--max-num-batched-tokens", str(2**31), 2**31 - 1),
        ("--max-num-seqs", str(10**12), 65536),
        ("--num-threads", str(10**20), 4096),
    ],
)
def test_a_number_beyond_all_measure_is_refused(
    flag: str, value: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(flag, value)
    assert f"{flag} must be at most {most}, is {value}" in capsys.readouterr().err


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("embedded", "embedded"),
        ("Qwen/Qwen3-8B", "Qwen3-8B"),
        ("/models/Qwen3-8B", "Qwen3-8B"),
        ("./models/Qwen3-8B/", "Qwen3-8B"),
        ("Qwen3-8B/.", "Qwen3-8B"),
        (f"/cache/models--Qwen--Qwen3-8B/snapshots/{COMMIT}", "Qwen3-8B"),
        (f"/cache/models--Qwen--Qwen3-8B/snapshots/{COMMIT}/", "Qwen3-8B"),
        (f"/cache/models--gpt2/snapshots/{COMMIT}", "gpt2"),
        # Not the hub's cache: whoever made such a folder meant its name.
        (f"/models/{COMMIT}", COMMIT),
        ("/cache/models--Qwen--Qwen3-8B/snapshots/mine", "mine"),
    ],
)
def test_a_model_is_named_by_its_repository_or_folder(model: str, name: str) -> None:
    assert model_name(WorkerSettings(model=model)) == name
    assert model_name(WorkerSettings(model=model, served_model_name="mine")) == "mine"


def test_dots_are_named_by_the_folder_that_they_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Qwen3-8B"
    (folder / "inner").mkdir(parents=True)
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for here, model, name in [
        (folder, ".", "Qwen3-8B"),
        (folder, "./", "Qwen3-8B"),
        (folder / "inner", "..", "Qwen3-8B"),
        (folder, "inner/..", "Qwen3-8B"),
        (snapshot, ".", "Qwen3-0.6B"),
        (snapshot.parent, COMMIT, "Qwen3-0.6B"),
    ]:
        monkeypatch.chdir(here)
        assert model_name(WorkerSettings(model=model)) == name


@pytest.mark.parametrize("flag", ["--record", "--port-file"])
def test_a_file_that_can_not_be_written_is_refused_at_start(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("old")
    for path, problem in (
        (tmp_path / "missing" / "file", f"there is no folder {tmp_path / 'missing'}"),
        (tmp_path / "there" / "file", f"there is no folder {tmp_path / 'there'}"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(SystemExit):
            read_command_line(SchedulerSettings, "tandem-scheduler", "Tests.", [flag, str(path)])
        assert capsys.readouterr().err == f"tandem-scheduler: {flag} {path}: {problem}\n"
    for name in ("new", "there"):
        read_command_line(SchedulerSettings, "tandem-scheduler", "Tests.", [flag, str(tmp_path / name)])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "old"


def test_tandem_serve_refuses_a_recording_that_can_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "embedded", "--port", "0", "--record", str(tmp_path / "missing" / "file")]) == 2
    assert "--record" in capsys.readouterr().err
