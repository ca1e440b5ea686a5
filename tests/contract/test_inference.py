"""Generate, GenerateStream, Tokenize, Detokenize over real gRPC, against the fake model's true tokens."""

import asyncio
import threading

import grpc
import pytest
from tokenizers import Tokenizer

from tandem.v1 import inference_pb2
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tandem_shared.step_plan import FAULT_GRAMMAR, FAULT_NAN_LOGITS, FAULT_NO_TOKEN
from tests.contract.services import (
    MODEL,
    Services,
    StreamedOutput,
    model_info,
    read_stream,
    retry_delay_s,
    stream_request,
    true_tokens,
    violations,
)
from tests.support.fake_worker import FakeRunner

STOP = inference_pb2.FINISH_REASON_STOP
LENGTH = inference_pb2.FINISH_REASON_LENGTH
TEXT = "What light through yonder window breaks?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve_model(MODEL, TOKENIZER_FILES) / "tokenizer.json"))


async def test_unary_and_joined_stream_are_the_truth(tokenizer: Tokenizer) -> None:
    request = stream_request(TEXT, 60)
    prompt_ids = tokenizer.encode(TEXT).ids
    expected = true_tokens(request, prompt_ids)
    async with Services() as services:
        streamed, unary = await services.stream(request), await services.generate(request)
    [choice] = unary.choices
    assert unary.model == MODEL
    for output in (streamed.choices[0], choice):
        assert list(output.token_ids) == expected
        assert output.text == tokenizer.decode(expected)
        assert output.finish == inference_pb2.Finish(reason=LENGTH)
    assert streamed.usage.num_prompt_tokens == unary.usage.num_prompt_tokens == len(prompt_ids)
    assert streamed.usage.num_output_tokens == unary.usage.num_output_tokens == 60
    assert streamed.usage.num_cached_tokens == 0
    assert unary.usage.num_cached_tokens == len(prompt_ids) // 16 * 16


async def test_many_streams_at_once_are_each_the_truth() -> None:
    requests = [
        stream_request(range(1, 5 + 7 * index), 20 + index, temperature=0.5 * (index % 2), seed=index)
        for index in range(24)
    ]
    async with Services(max_num_seqs=7, max_num_batched_tokens=64) as services:
        outputs = await asyncio.gather(*map(services.stream, requests))
    assert [output.token_ids for output in outputs] == [true_tokens(request) for request in requests]


async def test_each_choice_draws_its_own_numbers() -> None:
    request = stream_request([5] * 40, 12, temperature=1.0, seed=7, num_choices=5)
    async with Services() as services:
        streamed, unary = await services.stream(request), await services.generate(request)
    expected = [true_tokens(request, choice_index=index) for index in range(5)]
    assert len({tuple(tokens) for tokens in expected}) == 5
    assert [streamed.choices[index].token_ids for index in range(5)] == expected
    assert [list(choice.token_ids) for choice in unary.choices] == expected
    assert [choice.choice_index for choice in unary.choices] == list(range(5))
    assert streamed.usage.num_output_tokens == unary.usage.num_output_tokens == 60
    assert streamed.usage.num_prompt_tokens == 40
    assert unary.usage.num_cached_tokens == 5 * 32


async def test_a_missing_seed_derives_from_the_request_id() -> None:
    first, second = (stream_request(temperature=1.0, request_id=name) for name in ("first", "second"))
    async with Services() as services:
        outputs = [await services.stream(request) for request in (first, first, second)]
    assert [output.token_ids for output in outputs] == [true_tokens(request) for request in (first, first, second)]
    assert outputs[1].token_ids != outputs[2].token_ids


async def test_request_ids_are_given_back_or_made() -> None:
    async with Services() as services:
        named = await services.stream(stream_request(request_id="mine"))
        made = [await services.generate(stream_request()) for _ in range(2)]
    assert {message.request_id for message in named.messages} == {"mine"}
    assert made[0].request_id and made[0].request_id != made[1].request_id


async def test_left_out_parameters_take_the_models_defaults_then_the_apis() -> None:
    bare = stream_request(temperature=None, request_id="r")
    as_greedy, as_random = stream_request(), stream_request(temperature=1.0, request_id="r")
    async with Services() as services:
        assert (await services.stream(bare)).token_ids == true_tokens(as_random)
    async with Services(FakeRunner(model_info(sampling_defaults={"temperature": 0.0}))) as services:
        assert (await services.stream(bare)).token_ids == true_tokens(as_greedy)
        assert (await services.stream(as_random)).token_ids == true_tokens(as_random)


async def test_left_out_max_tokens_is_what_the_context_has_left() -> None:
    async with Services(FakeRunner(model_info(max_model_len=100))) as services:
        output = await services.stream(stream_request([1] * 70, None))
    assert len(output.token_ids) == 30
    assert output.choices[0].finish == inference_pb2.Finish(reason=LENGTH)


async def test_a_stop_string_may_be_part_of_the_text_and_waits_for_min_tokens(tokenizer: Tokenizer) -> None:
    expected = true_tokens(stream_request(max_tokens=200))
    text, stop, num_tokens = spanning_stop(tokenizer, expected)
    changes = {"max_tokens": 200, "stop_strings": [stop]}
    async with Services() as services:
        included = await services.generate(stream_request(include_stop_string=True, **changes))
        at_last = await services.generate(stream_request(min_tokens=num_tokens - 1, **changes))
        later = await services.generate(stream_request(min_tokens=num_tokens, **changes))
    assert included.choices[0].text == text + stop and at_last.choices[0].text == text
    for output in (included, at_last):
        assert output.choices[0].finish.stop_string == stop and output.usage.num_output_tokens == num_tokens
    assert later.choices[0].text.startswith(text + stop) and later.usage.num_output_tokens > num_tokens


async def test_the_models_defaults_are_shown() -> None:
    defaults = {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.5}
    async with Services(FakeRunner(model_info(sampling_defaults=defaults))) as services:
        info = await services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert info.default_sampling == inference_pb2.SamplingParams(**defaults)


async def test_the_models_end_token_stops_unless_ignored(tokenizer: Tokenizer) -> None:
    plain = stream_request(max_tokens=30)
    expected = true_tokens(plain)
    eos = expected[6]
    first = expected.index(eos)
    async with Services(FakeRunner(model_info(eos_token_ids=(eos,)))) as services:
        stopped = await services.stream(stream_request(max_tokens=30, ignore_eos=None))
        ignored = await services.stream(plain)
    assert stopped.token_ids == expected[: first + 1]
    assert stopped.choices[0].finish == inference_pb2.Finish(reason=STOP, stop_token_id=eos)
    # The stop token is among the token ids, and its text is not in the text.
    assert stopped.choices[0].text == tokenizer.decode(expected[:first])
    assert stopped.usage.num_output_tokens == first + 1
    assert ignored.token_ids == expected


async def test_a_stop_token_of_the_request_stops() -> None:
    expected = true_tokens(stream_request(max_tokens=30))
    stop = expected[4]
    async with Services() as services:
        output = await services.generate(stream_request(max_tokens=30, stop_token_ids=[stop, 3]))
    [choice] = output.choices
    assert list(choice.token_ids) == expected[: expected.index(stop) + 1]
    assert choice.finish == inference_pb2.Finish(reason=STOP, stop_token_id=stop)


async def test_a_stop_string_across_tokens_cuts_the_text_and_the_tokens(tokenizer: Tokenizer) -> None:
    plain = stream_request(max_tokens=200)
    expected = true_tokens(plain)
    text, stop, num_tokens = spanning_stop(tokenizer, expected)
    request = stream_request(max_tokens=200, stop_strings=["never in there", stop])
    async with Services(max_plans_in_flight=2) as services:
        streamed, unary = await services.stream(request), await services.generate(request)
        load = await services.load()
    for output in (streamed.choices[0], unary.choices[0]):
        assert output.text == text
        assert list(output.token_ids) == expected[:num_tokens]
        assert output.finish == inference_pb2.Finish(reason=STOP, stop_string=stop)
    # Tokens that plans in flight computed past the stop count as overshoot and nowhere else.
    assert streamed.usage.num_output_tokens == num_tokens
    assert load.num_output_tokens == 2 * num_tokens
    assert load.num_overshoot_tokens > 0


def spanning_stop(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[str, str, int]:
    """A string that two tokens of an output form together, the text before it, and how many tokens it takes."""
    for count in range(10, len(token_ids)):
        before, text = tokenizer.decode(token_ids[: count - 1]), tokenizer.decode(token_ids[:count])
        stop = text[len(before) - 2 : len(before) + 1]
        is_clean = stop.isascii() and len(stop) == 3 and text.startswith(before)
        if is_clean and text.find(stop) == len(before) - 2:
            return text[: len(before) - 2], stop, count
    raise AssertionError("no such string in the output")


async def test_a_stop_string_in_the_last_token_wins_over_the_length(tokenizer: Tokenizer) -> None:
    expected = true_tokens(stream_request(max_tokens=200))
    _, stop, num_tokens = spanning_stop(tokenizer, expected)
    async with Services() as services:
        output = await services.generate(stream_request(max_tokens=num_tokens, stop_strings=[stop]))
    assert output.choices[0].finish == inference_pb2.Finish(reason=STOP, stop_string=stop)
    assert output.usage.num_output_tokens == num_tokens


async def test_a_held_back_start_of_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    expected = true_tokens(stream_request())
    text = tokenizer.decode(expected)
    async with Services() as services:
        output = await services.generate(stream_request(stop_strings=[text[-2:] + "more"]))
    assert output.choices[0].text == text
    assert output.choices[0].finish == inference_pb2.Finish(reason=LENGTH)


async def test_a_prompt_of_40000_tokens_passes_as_ids_and_as_text(tokenizer: Tokenizer) -> None:
    text = "Good morrow, cousin. " * 8_000
    runner = FakeRunner(model_info(max_model_len=200_000, num_blocks=13_000))
    async with Services(runner) as services:
        prompt_ids = (await services.inference.Tokenize(inference_pb2.TokenizeRequest(text=text))).token_ids
        assert len(prompt_ids) >= 40_000 and list(prompt_ids) == tokenizer.encode(text).ids
        by_ids = await services.generate(stream_request(prompt_ids, 3))
        by_text = await services.generate(stream_request(text, 3))
    assert list(by_ids.choices[0].token_ids) == true_tokens(stream_request(prompt_ids, 3))
    assert by_text.choices == by_ids.choices
    assert by_text.usage.num_prompt_tokens == len(prompt_ids)


async def test_tokenize_and_detokenize(tokenizer: Tokenizer) -> None:
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    async with Services() as services:
        tokens = await services.inference.Tokenize(inference_pb2.TokenizeRequest(text=TEXT, model=MODEL))
        text = await services.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
        special = [
            await services.inference.Detokenize(
                inference_pb2.DetokenizeRequest(token_ids=[end_of_text], skip_special_tokens=skip)
            )
            for skip in (True, False)
        ]
    assert list(tokens.token_ids) == tokenizer.encode(TEXT).ids
    assert text.text == TEXT
    assert [response.text for response in special] == ["", "<|endoftext|>"]


async def test_a_full_queue_refuses_with_advice_and_keeps_no_choice() -> None:
    gate = threading.Semaphore(0)
    async with Services(FakeRunner(model_info(), gate=gate), max_num_waiting=4, max_num_seqs=1) as services:
        running = StreamedOutput()
        task = asyncio.create_task(read_stream(services.inference.GenerateStream(stream_request()), running))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        # These are more than may ever wait, so trying again would not help.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(stream_request(num_choices=5))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "num_choices" in violations(caught.value)
        waiting = asyncio.create_task(services.stream(stream_request(num_choices=3)))
        await services.wait_load(lambda load: load.num_waiting_sequences == 3, "three wait")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(stream_request(num_choices=2))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay_s(caught.value) > 0
        assert (await services.load()).num_waiting_sequences == 3
        gate.release(1000)
        await task
        assert len((await waiting).choices) == 3
    assert running.token_ids == true_tokens(stream_request())


async def test_a_live_request_id_is_refused_and_runs_anew_afterwards() -> None:
    gate = threading.Semaphore(0)
    request = stream_request(request_id="twice")
    async with Services(FakeRunner(model_info(), gate=gate)) as services:
        first = asyncio.create_task(services.stream(request))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "the first runs")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.stream(request)
        assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
        gate.release(1000)
        outputs = [await first, await services.stream(request)]
    assert [output.token_ids for output in outputs] == [true_tokens(request)] * 2


@pytest.mark.parametrize(
    ("fault", "status", "field"),
    [
        (FAULT_NAN_LOGITS, grpc.StatusCode.INTERNAL, None),
        (FAULT_GRAMMAR, grpc.StatusCode.INVALID_ARGUMENT, "structured_output"),
        (FAULT_NO_TOKEN, grpc.StatusCode.INVALID_ARGUMENT, "sampling"),
    ],
)
async def test_a_row_fault_ends_one_request_and_no_other(
    fault: int, status: grpc.StatusCode, field: str | None
) -> None:
    gate = threading.Semaphore(0)
    runner = FakeRunner(model_info(), gate=gate)
    # The second sequence that the engine was ever given.
    runner.faulty.add(1)
    runner.fault_codes[1] = fault
    good, bad = stream_request(range(1, 30), 20), stream_request(num_logprobs=2)
    async with Services(runner) as services:
        running = asyncio.create_task(services.stream(good))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "the good one runs")
        failing = asyncio.create_task(services.stream(bad))
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "the bad one has come"
        )
        gate.release(1000)
        assert (await running).token_ids == true_tokens(good)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await failing
        assert (await services.load()).num_worker_losses == 0
    assert caught.value.code() == status
    assert field is None or f"{field}: " in (caught.value.details() or "")
