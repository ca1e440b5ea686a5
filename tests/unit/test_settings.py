"""Settings: flags, environment variables, and what is refused."""

import os
import subprocess
import sys

import pytest

from shared.config import SchedulerSettings, WorkerSettings, read_command_line
from shared.settings import to_arguments


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
    settings = WorkerSettings(block_size=3, num_blocks=7, dtype="float64", kv_cache_memory_gib=0.25)
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


@pytest.mark.parametrize("module", ["worker_service", "scheduler_service"])
def test_help_says_units_defaults_and_variables(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert "token budget" in text or "tokens in a step" in text
    assert "in tokens; default 8192; environment TANDEM_MAX_NUM_BATCHED_TOKENS" in text
