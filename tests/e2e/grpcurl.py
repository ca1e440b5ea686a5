"""The real grpcurl, as a user would call it. It finds the services by reflection alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.executable).with_name("grpcurl")
TIMEOUT_S = 60


class GrpcurlError(Exception):
    """grpcurl ended with an error; `output` is what it printed."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def grpcurl(address: str, *arguments: str, data: str | None = None, flags: tuple[str, ...] = ()) -> str:
    """`grpcurl [flags] [-d data] ADDRESS [arguments]`: what it printed, or GrpcurlError."""
    command = [str(PROGRAM), "-plaintext", *flags, *([] if data is None else ["-d", data]), address, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise GrpcurlError(done.stdout)
    return done.stdout


def json_stream(output: str) -> list[dict[str, Any]]:
    """The objects that grpcurl prints one after another."""
    decoder, objects, rest = json.JSONDecoder(), [], output.strip()
    while rest:
        item, end = decoder.raw_decode(rest)
        objects.append(item)
        rest = rest[end:].lstrip()
    return objects
