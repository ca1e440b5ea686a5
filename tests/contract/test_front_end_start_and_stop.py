"""How front-end processes start and stop with their service, and when there are any."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem.v1 import inference_pb2
from tandem_scheduler.service import SchedulerService, default_num_front_ends
from tandem_shared.config import SchedulerSettings
from tandem_shared.errors import ConfigError
from tests.contract.front_ends import (
    front_end_processes,
    gated_services,
    two_front_ends,
)
from tests.contract.gated_worker import open_gate
from tests.contract.services import (
    CONTROL,
    HOST,
    INFERENCE,
    Services,
    error_of,
    retry_delay_s,
    stream_request,
    true_tokens,
)


async def test_stopping_finishes_what_runs_within_the_grace_and_ends_what_outlasts_it() -> None:
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        short, endless = (
            asyncio.create_task(each.stream(stream_request([n] * 5, 4 + 4000 * n)))
            for n, each in enumerate((first, second))
        )
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "two came")
        stopping = asyncio.create_task(services.service.stop(grace_s=1.0))
        open_gate(services.runner, 50)
        assert len((await short).token_ids) == 4
        error = await error_of(endless)
        assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
        await stopping
        assert front_end_processes() == []


async def test_before_a_worker_is_seen() -> None:
    services = Services(api_server_count=2)
    await services.start(has_worker=False)
    try:
        assert [await services.health_of(name) for name in ("", CONTROL, INFERENCE)] == [
            "SERVING",
            "SERVING",
            "NOT_SERVING",
        ]
        calls = [
            services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest()),
            services.stream(stream_request()),
        ]
        for call in calls:
            error = await error_of(call)
            assert error.code() == grpc.StatusCode.UNAVAILABLE and retry_delay_s(error) > 0
        await services.start_worker()
        await services.wait_health("SERVING")
        assert (await services.stream(stream_request())).token_ids == true_tokens(stream_request())
    finally:
        await services.stop()


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_port_in_use_is_an_error_even_if_its_owner_would_share(is_shared: bool) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(is_shared))
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        service = SchedulerService(SchedulerSettings(port=port, worker_address=f"{HOST}:1", api_server_count=2))
        with pytest.raises(ConfigError, match=f"can't listen on {HOST}:{port}"):
            await service.start()
    assert front_end_processes() == []


async def test_a_front_end_that_cannot_start_is_an_error_and_leaves_none(tmp_path: Path) -> None:
    settings = SchedulerSettings(port=0, tokenizer=str(tmp_path), worker_address=f"{HOST}:1", api_server_count=2)
    with pytest.raises(ConfigError, match="a front-end process ended with status 2 before it listened"):
        await SchedulerService(settings).start()
    assert front_end_processes() == []


def test_interceptors_need_the_front_end_in_their_own_process() -> None:
    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            return await continuation(handler_call_details)

    async def create() -> None:
        settings = SchedulerSettings(worker_address=f"{HOST}:1", api_server_count=1)
        with pytest.raises(ConfigError, match="interceptors"):
            SchedulerService(settings, interceptors=[Interceptor()])

    asyncio.run(create())


@pytest.mark.parametrize(("num_cpus", "count"), [(1, 0), (7, 0), (8, 2), (12, 3), (16, 4), (128, 4)])
def test_the_default_is_a_quarter_of_the_cpus_within_reason(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(num_cpus)))
    assert default_num_front_ends() == count
