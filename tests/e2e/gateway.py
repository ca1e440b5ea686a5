"""The HTTP gateway as a process, and outputs of real models that a test knows beforehand."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai

from tests.e2e.services import REPOSITORY
from tests.e2e.waiting import WAIT_S, wait_until


class GatewayProcess:
    """tandem-gateway before a scheduler."""

    def __init__(self, scheduler_address: str, folder: Path, *flags: str) -> None:
        """folder is for the file with the port, and the log."""
        self._asked = (scheduler_address, folder, *flags)
        port_file = folder / "gateway.port"
        port_file.unlink(missing_ok=True)
        self.log_file = folder / "gateway.log"
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tandem_gateway", "--scheduler-address", scheduler_address, "--http-port", "0",
                 "--port-file", str(port_file), *flags],
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until(lambda: port_file.exists() or self.process.poll() is not None, "the gateway listens")
        assert self.process.poll() is None, self.log_file.read_text()
        self.port = int(port_file.read_text())
        self.url = f"http://127.0.0.1:{self.port}"

    def again(self) -> "GatewayProcess":
        """Another one with the same flags on the same port, once this one has ended."""
        return GatewayProcess(*self._asked, "--http-port", str(self.port))

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def stop(self) -> int:
        """Ends it as a service is ended; returns its exit status."""
        self.process.terminate()
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


def forced(text: str) -> dict[str, Any]:
    """Fields of a chat whose output is this text, with its tags as tokens: a model can be forced to say anything."""
    parts = [part for part in re.split(r"(</?(?:think|tool_call)>)", text) if part]
    tags = re.compile(r"</?(?:think|tool_call)>")
    rule = " ".join(part if tags.fullmatch(part) else json.dumps(part, ensure_ascii=False) for part in parts)
    # The template then says that there is no thought, so that the grammar applies from the start.
    return {"structured_outputs": {"grammar": f"start: {rule}"}, "chat_template_kwargs": {"enable_thinking": False}}
