"""The grammars of the batch's rows: a matcher for each, which follows the row's sampled tokens, and their masks.

A grammar is compiled, and fed what the row's output has already, by a thread that starts when the row enters the batch,
so that the forward pass of its prompt hides this. masks() waits for it. Masks of all rows are computed in parallel.

Sampled tokens may come late: on a GPU the next plan, which may give a row's number to another sequence, is applied
before they are on the host. So accept() moves those grammars on whose masks were computed last, whoever has their rows
by then.

A matcher's place in its grammar is a function of the row's tokens. Only where a limit of structured_output.py is
reached may depend on more, as a mask that is computed leaves states behind that count, and rows with the same long
grammar share them.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem_shared.sampling_lists import Grammar
from tandem_shared.step_plan import FAULT_GRAMMAR, Int32Array, NewRow
from tandem_shared.structured_output import GrammarCompiler, GrammarError, Matcher, MatcherThreads, reason_of
from tandem_worker.runners.logits_stage import GrammarMasks, Words, mask_of, num_mask_words

logger = logging.getLogger(__name__)

NUM_COMPILING_THREADS = 4
MAX_MASK_THREADS = 16
"""More threads were not measured."""


@dataclass(frozen=True, eq=False)
class _Hidden:
    """Tokens that are possible only where no other is."""

    mask: Words
    """(ceil(vocab_size / 32),)"""
    places: npt.NDArray[np.intp]
    """The words of the mask that are not 0. They are few, so a look at them tells which masks have such a token."""

    def hide(self, bits: Words, lines: list[int]) -> None:
        """Takes the tokens out of these lines of masks (n, ceil(vocab_size / 32))."""
        places = np.array(lines)
        has_any = (bits[np.ix_(places, self.places)] & self.mask[self.places]).any(axis=1)
        for line in places[has_any].tolist():
            rest = bits[line] & ~self.mask
            if rest.any():
                bits[line] = rest


@dataclass
class _Row:
    """A row that has a grammar."""

    new: NewRow
    grammar: Grammar
    num_output_tokens: int
    allowed: Words | None
    """The request's allowed tokens, as a mask; None for all"""
    hidden: _Hidden | None
    """What is hidden always"""
    hidden_early: _Hidden | None
    """What is hidden before min_tokens"""
    ready: "Future[Matcher]"
    """The matcher, at the row's place in the grammar, which is in `matcher` once it has been waited for"""
    is_waiting: bool
    """Whether the token that starts the grammar has yet to come"""
    matcher: Matcher | None = None
    failure: str = ""

    @property
    def hidden_now(self) -> _Hidden | None:
        return self.hidden_early if self.num_output_tokens < self.new.sampling.min_tokens else self.hidden

    def wait(self) -> None:
        """Waits for the matcher, which is None if it could not be made."""
        try:
            self.matcher = self.ready.result()
        except GrammarError as error:
            self.fail(str(error))

    def check(self) -> None:
        assert self.matcher is not None
        if self.matcher.is_error():
            self.fail(reason_of(self.matcher))

    def fail(self, reason: str) -> None:
        if not self.failure:
            logger.info("the grammar of sequence %d failed: %s", self.new.sequence_id, reason)
            self.failure = reason


class GrammarRows:
    """The rows of one batch. Its methods are called by one thread."""

    def __init__(
        self,
        compiler: GrammarCompiler | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_threads: int = 1,
    ) -> None:
        """Without a compiler every grammar fails. num_threads compute masks."""
        self._compiler = compiler
        self._vocab_size, self._num_words = vocab_size, num_mask_words(vocab_size)
        self._num_threads = num_threads
        self._all = mask_of(range(vocab_size), vocab_size)
        self._eos_token_ids = tuple(eos_token_ids)
        self._eos = self._to_hide(self._eos_token_ids)
        # The masks that were computed last. The memory is kept, as new memory costs time in every step.
        self._bits = np.empty((0, self._num_words), np.uint32)
        self._rows: dict[int, _Row] = {}
        # Those whose masks were computed last, by their numbers then.
        self._sampling: dict[int, _Row] = {}
        # Threads are made when the first grammar comes.
        self._compiling: ThreadPoolExecutor | None = None
        self._matchers: MatcherThreads | None = None

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Takes note of rows that enter the batch, in the place of what was there, and starts to compile grammars."""
        for new in new_rows:
            self._rows.pop(new.row, None)
            if new.lists.grammar is not None:
                self._rows[new.row] = self._start(new, new.lists.grammar)

    def masks(self, rows: Int32Array) -> GrammarMasks:
        """The masks of those of the rows that have a grammar. Waits for grammars that are being compiled."""
        self._sampling = {row: self._rows[row] for row in rows.tolist() if row in self._rows}
        states = {
            row: state
            for row, state in self._sampling.items()
            if not state.is_waiting or state.hidden_now is not None or state.allowed is not None
        }
        if len(states) > len(self._bits):
            self._bits = np.empty((len(states), self._num_words), np.uint32)
        bits = self._bits[: len(states)]
        self._compute(list(states.values()), bits)
        return GrammarMasks(
            np.array(list(states), np.int32),
            bits.view(np.int32),
            {row: FAULT_GRAMMAR for row, state in states.items() if state.failure},
        )

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Moves the grammars on by one sampled token each. `rows` are some of those that masks() had last, or have no
        grammar. An id is negative where a row could not sample.
        """
        moving = []
        for row, token_id in zip(rows, token_ids, strict=True):
            state = self._sampling.get(row)
            if state is None or token_id < 0 or state.failure:
                continue
            state.num_output_tokens += 1
            if not state.is_waiting:
                moving.append((state, token_id))
            elif token_id == state.grammar.start_after_token_id:
                state.is_waiting = False
        if moving:
            assert self._matchers is not None, "these rows had masks"
            self._matchers.consume([(matcher, token_id) for state, token_id in moving if (matcher := state.matcher)])
            for state, _ in moving:
                state.check()

    def _start(self, new: NewRow, grammar: Grammar) -> _Row:
        output = new.token_ids[new.num_prompt_tokens :].tolist()
        start = grammar.start_after_token_id
        is_waiting = start is not None and start not in output
        read = [] if is_waiting else output if start is None else output[output.index(start) + 1 :]
        if self._compiling is None:
            self._compiling = ThreadPoolExecutor(NUM_COMPILING_THREADS, "grammars")
        lists = new.lists
        hidden = self._eos if grammar.ignore_eos else None
        hidden_early = hidden
        if new.sampling.min_tokens and lists.stop_token_ids:
            hidden_early = self._to_hide([*lists.stop_token_ids, *(self._eos_token_ids if grammar.ignore_eos else ())])
        return _Row(
            new=new,
            grammar=grammar,
            num_output_tokens=len(output),
            allowed=mask_of(lists.allowed_token_ids, self._vocab_size) if lists.allowed_token_ids else None,
            hidden=hidden,
            hidden_early=hidden_early,
            ready=self._compiling.submit(self._prepare, grammar.text, read),
            is_waiting=is_waiting,
        )

    def _prepare(self, text: str, read: list[int]) -> Matcher:
        """A matcher that has read these tokens. Raises GrammarError."""
        if self._compiler is None:
            raise GrammarError("this worker can't compile grammars")
        matcher = self._compiler.matcher(text)
        if read:
            matcher.consume_tokens(read)
        return matcher

    def _compute(self, states: list[_Row], bits: Words) -> None:
        """Fills in the masks (n, words). That of a failed row is all 0."""
        running: list[tuple[_Row, int]] = []
        for line, state in enumerate(states):
            if state.matcher is None and not state.failure:
                state.wait()
            if not state.failure and state.is_waiting:
                bits[line] = self._all
            elif not state.failure:
                running.append((state, line))
        if running:
            self._matchers = self._matchers or MatcherThreads(self._num_threads)
            self._matchers.fill([(matcher, line) for state, line in running if (matcher := state.matcher)], bits)
            for state, _ in running:
                state.check()
        lines_to_hide: dict[_Hidden, list[int]] = {}
        for line, state in enumerate(states):
            if state.failure:
                # The matcher itself allows the end-of-sequence token then.
                bits[line] = 0
                continue
            if state.allowed is not None:
                bits[line] &= state.allowed
            if (hidden := state.hidden_now) is not None:
                lines_to_hide.setdefault(hidden, []).append(line)
        for hidden, lines in lines_to_hide.items():
            hidden.hide(bits, lines)

    def _to_hide(self, token_ids: Sequence[int]) -> _Hidden:
        mask = mask_of(token_ids, self._vocab_size)
        return _Hidden(mask, np.flatnonzero(mask))


def num_mask_threads(num_ranks_here: int) -> int:
    """The threads that compute a rank's masks, where so many ranks share the host's CPUs. One is left to the rank's
    other threads.
    """
    num_cpus = len(os.sched_getaffinity(0))
    return max(1, min(MAX_MASK_THREADS, num_cpus // num_ranks_here - 1))
