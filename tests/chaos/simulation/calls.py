"""Calls of clients in virtual time: random requests, their true answers, and checks of the answers that come.

The true answers are computed here, from the fake worker's rule for the next token and the tokenizer's decode(), without
any code of the scheduler.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tokenizers import Tokenizer

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.grpc_api.inference_servicer import InferenceServicer
from tandem_scheduler.front_end.text.detokenizer import UNFINISHED
from tandem_shared.step_plan import WorkerInfo
from tests.chaos.simulation.front_end import SimulatedFrontEnd
from tests.chaos.simulation.wishes import add_wishes, lists_of, sampling_of
from tests.chaos.simulation.worker import FLAWS, Flaw, now
from tests.support.builders import create_request
from tests.support.fake_worker import expected_tokens

VOCAB_SIZE = 1024
"""The vocabulary size of the embedded model's tokenizer."""

PREFIXES = ((), (), (1,) * 4, (1,) * 16, (1,) * 15 + (2,), (1,) * 32)

STOP, LENGTH, ABORT = (
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
    inference_pb2.FINISH_REASON_ABORT,
)


class WrongAnswer(Exception):
    """An answer that differs from its request's true answer."""


@dataclass(frozen=True)
class Truth:
    """The true answer of a choice. finish is (reason, stop string, stop token id); the string is empty and the id None
    if it did not end so.
    """

    tokens: list[int]
    text: str
    finish: tuple[int, str, int | None]
    num_counted: int | None
    """The number of output tokens if a stop string ends the choice, which the engine learns late; None otherwise"""


@dataclass
class Asked:
    """A request. Its serial number is unique and is its seed, which tells the request of each of the worker's rows."""

    serial: int
    message: inference_pb2.GenerateStreamRequest
    truths: list[Truth]
    flaw: Flaw | None = None
    flawed_choice: int = 0

    @property
    def num_tokens(self) -> int:
        """The most tokens that prompt and output may have together."""
        return len(self.message.prompt.token_ids.ids) + self.message.stopping.max_tokens


def make_request(rng: Random, serial: int, request_id: str, worker: WorkerInfo, tokenizer: Tokenizer) -> Asked:
    """A random request, which fits the worker most of the time."""
    prompt = [*rng.choice(PREFIXES), *(rng.randint(1, 2) for _ in range(rng.randrange(18)))] or [1]
    request = inference_pb2.GenerateStreamRequest(request_id=request_id, priority=rng.choice([0, 0, 0, 1, -1]))
    request.prompt.token_ids.ids.extend(prompt)
    request.sampling.temperature = rng.choice([0.0, 0.0, 0.7])
    request.sampling.seed = serial
    max_tokens = rng.choice([1, 2, 5, 10, 20, 40, 40])
    room = min(worker.max_model_len, worker.num_blocks * worker.block_size) - len(prompt)
    request.stopping.max_tokens = max_tokens if rng.random() < 0.05 else max(1, min(max_tokens, room))
    request.cache_salt = rng.choice(["", "", "", "other"])
    request.output.skip_special_tokens = rng.random() < 0.8
    if rng.random() < 0.2:
        request.num_choices = rng.randint(2, 4)
    if rng.random() < 0.2:
        request.output.num_logprobs = rng.randrange(4)
    add_wishes(rng, request, VOCAB_SIZE)
    outputs = _raw_outputs(request, tokenizer)
    if rng.random() < 0.2:
        request.stopping.stop_token_ids.extend(rng.choices(rng.choice(outputs), k=2))
        # With min_tokens the stop tokens are impossible for a while.
        outputs = _raw_outputs(request, tokenizer)
    if rng.random() < 0.25 and not request.stopping.min_tokens:
        request.stopping.stop_strings.extend(_random_stops(rng, _decode(tokenizer, rng.choice(outputs), request)))
    truths = [
        make_truth(
            output,
            tokenizer,
            stop_token_ids=request.stopping.stop_token_ids,
            stop_strings=request.stopping.stop_strings,
            skip_special_tokens=request.output.skip_special_tokens,
        )
        for output in outputs
    ]
    asked = Asked(serial, request, truths)
    if rng.random() < 0.04:
        kind = rng.choice(FLAWS)
        asked.flawed_choice = rng.randrange(len(outputs))
        late = 0 if rng.random() < 0.7 else rng.randrange(len(asked.truths[asked.flawed_choice].tokens))
        asked.flaw = Flaw(kind, len(prompt) + late)
    return asked


def _raw_outputs(request: inference_pb2.GenerateStreamRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """The max_tokens output tokens of each choice that come if no stop condition applies."""
    prompt, max_tokens, lists = request.prompt.token_ids.ids, request.stopping.max_tokens, lists_of(request, tokenizer)
    return [
        expected_tokens(
            create_request(0, prompt, max_tokens, sampling=sampling_of(request, index), lists=lists),
            vocab_size=VOCAB_SIZE,
        )
        for index in range(request.num_choices or 1)
    ]


def _random_stops(rng: Random, text: str) -> list[str]:
    start = rng.randrange(len(text) + 1)
    piece = text[start : start + rng.randint(1, 6)].partition(UNFINISHED)[0]
    return [*filter(None, [piece, rng.choice(["", "never", text[start : start + 2] + "~"])])] or ["never"]


def _decode(tokenizer: Tokenizer, tokens: list[int], request: inference_pb2.GenerateStreamRequest) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=request.output.skip_special_tokens)
    return text


def make_truth(
    output: list[int],
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    skip_special_tokens: bool,
) -> Truth:
    """The true answer of a choice. output: the tokens that come if no stop condition applies."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    length = next((i + 1 for i, token_id in enumerate(output) if token_id in stop_token_ids), len(output))
    output = output[:length]
    stop_id = output[-1] if output[-1] in stop_token_ids else None
    spoken = output if stop_id is None else output[:-1]
    for count in range(1, len(spoken) + 1) if stop_strings else ():
        text = decode(spoken[:count])
        # A token that ends in the middle of a character has no text yet.
        if not text.endswith(UNFINISHED) and (found := _first_stop(text, stop_strings)):
            return Truth(output[:count], text[: text.index(found)], (STOP, found, None), count)
    text = decode(spoken)
    if found := _first_stop(text, stop_strings):
        return Truth(output, text[: text.index(found)], (STOP, found, None), None)
    return Truth(output, text, (LENGTH if stop_id is None else STOP, "", stop_id), None)


def _first_stop(text: str, stops: Sequence[str]) -> str:
    """The stop string that is complete first, the longest if there are several; empty for none."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return min(found)[2] if found else ""


@dataclass
class Choice:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: inference_pb2.Finish | None = None


class Call:
    """A call under way, whose messages are compared with the true answer as they come."""

    def __init__(
        self,
        asked: Asked,
        tokenizer: Tokenizer,
        front_end: SimulatedFrontEnd,
        *,
        may_share_id: bool,
        deadline: float | None,
    ) -> None:
        """may_share_id: another call, which may be live, has the same request id. deadline: in virtual seconds."""
        self.asked = asked
        self.front_end = front_end
        self.may_share_id = may_share_id
        self.deadline = deadline
        self.started_at = now()
        self.task: asyncio.Task[None] | None = None
        self.is_admitted = self.is_aborted = self.is_ended = self.is_answered = False
        """is_admitted: the worker has had a row of it. is_answered: its whole answer came."""
        self._tokenizer = tokenizer
        self._choices = [Choice() for _ in asked.truths]
        self._usage: inference_pb2.Usage | None = None

    async def stream(self, servicer: InferenceServicer, pause: Any) -> None:
        """Streams the answer, with pause between messages. Raises WrongAnswer, or the error that ends the call."""
        async with contextlib.aclosing(servicer.GenerateStream(self.asked.message, _Context(self))) as messages:  # type: ignore[arg-type,type-var]
            async for message in messages:
                self._add(message.choice_index, message, message.text_delta)
                if message.HasField("usage"):
                    self._usage = message.usage
                await pause()
        self._check_all()

    async def ask(self, servicer: InferenceServicer) -> None:
        """Gets the answer by a unary call."""
        request = inference_pb2.GenerateRequest.FromString(self.asked.message.SerializeToString())
        reply = inference_pb2.GenerateResponse.FromString(await servicer.Generate(request, _Context(self)))  # type: ignore[arg-type]
        for choice in reply.choices:
            self._add(choice.choice_index, choice, choice.text)
        self._usage = reply.usage
        self._check_all()

    @property
    def features(self) -> Counter[str]:
        """The features that an answer exercised: how its choices ended, and what was asked for."""
        request, finishes = self.asked.message, [choice.finish for choice in self._choices if choice.finish is not None]
        has = {
            "stop string": any(finish.stop_string for finish in finishes),
            "stop id": any(finish.HasField("stop_token_id") for finish in finishes),
            "length": any(finish.reason == LENGTH for finish in finishes),
            "abort": any(finish.reason == ABORT for finish in finishes),
            "several choices": len(finishes) > 1,
            "log-probabilities": request.output.HasField("num_logprobs"),
            "salt": bool(request.cache_salt),
            "priority": bool(request.priority),
            "seeded": request.sampling.temperature > 0,
            "penalties": request.sampling.HasField("presence_penalty")
            or request.sampling.HasField("repetition_penalty"),
            "lists": bool(
                request.sampling.logit_bias or request.sampling.bad_words or request.sampling.allowed_token_ids
            ),
            "min_tokens": request.stopping.min_tokens > 0,
            "prompt log-probabilities": request.output.HasField("num_prompt_logprobs"),
        }
        return Counter(f"answered: {feature}" for feature, is_there in has.items() if is_there)

    @property
    def is_told_its_stop(self) -> bool:
        """Whether all tokens up to its one choice's stop string came, so that only the finish is missing."""
        [truth, *others] = self.asked.truths
        return not others and truth.num_counted is not None and self._choices[0].tokens == truth.tokens

    def check_beginning(self) -> None:
        """Raises WrongAnswer if the text that came is not a beginning of the true text."""
        for choice, truth in zip(self._choices, self.asked.truths, strict=True):
            _check(truth.text.startswith(choice.text), f"text {choice.text!r}, not {truth.text!r}")

    def _add(self, index: int, message: Any, text: str) -> None:
        choice, truth = self._choices[index], self.asked.truths[index]
        _check(choice.finish is None, f"news of choice {index} after its end")
        _check(self._usage is None, "news after the usage")
        choice.tokens.extend(message.token_ids)
        choice.text += text
        known = truth.tokens[: len(choice.tokens)]
        _check(choice.tokens == known, f"choice {index}: tokens {choice.tokens}, not {known}")
        _check_logprobs(message, self.asked.message)
        if message.HasField("finish"):
            choice.finish = message.finish
            self._check_finish(index)

    def _check_finish(self, index: int) -> None:
        choice, truth = self._choices[index], self.asked.truths[index]
        finish = choice.finish
        assert finish is not None
        if finish.reason == ABORT and self.is_aborted:
            text = _decode(self._tokenizer, choice.tokens, self.asked.message)
            _check(choice.text == text, f"choice {index}: aborted with text {choice.text!r}, not {text!r}")
            return
        got = (
            finish.reason,
            finish.stop_string,
            finish.stop_token_id if finish.HasField("stop_token_id") else None,
        )
        _check(got == truth.finish, f"choice {index}: finish {got}, not {truth.finish}")
        _check(choice.tokens == truth.tokens, f"choice {index}: {len(choice.tokens)} of {len(truth.tokens)} tokens")
        _check(choice.text == truth.text, f"choice {index}: text {choice.text!r}, not {truth.text!r}")

    def _check_all(self) -> None:
        self.is_answered = True
        _check(all(choice.finish is not None for choice in self._choices), "a choice has no end")
        _check(self._usage is not None, "no usage")
        assert self._usage is not None
        num_prompt_tokens = len(self.asked.message.prompt.token_ids.ids)
        got = (self._usage.num_prompt_tokens, self._usage.num_output_tokens)
        expected = (num_prompt_tokens, sum(len(choice.tokens) for choice in self._choices))
        _check(got == expected, f"usage {got}, not {expected}")
        _check(self._usage.num_cached_tokens <= num_prompt_tokens * len(self._choices), "too many cached tokens")


def _check_logprobs(message: Any, request: inference_pb2.GenerateStreamRequest) -> None:
    """Checks for the log-probabilities that the fake worker reports: the token itself and the ids after it."""
    if not (request.output.HasField("num_logprobs") or request.output.logprob_token_ids):
        _check(not message.logprobs, "log-probabilities that nobody asked for")
        return
    count = request.output.num_logprobs
    expected = [
        (token_id, -0.5, [((token_id + i) % VOCAB_SIZE, -0.5 - i) for i in range(count)])
        for token_id in message.token_ids
    ]
    got = [
        (each.token_id, each.logprob, [(top.token_id, top.logprob) for top in each.top]) for each in message.logprobs
    ]
    _check(got == expected, f"log-probabilities {got}, not {expected}")


class _Context:
    """The methods of a call's context that the servicer uses."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def invocation_metadata(self) -> None:
        return None

    def time_remaining(self) -> float | None:
        return None if self._call.deadline is None else self._call.deadline - now()


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongAnswer(what)
