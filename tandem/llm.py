"""Use without a server: LLM runs both services as child processes and sends them requests."""

import tempfile
import threading
from collections.abc import Sequence

from tandem.client import PendingReply, Prompt, TandemClient
from tandem.processes import ServiceFailed, Services
from tandem.sampling_params import SamplingParams
from tandem.v1 import inference_pb2
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.options import split_keywords

MAX_CONCURRENT_REQUESTS = 256
STARTUP_TIMEOUT_S = 600.0


class LLM:
    """A model to generate with. Leaving it as a context manager, or close(), stops the services. On Linux they also
    stop when the thread that made this object ends.
    """

    def __init__(self, model: str = "embedded", **settings: object) -> None:
        """model is a folder, a hub id, or "embedded" for the package's own model. settings are fields of WorkerSettings
        and SchedulerSettings, by name; environment variables are not read.

        Raises ConfigError for an unknown setting, and where the extra tandem-llm[worker] is not installed. Raises
        ServiceFailed, with what the services logged, if they do not start.
        """
        worker, scheduler = split_keywords({"model": model, "port": 0, **settings}, WorkerSettings, SchedulerSettings)
        # The services log to this file, which is shown only if they fail.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
        self._services = Services(worker, scheduler, self._log)
        try:
            self._services.__enter__()
            self._services.wait_until_ready(STARTUP_TIMEOUT_S)
        except BaseException as error:
            self._services.stop()
            self._log.seek(0)
            log = self._log.read()
            self._log.close()
            if isinstance(error, ServiceFailed):
                raise ServiceFailed(f"{error}\n{log}") from error
            raise
        self.client = TandemClient(self._services.address)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the services."""
        self.client.close()
        try:
            self._services.stop()
        finally:
            self._log.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[inference_pb2.GenerateResponse]:
        """Returns one reply for each prompt, in the order of the prompts. A prompt is text or a sequence of token ids.
        If one fails, or at an interrupt, all others are aborted.
        """
        is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        every: Sequence[Prompt] = [prompts] if is_one else prompts  # type: ignore[list-item, assignment]
        free_places = threading.Semaphore(MAX_CONCURRENT_REQUESTS)
        pending: list[PendingReply] = []
        try:
            for prompt in every:
                free_places.acquire()
                pending.append(self.client.start_generate(prompt, params))
                pending[-1].add_done_callback(free_places.release)
            return [each.result() for each in pending]
        finally:
            for each in pending:
                each.cancel()
