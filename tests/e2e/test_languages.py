"""The examples in other languages, built and run as their READMEs say, on copies of their folders.

With real services they print what the Python client gets. A scheduler that holds its answer back shows that they print
each delta when it comes, and that Ctrl-C cancels the call.
"""

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tandem import Chat, SamplingParams, TandemClient
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import StartEngine
from tests.e2e.gateway import GatewayProcess
from tests.e2e.services import REPOSITORY, Engine
from tests.e2e.waiting import WAIT_S
from tests.support.programs import require_programs

QUESTIONS = ["Who are you?", "Tell me of Zürich, \"the moon\" and 'love'."]
GREEDY = SamplingParams(temperature=0, max_tokens=128)
"""What the examples ask for."""
DELTA = "Once"
NOBODY = "127.0.0.1:1"
"""An address where nothing listens."""
BUILD_TIMEOUT_S = 240
CACHES = REPOSITORY / "build"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Language:
    """An example's folder, the programs that it needs, and which of its README's blocks build it here. The last block
    runs it.
    """

    folder: str
    programs: tuple[str, ...]
    build_blocks: tuple[int, ...]
    is_http: bool = False


LANGUAGES = [
    Language("typescript", ("node", "npm", "protoc"), (0,)),
    Language("go", ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"), (0, 2)),
    Language("node", ("node", "npm"), (0,), is_http=True),
]


class Example:
    """A built example."""

    def __init__(self, language: Language, folder: Path) -> None:
        shutil.copytree(REPOSITORY / "protos", folder / "protos")
        kept = shutil.ignore_patterns("node_modules", "dist", "build", "tandem")
        self._folder = shutil.copytree(
            REPOSITORY / "examples" / language.folder, folder / "examples" / language.folder, ignore=kept
        )
        self.is_http = language.is_http
        blocks = (self._folder / "README.md").read_text().split("\n```\n")[1::2]
        caches = {"npm_config_cache": str(CACHES / "npm"), "GOCACHE": str(CACHES / "go")}
        for block in language.build_blocks:
            built = subprocess.run(
                ["bash", "-euc", blocks[block]],
                cwd=self._folder,
                env={**os.environ, **caches},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=BUILD_TIMEOUT_S,
            )
            assert built.returncode == 0, built.stdout
        self._command = shlex.split(blocks[-1])[:-2]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._command, *arguments], cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """The exit status, and what was printed to stdout and stderr."""
        with self.start(*arguments) as process:
            try:
                output, errors = process.communicate(timeout=WAIT_S)
            finally:
                process.kill()
        return process.returncode, output, errors


@pytest.fixture(scope="module", params=LANGUAGES, ids=lambda language: language.folder)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    require_programs(*request.param.programs)
    return Example(request.param, tmp_path_factory.mktemp("languages"))


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine("embedded", dtype="float32")


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(engine.scheduler.address, tmp_path_factory.mktemp("gateway"))
    yield gateway
    gateway.kill()
    print(gateway.log_file.read_text())


@pytest.fixture
def server(example: Example, engine: Engine, gateway: GatewayProcess) -> str:
    """What the example wants as its first argument."""
    return f"{gateway.url}/v1" if example.is_http else engine.scheduler.address


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_chat_is_what_the_python_client_gets(example: Example, engine: Engine, server: str, question: str) -> None:
    with TandemClient(engine.scheduler.address) as client:
        messages = list(client.generate_stream(Chat([{"role": "user", "content": question}]), GREEDY))
    truth = "".join(message.text_delta for message in messages)
    reason = inference_pb2.FinishReason.Name(messages[-1].finish.reason).removeprefix("FINISH_REASON_")
    status, output, errors = example.run(server, question)
    assert (status, output, errors.strip().upper()) == (0, truth, f"[{reason}]")
    assert truth


def test_errors_are_told(example: Example, server: str) -> None:
    status, output, errors = example.run(server, "why " * 20_000)
    assert (status, output) == (1, "")
    assert "prompt.chat" in errors and ("400" if example.is_http else "InvalidArgument") in errors
    status, output, errors = example.run(f"http://{NOBODY}/v1" if example.is_http else NOBODY, "Hello")
    assert (status, output) == (1, "") and ("Connection error" if example.is_http else "Unavailable") in errors
    status, output, errors = example.run(server)
    assert (status, output) == (2, "") and errors.startswith("usage: ")


class HoldingScheduler(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with one delta, then holds the rest back until the call ends."""

    def __init__(self) -> None:
        self.call_ended = threading.Event()

    def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(model="held", max_model_len=1024, has_chat_template=True)

    def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateStreamResponse]:
        context.add_callback(self.call_ended.set)
        yield inference_pb2.GenerateStreamResponse(text_delta=DELTA, token_ids=[1])
        self.call_ended.wait()


def test_deltas_are_printed_as_they_come_and_ctrl_c_cancels(example: Example, tmp_path: Path) -> None:
    scheduler = HoldingScheduler()
    server = grpc.server(ThreadPoolExecutor())
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(scheduler, server)
    with ExitStack() as stack:
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        stack.callback(server.stop, grace=None)
        if example.is_http:
            gateway = GatewayProcess(address, tmp_path)
            stack.callback(gateway.kill)
            address = f"{gateway.url}/v1"
        process = stack.enter_context(example.start(address, "Hello"))
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.read(len(DELTA)) == DELTA
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 130
        assert scheduler.call_ended.wait(WAIT_S)
