"""Calls that no gRPC library would make: HTTP/2 headers and frames written by hand, each on a connection of its own.

gRPC's C core answers what is not a gRPC call before Tandem sees it: with a status of its own (UNKNOWN for a method
other than POST, or if te or :path is missing) or by a reset of the stream. So these calls only show that the connection
is answered, and that a call whose headers are right gets a status of its RPC.
"""

import re
import socket
import struct

from grpc import StatusCode
from hypothesis import strategies as st

PATH = "/tandem.v1.InferenceService/Tokenize"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4
WAIT_S = 10.0

RIGHT = {
    b":method": b"POST",
    b":scheme": b"http",
    b":path": PATH.encode(),
    b":authority": b"tandem",
    b"te": b"trailers",
    b"content-type": b"application/grpc",
}
TIMEOUTS = [b"", b"abc", b"-1S", b"1X", b"0n", b"1 S", b"99999999999H", b"9" * 90]
ODD_HEADERS: list[tuple[bytes, bytes | None]] = [
    *((b"grpc-timeout", value) for value in TIMEOUTS),
    *((name, None) for name in RIGHT),
    *((b":method", value) for value in (b"GET", b"PUT", b"")),
    *((b":path", value) for value in (b"", b"no-slash", b"/" * 90, b"/tandem.v1.InferenceService/")),
    *((b"grpc-encoding", value) for value in (b"gzip", b"bogus", b"")),
    (b"content-type", b"text/plain"),
    (b"Upper", b"x"),
    (b"x-bin", b"!!!"),
    (b"x\n", b"y"),
    (b"x", b"a\0b"),
    (b":scheme", b"ftp"),
]
ODD_DATA = [
    b"",
    b"\0\0\0",
    b"\1\0\0\0\0",
    b"\2\0\0\0\0",
    b"\0\0\0\0\5ab",
    b"\0\xff\xff\xff\xff",
    b"\0\0\0\0\0\0",
    b"\0" * 10,
]

raw_calls = st.tuples(
    st.lists(st.sampled_from(ODD_HEADERS), max_size=2).map(tuple),
    st.sampled_from([b"\0\0\0\0\0", *ODD_DATA]) | st.binary(max_size=60),
)
"""Headers that differ from those of a valid call (None for a missing one), and the bytes of the DATA frame."""


def call(address: str, headers: tuple[tuple[bytes, bytes | None], ...], data: bytes) -> str:
    """The status's name, 'RESET' if the stream or connection ended without one, or 'SILENCE' if there was no answer."""
    host, _, port = address.rpartition(":")
    block = b"".join(_literal(name, value) for name, value in {**RIGHT, **dict(headers)}.items() if value is not None)
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        connection.settimeout(WAIT_S)
        frames = [
            _frame(SETTINGS, b"", 0, 0),
            _frame(HEADERS, block, END_HEADERS, 1),
            _frame(DATA, data, END_STREAM, 1),
        ]
        connection.sendall(PREFACE + b"".join(frames))
        came = b""
        while True:
            # The first use of a header on a connection is not compressed.
            if found := re.search(rb"grpc-status.(\d+)", came, re.DOTALL):
                return next(code.name for code in StatusCode if code.value[0] == int(found[1]))
            if {RST_STREAM, GOAWAY} & _kinds(came):
                return "RESET"
            try:
                more = connection.recv(65536)
            except ConnectionResetError:
                return "RESET"
            except TimeoutError:
                return "SILENCE"
            if not more:
                return "RESET"
            came += more


def _literal(name: bytes, value: bytes) -> bytes:
    """A header in HPACK without indexing or Huffman coding. Name and value have less than 127 bytes each."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _frame(kind: int, payload: bytes, flags: int, stream: int) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _kinds(data: bytes) -> set[int]:
    kinds, at = set(), 0
    while at + 9 <= len(data):
        kinds.add(data[at + 3])
        at += 9 + int.from_bytes(data[at : at + 3], "big")
    return kinds
