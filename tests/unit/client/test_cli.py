"""What `tandem generate` makes of its flags."""

from pathlib import Path
from typing import Any

import pytest

from tandem import cli
from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The params of the requests that the command sends."""
    params: list[SamplingParams] = []
    monkeypatch.setattr(cli, "stream_text", lambda client, prompt, each: params.append(each) or "")
    return params


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
def test_flags_become_params(sent: list[SamplingParams], flags: list[str], expected: dict[str, Any]) -> None:
    assert cli.main(["generate", "text", *flags]) == 0
    assert sent == [SamplingParams(stop=(), **expected)]


def test_a_schema_is_read_from_its_file(
    sent: list[SamplingParams], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    assert cli.main(["generate", "text", "--json-schema", str(file)]) == 2
    assert "--json-schema" in capsys.readouterr().err
    file.write_text('{"const": "é"}', encoding="utf-8")
    assert cli.main(["generate", "text", "--json-schema", str(file)]) == 0
    assert sent[0].structured_outputs == StructuredOutput(json='{"const": "é"}')


def test_a_wrong_value_ends_the_command_with_its_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "text", "--min-tokens", "200"]) == 1
    assert "min_tokens: must be at most max_tokens" in capsys.readouterr().err
