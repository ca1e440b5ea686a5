"""Services under load that a real Prometheus scrapes, and what their clients count of it."""

import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai

from tandem.v1 import inference_pb2
from tests.e2e.gateway import GatewayProcess
from tests.e2e.services import Engine, free_port
from tests.e2e.waiting import WAIT_S, wait_until
from tools.prometheus import Prometheus

MAX_NUM_SEQS = 6
# Few enough that sequences are preempted, and enough for any of them alone.
NUM_BLOCKS = 24
# Enough for the clients of a Load, as preempted sequences wait too.
MAX_NUM_WAITING = 8
PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"


@dataclass(frozen=True)
class Answer:
    """What a client saw of a request. Times are seconds from the call."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    first_token_s: float
    all_s: float


class Site:
    """A worker, a scheduler, a gateway and Prometheus; and the load."""

    def __init__(self, folder: Path) -> None:
        self._open = contextlib.ExitStack()
        try:
            self._start(folder)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path) -> None:
        metrics_port, worker_port = free_port(), free_port()
        limits = ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-waiting", str(MAX_NUM_WAITING)]
        self.engine = Engine(
            "embedded",
            dtype="float32",
            worker_flags=["--metrics-port", str(worker_port), "--num-blocks", str(NUM_BLOCKS)],
            scheduler_flags=["--metrics-port", str(metrics_port), *limits],
        )
        self._open.callback(self.engine.close)
        self.gateway = GatewayProcess(self.engine.scheduler.address, folder)
        self._open.callback(self.gateway.kill)
        ports = {"scheduler": metrics_port, "worker": worker_port, "gateway": self.gateway.port}
        self.prometheus = Prometheus(folder, {name: f"127.0.0.1:{port}" for name, port in ports.items()})
        self._open.callback(self.prometheus.close)
        wait_until(lambda: self.prometheus.value("up") == len(ports), "Prometheus scrapes all services")

    def close(self) -> None:
        self._open.close()

    def kill_worker(self) -> None:
        """Kills the process that serves. Its supervisor starts another."""
        self.engine.worker.serving().kill()

    def stream(self, source: random.Random) -> Answer:
        """A request by gRPC or by HTTP."""
        ask = self._stream_http if source.random() < 0.3 else self._stream_grpc
        return ask(PROMPT * source.randint(1, 3) + str(source.randrange(4)), source.randint(30, 120))

    def _stream_grpc(self, prompt: str, max_tokens: int) -> Answer:
        started, first, usage = time.monotonic(), None, None
        call = self.engine.inference.GenerateStream(grpc_request(prompt, max_tokens), timeout=2 * WAIT_S)
        for message in call:
            if first is None and message.token_ids:
                first = time.monotonic() - started
            if message.HasField("usage"):
                usage = message.usage
        assert first is not None and usage is not None
        counts = (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens)
        return Answer(*counts, first, time.monotonic() - started)

    def _stream_http(self, prompt: str, max_tokens: int) -> Answer:
        started, first, usage = time.monotonic(), None, None
        client = openai.OpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0, timeout=2 * WAIT_S)
        with client:
            stream = client.completions.create(
                model="embedded",
                prompt=prompt,
                max_tokens=max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                if first is None and chunk.choices:
                    first = time.monotonic() - started
                usage = chunk.usage or usage
        assert first is not None and usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return Answer(usage.prompt_tokens, cached, usage.completion_tokens, first, time.monotonic() - started)


class Load:
    """Clients that ask one request after the other until they are told to stop."""

    def __init__(self, site: Site, num_clients: int = MAX_NUM_SEQS + 2) -> None:
        self._site = site
        self._is_over = threading.Event()
        self.answers: list[Answer] = []
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        source = random.Random(seed)
        try:
            while not self._is_over.is_set():
                self.answers.append(self._site.stream(source))
        except BaseException as error:
            self.errors.append(error)

    def wait_answers(self, count: int) -> None:
        """Waits for so many further ones."""
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal or bool(self.errors), f"{goal} answers", 3 * WAIT_S)
        assert not self.errors, self.errors

    def end(self) -> list[Answer]:
        self._is_over.set()
        for thread in self._threads:
            thread.join(3 * WAIT_S)
            assert not thread.is_alive(), "a request did not end"
        assert not self.errors, self.errors
        return self.answers


@contextlib.contextmanager
def observed_site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="tandem-observed-") as folder:
        site = Site(Path(folder))
        try:
            yield site
        finally:
            site.close()


def grpc_request(prompt: str, max_tokens: int) -> inference_pb2.GenerateStreamRequest:
    return inference_pb2.GenerateStreamRequest(
        prompt=inference_pb2.Prompt(text=prompt),
        stopping=inference_pb2.StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
    )
