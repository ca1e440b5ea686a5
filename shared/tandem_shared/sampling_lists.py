"""What a request may ask of sampling beside numbers: lists, nearly all of which are empty for nearly all rows.

sampling_fields.py has the numbers. worker.proto says what the fields of these classes mean. Knows neither numpy nor
torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tandem_shared.sampling_fields import MAX_LOGPROBS, RowSampling

MAX_LOGIT_BIAS = 1024
"""The most tokens of a request that have a bias."""
BIAS_LIMIT = 100.0
"""A bias is in [-100, 100], as in OpenAI's API."""
MAX_ALLOWED_TOKEN_IDS = 16_384
MAX_BAD_WORDS = 256
"""The most token sequences that a row's output must not contain. A bad word of a request is up to two of them."""
MAX_BAD_WORD_TOKENS = 32
MAX_LOGPROB_TOKEN_IDS = MAX_LOGPROBS
MAX_STOP_TOKEN_IDS = 256
"""The most stop tokens of a row, end-of-sequence tokens included."""
MAX_GRAMMAR_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output must match."""

    text: str
    """In the form that llguidance reads: see structured_output.py"""
    start_after_token_id: int | None = None
    """The output is free up to and with the first such token; None constrains it from its first token on."""
    ignore_eos: bool = False
    """End-of-sequence tokens are possible only where nothing else is."""


@dataclass(frozen=True, slots=True)
class SamplingLists:
    """The lists of a row. The defaults change nothing and report nothing."""

    stop_token_ids: tuple[int, ...] = ()
    """The tokens that are impossible before min_tokens"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit"""
    allowed_token_ids: tuple[int, ...] = ()
    """The only possible tokens; empty allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output must not contain"""
    logprob_token_ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are reported in every place"""
    grammar: Grammar | None = None

    def __bool__(self) -> bool:
        # Nearly all rows have the very object, which spares the comparison of the fields.
        return self is not NO_LISTS and self != NO_LISTS


NO_LISTS = SamplingLists()


def has_penalty(sampling: RowSampling) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1


def adjusts_logits(sampling: RowSampling, lists: SamplingLists) -> bool:
    """Whether a row's tokens are sampled from other logits than the model's."""
    return (
        has_penalty(sampling)
        or (sampling.min_tokens > 0 and bool(lists.stop_token_ids))
        or bool(lists.logit_bias or lists.allowed_token_ids or lists.bad_words)
        or lists.grammar is not None
    )


def problems(lists: SamplingLists, vocab_size: int) -> Iterator[str]:
    """What is wrong with a row's lists, for a worker. Lengths come first; nothing too long is read."""
    for name, most in _MOST.items():
        if len(getattr(lists, name)) > most:
            yield f"{name} has more than {most} entries"
            return
    if any(not 1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in lists.bad_words):
        yield f"bad_words has a word that is not of 1 to {MAX_BAD_WORD_TOKENS} tokens"
        return
    ids = [*lists.stop_token_ids, *lists.allowed_token_ids, *lists.logprob_token_ids]
    ids += [token_id for token_id, _ in lists.logit_bias]
    ids += [token_id for word in lists.bad_words for token_id in word]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        yield "a list has a token id outside the vocabulary"
    if any(not -BIAS_LIMIT <= bias <= BIAS_LIMIT for _, bias in lists.logit_bias):
        yield f"logit_bias has a bias outside [-{BIAS_LIMIT:g}, {BIAS_LIMIT:g}]"
    if len({token_id for token_id, _ in lists.logit_bias}) < len(lists.logit_bias):
        yield "logit_bias has a token twice"
    if lists.grammar is not None and len(lists.grammar.text) > MAX_GRAMMAR_BYTES:
        yield f"the grammar has more than {MAX_GRAMMAR_BYTES} characters"


_MOST = {
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "logit_bias": MAX_LOGIT_BIAS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
    "logprob_token_ids": MAX_LOGPROB_TOKEN_IDS,
}
