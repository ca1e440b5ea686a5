"""The settings of the HTTP gateway, with what --help says of them."""

from dataclasses import dataclass

from tandem_shared.options import option
from tandem_shared.rpc.grpc_options import MAX_MESSAGE_BYTES

MAX_PORT = 65535
DEFAULT_HTTP_PORT = 8000
API_KEY_FILE_HELP = "file of API keys, one of which each call must show; it is read again when it changes"
INSECURE_HELP = (
    "whether the service may listen on an address that is not loopback although it asks nobody for a key or certificate"
    " (true or false; the flag alone is true)"
)
TRACES_HELP = (
    "URL of an OpenTelemetry collector that takes OTLP over gRPC, such as http://127.0.0.1:4317; spans of requests are"
    " sent to it; needs the extra otel; if not given, there are no traces"
)


@dataclass(frozen=True)
class GatewaySettings:
    """A field that another service also has means the same for both."""

    scheduler_address: str = option("127.0.0.1:50051", "HOST:PORT of the scheduler service")
    scheduler_ca: str = option(
        "",
        "PEM file of the authority that signed the scheduler's certificate; if given, the gateway speaks TLS to it",
    )
    scheduler_tls_cert: str = option("", "PEM file of the certificate chain that the gateway shows the scheduler")
    scheduler_tls_key: str = option("", "PEM file of that certificate's private key")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 listens on every interface")
    http_port: int = option(
        DEFAULT_HTTP_PORT,
        "port of the HTTP API; 0 takes a free one, and with tandem serve there is no HTTP API then",
        minimum=0,
        maximum=MAX_PORT,
    )
    http_workers: int = option(1, "processes that serve HTTP", minimum=1, maximum=64)
    http_max_body_bytes: int = option(
        8 * 1024 * 1024,
        "size of the largest HTTP request that is taken",
        unit="bytes",
        minimum=1024,
        maximum=MAX_MESSAGE_BYTES,
    )
    http_body_timeout_s: float = option(
        30.0, "how long the body of an HTTP request may take to arrive", unit="seconds", minimum=0.1
    )
    reasoning_parser: str = option(
        "think",
        "how reasoning is found in a chat's output: think, or qwen3 as vLLM has it, looks for <think> at its start;"
        " opened is for models whose prompt already ends with <think>; none leaves all text as it is",
        choices=("think", "qwen3", "opened", "none"),
    )
    drain_grace_s: float = option(30.0, "how long running requests may go on after SIGTERM", unit="seconds", minimum=0)
    port_file: str = option("", "file that the port is written to once the service listens")
    tls_cert: str = option("", "PEM file of the server's certificate chain; if given, the server speaks only TLS")
    tls_key: str = option("", "PEM file of the certificate's private key")
    tls_client_ca: str = option("", "PEM file of the authority that must have signed the certificates of clients")
    api_key_file: str = option("", API_KEY_FILE_HELP)
    insecure: bool = option(False, INSECURE_HELP)
    otlp_traces_endpoint: str = option("", TRACES_HELP)
    log_format: str = option(
        "text", "form of the log's lines; json is an object for each line", choices=("text", "json")
    )
    log_level: str = option(
        "info", "least severe messages that are logged", choices=("debug", "info", "warning", "error")
    )
