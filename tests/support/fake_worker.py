"""A worker without a model: it executes plans by the rules of worker.proto and fails loudly where one breaks them.

Each slot remembers which token chain was stored there, so a read of an unwritten, foreign or stale slot is seen, and
a sampled token is a hash of what the row reads through its block table. Written apart from the worker's Batch:
this is the truth that the scheduler is held against. Knows nothing of how a scheduler decides.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists, adjusts_logits
from tandem_shared.step_plan import (
    FAULT_NAN_LOGITS,
    PADDING_BLOCK,
    NewRow,
    PromptLogprobs,
    RowFault,
    RowLogprobs,
    StepPlan,
    StepResult,
    WorkerInfo,
)
from tests.support.builders import VOCAB_SIZE, prompt_logprobs, worker_info

Chain = npt.NDArray[np.uint64]
"""Entry p is a hash of all tokens 0 to p of a sequence. 0 stands for an unwritten slot."""


class BrokenPlan(InvalidPlan, AssertionError):
    """A plan that breaks the protocol, or whose rows would read or write slots of others."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenPlan(message)


def extend_chain(chain: list[int], token_ids: list[int]) -> None:
    for token_id in token_ids:
        chain.append(xxhash.xxh64_intdigest(token_id.to_bytes(4, "little"), chain[-1] if chain else 0) | 1)


def sample(
    contents: Chain, sampling: RowSampling, lists: SamplingLists, num_prompt_tokens: int, vocab_size: int
) -> int:
    """The next token: a function of the contents that were read; unless greedy, of seed, choice and position; and of
    all that adjusts logits, if anything does. Stop tokens do not come before min_tokens.
    """
    noise = (sampling.seed, sampling.choice_index, len(contents)) if sampling.temperature > 0 else (0, 0, 0)
    data = contents.tobytes() + repr(noise).encode() + _adjustments(sampling, lists, num_prompt_tokens)
    token_id = xxhash.xxh64_intdigest(data) % vocab_size
    while len(contents) - num_prompt_tokens < sampling.min_tokens and token_id in lists.stop_token_ids:
        token_id = (token_id + 1) % vocab_size
    return token_id


def _adjustments(sampling: RowSampling, lists: SamplingLists, num_prompt_tokens: int) -> bytes:
    """Everything that adjusts logits; empty if nothing does. The order of lists means nothing."""
    if not adjusts_logits(sampling, lists):
        return b""
    bias = sorted(lists.logit_bias)
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    others = (
        num_prompt_tokens,
        sampling.min_tokens,
        sorted(lists.stop_token_ids) if sampling.min_tokens else [],
        [token_id for token_id, _ in bias],
        sorted(lists.allowed_token_ids),
        sorted(lists.bad_words),
        lists.grammar,
    )
    # Between processes these are 32-bit floats.
    return np.array([*penalties, *(value for _, value in bias)], np.float32).tobytes() + repr(others).encode()


def requested_logprobs(lists: SamplingLists) -> tuple[float, ...]:
    """The log-probabilities of the tokens that a row asks for by their ids."""
    return tuple(-0.5 * token_id for token_id in lists.logprob_token_ids)


def rank_of(token_id: int) -> int:
    return token_id % 7 + 1


def prompt_report(row: int, chain: list[int], first: int, end: int, num_top: int, vocab_size: int) -> PromptLogprobs:
    """What is reported of the prompt positions first to end - 1: functions of the tokens up to each."""
    entries = chain[first:end]
    return prompt_logprobs(
        row,
        first,
        logprobs=[-(entry % 256) / 8 for entry in entries],
        ranks=[entry % 50 + 1 for entry in entries],
        num_top=num_top,
        top_token_ids=[(entry // 64 + i) % vocab_size for entry in entries for i in range(num_top)],
        top_logprobs=[-(entry % 4) - 0.5 * i for entry in entries for i in range(num_top)],
    )


def expected_prompt_logprobs(request: SequenceRequest, *, vocab_size: int = VOCAB_SIZE) -> PromptLogprobs:
    """The true report on a whole prompt, in one part."""
    chain: list[int] = []
    extend_chain(chain, request.prompt_token_ids.tolist())
    assert request.sampling.num_prompt_logprobs is not None
    return prompt_report(0, chain, 1, len(chain), request.sampling.num_prompt_logprobs, vocab_size)


def expected_tokens(request: SequenceRequest, n: int | None = None, *, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """The first n tokens (all of them by default) of a request's true output, computed alone, with no cache."""
    chain: list[int] = []
    extend_chain(chain, request.prompt_token_ids.tolist())
    output: list[int] = []
    while len(output) < min(request.max_tokens, request.max_tokens if n is None else n):
        contents, num_prompt_tokens = np.array(chain, np.uint64), len(request.prompt_token_ids)
        output.append(sample(contents, request.sampling, request.lists, num_prompt_tokens, vocab_size))
        if output[-1] in request.stop_token_ids:
            break
        extend_chain(chain, output[-1:])
    return output


@dataclass
class FakeRow:
    """The state of a row. chain has an entry for each of its tokens, sampled ones included."""

    sequence_id: int
    salt: str
    chain: list[int]
    num_computed_tokens: int
    num_cached_tokens: int
    block_ids: list[int]
    num_prompt_tokens: int
    sampling: RowSampling
    lists: SamplingLists
    added_at: int
    is_decoding: bool = False


class FakePendingStep:
    """A result that is known already, and returned once the runner's gate and delay let it through."""

    def __init__(self, result: StepResult, gate: threading.Semaphore | None, delay_s: float) -> None:
        self._result = result
        self._gate = gate
        self._delay_s = delay_s

    def wait(self) -> StepResult:
        if self._gate is not None:
            self._gate.acquire()
        if self._delay_s:
            time.sleep(self._delay_s)
        return self._result


class FakeRunner:
    """A Runner. `gate`: each wait() takes one permit, so that a test says when results come. `delay_s`: each wait()
    takes that long. `salt_of`: the cache salt of a sequence id, which no plan carries; blocks must not cross salts.
    Sequence ids in `faulty` answer with a row fault, whose code `fault_codes` may change.
    """

    def __init__(
        self,
        info: WorkerInfo | None = None,
        *,
        gate: threading.Semaphore | None = None,
        delay_s: float = 0.0,
        salt_of: Callable[[int], str] = lambda sequence_id: "",
    ) -> None:
        self._info = info or worker_info()
        self.gate = gate
        self.delay_s = delay_s
        self._salt_of = salt_of
        self.faulty: set[int] = set()
        self.fault_codes: dict[int, int] = {}
        self.num_steps = 0
        self.num_full_hits = 0
        # Tests raise it to make a step look as if it made progress.
        self.progress = 0
        self.reset()

    @property
    def info(self) -> WorkerInfo:
        return self._info

    def reset(self) -> None:
        num_slots = self._info.num_blocks * self._info.block_size
        self._slots: Chain = np.zeros(num_slots, np.uint64)
        self._salts: list[str | None] = [None] * self._info.num_blocks
        self.rows: dict[int, FakeRow] = {}
        self._last_step_id = 0

    def forget_block(self, block_id: int) -> None:
        """Makes the slots of a block unwritten again."""
        size = self._info.block_size
        self._slots[block_id * size : (block_id + 1) * size] = 0

    def execute(self, plan: StepPlan) -> FakePendingStep:
        check(plan.step_id == self._last_step_id + 1, f"step {plan.step_id} follows {self._last_step_id}")
        self._last_step_id = plan.step_id
        self.num_steps += 1
        self._change_batch(plan)
        num_tokens = self._num_tokens_by_row(plan)
        written: set[int] = set()
        contents: dict[int, Chain] = {}
        prompt_logprobs: list[PromptLogprobs] = []
        # The order is decoding rows, other old rows, new rows as they were added: each reads what those before it
        # stored.
        new_rows = [new.row for new in plan.added_rows]
        old_rows = sorted(num_tokens.keys() - set(new_rows), key=lambda row: not self.rows[row].is_decoding)
        for row in [*old_rows, *new_rows]:
            if count := num_tokens.get(row):
                state = self.rows[row]
                self._store(state, count, written)
                prompt_logprobs += self._report_prompt(row, state, count)
                state.num_computed_tokens += count
                contents[row] = self._read(state)
        prompt_logprobs.sort(key=lambda report: (report.row, report.first_position))
        result = self._sample(plan.step_id, {row: contents[row] for row in num_tokens}, prompt_logprobs)
        return FakePendingStep(result, self.gate, self.delay_s)

    def _change_batch(self, plan: StepPlan) -> None:
        for row in plan.removed_rows.tolist():
            check(row in self.rows, f"row {row} is removed but empty")
            del self.rows[row]
        for new_row in plan.added_rows:
            self._add(new_row)
        for row, block_id in zip(plan.appended_block_rows.tolist(), plan.appended_block_ids.tolist(), strict=True):
            check(row in self.rows, f"a block is appended to the empty row {row}")
            self.rows[row].block_ids.append(block_id)
        self._holders: dict[int, list[FakeRow]] = {}
        for row, state in self.rows.items():
            check(len(set(state.block_ids)) == len(state.block_ids), f"row {row} has a block twice")
            for block_id in state.block_ids:
                check(PADDING_BLOCK < block_id < self._info.num_blocks, f"row {row} has block {block_id}")
                self._holders.setdefault(block_id, []).append(state)

    def _add(self, new: NewRow) -> None:
        num_tokens, cached, computed = len(new.token_ids), new.num_cached_tokens, new.num_computed_tokens
        check(0 <= new.row < self._info.max_num_rows, f"there is no row {new.row}")
        check(new.row not in self.rows, f"row {new.row} is taken")
        check(1 <= new.num_prompt_tokens <= num_tokens < self._info.max_model_len, f"{num_tokens} tokens in a new row")
        check(0 <= computed < num_tokens and cached % self._info.block_size == 0, f"{computed=} {cached=}")
        check(computed == cached or (computed == cached - 1 and cached == num_tokens), f"{computed=} {cached=}")
        self.num_full_hits += computed < cached
        reports_prompt = new.sampling.num_prompt_logprobs is not None
        check(not (reports_prompt and cached), f"row {new.row} reports a prompt of which {cached} tokens are cached")
        chain: list[int] = []
        extend_chain(chain, new.token_ids.tolist())
        salt = self._salt_of(new.sequence_id)
        block_ids = new.block_ids.tolist()
        self.rows[new.row] = FakeRow(
            new.sequence_id,
            salt,
            chain,
            computed,
            cached,
            block_ids,
            new.num_prompt_tokens,
            new.sampling,
            new.lists,
            self._last_step_id,
        )

    def _num_tokens_by_row(self, plan: StepPlan) -> dict[int, int]:
        """Rows that compute in this step, ascending, and how many tokens each."""
        rows = plan.chunk_rows.tolist()
        check(rows == sorted(set(rows)) and len(rows) == len(plan.chunk_num_tokens), f"chunk rows {rows}")
        chunks = dict(zip(rows, plan.chunk_num_tokens.tolist(), strict=True))
        for row, count in chunks.items():
            check(row in self.rows and not self.rows[row].is_decoding, f"row {row} has a chunk and does not prefill")
            left = len(self.rows[row].chain) - self.rows[row].num_computed_tokens
            check(1 <= count <= left, f"row {row} computes {count} of {left} tokens")
        num_tokens = {r: 1 if s.is_decoding else chunks.get(r, 0) for r, s in sorted(self.rows.items())}
        total = sum(num_tokens.values())
        check(0 < total <= self._info.max_num_batched_tokens, f"a step of {total} tokens")
        return {row: count for row, count in num_tokens.items() if count}

    def _store(self, row: FakeRow, count: int, written: set[int]) -> None:
        size = self._info.block_size
        end = row.num_computed_tokens + count
        check(end <= len(row.block_ids) * size, f"{row.sequence_id} writes past its block table")
        for position in range(max(row.num_computed_tokens, row.num_cached_tokens), end):
            block_id = row.block_ids[position // size]
            slot = block_id * size + position % size
            check(slot not in written, f"slot {slot} is written twice in a step")
            # Rows that came with this very step may share a block that it fills. Other rows own the blocks that they
            # read.
            owners = [
                r.sequence_id for r in self._holders[block_id] if r is not row and r.added_at < self._last_step_id
            ]
            check(not owners, f"{row.sequence_id} writes block {block_id}, which {owners} read")
            written.add(slot)
            self._slots[slot] = row.chain[position]
            self._salts[block_id] = row.salt

    def _report_prompt(self, index: int, row: FakeRow, count: int) -> list[PromptLogprobs]:
        """Reports the positions that the row's next count tokens predict. Some reports come in two parts."""
        num_top = row.sampling.num_prompt_logprobs
        first = row.num_computed_tokens + 1
        end = min(first + count, row.num_prompt_tokens)
        if num_top is None or first >= end:
            return []
        middle = first + (end - first) // 2 if self._last_step_id % 3 == 0 else first
        spans = [(first, middle), (middle, end)] if middle > first else [(first, end)]
        return [prompt_report(index, row.chain, *span, num_top, self._info.vocab_size) for span in spans]

    def _sample(self, step_id: int, contents: dict[int, Chain], prompt_logprobs: list[PromptLogprobs]) -> StepResult:
        counts: list[int] = []
        token_ids: list[int] = []
        faults: list[RowFault] = []
        logprobs: list[RowLogprobs] = []
        for index, read in contents.items():
            row = self.rows[index]
            if row.num_computed_tokens < len(row.chain):
                continue
            row.is_decoding = True
            token_id = sample(read, row.sampling, row.lists, row.num_prompt_tokens, self._info.vocab_size)
            check(len(row.chain) < self._info.max_model_len, f"{row.sequence_id} outgrows the context")
            extend_chain(row.chain, [token_id])
            if row.sequence_id in self.faulty:
                counts.append(0)
                faults.append(RowFault(index, self.fault_codes.get(row.sequence_id, FAULT_NAN_LOGITS)))
            else:
                counts.append(1)
                token_ids.append(token_id)
            # A row that asked for log-probabilities gets a report even if it has a fault: the scheduler must cope with
            # that.
            if row.sampling.num_logprobs is not None or row.lists.logprob_token_ids:
                top = tuple((token_id + i) % self._info.vocab_size for i in range(row.sampling.num_logprobs or 0))
                top_logprobs = tuple(-0.5 - i for i in range(len(top)))
                requested = requested_logprobs(row.lists)
                logprobs.append(RowLogprobs(index, -0.5, top, top_logprobs, rank_of(token_id), requested))
        return StepResult(step_id, counts, token_ids, tuple(faults), tuple(logprobs), tuple(prompt_logprobs))

    def _read(self, row: FakeRow) -> Chain:
        """The contents that the row's newest position attends to. Every slot must hold this row's own past."""
        size, count = self._info.block_size, row.num_computed_tokens
        blocks = np.array(row.block_ids, np.int64)
        positions = np.arange(count)
        contents: Chain = self._slots[blocks[positions // size] * size + positions % size]
        wrong = np.flatnonzero(contents != np.array(row.chain[:count], np.uint64))
        if len(wrong):
            what = "foreign" if contents[wrong[0]] else "unwritten"
            raise BrokenPlan(f"{row.sequence_id} reads a slot at position {wrong[0]} that is {what}")
        salts = {self._salts[block_id] for block_id in row.block_ids[: -(-count // size)]}
        check(salts == {row.salt}, f"{row.sequence_id} with salt {row.salt!r} reads blocks of {salts}")
        return contents
