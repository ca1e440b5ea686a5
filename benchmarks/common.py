"""What the benchmarks share: services to measure, requests to send them, and the head of a results file.

The services are processes of their own and are talked to over gRPC alone; nothing here knows torch.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import grpc

from benchmarks.workloads import Workload
from tandem.client import TandemClient
from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem.processes import Services
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.model_folder import ALL_FILES, resolve_model
from tandem_shared.options import split_keywords
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.session_secret import SECRET_METADATA_KEY, read_secret
from tandem_shared.step_codec import PROTOCOL_VERSION
from tandem_shared.step_plan import WorkerInfo

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
STARTUP_TIMEOUT_S = 900.0
VERSIONS = ("grpcio", "numpy", "torch", "triton")
COUNTERS = ("num_steps", "num_preemptions", "num_cached_prompt_tokens", "num_overshoot_tokens")
SHAPES = {(1024, 28): "0.6b", (4096, 36): "8b", (5120, 64): "32b"}
"""The name of a shape by hidden_size and num_hidden_layers."""

# Every field is set: a checkpoint's own defaults must not change what is measured.
SAMPLINGS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "qwen3": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0},
}


Report = dict[str, Any]
"""What a results file holds."""
Key = TypeVar("Key", bound=Hashable)


class BenchmarkError(Exception):
    """A run that did not measure what was asked for."""


@dataclass(frozen=True)
class Engine:
    """Running services that are ready, and a client of them."""

    services: Services
    client: TandemClient
    vocab_size: int
    description: dict[str, Any]

    def counters(self) -> dict[str, int]:
        load = self.client.load()
        return {name: getattr(load, name) for name in COUNTERS}


@contextlib.contextmanager
def running_engine(
    arguments: argparse.Namespace,
    worker_program: Sequence[str] = ("tandem_worker",),
    gateway: GatewaySettings | None = None,
) -> Iterator[Engine]:
    """A scheduler and a worker with the settings of add_engine_options. worker_program, gateway: as Services takes
    them.
    """
    given = {"model": arguments.model, "port": 0, "log_level": "warning", **dict(arguments.set)}
    worker, scheduler = split_keywords(given, WorkerSettings, SchedulerSettings)
    started = time.monotonic()
    with Services(worker, scheduler, worker_program=worker_program, gateway=gateway) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        startup_s = time.monotonic() - started
        with (
            TandemClient(services.address) as client,
            grpc.insecure_channel(services.worker_address, CHANNEL_OPTIONS) as channel,
        ):
            secret = read_secret(services.session_secret_file)
            info = worker_pb2_grpc.WorkerServiceStub(channel).GetWorkerInfo(
                worker_pb2.GetWorkerInfoRequest(), metadata=((SECRET_METADATA_KEY, secret),)
            )
            description = {
                "device": info.device,
                "model": Path(arguments.model).name,
                "shape": shape_of(arguments.model),
                "dtype": info.dtype,
                "max_model_len": info.max_model_len,
                "num_blocks": info.num_blocks,
                "block_size_tokens": info.block_size_tokens,
                "startup_s": round(startup_s, 2),
                "settings": dict(arguments.set),
            }
            yield Engine(services, client, info.vocab_size, description)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder, or 'embedded'")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of either service"
    )
    parser.add_argument("--sampling", choices=SAMPLINGS, default="temperature")
    parser.add_argument("--scale", type=int, default=1, help="divides numbers of sequences and tokens")
    parser.add_argument("--connections", type=int, default=8, help="connections of the client that sends unary calls")
    parser.add_argument("--commit", help="the commit that is measured; git is asked by default")


def setting(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE: max_num_seqs=128 gives ('max_num_seqs', 128)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    with contextlib.suppress(json.JSONDecodeError):
        return name, json.loads(value)
    return name, value


def shape_of(model: str) -> str | None:
    config = json.loads((resolve_model(model, ALL_FILES) / "config.json").read_text())
    return SHAPES.get((config["hidden_size"], config["num_hidden_layers"]))


def request_fields(workload: Workload, sampling: str) -> list[dict[str, Any]]:
    """The fields of a GenerateRequest or GenerateStreamRequest for each sequence. Each batch has a cache salt of its
    own.
    """
    salt = uuid.uuid4().hex
    return [
        {
            "prompt": inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=prompt)),
            "sampling": inference_pb2.SamplingParams(**SAMPLINGS[sampling], seed=seed),  # type: ignore[arg-type]
            "stopping": inference_pb2.StoppingCriteria(max_tokens=length, ignore_eos=True),
            "cache_salt": salt,
        }
        for seed, (prompt, length) in enumerate(zip(*workload, strict=True))
    ]


def check_usage(usage: inference_pb2.Usage, num_tokens: int, asked: int) -> None:
    if usage.num_cached_tokens:
        raise BenchmarkError(f"{usage.num_cached_tokens} prompt tokens came from the prefix cache")
    if not num_tokens == usage.num_output_tokens == asked:
        raise BenchmarkError(f"asked for {asked} tokens, got {num_tokens}, usage says {usage.num_output_tokens}")


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel with its own connection, as the kernel deals out connections to the server's processes."""
    return grpc.aio.insecure_channel(address, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


class UnaryClient:
    """Sends whole batches at once through Generate, over a few connections. An async context manager."""

    def __init__(self, address: str, connections: int, sampling: str) -> None:
        self._channels = [open_channel(address) for _ in range(connections)]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._sampling = sampling

    async def __aenter__(self) -> "UnaryClient":
        for channel in self._channels:
            await channel.channel_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def seconds(self, workload: Workload) -> float:
        """Sends a batch. Returns the seconds from just before the first call is sent until the last reply is parsed."""
        return (await self.timed_replies(workload))[0]

    async def timed_replies(
        self, workload: Workload, **fields: Any
    ) -> tuple[float, list[inference_pb2.GenerateResponse]]:
        """Like seconds(), with the replies. fields: further fields of every request."""
        given = [one | fields for one in request_fields(workload, self._sampling)]
        requests = [inference_pb2.GenerateRequest(**one) for one in given]
        started = time.perf_counter()
        calls = [self._stubs[i % len(self._stubs)].Generate(request) for i, request in enumerate(requests)]
        replies = [await call for call in calls]
        elapsed = time.perf_counter() - started
        for reply, asked in zip(replies, workload[1], strict=True):
            check_usage(reply.usage, len(reply.choices[0].token_ids), asked)
        return elapsed, replies


def modelless_worker(**fields: Any) -> WorkerInfo:
    """What a worker without a model says of itself. fields: WorkerInfo's. vocab_size, max_model_len, num_blocks and
    max_num_rows must be among them.
    """
    defaults = {
        "protocol_version": PROTOCOL_VERSION,
        "worker_instance_id": "modelless",
        "fingerprint": "modelless",
        "model": "embedded",
        "dtype": "none",
        # For a worker on a CPU the scheduler would cut prompts into chunks of about a second.
        "device": "none",
        "block_size": 16,
        "max_num_batched_tokens": 8192,
    }
    return WorkerInfo(**(defaults | fields))


def header(what: str, commit: str | None = None) -> dict[str, Any]:
    """The head of a results file: what, when, of which code, with which versions, on which CPU."""
    return {
        "what": what,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "is_dirty": None if commit else bool(git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpu_model(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in VERSIONS},
    }


def read_reports(folder: Path, pattern: str) -> list[tuple[str, Report]]:
    """The results files of a folder: their names, and what they hold."""
    return [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob(pattern))]


def newest(reports: Iterable[tuple[Key, Report]]) -> dict[Key, Report]:
    """The newest report of each key; the first of equally old ones."""
    found: dict[Key, Report] = {}
    for key, report in reports:
        if key not in found or report["date"] > found[key]["date"]:
            found[key] = report
    return found


def commit_in(report: Mapping[str, Any]) -> str:
    """The commit that was measured, as a short hash, with what else the report says of the tree; empty if it says
    nothing.
    """
    return re.sub(r"\b([0-9a-f]{7})[0-9a-f]+\b", r"\1", str(report.get("commit", "")))


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def git(*arguments: str) -> str:
    """The output of a git command; empty if there is no git or no repository."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    return ""


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
