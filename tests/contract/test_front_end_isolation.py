"""A front-end process that is frozen, killed or left by its clients costs its own requests at most."""

import asyncio
import signal

import grpc
import pytest
from tokenizers import Tokenizer

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.live_request import MAX_TOKENS_PER_DELTA
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tests.contract.front_ends import (
    front_end_processes,
    gated_services,
    reach_a_third,
    running_on,
    two_front_ends,
)
from tests.contract.gated_worker import open_gate
from tests.contract.services import (
    MODEL,
    error_of,
    stream_request,
    true_tokens,
    wait_until,
)
from tests.contract.test_inference import spanning_stop

STOP = inference_pb2.FINISH_REASON_STOP


async def test_a_frozen_front_end_slows_nobody_and_a_stop_found_late_counts_nothing_past_it() -> None:
    tokenizer = Tokenizer.from_file(str(resolve_model(MODEL, TOKENIZER_FILES) / "tokenizer.json"))
    truth = true_tokens(stream_request(max_tokens=200))
    text, stop, num_tokens = spanning_stop(tokenizer, truth)
    request = stream_request(max_tokens=200, stop_strings=[stop], num_logprobs=2)
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        first.process.send_signal(signal.SIGSTOP)
        # The other front end is asked from here on, as this one does not answer.
        open_gate(services.runner)
        assert (await second.stream(stream_request([4, 5], 100))).usage.num_output_tokens == 100

        async def has_ended() -> bool:
            return (await second.load()).num_running_sequences == 0

        await wait_until(has_ended, "the core has ended it, by length")
        first.process.send_signal(signal.SIGCONT)
        output = await task

        async def is_counted() -> bool:
            return (await second.load()).num_output_tokens == 100 + num_tokens

        await wait_until(is_counted, "tokens past the stop count nowhere")
        assert (await second.load()).num_overshoot_tokens == 200 - num_tokens
    [choice] = output.choices.values()
    assert (choice.text, choice.token_ids) == (text, truth[:num_tokens])
    assert len(choice.logprobs) == output.usage.num_output_tokens == num_tokens
    assert choice.finish == inference_pb2.Finish(reason=STOP, stop_string=stop)


async def test_steps_that_a_frozen_front_end_misses_reach_it_merged() -> None:
    # Log-probabilities fill the socket; from then on outputs gather in the scheduler process.
    request = stream_request(max_tokens=2000, num_logprobs=20)
    services = gated_services()
    async with two_front_ends(services) as (first, second), running_on(services, first, request) as task:
        first.process.send_signal(signal.SIGSTOP)
        open_gate(services.runner)

        async def has_ended() -> bool:
            return (await second.load()).num_running_sequences == 0

        await wait_until(has_ended, "the core has ended it")
        first.process.send_signal(signal.SIGCONT)
        output = await task
    assert output.token_ids == true_tokens(request)
    assert len(output.choices[0].logprobs) == 2000
    assert max(len(message.token_ids) for message in output.messages) == MAX_TOKENS_PER_DELTA


@pytest.mark.parametrize("ending", ["cancelled", "deadline"])
async def test_a_call_that_goes_away_leaves_nothing_behind(ending: str) -> None:
    request = stream_request([1] * 100, 500, num_choices=3, request_id="mine")
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        call = first.inference.GenerateStream(request, timeout=0.5 if ending == "deadline" else None)
        await services.wait_load(lambda load: load.num_used_blocks > 0, "it runs")
        if ending == "cancelled":
            call.cancel()
        await services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
        open_gate(services.runner)
        again = stream_request([1] * 100, 5, request_id="mine")
        assert (await second.stream(again)).token_ids == true_tokens(again)


async def test_a_killed_front_end_loses_its_own_requests_alone_and_is_replaced() -> None:
    requests = [stream_request([number] * 100, 60, request_id=f"r{number}") for number in range(4)]
    services = gated_services()
    async with two_front_ends(services) as (first, second):
        tasks = [
            asyncio.create_task((first if number % 2 else second).stream(request))
            for number, request in enumerate(requests)
        ]
        await services.wait_load(lambda load: load.num_running_sequences + load.num_waiting_sequences == 4, "all came")
        open_gate(services.runner, 5)
        first.process.kill()

        async def are_gone() -> bool:
            load = await second.load()
            return load.num_running_sequences + load.num_waiting_sequences == 2

        await wait_until(are_gone, "its sequences are gone")
        # 60 tokens after 100 take 10 blocks each.
        assert (await second.load()).num_used_blocks <= 20
        for task in tasks[1::2]:
            assert (await error_of(task)).code() == grpc.StatusCode.UNAVAILABLE
        open_gate(services.runner)
        for task, request in zip(tasks[::2], requests[::2], strict=True):
            assert (await task).token_ids == true_tokens(request)

        async def is_replaced() -> bool:
            return len(front_end_processes()) == 2 and (await reach_a_third(services, [first, second]))

        await wait_until(is_replaced, "a new front end takes calls")
        # The request ids of the dead front end are free.
        assert (await second.stream(requests[1])).token_ids == true_tokens(requests[1])
        assert (await second.load()).num_used_blocks == 0
