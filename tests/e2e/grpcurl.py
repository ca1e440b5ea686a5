"""Calls the real grpcurl and buf as a user would. They find the services by reflection alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM, BUF = (Path(sys.executable).with_name(name) for name in ("grpcurl", "buf"))
TIMEOUT_S = 60


class GrpcurlError(Exception):
    """grpcurl ended with an error; `output` is what it printed."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def grpcurl(address: str, *arguments: str, data: str | None = None, flags: tuple[str, ...] = ()) -> str:
    """`grpcurl [flags] [-d data] ADDRESS [arguments]`; returns what it printed, or raises GrpcurlError."""
    command = [str(PROGRAM), "-plaintext", *flags, *([] if data is None else ["-d", data]), address, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise GrpcurlError(done.stdout)
    return done.stdout


def buf_curl(address: str, *arguments: str, path: str = "", version: str) -> str:
    """What `buf curl` prints of http://ADDRESS/path when it asks for that version of reflection alone."""
    flags = ["--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", f"grpc-{version}"]
    command = [str(BUF), "curl", *flags, *arguments, f"http://{address}/{path}"]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=TIMEOUT_S).stdout


def json_stream(output: str) -> list[dict[str, Any]]:
    """The JSON objects that grpcurl printed one after another."""
    decoder, objects, rest = json.JSONDecoder(), [], output.strip()
    while rest:
        item, end = decoder.raw_decode(rest)
        objects.append(item)
        rest = rest[end:].lstrip()
    return objects
