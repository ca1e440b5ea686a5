"""Grammars of outputs: what a request asks for becomes a text for llguidance, and the text a matcher that says which
tokens may come next. The front end checks grammars with this module, and the worker masks logits with it.

llguidance never raises for a grammar that is wrong or too costly. Its matchers enter an error state, in which their
mask allows the end-of-sequence token. So each use of a matcher is followed by a look at is_error().

All limits below count what llguidance does, not time, so that the front end and all ranks of a worker decide alike.
docs/performance-log.md, "what bounds a grammar", says what became of grammars near a limit.

Only this module uses llguidance. Knows no torch.
"""

import contextlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from tandem_shared.model_folder import TOKENIZER_FILE, exists, read_json_bytes
from tandem_shared.rust_panic import is_rust_panic

Matcher: TypeAlias = LLMatcher
"""A grammar and a place in it. It is one thread's at a time."""

WHITESPACE = r" |\n {0,40}"
"""What may stand between the parts of a JSON value. It is bounded, as a model that may go on with spaces may do so."""

MAX_ITEMS_IN_ROW = 500
"""The most parser states after one byte. Ambiguous grammars reach any limit, and each mask before it takes longer than
the one before: with llguidance's default of 2,000 far longer than a step."""
MAX_LEXER_STATES = 20_000
"""The most states of all regular expressions of a matcher and its copies, of 1 to 2 kB each."""
MAX_GRAMMAR_SIZE = 10_000
"""The most symbols of a grammar's rules. A JSON schema of 1,000 properties has fewer, one of 2,000 has more."""
MAX_MULTIPLE_OF = 10_000
"""The limit of the least common multiple of all `multipleOf` of a schema, without decimal point and trailing zeros.
llguidance makes a state for each remainder and has no limit of its own: with 9,999,991 it takes far too long.
"""

MAX_COPIES = 4
"""The most matchers that are copies of one long grammar. llguidance's copies share a lock, so their masks are computed
one after the other, and they share the limit on lexer states. So all rows of a batch must not be copies of one.
"""
MAX_OWN_CHARACTERS = 8192
"""The longest grammar that is compiled for each matcher, so that nothing is shared. Longer ones take too long."""
MAX_CACHED_GRAMMARS = 64
MAX_CACHED_CHARACTERS = 1 << 20
"""The limit of the texts of all cached grammars together."""
MAX_REASON_CHARACTERS = 200

_JSON_OPTIONS: Any = {
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    # A keyword that is not implemented is an error, whatever the schema itself says of that.
    "lenient": False,
}


class GrammarError(Exception):
    """A grammar is wrong, or needs more than the limits. The text is the reason, for the user."""


class _NoJson(GrammarError):
    pass


def json_schema_grammar(schema: str) -> str:
    """A JSON schema as llguidance's text. Raises GrammarError where it is no JSON object or needs too much."""
    _check_multiples(_read_multiples(schema, 0))
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    except ValueError as error:
        raise GrammarError(f"is not a JSON schema: {_first_line(str(error))}") from error


def json_object_grammar() -> str:
    return json_schema_grammar('{"type": "object"}')


def regex_grammar(regex: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


def choice_grammar(texts: Sequence[str]) -> str:
    return _wrapped("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, texts)))


def lark_grammar(lark: str) -> str:
    """Raises GrammarError where a JSON schema within the grammar needs too much."""
    start = 0
    while (start := lark.find("%json", start)) >= 0:
        # The next one may be within this one's value, if this one is part of a text.
        start += len("%json")
        # What is no JSON is part of a text, or llguidance refuses it.
        with contextlib.suppress(_NoJson):
            _check_multiples(_read_multiples(lark, start))
    return _wrapped(lark)


def _wrapped(lark: str) -> str:
    """llguidance's text for a grammar in Lark's format, which by itself may be taken for JSON."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False)


@dataclass
class _Compiled:
    """A grammar that is compiled, or being compiled."""

    matcher: "Future[Matcher]"
    """A matcher at the grammar's start, which is copied"""
    num_copies: int = 0


class GrammarCompiler:
    """Makes matchers for one vocabulary, and keeps what it has compiled last. Its methods may be called from several
    threads.
    """

    def __init__(self, tokenizer_json: bytes, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Loads the vocabulary, which takes long and holds the GIL. vocab_size is the model's, which may be more than
        the tokenizer has. Raises GrammarError where the tokenizer can't be used.
        """
        if not eos_token_ids:
            raise GrammarError("the model has no end-of-sequence token")
        try:
            self._tokenizer = LLTokenizer(tokenizer_json.decode(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except BaseException as error:
            if not isinstance(error, Exception) and not is_rust_panic(error):
                raise
            raise GrammarError(f"the model's tokenizer does not allow it: {_first_line(str(error))}") from error
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._limits = LLParserLimits(
            max_items_in_row=MAX_ITEMS_IN_ROW,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        self._lock = threading.Lock()
        # The latest used one comes last.
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def check(self, text: str) -> None:
        """Compiles a grammar and computes its first mask. Raises GrammarError."""
        self._get(text, num_copies=0)

    def matcher(self, text: str) -> Matcher:
        """A new matcher at the grammar's start. Raises GrammarError."""
        return self._get(text, num_copies=1).deep_copy()

    def _get(self, text: str, num_copies: int) -> Matcher:
        """The compiled grammar, of which so many copies will be made. However many threads ask, one compiles it."""
        with self._lock:
            compiled = self._compiled.pop(text, None)
            is_new = compiled is None
            compiled = compiled or _Compiled(Future())
            compiled.num_copies += num_copies
            if compiled.num_copies < (1 if len(text) <= MAX_OWN_CHARACTERS else MAX_COPIES):
                self._compiled[text] = compiled
            while self._is_over_limit():
                self._compiled.popitem(last=False)
        if is_new:
            try:
                compiled.matcher.set_result(self._compile(text))
            except BaseException as error:
                compiled.matcher.set_exception(error)
        return compiled.matcher.result()

    def _is_over_limit(self) -> bool:
        num_characters = sum(map(len, self._compiled))
        return len(self._compiled) > 1 and (
            len(self._compiled) > MAX_CACHED_GRAMMARS or num_characters > MAX_CACHED_CHARACTERS
        )

    def _compile(self, text: str) -> Matcher:
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            # A grammar whose first mask needs too much fails here, and the others have it ready.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(reason_of(matcher))
        return matcher


def load_compiler(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> GrammarCompiler:
    """A compiler for the tokenizer.json of a model's folder. Raises GrammarError where there is none that can be used,
    and ModelError where it can't be read.
    """
    path = folder / TOKENIZER_FILE
    if not exists(path):
        raise GrammarError("the model's folder has no tokenizer.json")
    return GrammarCompiler(read_json_bytes(path), vocab_size, eos_token_ids)


class MatcherThreads:
    """Threads that serve many matchers at once, without the GIL. Whoever calls looks at is_error() of each then."""

    def __init__(self, num_threads: int) -> None:
        self._executor = LLExecutor(num_threads)

    def fill(self, matchers: Sequence[tuple[Matcher, int]], bits: npt.NDArray[np.uint32]) -> None:
        """Writes the mask of each matcher to its line of bits (lines, ceil(vocab_size / 32)): token t may come next if
        bit t % 32 of word t // 32 is set.
        """
        assert bits.flags["C_CONTIGUOUS"] and bits.dtype == np.uint32
        self._executor.unsafe_compute_mask_ptr(list(matchers), bits.ctypes.data, bits.shape[1] * 4, bits.shape[0])

    def consume(self, matchers: Sequence[tuple[Matcher, int]]) -> None:
        """Moves each matcher on by its token."""
        self._executor.consume_token_par(list(matchers))


def reason_of(matcher: Matcher) -> str:
    """Why a matcher is in the error state, in one short line without its inner state."""
    reason = _first_line(matcher.get_error())
    return "allows no text" if reason.startswith("NoExtension") else reason or "is wrong"


def _first_line(message: str) -> str:
    """What a message of llguidance says, without the text that it quotes below."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    # The regex crate quotes the whole expression before its reason.
    for line in lines:
        if line.startswith("error:"):
            return f"has a wrong regular expression: {line.removeprefix('error:').strip()}"[:MAX_REASON_CHARACTERS]
    return lines[0].split(" (at ")[0][:MAX_REASON_CHARACTERS]


def _read_multiples(text: str, start: int) -> list[Decimal]:
    """The numbers of all `multipleOf`, at any depth of the JSON value at `start`. Raises
    _NoJson where no JSON value stands there, and GrammarError for one that is nested too deeply.
    """
    numbers: list[Decimal] = []

    def read_object(members: list[tuple[str, Any]]) -> None:
        numbers.extend(value for key, value in members if key == "multipleOf" and isinstance(value, Decimal))

    decoder = json.JSONDecoder(
        object_pairs_hook=read_object, parse_int=Decimal, parse_float=_read_decimal, parse_constant=_refuse_constant
    )
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    try:
        decoder.raw_decode(text, start)
    except RecursionError as error:
        raise GrammarError("has JSON that is nested too deeply") from error
    except ValueError as error:
        raise _NoJson(f"has JSON that can't be read: {_first_line(str(error))}") from error
    return numbers


def _read_decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError("a number is out of range") from error


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _check_multiples(numbers: Sequence[Decimal]) -> None:
    """Refuses multiples for which llguidance would take too long. Raises GrammarError."""
    least_common = 1
    for coefficient in _coefficients(numbers):
        least_common = math.lcm(least_common, coefficient)
        if least_common > MAX_MULTIPLE_OF:
            raise GrammarError(
                "is too costly: without trailing zeros, the least common multiple of all multipleOf must be at most "
                f"{MAX_MULTIPLE_OF}"
            )


def _coefficients(numbers: Sequence[Decimal]) -> Iterator[int]:
    for number in numbers:
        digits = "".join(map(str, number.as_tuple().digits)).rstrip("0")
        # A longer number is over the limit anyway, and may be too long to be read.
        yield int(digits[:18] or "1")
