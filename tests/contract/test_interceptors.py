"""Interceptors that the setting --interceptor names."""

from typing import Any

import grpc
import pytest

from tandem.v1 import inference_pb2
from tandem_shared.errors import ConfigError, PermissionDenied
from tandem_shared.rpc.interceptors import load_interceptors
from tests.contract.services import Services, error_of, stream_request


class RefuseSome(grpc.aio.ServerInterceptor):
    """Refuses calls whose metadata asks for it, in different ways."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        metadata = dict(handler_call_details.invocation_metadata)
        if "refuse" in metadata:
            raise PermissionDenied("not today")
        if "fail" in metadata:
            raise RuntimeError("a bug")
        return await continuation(handler_call_details)


class Watch(grpc.aio.ServerInterceptor):
    methods: tuple[str, ...] = ()

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        Watch.methods += (handler_call_details.method,)
        return await continuation(handler_call_details)


class NoInterceptor:
    pass


@pytest.mark.parametrize("api_server_count", [0, 1])
async def test_calls_go_through_them_in_every_process(api_server_count: int) -> None:
    names = f"{__name__}:RefuseSome, {__name__}:Watch"
    async with Services(interceptor=names, api_server_count=api_server_count) as services:
        assert (await services.stream(stream_request())).token_ids
        for name, status in (("refuse", grpc.StatusCode.PERMISSION_DENIED), ("fail", grpc.StatusCode.INTERNAL)):
            call = services.inference.Generate(unary_request(), metadata=((name, "x"),))
            assert (await error_of(call)).code() == status
    if not api_server_count:
        assert "/tandem.v1.InferenceService/GenerateStream" in Watch.methods
        assert "/tandem.v1.InferenceService/Generate" not in Watch.methods


def unary_request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest.FromString(stream_request().SerializeToString())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module:Class", "ModuleNotFoundError"),
        (f"{__name__}:NoSuchClass", "AttributeError"),
        (f"{__name__}", "AttributeError"),
        (f"{__name__}:NoInterceptor", "is not a grpc.aio.ServerInterceptor"),
    ],
)
def test_what_can_not_be_made_is_refused_by_name(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--interceptor {name}: {problem}"):
        load_interceptors(name)
