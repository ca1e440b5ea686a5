"""Models by name: the real client of the hub, against a hub in this process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem_shared.model_folder import resolve_model
from tests.support.fake_hub import COMMITS, REPOSITORY, FakeHub

PATHS = os.pathsep.join(sys.path)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    folder = resolve_model("embedded", [])
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with FakeHub({**files, "pytorch_model.bin": b"not wanted"}) as hub:
        yield hub


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {**environment, "PYTHONPATH": PATHS}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


RESOLVE = f"""
from tandem_shared.errors import ModelError
from tandem_shared.model_folder import ALL_FILES, resolve_model
for revision in ("", "v1", "v2"):
    try:
        print(resolve_model("{REPOSITORY}", ALL_FILES, revision))
    except ModelError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_a_revision_is_downloaded_once_and_the_cache_does_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    done = run(RESOLVE, hub.environment(tmp_path))
    assert done.returncode == 0, done.stderr
    main, v1, v2 = done.stdout.splitlines()
    for path, revision in ((main, "main"), (v1, "v1")):
        assert path.endswith(f"/models--tandem-tests--tiny/snapshots/{COMMITS[revision]}")
        held = {each.name: each.read_bytes() for each in Path(path).iterdir()}
        assert "model.safetensors" in held and "tokenizer.json" in held
        assert held == {name: hub.files[name] for name in held} and "pytorch_model.bin" not in held
    assert v2.startswith(f"ModelError {REPOSITORY}: ") and "v2" in v2
    assert "Fetching" in done.stderr or "model.safetensors" in done.stderr
    num_downloads = len(hub.downloads)
    hub.close()
    again = run(RESOLVE, hub.environment(tmp_path))
    assert again.stdout.splitlines()[:2] == [main, v1], again.stderr
    assert again.stdout.splitlines()[2].startswith("ModelError")
    assert len(hub.downloads) == num_downloads


GENERATE = f"""
from tandem import LLM, ModelError, SamplingParams
with LLM("{REPOSITORY}", revision="v1") as llm:
    print(llm.client.model_info().model, len(llm.generate("ROMEO:", SamplingParams(max_tokens=3))[0]["token_ids"]))
"""


@pytest.mark.slow
def test_llm_shows_the_download_and_serves_the_model_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
    done = run(GENERATE, hub.environment(tmp_path))
    assert (done.returncode, done.stdout) == (0, "tiny 3\n"), done.stderr
    assert "%" in done.stderr.partition("prompts")[0]
