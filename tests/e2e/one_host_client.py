"""Runs a scheduler for the worker at ADDRESS, inside a network namespace, and prints the outputs of the requests of
test_tensor_parallel.py. Usage: python -m tests.e2e.one_host_client ADDRESS MODEL_FOLDER SESSION_SECRET_FILE
"""

import sys
import tempfile
from pathlib import Path

import grpc

from tandem.v1 import inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.e2e.services import Service, Stream, wait_ready
from tests.e2e.test_tensor_parallel import make_requests


def main(address: str, folder: str, secret_file: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        flags = ["--model", folder, "--tokenizer", "embedded", "--worker-address", address, "--api-server-count", "0"]
        flags += ["--session-secret-file", secret_file]
        scheduler = Service("tandem_scheduler", flags, Path(name))
        try:
            scheduler.wait_listening()
            with grpc.insecure_channel(scheduler.address, CHANNEL_OPTIONS) as channel:
                wait_ready(channel)
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                streams = [Stream(stub.GenerateStream(request)) for request in make_requests()]
                print([stream.result() for stream in streams])
        finally:
            scheduler.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
