"""What `tandem` makes of its flags."""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem import cli
from tandem.chat import Chat
from tandem.commands import generate
from tandem.commands.serve_http import read_http_flags
from tandem.commands.service_flags import add_service_flags, read_service_flags
from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput
from tandem_shared import VERSION
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.options import spell_out_booleans


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, SamplingParams]]:
    """Prompts and params of the requests that the command sends."""
    calls: list[tuple[Any, SamplingParams]] = []
    monkeypatch.setattr(
        generate, "stream_text", lambda client, prompt, params, timeout_s: calls.append((prompt, params)) or ""
    )
    return calls


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"max_tokens": 128}),
        (["--min-tokens", "5", "--max-tokens", "9"], {"min_tokens": 5, "max_tokens": 9}),
        (["--presence-penalty", "-1.5", "--top-k", "-1"], {"presence_penalty": -1.5, "top_k": -1, "max_tokens": 128}),
        (["--regex", "a+"], {"max_tokens": 128, "structured_outputs": StructuredOutput(regex="a+")}),
        (
            ["--choice", "yes", "--choice", "no"],
            {"max_tokens": 128, "structured_outputs": StructuredOutput(choice=["yes", "no"])},
        ),
    ],
)
def test_flags_become_params(
    calls: list[tuple[Any, SamplingParams]], flags: list[str], expected: dict[str, Any]
) -> None:
    assert cli.main(["generate", "text", *flags]) == 0
    assert calls == [("text", SamplingParams(stop=(), **expected))]


def test_a_schema_is_read_from_its_file(
    calls: list[tuple[Any, SamplingParams]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    assert cli.main(["generate", "text", "--json-schema", str(file)]) == 2
    assert "--json-schema" in capsys.readouterr().err
    file.write_text('{"const": "é"}', encoding="utf-8")
    assert cli.main(["generate", "text", "--json-schema", str(file)]) == 0
    assert calls[0][1].structured_outputs == StructuredOutput(json='{"const": "é"}')


def test_a_wrong_value_ends_the_command_with_its_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "text", "--min-tokens", "200"]) == 1
    assert "min_tokens: must be at most max_tokens" in capsys.readouterr().err


def test_vllms_flags_are_those_of_the_settings() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_service_flags(parser)
    flags = (
        "--tensor-parallel-size 2 --enforce-eager --served-model-name mine --max-num-seqs=8 --no-enable-prefix-caching "
        "--num-gpu-blocks-override 99"
    )
    arguments = spell_out_booleans(flags.split(), WorkerSettings, SchedulerSettings)
    worker, scheduler = read_service_flags(parser.parse_args(arguments))
    assert worker == WorkerSettings(
        port=0, tp_size=2, enforce_eager=True, served_model_name="mine", max_num_seqs=8, num_blocks=99
    )
    assert scheduler == SchedulerSettings(served_model_name="mine", max_num_seqs=8, enable_prefix_caching=False)


def test_a_command_line_of_vllms_for_qwen3_can_be_kept() -> None:
    line = (
        "serve Qwen/Qwen3-0.6B --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 -tp 2 "
        "--trust-remote-code --enable-chunked-prefill --max-model-len 4096 --gpu-memory-utilization 0.9"
    )
    options = cli.build_parser().parse_args(line.split())
    worker, scheduler = read_service_flags(options)
    assert (worker.tp_size, worker.max_model_len, worker.gpu_memory_utilization) == (2, 4096, 0.9)
    gateway = read_http_flags(options, {"TANDEM_HTTP_PORT": "0"}, scheduler)
    assert gateway is None and options.reasoning_parser == "qwen3"
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["serve", "embedded", "--tool-call-parser", "mistral"])


def test_a_boolean_flag_keeps_the_value_that_follows_it() -> None:
    arguments = ["serve", "--enforce-eager", "false", "--enforce-eager", "folder", "--enforce-eager=False", "true"]
    expected = ["serve", "--enforce-eager", "false", "--enforce-eager=true", "folder", "--enforce-eager=False", "true"]
    assert spell_out_booleans(arguments, WorkerSettings) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_prompt_may_come_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], calls: list[tuple[Any, SamplingParams]]
) -> None:
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("line\nline\n"))
        assert cli.main(["generate", *arguments]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("who?"))
    assert cli.main(["generate", "--chat", "--system", "be brief"]) == 0
    chat = Chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}])
    assert [prompt for prompt, _ in calls] == ["line\nline\n", "line\nline\n", chat]
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert cli.main(["generate"]) == 2
    assert "give a prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--ca", "/no/such/file"], "--ca: "),
        (["--client-cert", "x"], "--client-cert and --client-key go together"),
        (["--client-cert", "x", "--client-key", "y"], "--client-cert needs --tls or --ca"),
        (["--system", "x"], "--system needs --chat"),
        (["--timeout-s", "0"], "--timeout-s must be above 0, is 0.0"),
    ],
)
def test_flags_that_make_no_sense_are_named(
    calls: list[tuple[Any, SamplingParams]], flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "x", *flags]) == 2
    assert problem in capsys.readouterr().err
    assert not calls


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tandem {VERSION}\n"


class BlockingError(grpc.RpcError):
    """What the blocking client raises, as far as the command reads it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


def asyncio_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize("make", [BlockingError, asyncio_error])
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_errors_of_both_clients_are_told_by_their_details(
    make: Any, code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise make(code, "nobody there")

    monkeypatch.setattr(generate, "stream_text", fail)
    assert cli.main(["generate", "text"]) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "tandem generate: nobody there" and len(rest) == (code == grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--base-url 127.0.0.1:8000", "--base-url must be"),
        ("--base-url http://", "--base-url must be"),
        ("--base-url http://[::1", "--base-url must be"),
        ("--base-url http://h:70000", "--base-url must be"),
        ("--base-url http://h --endpoint v1/completions", "--endpoint must begin with /"),
        ("--base-url http://h --backend openai-chat --endpoint /v1/completions", "does not go with"),
        ("--base-url http://h --backend vllm --endpoint /v1/chat/completions", "does not go with"),
        ("--backend openai-chat", "need --base-url"),
    ],
)
def test_bench_names_a_wrong_server(flags: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *flags.split()]) == 2
    assert problem in capsys.readouterr().err
