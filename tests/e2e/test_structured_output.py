"""Outputs have the form that was asked for, as Python's own judges see it, while the KV pool is too small for all
requests, half of the replies are streamed, and the worker is killed.
"""

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tandem import SamplingParams, StructuredOutput
from tandem.client import TandemClient
from tandem.v1 import inference_pb2
from tandem_shared.errors import InvalidRequest
from tests.e2e.conftest import StartEngine
from tests.e2e.services import Engine
from tests.e2e.waiting import wait_until
from tests.support.output_forms import FORMS, Form

NUM_CLIENTS = 24
NUM_SHORT = 60
MAX_TOKENS = 700
LINE_BREAK, FULL_STOP = 198, 13
"""Tokens of the embedded model"""
STOP = inference_pb2.FINISH_REASON_STOP


@dataclass(frozen=True)
class Output:
    form: Form
    text: str
    reason: int


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine(
        "embedded",
        dtype="float32",
        worker_flags=["--num-blocks", "97", "--max-num-seqs", str(NUM_CLIENTS)],
        scheduler_flags=["--step-timeout-s", "20"],
    )


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TandemClient]:
    client = TandemClient(engine.scheduler.address)
    yield client
    client.close()


def generate(client: TandemClient, number: int) -> Output:
    """Every second output is streamed, and some ask for more than their form."""
    form, rng = FORMS[number % len(FORMS)], random.Random(number)
    params = SamplingParams(
        seed=number,
        max_tokens=MAX_TOKENS,
        temperature=rng.choice([0.5, 1.0]),
        top_k=rng.choice([None, 0, 20]),
        ignore_eos=rng.random() < 0.3,
        min_tokens=rng.choice([None, 5]),
        presence_penalty=rng.choice([None, None, 0.5]),
        logprobs=rng.choice([None, None, 2]),
        # A line break may bring 40 spaces. Without line breaks there is more output in the time of a quick test.
        logit_bias=None if number >= NUM_SHORT and rng.random() < 0.5 else {LINE_BREAK: -20.0},
        structured_outputs=form.output,
    )
    prompt = f"Question {number}:\n" + "Speak, speak. " * rng.randrange(20) + "\nAnswer:"
    if number % 2:
        choice = client.generate(prompt, params).choices[0]
        return Output(form, choice.text, choice.finish.reason)
    parts = list(client.generate_stream(prompt, params))
    return Output(form, "".join(part.text_delta for part in parts), parts[-1].finish.reason)


def check(outputs: list[Output], least_share: float = 0.99) -> None:
    """At least this share of the outputs has ended before max_tokens, and all of those have their form."""
    stopped = [output for output in outputs if output.reason == STOP]
    assert not [(output.form.name, output.text) for output in stopped if not output.form.is_valid(output.text)]
    assert len(stopped) >= least_share * len(outputs), [it.form.name for it in outputs if it.reason != STOP]


def test_outputs_have_their_forms(engine: Engine, client: TandemClient) -> None:
    assert len(FORMS) >= 30
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        check(list(clients.map(lambda number: generate(client, number), range(NUM_SHORT))))
    assert engine.load().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_outputs_have_their_forms_though_workers_are_killed(engine: Engine, client: TandemClient) -> None:
    load = engine.load()
    outputs: list[Output] = []
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        running = [clients.submit(generate, client, number) for number in range(1000)]
        for num_done in (100, 300, 600):
            wait_until(lambda: sum(call.done() for call in running) >= num_done, "outputs", 600)  # noqa: B023
            engine.worker.serving().kill()
        outputs = [call.result(timeout=600) for call in running]
    check(outputs)
    assert engine.load().num_preemptions > load.num_preemptions
    assert engine.load().num_worker_losses >= load.num_worker_losses + 3


def test_a_form_may_begin_after_the_thinking(client: TandemClient) -> None:
    """The embedded model does not think, so a sentence stands for that."""
    params = SamplingParams(
        seed=1,
        max_tokens=200,
        ignore_eos=True,
        structured_outputs=StructuredOutput(regex="[a-z]{3} [0-9]{3}", start_after_token_id=FULL_STOP),
    )
    choice = client.generate("ROMEO:\n", params).choices[0]
    assert list(choice.token_ids).index(FULL_STOP) > 0 and choice.finish.reason == STOP
    thinking, _, answer = choice.text.partition(".")
    assert thinking and re.fullmatch("[a-z]{3} [0-9]{3}", answer)


@pytest.mark.parametrize(
    ("form", "field", "reason"),
    [
        (StructuredOutput(regex="a("), "structured_output.regex", "unclosed group"),
        (StructuredOutput(json={"type": "nope"}), "structured_output.json_schema", "Invalid type"),
        (StructuredOutput(json={"multipleOf": 9999991}), "structured_output.json_schema", "too costly"),
        (StructuredOutput(grammar="start: x"), "structured_output.lark", "unknown name"),
        (StructuredOutput(regex="a", start_after_token_id=5000), "structured_output.start_after_token_id", "vocabul"),
    ],
)
def test_a_bad_form_is_refused_with_its_reason(
    client: TandemClient, form: StructuredOutput, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("x", SamplingParams(structured_outputs=form))
    [violation] = caught.value.violations
    assert violation.field == field and reason in violation.description


def test_a_form_that_leaves_no_token_ends_alone(client: TandemClient) -> None:
    other = client.generate_stream("x", SamplingParams(seed=1, max_tokens=60, ignore_eos=True))
    num_tokens = len(next(other).token_ids)
    with pytest.raises(InvalidRequest):
        client.generate("x", SamplingParams(allowed_token_ids=[64], structured_outputs=StructuredOutput(regex="b")))
    assert num_tokens + sum(len(delta.token_ids) for delta in other) == 60
