"""Offline use: both services as children of this process, behind one object."""

import tempfile
import threading
from collections.abc import Sequence

from tandem.client import PendingReply, Prompt, TandemClient
from tandem.processes import ServiceFailed, Services
from tandem.sampling_params import SamplingParams
from tandem.v1 import inference_pb2
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.settings import split_keywords

MAX_CONCURRENT_REQUESTS = 256
STARTUP_TIMEOUT_S = 600.0


class LLM:
    """A model to generate with. Use it as a context manager, or close() it: that stops the services. On Linux they
    also stop with the thread that made this object.
    """

    def __init__(self, model: str = "embedded", **settings: object) -> None:
        """settings: fields of WorkerSettings and SchedulerSettings by name; an unknown one raises ConfigError.

        TANDEM_* variables are not read.
        """
        worker, scheduler = split_keywords({"model": model, "port": 0, **settings}, WorkerSettings, SchedulerSettings)
        # What the services log is shown only if they fail.
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
        self.client.close()
        try:
            self._services.stop()
        finally:
            self._log.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[inference_pb2.GenerateResponse]:
        """One reply a prompt, in their order. A prompt is text or token ids. An interrupt, or a prompt that fails,
        aborts the others.
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
