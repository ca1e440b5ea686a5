"""Asks a gRPC server for its health: `python -m tandem_shared.rpc.health_probe HOST:PORT [SERVICE]`.

Exits with 0 if the service (the whole server if none is named) is SERVING, else with 1 and a line that says why.
It is for health checks of containers, and speaks no TLS.
"""

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem_shared.rpc.grpc_options import NO_PROXY

TIMEOUT_S = 3.0


def health_status(address: str, service: str = "") -> str:
    """The name of the service's health status, or of the gRPC status if asking failed."""
    with grpc.insecure_channel(address, NO_PROXY) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print("usage: python -m tandem_shared.rpc.health_probe HOST:PORT [SERVICE]", file=sys.stderr)
        return 2
    status = health_status(*arguments)
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
