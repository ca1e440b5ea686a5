"""The settings of scheduler and worker, with what --help says of them, and how a command reads them.

A setting that vLLM has too has the name that it has there.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import TypeVar

from tandem_shared.errors import ConfigError
from tandem_shared.extras import require_extra
from tandem_shared.gateway_settings import API_KEY_FILE_HELP, INSECURE_HELP, MAX_PORT, TRACES_HELP, GatewaySettings
from tandem_shared.options import (
    Given,
    add_options,
    list_fields,
    option,
    read_settings,
    refuse_unknown_variables,
    spell_out_booleans,
)
from tandem_shared.rpc.grpc_options import DEFAULT_MAX_REQUEST_BYTES, MAX_MESSAGE_BYTES
from tandem_shared.settings_checks import check_settings

STEP_TIMEOUT_S = 60.0
"""The default of --step-timeout-s of both services"""
MAX_ROWS = 65536
"""The largest --max-num-seqs"""
_HUB_SNAPSHOT = re.compile(r"/models--(?:[^/]+--)?([^/]+)/snapshots/[0-9a-f]{40}$")
"""The path of a commit of the repository OWNER/NAME, or NAME alone, in the hub's cache. The group is NAME."""


@dataclass(frozen=True)
class ServiceSettings:
    """The settings that both services have."""

    model: str = option(
        "embedded", "model to serve: a folder, a Hugging Face hub id, or 'embedded' for the small model in the package"
    )
    revision: str = option("", "branch, tag or commit of a hub id's repository; its main branch if not given")
    served_model_name: str = option(
        "", "name under which clients know the model; if not given, the last part of the folder or hub id"
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 listens on every interface")
    port: int = option(0, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    port_file: str = option("", "file that the port is written to once the service listens")
    tls_cert: str = option("", "PEM file of the server's certificate chain; if given, the server speaks only TLS")
    tls_key: str = option("", "PEM file of the certificate's private key")
    tls_client_ca: str = option("", "PEM file of the authority that must have signed the certificates of clients")
    session_secret_file: str = option(
        "",
        "file with the secret that the scheduler shows its worker, the same for both; created if it does not exist",
    )
    health_port: int = option(
        0,
        "port that answers health checks alone, without TLS and keys, for kubelets and the like; 0 is none",
        minimum=0,
        maximum=MAX_PORT,
    )
    step_timeout_s: float = option(
        STEP_TIMEOUT_S,
        "time without progress after which a step has failed: the worker ends, the scheduler takes it as lost",
        unit="seconds",
        minimum=0.1,
    )
    log_format: str = option(
        "text", "form of the log's lines; json is an object for each line", choices=("text", "json")
    )
    metrics_port: int | None = option(
        None,
        "port on which Prometheus reads the service's metrics over HTTP; 0 takes a free one; none if not given",
        minimum=0,
        maximum=MAX_PORT,
    )
    metrics_prefix: str = option(
        "tandem:", "what the names of metrics begin with; with vllm: dashboards made for vLLM find them"
    )
    log_level: str = option(
        "info", "least severe messages that are logged", choices=("debug", "info", "warning", "error")
    )


SYNONYMS = {
    "tensor_parallel_size": "tp_size",
    "kvcache_block_size": "block_size",
    "num_gpu_blocks_override": "num_blocks",
    "num_kvcache_blocks": "num_blocks",
}
"""Names that vLLM and nano-vllm have for settings of ours."""

T = TypeVar("T", bound="ServiceSettings | GatewaySettings")


@dataclass(frozen=True)
class SchedulerSettings(ServiceSettings):
    """The settings of the scheduler service."""

    port: int = option(50051, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    worker_address: str = option("127.0.0.1:50052", "HOST:PORT of the worker service")
    worker_ca: str = option(
        "", "PEM file of the authority that signed the worker's certificate; if given, the scheduler speaks TLS to it"
    )
    worker_tls_cert: str = option("", "PEM file of the certificate chain that the scheduler shows its worker")
    worker_tls_key: str = option("", "PEM file of that certificate's private key")
    api_key_file: str = option("", API_KEY_FILE_HELP)
    insecure: bool = option(False, INSECURE_HELP)
    interceptor: str = option(
        "",
        "MODULE:CLASS of a grpc.aio.ServerInterceptor that calls go through, made without arguments; or several,"
        " with commas between them",
        is_list=True,
    )
    tokenizer: str = option("", "folder with tokenizer.json; the model's if not given")
    max_num_seqs: int = option(
        256, "most sequences that run at once; a request has one for each choice", minimum=1, maximum=MAX_ROWS
    )
    max_num_batched_tokens: int = option(8192, "most tokens that a step computes", unit="tokens", minimum=1)
    max_chunk_tokens: int | None = option(
        None,
        "most prompt tokens of one sequence in a step; --max-num-batched-tokens if not given",
        unit="tokens",
        minimum=1,
    )
    max_plans_in_flight: int = option(2, "most step plans that are sent and have no result yet", minimum=1, maximum=4)
    max_num_waiting: int = option(
        4096, "most sequences that wait for their first step; further requests are refused", minimum=1
    )
    max_num_waiting_tokens: int = option(
        2**22,
        "most prompt tokens of sequences that wait for their first step; further requests are refused",
        unit="tokens",
        minimum=1,
    )
    max_request_bytes: int = option(
        DEFAULT_MAX_REQUEST_BYTES,
        "size of the largest request that is taken; the default holds a prompt of a million token ids",
        unit="bytes",
        minimum=1024,
        maximum=MAX_MESSAGE_BYTES,
    )
    enable_prefix_caching: bool = option(True, "whether requests share the KV of equal prompt prefixes (true or false)")
    worker_wait_s: float = option(
        60.0, "how long requests wait for a lost worker before they fail", unit="seconds", minimum=0
    )
    api_server_count: int | None = option(
        None,
        "front-end processes; with 0, the scheduler process serves clients itself; if not given, a quarter of the CPUs"
        " but at most 4, and 0 with fewer than 8 CPUs",
        minimum=0,
        maximum=64,
    )
    vllm_engine_service: bool = option(
        False,
        "whether the gateway SMG may use this server as it uses vLLM, through vllm.grpc.engine.VllmEngine; needs the"
        " extra smg (true or false)",
    )
    drain_grace_s: float = option(30.0, "how long running requests may go on after SIGTERM", unit="seconds", minimum=0)
    load_reports: bool = option(
        False,
        "whether the trailers of generating calls tell the server's load, for clients and proxies that balance by ORCA"
        " (true or false)",
    )
    log_requests: str = option(
        "few",
        "requests of which the log has a line when they end; few is at most 10 a second and a count of the others",
        choices=("few", "all", "none"),
    )
    otlp_traces_endpoint: str = option("", TRACES_HELP)
    record: str = option("", "file that the scheduler's events and plans are recorded in, for replay")


@dataclass(frozen=True)
class WorkerSettings(ServiceSettings):
    """The settings of the worker service."""

    port: int = option(50052, "port to listen on; 0 takes a free one", minimum=0, maximum=MAX_PORT)
    device: str = option(
        "auto", "where the model runs; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "type of weights and activations; auto is bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float64", "float32", "bfloat16"),
    )
    block_size: int = option(16, "size of a KV block", unit="tokens", minimum=1, maximum=1024)
    num_blocks: int | None = option(None, "number of KV blocks; if not given, as many as the memory allows", minimum=2)
    kv_cache_memory_gib: float = option(
        1.0, "size of the KV pool on a CPU, unless --num-blocks is given", unit="GiB", minimum=0
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory that weights, activations and KV pool may take", minimum=0.05, maximum=1.0
    )
    max_model_len: int | None = option(
        None,
        "most tokens of prompt and output together; the model's own context if not given",
        unit="tokens",
        minimum=1,
    )
    max_num_seqs: int = option(256, "rows of the batch: most sequences that run at once", minimum=1, maximum=MAX_ROWS)
    max_num_batched_tokens: int = option(8192, "most tokens that a step computes", unit="tokens", minimum=1)
    tp_size: int = option(
        1,
        "tensor-parallel size: number of processes that share the model, each with a GPU of its own",
        minimum=1,
        maximum=64,
    )
    attention_backend: str = option(
        "auto",
        "what computes attention: triton is our kernels; flash-attn is that library, on Hopper GPUs with a block size"
        " that is a multiple of 256; torch computes the whole model in plain torch; auto is the fastest that can run,"
        " which on a CPU is torch",
        choices=("auto", "triton", "flash-attn", "torch"),
    )
    all_reduce: str = option(
        "auto",
        "how GPUs sum over the ranks; auto takes peer memory if the GPUs reach each other's, else NCCL",
        choices=("auto", "nccl"),
    )
    enforce_eager: bool = option(
        False, "whether every kernel is launched by itself, without CUDA graphs (true or false; the flag alone is true)"
    )
    num_threads: int | None = option(
        None, "CPU threads that compute a forward pass; torch's choice if not given", minimum=1, maximum=4096
    )


SETTINGS = (SchedulerSettings, WorkerSettings, GatewaySettings)
"""The settings that there are, each of which may be a variable or stand in a file."""


def read_command_line(
    settings_class: type[T],
    program: str,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    extra: str | None = None,
) -> T:
    """Reads settings from the command line and the environment. Exits with status 2 and one line on stderr if they are
    wrong, or if the extra of the package that the program needs is not installed.
    """
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add_options(parser, settings_class, synonyms=SYNONYMS)
    add_config_flag(parser)
    given = sys.argv[1:] if arguments is None else arguments
    namespace = parser.parse_args(spell_out_booleans(given, settings_class))
    try:
        if extra is not None:
            require_extra(extra)
        refuse_unknown_variables(os.environ, SETTINGS)
        settings = read_settings(settings_class, namespace, os.environ, read_config(namespace, program))
        check_settings(settings)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    return settings


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    text = "YAML file of settings, with the flags' names as keys; flags and environment variables win over it"
    parser.add_argument("--config", metavar="FILE", help=text)


def read_config(options: argparse.Namespace, program: str, without: Iterable[str] = ()) -> dict[str, Given]:
    """What the file of --config says, if one is given. Services may share a file, so it may have the settings of each,
    but for some. Raises ConfigError.
    """
    if options.config is None:
        return {}
    # It needs a package that the client alone does without.
    from tandem_shared.config_file import read_config_file

    known = {field.name for cls in SETTINGS for field in fields(cls)} - {*without}
    return read_config_file(options.config, program, known, list_fields(*SETTINGS), SYNONYMS)


def model_name(settings: ServiceSettings) -> str:
    """The name under which the model is served: served_model_name if given, else the last part of the hub id or folder.

    A folder in the hub's cache is named after its commit, so its repository's name is taken instead. A folder given as
    '.' or '..' has the last part of its real path.
    """
    if settings.served_model_name:
        return settings.served_model_name
    path = PurePosixPath(settings.model)
    if path.name in ("", ".."):
        path = PurePosixPath(os.path.realpath(settings.model))
    snapshot = _HUB_SNAPSHOT.search(os.path.abspath(path))
    return snapshot[1] if snapshot else path.name
