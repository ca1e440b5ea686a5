"""The load reports in trailers, read as ORCA's definition says, which is made here from its published fields."""

import asyncio
import base64
import re
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import MessageToJson

from tandem.v1 import inference_pb2
from tests.contract.gated_worker import gated_runner, open_gate
from tests.contract.services import INFERENCE, Services, model_info, stream_request, wait_until
from tests.e2e.grpcurl import grpcurl

Field = descriptor_pb2.FieldDescriptorProto
KEY = "endpoint-load-metrics-bin"


def orca_report() -> Any:
    """An empty xds.data.orca.v3.OrcaLoadReport."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="xds.data.orca.v3", syntax="proto3")
    report = file.message_type.add(name="OrcaLoadReport")
    for name, number in (("cpu_utilization", 1), ("mem_utilization", 2), ("rps_fractional", 6), ("eps", 7)):
        report.field.add(name=name, number=number, type=Field.TYPE_DOUBLE, label=Field.LABEL_OPTIONAL)
    report.field.add(name="rps", number=3, type=Field.TYPE_UINT64, label=Field.LABEL_OPTIONAL)
    report.field.add(name="application_utilization", number=9, type=Field.TYPE_DOUBLE, label=Field.LABEL_OPTIONAL)
    for name, number, entry in (
        ("request_cost", 4, "RequestCostEntry"),
        ("utilization", 5, "UtilizationEntry"),
        ("named_metrics", 8, "NamedMetricsEntry"),
    ):
        of_entry = report.nested_type.add(name=entry)
        of_entry.options.map_entry = True
        of_entry.field.add(name="key", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL)
        of_entry.field.add(name="value", number=2, type=Field.TYPE_DOUBLE, label=Field.LABEL_OPTIONAL)
        type_name = f".xds.data.orca.v3.OrcaLoadReport.{entry}"
        report.field.add(
            name=name, number=number, type=Field.TYPE_MESSAGE, label=Field.LABEL_REPEATED, type_name=type_name
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))()


async def call(address: str, request: inference_pb2.GenerateStreamRequest, method: str = "GenerateStream") -> Any:
    """Generates with grpcurl, and gives the report that came with it. None if there was none. grpcio does not show
    these trailers to programs, as only its own load balancing reads them.
    """
    output = await asyncio.to_thread(
        grpcurl, address, f"{INFERENCE}/{method}", data=MessageToJson(request), flags=("-v",)
    )
    trailers = output.partition("Response trailers received:")[2]
    found = re.search(rf"^{KEY}: (\S+)$", trailers, re.MULTILINE)
    if found is None:
        return None
    data = base64.b64decode(found[1] + "=" * (-len(found[1]) % 4))
    report = orca_report()
    assert report.ParseFromString(data) == len(data)
    return report


@pytest.mark.parametrize("is_on", [True, False])
async def test_a_stream_brings_the_load(is_on: bool) -> None:
    runner = gated_runner(0, block_size=16)
    async with Services(runner, load_reports=is_on, max_num_seqs=2, max_plans_in_flight=1) as services:
        short = asyncio.create_task(call(services.address, stream_request(max_tokens=1)))
        await services.wait_load(lambda load: load.num_steps_in_flight == 1, "its one step is under way")
        others = [asyncio.create_task(services.stream(stream_request(max_tokens=40))) for _ in range(3)]
        await services.wait_load(lambda load: load.num_waiting_sequences == 3, "the others wait")
        open_gate(runner, 1)
        report = await short
        open_gate(runner)
        await asyncio.gather(*others)
    if not is_on:
        assert report is None
        return
    assert report.application_utilization == 3 / 2
    named = dict(report.named_metrics)
    assert named["num_requests_running"] + named["num_requests_waiting"] == 3
    # Each that runs has a block.
    assert named["kv_cache_usage_perc"] == named["num_requests_running"] / (model_info().num_blocks - 1)
    assert named.keys() == {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}


async def test_front_end_processes_bring_it_too_and_unary_calls() -> None:
    async with Services(api_server_count=1, load_reports=True) as services:

        async def has_report() -> bool:
            report = await call(services.address, stream_request())
            return report is not None and report.rps_fractional > 0

        await wait_until(has_report, "a report with the rate of requests")
        assert await call(services.address, stream_request(), "Generate") is not None
