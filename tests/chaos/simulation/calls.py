"""Calls of clients in virtual time: random requests, their true answers, and checks of the answers that come.

The true answers follow from the fake worker's rule for the next token and from truths.py, without any code of the
scheduler.
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
from tests.chaos.simulation.logprobs import check_logprobs, check_prompt_logprobs, num_prompt_reports
from tests.chaos.simulation.truths import ABORT, LENGTH, Truth, check, make_truth
from tests.chaos.simulation.wishes import VOCAB_SIZE, add_wishes, lists_of, sampling_of
from tests.chaos.simulation.worker import FLAWS, Flaw, now
from tests.support.builders import create_request
from tests.support.fake_worker import expected_tokens

PREFIXES = ((), (), (1,) * 4, (1,) * 16, (1,) * 15 + (2,), (1,) * 32)


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
    add_wishes(rng, request)
    outputs = _raw_outputs(request, tokenizer)
    if rng.random() < 0.2:
        request.stopping.stop_token_ids.extend(rng.choices(rng.choice(outputs), k=2))
        # With min_tokens the stop tokens are impossible for a while.
        outputs = _raw_outputs(request, tokenizer)
    if rng.random() < 0.25:
        request.stopping.include_stop_string = rng.random() < 0.3
        request.stopping.stop_strings.extend(_random_stops(rng, _decode(tokenizer, rng.choice(outputs), request)))
    truths = [
        make_truth(
            output,
            tokenizer,
            stop_token_ids=request.stopping.stop_token_ids,
            stop_strings=request.stopping.stop_strings,
            min_tokens=request.stopping.min_tokens,
            include_stop_string=request.stopping.include_stop_string,
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
        self._num_reported = 0

    async def stream(self, servicer: InferenceServicer, pause: Any) -> None:
        """Streams the answer, with pause between messages. Raises WrongAnswer, or the error that ends the call."""
        async with contextlib.aclosing(servicer.GenerateStream(self.asked.message, _Context(self))) as messages:  # type: ignore[arg-type,type-var]
            async for message in messages:
                self._add_prompt(message.prompt_logprobs)
                self._add(message.choice_index, message, message.text_delta)
                if message.HasField("usage"):
                    self._usage = message.usage
                await pause()
        self._check_all()

    async def ask(self, servicer: InferenceServicer) -> None:
        """Gets the answer by a unary call."""
        request = inference_pb2.GenerateRequest.FromString(self.asked.message.SerializeToString())
        reply = inference_pb2.GenerateResponse.FromString(await servicer.Generate(request, _Context(self)))  # type: ignore[arg-type]
        self._add_prompt(reply.prompt_logprobs)
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
            "stop string in the text": request.stopping.include_stop_string and bool(request.stopping.stop_strings),
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
        """Raises WrongAnswer if the text that came is not a beginning of the true text. A choice that has ended was
        checked then; if it was aborted, an incomplete character may be the end of its text.
        """
        for choice, truth in zip(self._choices, self.asked.truths, strict=True):
            if choice.finish is not None:
                continue
            check(truth.text.startswith(choice.text), f"text {choice.text!r}, not {truth.text!r}")

    def _add_prompt(self, reports: Sequence[inference_pb2.TokenLogprob]) -> None:
        check_prompt_logprobs(reports, self.asked.message, self._num_reported)
        self._num_reported += len(reports)

    def _add(self, index: int, message: Any, text: str) -> None:
        choice, truth = self._choices[index], self.asked.truths[index]
        check(choice.finish is None, f"news of choice {index} after its end")
        check(self._usage is None, "news after the usage")
        choice.tokens.extend(message.token_ids)
        choice.text += text
        known = truth.tokens[: len(choice.tokens)]
        check(choice.tokens == known, f"choice {index}: tokens {choice.tokens}, not {known}")
        check_logprobs(message, self.asked.message)
        if index == 0 and choice.tokens:
            due = num_prompt_reports(self.asked.message)
            check(self._num_reported == due, f"a token after {self._num_reported} of {due} prompt log-probabilities")
        if message.HasField("finish"):
            choice.finish = message.finish
            self._check_finish(index)

    def _check_finish(self, index: int) -> None:
        choice, truth = self._choices[index], self.asked.truths[index]
        finish = choice.finish
        assert finish is not None
        if finish.reason == ABORT and self.is_aborted:
            text = _decode(self._tokenizer, choice.tokens, self.asked.message)
            check(choice.text == text, f"choice {index}: aborted with text {choice.text!r}, not {text!r}")
            return
        got = (
            finish.reason,
            finish.stop_string,
            finish.stop_token_id if finish.HasField("stop_token_id") else None,
        )
        check(got == truth.finish, f"choice {index}: finish {got}, not {truth.finish}")
        check(choice.tokens == truth.tokens, f"choice {index}: {len(choice.tokens)} of {len(truth.tokens)} tokens")
        check(choice.text == truth.text, f"choice {index}: text {choice.text!r}, not {truth.text!r}")

    def _check_all(self) -> None:
        self.is_answered = True
        check(all(choice.finish is not None for choice in self._choices), "a choice has no end")
        check(self._usage is not None, "no usage")
        assert self._usage is not None
        num_prompt_tokens = len(self.asked.message.prompt.token_ids.ids)
        got = (self._usage.num_prompt_tokens, self._usage.num_output_tokens)
        expected = (num_prompt_tokens, sum(len(choice.tokens) for choice in self._choices))
        check(got == expected, f"usage {got}, not {expected}")
        check(self._usage.num_cached_tokens <= num_prompt_tokens * len(self._choices), "too many cached tokens")


class _Context:
    """The methods of a call's context that the servicer uses."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def invocation_metadata(self) -> None:
        return None

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    def time_remaining(self) -> float | None:
        return None if self._call.deadline is None else self._call.deadline - now()
