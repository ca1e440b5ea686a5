"""gRPC channel and server options that both ends agree on."""

Options = list[tuple[str, int]]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A prompt of a million token ids is 3 to 5 MB; gRPC's own limit of 4 MB would refuse it."""

KEEPALIVE_TIME_MS = 10_000
"""An idle connection is pinged this often, so that a peer that vanished without a word is noticed."""

KEEPALIVE_TIMEOUT_MS = 5_000
"""A ping with no answer for so long closes the connection."""

WORKER_KEEPALIVE_TIME_MS = 2_000
WORKER_KEEPALIVE_TIMEOUT_MS = 3_000
"""The scheduler notices a worker whose machine vanished within these; all streams wait for it."""

MIN_PING_INTERVAL_MS = 1_000
"""A server takes pings this often, streams or not; more often is GOAWAY with too_many_pings."""

CHANNEL_OPTIONS: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted peer is found again within this time.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

WORKER_CHANNEL_OPTIONS: Options = [
    *(option for option in CHANNEL_OPTIONS if option[0] not in ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms")),
    ("grpc.keepalive_time_ms", WORKER_KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", WORKER_KEEPALIVE_TIMEOUT_MS),
]

SERVER_OPTIONS: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    ("grpc.enable_channelz", 1),
    # A port in use is an error, not a second server that shares it.
    ("grpc.so_reuseport", 0),
]

SHARED_PORT_OPTIONS: Options = [
    *(option for option in SERVER_OPTIONS if option[0] != "grpc.so_reuseport"),
    ("grpc.so_reuseport", 1),
]

LOCAL_OPTIONS: Options = [
    # Of one installation, on one machine: nothing to guard against, and a dead peer is seen at once without pings.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
"""Between processes of one service, over a Unix domain socket."""
