"""`tandem serve` as a process that the harness ends and starts again."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem_shared.rpc.health_probe import health_status
from tests.e2e.services import INFERENCE, REPOSITORY
from tests.e2e.waiting import wait_until


class Serve:
    """`tandem serve`, the parent of both services. When it is started again it listens at the same address."""

    def __init__(self, model: Path, flags: Sequence[str], log_file: Path) -> None:
        self._flags = [str(model), "--tokenizer", "embedded", "--dtype", "float64", "--num-threads", "1", *flags]
        self._log_file = log_file
        self._port = 0
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        with self._log_file.open("wb") as log:
            command = [sys.executable, "-m", "tandem.cli", "serve", *self._flags, "--port", str(self._port)]
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(lambda: self._find_port() or self.process.poll() is not None, "tandem serve listens")
        assert self.process.poll() is None, self._log_file.read_text()[-4000:]
        wait_until(lambda: health_status(self.address, INFERENCE) == "SERVING", "tandem serve is ready")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        print(self._log_file.read_text())

    def _find_port(self) -> bool:
        found = re.search(r"tandem serve: listening on 127\.0\.0\.1:(\d+)\n", self._log_file.read_text())
        self._port = int(found[1]) if found else self._port
        return found is not None
