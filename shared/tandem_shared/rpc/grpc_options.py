"""Options of gRPC channels and servers: message sizes, how soon a silent peer is noticed, and what a client may use up.

gRPC ignores options that it does not know, so their effects are tested, as far as a test can see them.
"""

import ipaddress

Options = list[tuple[str, int]]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The largest message between our own services, such as step plans and results, and to Tandem's own client."""

DEFAULT_MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""The largest request of a client by default: over a million token ids of 3 bytes each, or 4 MiB of text."""

KEEPALIVE_TIME_MS = 10_000
"""A connection that was silent for this time is pinged, so that a peer that vanished silently is noticed."""

KEEPALIVE_TIMEOUT_MS = 5_000
"""A ping that is not answered within this time closes the connection."""

WORKER_KEEPALIVE_TIME_MS = 2_000
WORKER_KEEPALIVE_TIMEOUT_MS = 3_000
"""The scheduler notices a worker that went silent within the sum of the two. Meanwhile all streams wait."""

CONNECT_TIMEOUT_MS = 10_000
WORKER_CONNECT_TIMEOUT_MS = 2_000
"""The time for the handshakes of TCP, TLS and HTTP/2. It is shorter for the worker, which is near: an attempt that
began while the network was down must not hold up the next one.
"""

RESOLUTION_INTERVAL_MS = 500
"""How soon a name is looked up again after it led to an address where nobody listens: a peer that is started elsewhere,
as Kubernetes does, has another address. The default of gRPC is 30 s.
"""

HANDSHAKE_TIMEOUT_MS = 10_000
"""A connection is closed if its client has not done the handshakes of TLS and HTTP/2 within this time."""

IDLE_TIMEOUT_MS = 600_000
"""A connection without a call for this time is closed. gRPC clients open another one when they need it."""

MIN_CALLS_PER_CONNECTION = 8192
"""The least limit on the open calls of one connection. gRPC clients hold back calls above the limit until others end,
and some of those end UNAVAILABLE. A client that opens and resets calls in a loop can make gRPC hold this many, at about
15 kB each.
"""

UNACCEPTED_CALL_TIMEOUT_S = 3600
"""How long a call may wait for Python to take it before gRPC ends it CANCELLED. The default of gRPC is 30 s."""

NO_PROXY: Options = [("grpc.enable_http_proxy", 0)]
"""Connect directly, whatever http_proxy and similar variables say. For our own peers."""


def _keepalive(time_ms: int, timeout_ms: int) -> Options:
    return [
        ("grpc.keepalive_time_ms", time_ms),
        # The first option limits how long the peer's kernel may take to confirm bytes. The second limits how long the
        # answer to a ping may take, 60 s by default.
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
        # A restarted peer is found again within a second.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Despite its name, this is how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", connect_timeout_ms),
        ("grpc.dns_min_time_between_resolutions_ms", RESOLUTION_INTERVAL_MS),
    ]


REMOTE_CHANNEL_OPTIONS = _channel_options(_keepalive(KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS), CONNECT_TIMEOUT_MS)
"""For channels to a server that may be anywhere, through a proxy if the environment names one."""

CHANNEL_OPTIONS: Options = [*REMOTE_CHANNEL_OPTIONS, *NO_PROXY]
"""For channels to a server on this machine."""

WORKER_CHANNEL_OPTIONS: Options = [
    *_channel_options(_keepalive(WORKER_KEEPALIVE_TIME_MS, WORKER_KEEPALIVE_TIMEOUT_MS), WORKER_CONNECT_TIMEOUT_MS),
    *NO_PROXY,
]

LOCAL_OPTIONS: Options = [
    # Both ends are of one installation, so there is nothing to guard against, and a dead peer is seen without pings.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    *NO_PROXY,
]
"""For channels and servers between the processes of one service, over a Unix domain socket."""


def client_options(address: str) -> Options:
    """The options for a channel to a gRPC target such as HOST:PORT. A server on this machine is reached without a
    proxy.
    """
    return CHANNEL_OPTIONS if is_local(address) else REMOTE_CHANNEL_OPTIONS


def server_options(
    *,
    max_connections: int,
    max_open_calls: int,
    max_request_bytes: int = MAX_MESSAGE_BYTES,
    shares_port: bool = False,
) -> Options:
    """The options for a server that any client may reach. max_open_calls: the number above which the server's gate
    refuses calls (call_gate.py). shares_port: whether other servers may listen on the same port.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", max_request_bytes),
        # No compression, as gRPC inflates a message before it checks its size.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        *_keepalive(KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS),
        # No limit on pings. With one, gRPC queues a GOAWAY for each ping above it, so that a flood of pings takes
        # gigabytes. Without one, it stops reading while the client does not read its answers, and stores nothing.
        ("grpc.http2.max_ping_strikes", 0),
        # Without these probes, the window of a call is 64 KiB until its message is asked for, and then as large as the
        # message. With them, gRPC would open all windows to 4 MiB, and hold as much for each call that is not read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", IDLE_TIMEOUT_MS),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", max(max_open_calls, MIN_CALLS_PER_CONNECTION)),
        ("grpc.server_max_unrequested_time_in_server", UNACCEPTED_CALL_TIMEOUT_S),
        ("grpc.enable_channelz", 1),
        # Without this option, a port in use is an error.
        ("grpc.so_reuseport", int(shares_port)),
    ]


def is_local(address: str) -> bool:
    """Whether a gRPC target is certainly this machine: a Unix domain socket, localhost, or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    # dns://AUTHORITY/HOST:PORT is one form of a target.
    host_and_port = address.rpartition("/")[2]
    host = (
        host_and_port.partition("]")[0].removeprefix("[") if "[" in host_and_port else host_and_port.partition(":")[0]
    )
    return is_loopback(host)


def is_loopback(host: str) -> bool:
    """Whether a name or address of a host is certainly this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")
