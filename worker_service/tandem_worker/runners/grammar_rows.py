"""The grammars of the batch's rows: a matcher for each, which follows the row's sampled tokens, and their masks.

A grammar is compiled, and fed what the row's output has already, by a thread that starts when the row enters the batch,
so that the forward pass of its prompt hides this. masks() waits for it. Masks of all rows are computed in parallel.

Sampled tokens may come late: on a GPU the next plan, which may give a row's number to another sequence, is applied
before they are on the host. So accept() moves those grammars on whose masks were computed last, whoever has their rows
by then.

A matcher's place in its grammar is a function of the row's tokens. Only where a limit of structured_output.py is
reached may depend on more, as a mask that is computed leaves states behind that count.
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
from tandem_worker.runners.logits_stage import GrammarMasks

logger = logging.getLogger(__name__)

NUM_COMPILING_THREADS = 4
MAX_MASK_THREADS = 16
"""More threads were not measured."""

Words = npt.NDArray[np.uint32]


@dataclass
class _Row:
    """A row that has a grammar."""

    new: NewRow
    grammar: Grammar
    num_output_tokens: int
    allowed: Words | None
    """The request's allowed tokens, as a mask; None for all"""
    stops: Words | None
    """The tokens that are hidden before min_tokens, as a mask; None if there are none"""
    ready: "Future[Matcher]"
    """The matcher, at the row's place in the grammar"""
    is_waiting: bool
    """Whether the token that starts the grammar has yet to come"""
    failure: str = ""

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
        self._num_words = -(-vocab_size // 32)
        self._num_threads = num_threads
        self._all = self._mask_of(range(vocab_size))
        self._eos = self._mask_of(eos_token_ids)
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
            if not state.is_waiting or self._hidden(state) is not None or state.allowed is not None
        }
        bits = np.zeros((len(states), self._num_words), np.uint32)
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
            self._matchers.consume([(state.ready.result(), token_id) for state, token_id in moving])
            self._check([state for state, _ in moving])

    def _start(self, new: NewRow, grammar: Grammar) -> _Row:
        output = new.token_ids[new.num_prompt_tokens :].tolist()
        start = grammar.start_after_token_id
        is_waiting = start is not None and start not in output
        read = [] if is_waiting else output if start is None else output[output.index(start) + 1 :]
        if self._compiling is None:
            self._compiling = ThreadPoolExecutor(NUM_COMPILING_THREADS, "grammars")
        lists, sampling = new.lists, new.sampling
        return _Row(
            new=new,
            grammar=grammar,
            num_output_tokens=len(output),
            allowed=self._mask_of(lists.allowed_token_ids) if lists.allowed_token_ids else None,
            stops=self._mask_of(lists.stop_token_ids) if sampling.min_tokens and lists.stop_token_ids else None,
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
        """Fills in the masks (n, words), which are all 0. That of a failed row stays so."""
        running: list[tuple[_Row, int]] = []
        for place, state in enumerate(states):
            try:
                state.ready.result()
            except GrammarError as error:
                state.fail(str(error))
            if not state.failure and state.is_waiting:
                bits[place] = self._all
            elif not state.failure:
                running.append((state, place))
        if running:
            self._matchers = self._matchers or MatcherThreads(self._num_threads)
            self._matchers.fill([(state.ready.result(), place) for state, place in running], bits)
            self._check([state for state, _ in running])
        for state, mask in zip(states, bits, strict=True):
            if state.failure:
                # The matcher itself allows the end-of-sequence token then.
                mask[:] = 0
                continue
            if state.allowed is not None:
                mask &= state.allowed
            if (hidden := self._hidden(state)) is not None and (rest := mask & ~hidden).any():
                mask[:] = rest

    def _check(self, states: list[_Row]) -> None:
        for state in states:
            matcher = state.ready.result()
            if matcher.is_error():
                state.fail(reason_of(matcher))

    def _hidden(self, state: _Row) -> Words | None:
        """The tokens that are possible only where no other is."""
        is_early = state.stops is not None and state.num_output_tokens < state.new.sampling.min_tokens
        hidden = state.stops if is_early else None
        if state.grammar.ignore_eos:
            return self._eos if hidden is None else self._eos | hidden
        return hidden

    def _mask_of(self, token_ids: Sequence[int]) -> Words:
        ids = np.array(token_ids, np.uint32)
        mask = np.zeros(self._num_words, np.uint32)
        np.bitwise_or.at(mask, ids // 32, np.uint32(1) << ids % 32)
        return mask


def num_mask_threads(num_ranks_here: int) -> int:
    """The threads that compute a rank's masks, where so many ranks share the host's CPUs. One is left to the rank's
    other threads.
    """
    num_cpus = len(os.sched_getaffinity(0))
    return max(1, min(MAX_MASK_THREADS, num_cpus // num_ranks_here - 1))
