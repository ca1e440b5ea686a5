"""The settings of both services, and the one way in which a command reads them. Names are vLLM's where it has them."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra
from tandem_shared.rpc.grpc_options import DEFAULT_MAX_REQUEST_BYTES, MAX_MESSAGE_BYTES
from tandem_shared.settings import add_options, option, read_settings, refuse_unknown_variables

MAX_PORT = 65535
STEP_TIMEOUT_S = 60.0
MAX_ROWS = 65536
_HUB_SNAPSHOT = re.compile(r"/models--(?:[^/]+--)?([^/]+)/snapshots/[0-9a-f]{40}$")
"""Where the hub's cache has a commit of a repository, OWNER--NAME or NAME alone."""


@dataclass(frozen=True)
class ServiceSettings:
    """What both services have."""

    model: str = option("embedded", "model folder, hub id, or 'embedded' for the small model inside the package")
    served_model_name: str = option("", "name that requests give; the folder's or hub id's last part if empty")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = option(0, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    port_file: str = option("", "file to write the bound port to, once it listens")
    tls_cert: str = option("", "PEM file of the server's certificate chain; with it, only TLS is spoken")
    tls_key: str = option("", "PEM file of the certificate's private key")
    tls_client_ca: str = option("", "PEM file of the authority that client certificates must come from")
    session_secret_file: str = option(
        "",
        "file with the secret that a scheduler shows its worker, the same for both; made where there is none",
    )
    step_timeout_s: float = option(
        STEP_TIMEOUT_S,
        "a step that does not get on for so long has failed (the worker ends), or its worker is lost",
        unit="seconds",
        minimum=0.1,
    )
    log_level: str = option("info", "least severe messages to log", choices=("debug", "info", "warning", "error"))


T = TypeVar("T", bound=ServiceSettings)


@dataclass(frozen=True)
class SchedulerSettings(ServiceSettings):
    """The scheduler service."""

    port: int = option(50051, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    worker_address: str = option("127.0.0.1:50052", "HOST:PORT of the worker service")
    worker_ca: str = option("", "PEM file of the authority of the worker's certificate; with it, TLS is spoken to it")
    worker_tls_cert: str = option("", "PEM file of the certificate chain that the scheduler shows to its worker")
    worker_tls_key: str = option("", "PEM file of that certificate's private key")
    tokenizer: str = option("", "folder with tokenizer.json; the model's if empty")
    max_num_seqs: int = option(256, "sequences running at once, at most", minimum=1, maximum=MAX_ROWS)
    max_num_batched_tokens: int = option(8192, "token budget of a step", unit="tokens", minimum=1)
    max_chunk_tokens: int | None = option(
        None, "prompt tokens of one sequence in one step, at most; the budget if none", unit="tokens", minimum=1
    )
    max_plans_in_flight: int = option(2, "step plans sent ahead of their results", minimum=1, maximum=4)
    max_num_waiting: int = option(4096, "sequences that wait for their first step, at most", minimum=1)
    max_num_waiting_tokens: int = option(
        2**22, "prompt tokens of sequences that wait for their first step, at most", unit="tokens", minimum=1
    )
    max_request_bytes: int = option(
        DEFAULT_MAX_REQUEST_BYTES,
        "size of a request, at most; the default holds a prompt of a million token ids",
        unit="bytes",
        minimum=1024,
        maximum=MAX_MESSAGE_BYTES,
    )
    enable_prefix_caching: bool = option(True, "reuse the KV of equal prompt prefixes (true or false)")
    worker_wait_s: float = option(60.0, "how long requests wait for a lost worker", unit="seconds", minimum=0)
    api_server_count: int | None = option(
        None,
        "front-end processes beside the scheduler's own; 0 is none; a quarter of the CPUs, 4 at most, if not given, and"
        " 0 under 8 CPUs",
        minimum=0,
        maximum=64,
    )
    drain_grace_s: float = option(30.0, "how long running requests may go on after SIGTERM", unit="seconds", minimum=0)
    record: str = option("", "file to record the scheduler's events and plans in, for replay")


@dataclass(frozen=True)
class WorkerSettings(ServiceSettings):
    """The worker service."""

    port: int = option(50052, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    device: str = option(
        "auto", "where the model runs; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "type of weights and activations; auto is bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float64", "float32", "bfloat16"),
    )
    block_size: int = option(16, "KV block size", unit="tokens", minimum=1, maximum=1024)
    num_blocks: int | None = option(None, "KV blocks; measured if none", minimum=2)
    kv_cache_memory_gib: float = option(1.0, "KV pool on a CPU, where num_blocks is none", unit="GiB", minimum=0)
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory for weights, activations and KV pool", minimum=0.05, maximum=1.0
    )
    max_model_len: int | None = option(None, "context; the model's own if none", unit="tokens", minimum=1)
    max_num_seqs: int = option(256, "rows of the batch", minimum=1, maximum=MAX_ROWS)
    max_num_batched_tokens: int = option(8192, "tokens in a step, at most", unit="tokens", minimum=1)
    tp_size: int = option(1, "tensor-parallel size: processes that share the model, one a GPU", minimum=1, maximum=64)
    kernels: str = option(
        "auto",
        "what computes on a GPU: Triton kernels with cuBLAS, or plain torch; auto takes the kernels where they can run",
        choices=("auto", "triton", "torch"),
    )
    all_reduce: str = option(
        "auto",
        "how ranks on GPUs add up: auto is over peer memory where they reach each other's, else by NCCL; nccl always",
        choices=("auto", "nccl"),
    )
    enforce_eager: bool = option(False, "no CUDA graphs: every kernel is launched by itself (true or false)")
    num_threads: int | None = option(
        None, "CPU threads of a forward pass; torch's choice if none", minimum=1, maximum=4096
    )


def read_command_line(
    settings_class: type[T],
    program: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    extra: str | None = None,
) -> T:
    """Settings from the command line and the environment. Exits with status 2 and one line where they are wrong, or
    where the package's extra that the program needs is not installed.
    """
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add_options(parser, settings_class)
    namespace = parser.parse_args(arguments)
    try:
        refuse_unknown_variables(os.environ, (SchedulerSettings, WorkerSettings))
        settings = read_settings(settings_class, namespace, os.environ)
        check_tls(settings)
        if extra is not None:
            require_extra(extra)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    return settings


def check_tls(settings: ServiceSettings) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("--tls-cert and --tls-key go together")
    if settings.tls_client_ca and not settings.tls_cert:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if isinstance(settings, SchedulerSettings):
        if bool(settings.worker_tls_cert) != bool(settings.worker_tls_key):
            raise ConfigError("--worker-tls-cert and --worker-tls-key go together")
        if settings.worker_tls_cert and not settings.worker_ca:
            raise ConfigError("--worker-tls-cert needs --worker-ca")


def model_name(settings: ServiceSettings) -> str:
    """The name under which the model is served: the last part of the hub id or of the folder's path.

    A folder of the hub's cache is called after its commit, so it is named by its repository; one given as '.' or '..'
    by what it is called where it lies.
    """
    if settings.served_model_name:
        return settings.served_model_name
    path = PurePosixPath(settings.model)
    if path.name in ("", ".."):
        path = PurePosixPath(os.path.realpath(settings.model))
    snapshot = _HUB_SNAPSHOT.search(os.path.abspath(path))
    return snapshot[1] if snapshot else path.name
