"""gRPC channel and server options: message sizes, how soon a silent peer is noticed, and what a stranger may use up.

gRPC reads a setting that it does not know as no setting, so what each of them does is tested where a test can see it.
"""

import ipaddress

Options = list[tuple[str, int]]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Any one message between our own services: step plans, their results, a whole output's log-probabilities."""

DEFAULT_MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""A client's request, at most: over a million token ids of 3 bytes each, or as many bytes of text."""

KEEPALIVE_TIME_MS = 10_000
"""A connection that was silent for so long is pinged, so that a peer that vanished without a word is noticed."""

KEEPALIVE_TIMEOUT_MS = 5_000
"""A ping with no answer for so long closes the connection."""

WORKER_KEEPALIVE_TIME_MS = 2_000
WORKER_KEEPALIVE_TIMEOUT_MS = 3_000
"""The scheduler notices a worker that went silent within these two together; all streams wait for it."""

CONNECT_TIMEOUT_MS = 10_000
WORKER_CONNECT_TIMEOUT_MS = 2_000
"""For the handshakes of TCP, TLS and HTTP/2. The worker is near, and an attempt that was begun while the network was
silent must not hold up the next.
"""

HANDSHAKE_TIMEOUT_MS = 10_000
"""A connection whose client has not spoken TLS and HTTP/2 by then is closed."""

IDLE_TIMEOUT_MS = 600_000
"""A connection with no call for so long is closed; gRPC clients open another when they need it."""

MIN_CALLS_PER_CONNECTION = 8192
"""One connection may have at least so many calls open. gRPC clients keep those above it until others end, and see some
end UNAVAILABLE; whoever opens and resets calls in a loop makes gRPC hold this many, at about 15 kB each.
"""

UNACCEPTED_CALL_TIMEOUT_S = 3600
"""For a call that waits for Python to take it. gRPC ends it CANCELLED without a reason, after 30 s by default."""

NO_PROXY: Options = [("grpc.enable_http_proxy", 0)]
"""Whatever http_proxy and its like say: for peers that are ours."""


def _keepalive(time_ms: int, timeout_ms: int) -> Options:
    return [
        ("grpc.keepalive_time_ms", time_ms),
        # The first is for bytes that the other kernel doesn't confirm. Pings have a limit of their own, 60 s otherwise.
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _channel_options(keepalive: Options, connect_timeout_ms: int) -> Options:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        *keepalive,
        # A restarted peer is found again within this time.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Despite its name: how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", connect_timeout_ms),
    ]


REMOTE_CHANNEL_OPTIONS = _channel_options(_keepalive(KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS), CONNECT_TIMEOUT_MS)
"""To a server that may be anywhere: over a proxy where the environment names one."""

CHANNEL_OPTIONS: Options = [*REMOTE_CHANNEL_OPTIONS, *NO_PROXY]
"""To a server of this machine."""

WORKER_CHANNEL_OPTIONS: Options = [
    *_channel_options(_keepalive(WORKER_KEEPALIVE_TIME_MS, WORKER_KEEPALIVE_TIMEOUT_MS), WORKER_CONNECT_TIMEOUT_MS),
    *NO_PROXY,
]

LOCAL_OPTIONS: Options = [
    # Of one installation, on one machine: nothing to guard against, and a dead peer is seen at once without pings.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    *NO_PROXY,
]
"""Between processes of one service, over a Unix domain socket."""


def client_options(address: str) -> Options:
    """For a channel to a gRPC target, HOST:PORT for one. What listens on this machine is reached without a proxy."""
    return CHANNEL_OPTIONS if is_local(address) else REMOTE_CHANNEL_OPTIONS


def server_options(
    *,
    max_connections: int,
    max_open_calls: int,
    max_request_bytes: int = MAX_MESSAGE_BYTES,
    shares_port: bool = False,
) -> Options:
    """For a server that strangers may reach. max_open_calls: those above it are refused, by Python.
    shares_port: other servers may listen on the same port.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", max_request_bytes),
        # Identity alone: gRPC inflates a message before it looks at its size.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        *_keepalive(KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS),
        # Pings are never too many: gRPC queues a GOAWAY for each one past a limit, and a flood of them is gigabytes.
        # Without a limit it stops reading while its answers are not read, and keeps nothing.
        ("grpc.http2.max_ping_strikes", 0),
        # A call's window stays at 64 KiB until its message is asked for, and is then as large as the message. With
        # these probes, gRPC would open all windows to 4 MiB, and hold as much for each call that is not read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", IDLE_TIMEOUT_MS),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", max(max_open_calls, MIN_CALLS_PER_CONNECTION)),
        ("grpc.server_max_unrequested_time_in_server", UNACCEPTED_CALL_TIMEOUT_S),
        ("grpc.enable_channelz", 1),
        # Unless shared, a port in use is an error.
        ("grpc.so_reuseport", int(shares_port)),
    ]


def is_local(address: str) -> bool:
    """Whether a gRPC target is certainly this machine: a Unix domain socket, localhost, or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    # What is left of dns://AUTHORITY/HOST:PORT.
    host_and_port = address.rpartition("/")[2]
    host = (
        host_and_port.partition("]")[0].removeprefix("[") if "[" in host_and_port else host_and_port.partition(":")[0]
    )
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")
