"""The service through which SMG uses Tandem, over real gRPC, against the fake model's true output and against what the
public API says of the same request.
"""

import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from tandem.v1 import inference_pb2
from tandem_scheduler.service import SchedulerService
from tandem_shared import extras
from tandem_shared.config import SchedulerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.model_folder import tokenizer_digest
from tests.contract.services import Services, error_of, model_info, stream_request, true_tokens, violations, wait_until
from tests.support.fake_worker import FakeRunner
from tests.support.tokenizers import EMBEDDED

Pb = vllm_engine_pb2
SERVICE = "vllm.grpc.engine.VllmEngine"
PROMPT = [5, 6, 7, 8]


def vllm_request(prompt: Any = PROMPT, max_tokens: int | None = 8, stream: bool = True, **sampling: Any) -> Any:
    """A greedy request that goes on past end-of-sequence tokens."""
    params = Pb.SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **sampling})
    request = Pb.GenerateRequest(sampling_params=params, stream=stream)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.input_ids.extend(prompt)
        request.tokenized.original_text = "is not looked at"
    return request


class Engine:
    """The service as the gateway sees it."""

    def __init__(self, services: Services) -> None:
        self.stub = vllm_engine_pb2_grpc.VllmEngineStub(services.channel)

    async def read(self, request: Any) -> tuple[list[Any], dict[int, Any]]:
        """The chunks, and the complete outputs by index. Chunks of a choice come before its complete output."""
        chunks: list[Any] = []
        completes: dict[int, Any] = {}
        async for message in self.stub.Generate(request):
            if message.HasField("chunk"):
                assert message.chunk.index not in completes
                chunks.append(message.chunk)
            else:
                assert message.complete.index not in completes
                completes[message.complete.index] = message.complete
        return chunks, completes


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    runner = FakeRunner(model_info(eos_token_ids=(0, 7), tokenizer_digest=tokenizer_digest(EMBEDDED.parent)))
    async with Services(runner, vllm_engine_service=True) as services:
        yield services


@pytest.fixture
def engine(services: Services) -> Engine:
    return Engine(services)


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_come_by_index_with_their_true_tokens_and_counts(engine: Engine, stream: bool) -> None:
    # Seeds are int32, and those below zero are seeds too.
    request = vllm_request(stream=stream, n=3, temperature=1.0, seed=-2)
    chunks, completes = await engine.read(request)
    assert sorted(completes) == [0, 1, 2]
    for index, complete in completes.items():
        truth = true_tokens(stream_request(PROMPT, temperature=1.0, seed=2**64 - 2), choice_index=index)
        assert list(complete.output_ids) == truth
        assert (complete.finish_reason, complete.WhichOneof("matched_stop")) == ("length", None)
        assert (complete.prompt_tokens, complete.completion_tokens) == (4, 8)
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in own for token in chunk.token_ids] == (truth if stream else [])
        totals = [chunk.completion_tokens for chunk in own]
        assert totals == sorted(totals) and all(chunk.prompt_tokens == 4 for chunk in own)


async def test_zeros_are_fields_that_were_left_out(engine: Engine) -> None:
    assert vllm_request().sampling_params.top_p == vllm_request().sampling_params.repetition_penalty == 0
    _, completes = await engine.read(vllm_request())
    assert list(completes[0].output_ids) == true_tokens(stream_request(PROMPT))
    bare = Pb.GenerateRequest(request_id="bare", tokenized=Pb.TokenizedInput(input_ids=PROMPT))
    bare.sampling_params.max_tokens = 4
    _, completes = await engine.read(bare)
    truth = true_tokens(stream_request(PROMPT, 4, temperature=1.0, request_id="bare"), stop_token_ids=(0, 7))
    assert list(completes[0].output_ids) == truth


async def test_the_models_defaults_stand_for_zeros_that_can_be_no_values() -> None:
    defaults = {"temperature": 0.0, "top_p": 0.5, "top_k": 3}
    async with Services(FakeRunner(model_info(sampling_defaults=defaults)), vllm_engine_service=True) as services:
        request = vllm_request()
        request.sampling_params.ClearField("temperature")
        _, completes = await Engine(services).read(request)
        assert list(completes[0].output_ids) == true_tokens(stream_request(PROMPT))
        info = await Engine(services).stub.GetModelInfo(Pb.GetModelInfoRequest())
        assert info.default_sampling_params_json == '{"temperature": 0.0, "top_k": 3, "top_p": 0.5}'


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_output_at_the_token_that_completes_it(
    services: Services, engine: Engine, stream: bool
) -> None:
    text = (await services.stream(stream_request(PROMPT, 40))).choices[0].text
    stop = text[len(text) // 2 :][:2]
    known = (await services.stream(stream_request(PROMPT, 40, stop_strings=[stop]))).choices[0]
    assert known.finish is not None and known.finish.stop_string == stop
    chunks, completes = await engine.read(vllm_request(max_tokens=40, stream=stream, stop=[stop]))
    assert completes[0].matched_stop_str == stop and completes[0].finish_reason == "stop"
    assert list(completes[0].output_ids) == known.token_ids
    assert [token for chunk in chunks for token in chunk.token_ids] == (known.token_ids if stream else [])


async def test_only_a_stop_token_of_the_request_is_told(engine: Engine) -> None:
    ids = true_tokens(stream_request(PROMPT, 40))
    _, completes = await engine.read(vllm_request(max_tokens=40, stop_token_ids=[ids[5]]))
    assert completes[0].matched_token_id == ids[5] and list(completes[0].output_ids) == ids[: ids.index(ids[5]) + 1]
    eos = model_info(eos_token_ids=(ids[5],))
    async with Services(FakeRunner(eos), vllm_engine_service=True) as services:
        _, completes = await Engine(services).read(vllm_request(max_tokens=40, ignore_eos=False))
        assert completes[0].finish_reason == "stop" and completes[0].WhichOneof("matched_stop") is None
        assert completes[0].output_ids[-1] == ids[5]


async def test_log_probabilities_are_those_of_the_public_api(services: Services, engine: Engine) -> None:
    known = await services.stream(stream_request(PROMPT, 100, num_logprobs=2, num_prompt_logprobs=1))
    chunks, completes = await engine.read(vllm_request(max_tokens=100, logprobs=2))
    assert not completes[0].HasField("output_logprobs")
    request = vllm_request(max_tokens=100, stream=False, logprobs=2, prompt_logprobs=1, n=2)
    _, whole = await engine.read(request)
    for reports in ([chunk.output_logprobs for chunk in chunks], [whole[0].output_logprobs]):
        assert [token for report in reports for token in report.token_ids] == known.token_ids
        assert [value for report in reports for value in report.token_logprobs] == [
            each.logprob for each in known.choices[0].logprobs
        ]
        top = [
            list(zip(each.token_ids, each.values, strict=True)) for report in reports for each in report.top_logprobs
        ]
        assert top == [[(one.token_id, one.logprob) for one in each.top] for each in known.choices[0].logprobs]
    prompt = whole[0].input_logprobs
    assert list(prompt.token_ids) == PROMPT and not whole[1].HasField("input_logprobs")
    values = [each.value if each.HasField("value") else None for each in prompt.token_logprobs]
    assert values == [None, *(each.logprob for each in known.prompt_logprobs)]
    assert [list(each.token_ids) for each in prompt.top_logprobs[1:]] == [
        [one.token_id for one in each.top] for each in known.prompt_logprobs
    ]


async def test_cached_tokens_are_those_of_each_choice(engine: Engine) -> None:
    prompt = list(range(10, 75))
    await engine.read(vllm_request(prompt))
    _, completes = await engine.read(vllm_request(prompt, n=2))
    assert [completes[index].cached_tokens for index in (0, 1)] == [64, 64]


async def test_a_structured_output_is_asked_for_in_each_form(services: Services, engine: Engine) -> None:
    outputs = []
    for form, known in (
        ({"choice": Pb.ChoiceConstraint(choices=["no", "yes"])}, {"choice": {"texts": ["no", "yes"]}}),
        ({"regex": "no|yes"}, {"regex": "no|yes"}),
        ({"json_schema": '{"enum": ["no", "yes"]}'}, {"json_schema": '{"enum": ["no", "yes"]}'}),
        ({"json_object": True}, {"json_object": True}),
        ({"grammar": 'start: "no" | "yes"'}, {"lark": 'start: "no" | "yes"'}),
    ):
        _, completes = await engine.read(vllm_request(max_tokens=40, ignore_eos=False, **form))
        request = stream_request(PROMPT, 40, ignore_eos=False)
        request.structured_output.CopyFrom(inference_pb2.StructuredOutput(**known))
        outputs.append((await services.stream(request)).token_ids)
        assert list(completes[0].output_ids) == outputs[-1], form
    # The fake model's tokens depend on the grammar.
    assert len(set(map(tuple, outputs))) > 1
    error = await error_of(engine.read(vllm_request(grammar="start: (")))
    assert list(violations(error)) == ["structured_output.lark"]


async def test_what_is_not_possible_is_refused_and_named(engine: Engine) -> None:
    for field, changes in (
        ("kv_transfer_params_json", {"kv_transfer_params_json": "{}"}),
        ("mm_inputs", {"mm_inputs": Pb.MultimodalInputs()}),
        ("extra_mm_inputs", {"extra_mm_inputs": [Pb.MultimodalInputs()]}),
        ("media_refs", {"media_refs": Pb.MediaRefs()}),
        ("data_parallel_rank", {"data_parallel_rank": 1}),
        ("sampling_params.structural_tag", {"sampling_params": Pb.SamplingParams(structural_tag="{}")}),
        ("sampling_params.truncate_prompt_tokens", {"sampling_params": Pb.SamplingParams(truncate_prompt_tokens=-1)}),
        ("sampling_params.prompt_logprobs", {"sampling_params": Pb.SamplingParams(prompt_logprobs=1)}),
        ("output.num_logprobs", {"sampling_params": Pb.SamplingParams(logprobs=-1)}),
        ("sampling.logit_bias[-1]", {"sampling_params": Pb.SamplingParams(logit_bias={-1: 1.0})}),
        ("sampling.top_p", {"sampling_params": Pb.SamplingParams(top_p=1.5)}),
        ("prompt", {"tokenized": None}),
    ):
        request = Pb.GenerateRequest(**{"tokenized": Pb.TokenizedInput(input_ids=PROMPT), "stream": True, **changes})
        error = await error_of(engine.read(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and list(violations(error)) == [field], field
    huge = vllm_request(stop=[""] * 500_000)
    assert "beside the prompt" in str((await error_of(engine.read(huge))).details())


async def test_a_gateway_aborts_flushes_and_sees_loads(services: Services, engine: Engine) -> None:
    request = vllm_request(range(10, 50), max_tokens=4000)
    request.request_id = "long"
    call = aiter(engine.stub.Generate(request))
    last = await anext(call)
    await services.wait_load(lambda load: load.num_running_sequences == 1, "it runs")
    loads = await engine.stub.GetLoads(Pb.GetLoadsRequest())
    assert loads.dp_rank_count == 1
    [load] = loads.loads
    assert (load.num_running_reqs, load.num_total_reqs, load.max_total_num_tokens) == (1, 1, 16384)
    assert load.num_used_tokens == round(load.token_usage * 16384) > 0
    server = await engine.stub.GetServerInfo(Pb.GetServerInfoRequest())
    assert (server.active_requests, server.block_size, server.max_num_seqs) == (1, 16, 256)
    await engine.stub.Abort(Pb.AbortRequest(request_ids=["unknown", "long"]))
    async for message in call:
        last = message
    assert last.complete.finish_reason == "abort" and last.complete.completion_tokens == len(last.complete.output_ids)
    cancelled = engine.stub.Generate(vllm_request(max_tokens=4000))
    await cancelled.read()
    cancelled.cancel()
    await services.wait_load(lambda load: load.num_running_sequences == 0, "the cancelled call is aborted")
    assert (await services.load()).num_cached_blocks > 0
    assert (await engine.stub.FlushCache(common_pb2.FlushCacheRequest())).success
    assert (await services.load()).num_cached_blocks == 0
    for unknown in (engine.stub.Embed(Pb.EmbedRequest()), engine.stub.StartProfile(common_pb2.StartProfileRequest())):
        assert (await error_of(unknown)).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_tokenizer_comes_as_a_zip_file(engine: Engine) -> None:
    async def bundle() -> tuple[bytes, list[str]]:
        chunks = [chunk async for chunk in engine.stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        return b"".join(chunk.data for chunk in chunks), [chunk.sha256 for chunk in chunks]

    contents, digests = await bundle()
    assert digests == [""] * (len(digests) - 1) + [hashlib.sha256(contents).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(contents)) as files:
        assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(files.namelist())
        assert files.read("tokenizer.json") == EMBEDDED.read_bytes()
    assert (await bundle())[0] == contents
    async with Services(vllm_engine_service=True) as other:
        engine.stub = Engine(other).stub
        assert (await bundle())[0] == contents


async def test_health_is_readiness(services: Services, engine: Engine) -> None:
    async def health() -> bool:
        return bool((await engine.stub.HealthCheck(Pb.HealthCheckRequest())).healthy)

    async def is_unhealthy() -> bool:
        return not await health()

    info = await engine.stub.GetModelInfo(Pb.GetModelInfoRequest())
    assert (info.served_model_name, info.model_type, list(info.architectures)) == (
        "embedded",
        "qwen3",
        ["Qwen3ForCausalLM"],
    )
    assert (info.max_context_length, info.vocab_size, list(info.eos_token_ids)) == (4096, 1024, [0, 7])
    assert await health() and await services.health_of(SERVICE) == "SERVING"
    await services.stop_worker()
    await wait_until(is_unhealthy, "the lost worker is told")
    await services.start_worker()
    await services.wait_health("SERVING")
    assert await health()
    await services.drain()
    assert await is_unhealthy() and await services.health_of(SERVICE) == "NOT_SERVING"
    assert (await error_of(engine.read(vllm_request()))).code() is grpc.StatusCode.UNAVAILABLE


async def test_front_end_processes_serve_gateways_too() -> None:
    async with Services(vllm_engine_service=True, api_server_count=1) as services:
        engine = Engine(services)
        _, completes = await engine.read(vllm_request())
        assert list(completes[0].output_ids) == true_tokens(stream_request(PROMPT))
        assert (await engine.stub.GetLoads(Pb.GetLoadsRequest())).loads[0].max_running_requests == 256
        await engine.stub.Abort(Pb.AbortRequest(request_ids=["unknown"]))


async def test_the_service_must_be_asked_for_and_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Services() as services:
        assert (await error_of(Engine(services).read(vllm_request()))).code() is grpc.StatusCode.UNIMPLEMENTED
    monkeypatch.setitem(extras.MODULES_OF_EXTRA, "smg", ("smg_grpc_missing",))
    with pytest.raises(ConfigError, match=r"install tandem-llm\[smg\]: no module named smg_grpc_missing"):
        SchedulerService(SchedulerSettings(model="embedded", vllm_engine_service=True))
