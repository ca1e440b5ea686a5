"""Hostile HTTP requests as bytes: request lines, headers, framing of bodies, pipelines. Each comes with the statuses
that may answer it. The bodies are valid, so that what is wrong is only what the name says.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.chaos.http.exchange import request
from tests.chaos.http.judge import OF_INPUT

BODY = b'{"prompt": [1, 2, 3], "max_tokens": 2}'
PATH = "/v1/completions"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n"
)
ONE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
GET = b"GET /version HTTP/1.1\r\nhost: a\r\n"
OK, WRONG, EITHER = frozenset({200}), frozenset({400}), frozenset({200, 400})
MAX_CHANGES = 3


@dataclass(frozen=True)
class Head:
    """may_be_silent: whether the bytes may leave the server waiting for more, or be so wrong that it hangs up."""

    name: str
    data: bytes
    allowed: frozenset[int]
    num_replies: int = 1
    method: str = "POST"
    may_be_silent: bool = False


def _post(
    name: str,
    allowed: frozenset[int],
    *lines: bytes,
    body: bytes = BODY,
    has_length: bool = True,
    may_be_silent: bool = False,
) -> Head:
    length = [b"content-length: %d" % len(body)] if has_length else []
    typed = (
        [] if any(line.lower().startswith(b"content-type") for line in lines) else [b"content-type: application/json"]
    )
    head = [b"POST /v1/completions HTTP/1.1", b"host: a", *typed, *length, *lines]
    return Head(name, b"\r\n".join([*head, b"", body]), allowed, may_be_silent=may_be_silent)


def _lengths() -> Iterator[Head]:
    yield Head("a valid request", request(PATH, BODY), OK)
    yield _post("no length", WRONG, has_length=False)
    yield _post("equal lengths", EITHER, b"content-length: %d" % len(BODY))
    yield _post("contradicting lengths", WRONG, b"content-length: 1")
    for value in (b"-1", b"+5", b"0x10", b"1e3", b"", b"5, 6", b"\xb2", b"9" * 30, b"9" * 5000):
        yield _post(f"length {value[:30]!r}", frozenset({400, 413}), b"content-length: " + value, has_length=False)
    yield _post("a length past the limit", frozenset({413}), b"content-length: 1000000000000", has_length=False)
    yield _post("a length that is not sent", frozenset({408}), b"content-length: 99", has_length=False)
    yield _post("length and chunks", EITHER, b"transfer-encoding: chunked", body=ONE_CHUNK)
    for value in (b"gzip", b"chunked, gzip", b"chunked, chunked", b"identity", b"\x0bchunked"):
        yield _post(f"encoding {value!r}", EITHER, b"transfer-encoding: " + value, body=ONE_CHUNK, has_length=False)


def _chunks() -> Iterator[Head]:
    yield Head("chunks", CHUNKED + b"\r\n" + ONE_CHUNK, OK)
    yield Head("chunks with extensions", CHUNKED + b"\r\n" + ONE_CHUNK.replace(b"\r\n", b";a=b\r\n", 1), EITHER)
    yield Head("chunks with trailers", CHUNKED + b"\r\n" + ONE_CHUNK[:-2] + b"x-evil: 1\r\n\r\n", EITHER)
    for size in (b"zz", b"-1", b"", b"0x5", b"5 5", b"f" * 15, b"f" * 16, b"f" * 17, b"f" * 400):
        allowed = frozenset({400, 408, 413})
        yield Head(
            f"chunk of size {size[:20]!r}", CHUNKED + b"\r\n" + size + b"\r\n" + BODY + b"\r\n0\r\n\r\n", allowed
        )
    yield Head("a chunk that is longer than its size", CHUNKED + b"\r\n3\r\n" + BODY + b"\r\n0\r\n\r\n", WRONG)
    yield Head("a second chunk that is broken", CHUNKED + b"\r\n" + ONE_CHUNK[:-5] + b"\xff\xff\r\n", WRONG)
    yield Head("chunks without an end", CHUNKED + b"\r\n" + ONE_CHUNK[:-5], frozenset({408}))
    one_byte = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    yield Head("chunks of one byte", CHUNKED + b"\r\n" + one_byte, OK)
    yield Head(
        "an endless body",
        CHUNKED + b"\r\n" + b"40000\r\n" + b" " * 0x40000 + b"\r\n" + b"0" * 4000,
        frozenset({400, 408}),
    )
    many = b"".join(b"10000\r\n" + b" " * 0x10000 + b"\r\n" for _ in range(40))
    yield Head("chunks past the limit", CHUNKED + b"\r\n" + many, frozenset({413}))


def _headers() -> Iterator[Head]:
    for size in (20_000, 70_000, 2_000_000):
        # The server hangs up on what is too large, with bytes unread, and the reset may come before its answer.
        is_huge = size > 2**16
        yield _post(f"a header of {size} bytes", EITHER, b"x-a: " + b"a" * size, may_be_silent=is_huge)
        yield _post(f"an id of {size} bytes", EITHER | {409}, b"x-request-id: " + b"a" * size, may_be_silent=is_huge)
        wrong = frozenset({400, 401})
        yield _post(f"a key of {size} bytes", wrong, b"authorization: Bearer " + b"a" * size, may_be_silent=is_huge)
    yield _post("many headers", EITHER, *(b"x-%d: a" % number for number in range(9000)))
    for line in (
        b"no colon",
        b"name : a",
        b" folded",
        b": empty",
        b"x: a\0b",
        b"x: a\rb",
        b"x\xff: a",
        b"x(): a",
        b"x:",
    ):
        yield _post(f"header {line!r}", EITHER, line)
    yield Head("line feeds alone", request(PATH, BODY).replace(b"\r\n", b"\n"), EITHER)
    yield Head("no host", request(PATH, BODY).replace(b"host: a\r\n", b""), EITHER)
    yield _post("two hosts", EITHER, b"host: b")
    for value in (
        b"a\r\nX-Evil: 1",
        b"a%0d%0aX-Evil: 1",
        b"a\\r\\nX-Evil: 1",
        b"\xff\xe2\x80\xa8",
        b"",
        b"   ",
        b"a b",
        b'"',
    ):
        # Another call may have the same id at the time.
        yield _post(f"id {value!r}", EITHER | {409}, b"x-request-id: " + value)
        yield _post(f"key {value!r}", frozenset({200, 400, 401}), b"authorization: " + value)
    yield _post("two ids", EITHER | {409}, b"x-request-id: first-of-two", b"X-Request-ID: second-of-two")
    yield _post("two keys", frozenset({401}), b"authorization: Bearer a", b"authorization: Bearer b")
    for kind in (b"", b"text/plain", b"application/json; charset=utf-16", b"application/x-www-form-urlencoded", b"*/*",
                 b"multipart/form-data; boundary=a", b"application/json" + b";a" * 3000, b"\xff"):  # fmt: skip
        yield _post(f"type {kind[:40]!r}", EITHER, b"content-type: " + kind)
    yield _post("gzip", EITHER, b"content-encoding: gzip")
    yield _post("to be continued", OK, b"expect: 100-continue")
    yield _post("expectations", EITHER, b"expect: 200-maybe")
    for what in (b"websocket", b"h2c", b"TLS/1.3"):
        yield _post(f"upgrade to {what!r}", OK, b"connection: upgrade, close", b"upgrade: " + what)
    yield _post(
        "all that is hop by hop", EITHER, b"te: trailers", b"trailer: x", b"proxy-authorization: a", b"via: 1.1 a"
    )


def _lines() -> Iterator[Head]:
    nothing = frozenset({404, 405, 400, 200})
    for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "FOO", "get", "G" * 5000, "G\0T", "CONNECT"):
        for path in (PATH, "/", "/nothing"):
            data = request(path, b"", method=method)
            yield Head(f"{method[:9]} {path}", data, nothing, method=method, may_be_silent=method == "CONNECT")
    paths = ["/%00", "/%ff%fe", "/..", "//", "/../../etc/passwd", "*", "/v1/models/%2e%2e", "/?", "?",
             "/v1/models/a%0d%0aX-Evil:1", "/v1/models/" + "a" * 9000, "/v1/completions/", "/tokenize/",
             "/v1/models//", "http://b/v1/models", "/v1/models?" + "a=%" * 900, "/v1/models#a", "/" + "a/" * 4000,
             "a", "/\xff", "/docs", "/metrics", "/v1/models/\\",
             "/openapi.json", "/v1/models/%E2%80%A8", "/%", "/" + "a" * 100_000]  # fmt: skip
    for path in paths:
        data = b"GET " + path.encode("latin-1") + b" HTTP/1.1\r\nhost: a\r\n\r\n"
        yield Head(f"GET {path[:40]!r}", data, nothing, method="GET")
    for version in (
        b"HTTP/0.9",
        b"HTTP/1.0",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/9.9",
        b"HTTP/1.1x",
        b"http/1.1",
        b"",
        b"HTTQ/1.1",
    ):
        data = request(PATH, BODY).replace(b"HTTP/1.1", version, 1)
        yield Head(f"version {version!r}", data, EITHER, may_be_silent=version in (b"", b"HTTP/0.9"))
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 600
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for data in (preface, hello, b"\r\n" * 3 + b"\0", b"GET\r\n\r\n", b"\xff" * 300, b" GET / HTTP/1.1\r\n\r\n"):
        yield Head(f"no HTTP {data[:12]!r}", data, frozenset({400, 404, 405}), may_be_silent=True)


def _pipelines() -> Iterator[Head]:
    one = request(PATH, BODY)
    get = GET + b"\r\n"
    yield Head("a pipeline", get + one + get + one, OK, num_replies=4)
    yield Head("a long pipeline", get * 60, OK, num_replies=60)
    yield Head("a pipeline after an error", request(PATH, b"{") + get, EITHER, num_replies=2)
    stream = request(PATH, b'{"prompt": [1], "max_tokens": 9, "stream": true, "ignore_eos": true}')
    yield Head("a pipeline behind a stream", stream + get, OK, num_replies=2)
    yield Head("garbage behind a stream", stream + b"\0garbage\r\n\r\n", EITHER, may_be_silent=True)
    yield Head("garbage behind a request", one + b"\0garbage\r\n\r\n", EITHER, may_be_silent=True)


HEADS = [*_lengths(), *_chunks(), *_headers(), *_lines(), *_pipelines()]


def draw_heads(count: int, seed: int) -> list[Head]:
    """`count` requests: all of HEADS, in rounds, and valid ones whose bytes are changed."""
    source = random.Random(seed)
    found = [HEADS[number % len(HEADS)] for number in range(count // 2)]
    while len(found) < count:
        found.append(_changed(source))
    source.shuffle(found)
    return found


def _changed(source: random.Random) -> Head:
    whole = source.choice([head.data for head in HEADS if len(head.data) < 2000])
    data = bytearray(whole)
    for _ in range(source.randint(1, MAX_CHANGES)):
        at = source.randrange(len(data) + 1)
        part = source.choice(
            [b"\r\n", b"\n", b"\0", b" ", b":", b"\xff", b"\t", bytes(data[at : at + 20]), b"\r\n\r\n"]
        )
        data[at : at + source.choice([0, 0, 1, 5])] = part
    data += b"\r\n\r\n" * source.randint(0, 1)
    method = bytes(data).partition(b" ")[0].decode("latin-1")
    return Head("changed bytes", bytes(data), OF_INPUT, 1, method, may_be_silent=True)
