"""The true answers of simulated requests, made of the fake worker's tokens and the tokenizer's decode(), without any
code of the scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.text.detokenizer import UNFINISHED

STOP, LENGTH, ABORT = (
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
    inference_pb2.FINISH_REASON_ABORT,
)


class WrongAnswer(Exception):
    """An answer that differs from its request's true answer."""


def check(is_right: bool, what: str) -> None:
    """Raises WrongAnswer."""
    if not is_right:
        raise WrongAnswer(what)


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


def make_truth(
    output: list[int],
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    min_tokens: int = 0,
    include_stop_string: bool = False,
    skip_special_tokens: bool,
) -> Truth:
    """The true answer of a choice. output: the tokens that come if no stop condition applies, with no stop token before
    min_tokens.
    """

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    length = next((i + 1 for i, token_id in enumerate(output) if token_id in stop_token_ids), len(output))
    output = output[:length]
    stop_id = output[-1] if output[-1] in stop_token_ids else None
    spoken = output if stop_id is None else output[:-1]
    # The text in which no stop string ends, as it came before min_tokens.
    num_passed = 0
    for count in range(1, len(spoken) + 1) if stop_strings else ():
        text = decode(spoken[:count])
        # A token that ends in the middle of a character has no text yet.
        if text.endswith(UNFINISHED):
            continue
        if count <= min_tokens:
            num_passed = len(text)
        elif found := _first_stop(text, stop_strings, num_passed):
            stop, end = found
            return Truth(
                output[:count], text[: end if include_stop_string else end - len(stop)], (STOP, stop, None), count
            )
    text = decode(spoken)
    if len(spoken) > min_tokens and (found := _first_stop(text, stop_strings, num_passed)):
        stop, end = found
        return Truth(output, text[: end if include_stop_string else end - len(stop)], (STOP, stop, None), None)
    return Truth(output, text, (LENGTH if stop_id is None else STOP, "", stop_id), None)


def _first_stop(text: str, stops: Sequence[str], after: int) -> tuple[str, int] | None:
    """The stop string that is complete first behind text[:after], the longest if there are several, and its end."""
    found = []
    for stop in stops:
        if (start := text.find(stop, max(0, after - len(stop) + 1))) >= 0:
            found.append((start + len(stop), -len(stop), stop))
    if not found:
        return None
    end, _, stop = min(found)
    return stop, end
