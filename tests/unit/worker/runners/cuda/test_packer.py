"""Packed steps of random plans, read as a kernel reads them and compared with a plain account of every row."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.cuda.input_layout import InputLayout, MixedSections
from tandem_worker.runners.cuda.packer import PackedStep, Packer
from tandem_worker.runners.cuda.step_shapes import (
    MAX_PADDING_TOKENS,
    MIN_SPLIT_TOKENS,
    StepShapes,
    batch_sizes,
    deal_chunks,
    token_counts,
)
from tests.unit.worker.runners.cuda.test_micro_batches import make_work, tokens_of
from tests.unit.worker.runners.test_batch import ints

NUM_ROWS, BLOCK_SIZE, MAX_TOKENS, MAX_LEN = 6, 4, 2500, 3000
NUM_BLOCKS = NUM_ROWS * (MAX_LEN // BLOCK_SIZE) + 1
NUM_STEPS = 60
PADDING = -1


@dataclass
class Account:
    """What one row holds, kept token by token."""

    token_ids: list[int]
    num_computed: int
    num_cached: int
    blocks: list[int]

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= len(self.token_ids)

    def slot(self, position: int) -> int:
        if position < self.num_cached:
            return 0
        return self.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


@dataclass
class Token:
    """A token that a step computes."""

    row: int
    token_id: int
    position: int
    slot: int


@dataclass
class ExpectedStep:
    plan: StepPlan
    decode_tokens: list[Token]
    chunk_tokens: list[Token]
    sampling_rows: list[int]
    accounts: dict[int, Account]


class RandomPlans:
    """Valid plans for a batch that is often changed, with what each must compute."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._accounts: dict[int, Account] = {}
        self._free_blocks = self._rng.permutation(NUM_BLOCKS - 1) + 1

    def take_blocks(self, count: int) -> list[int]:
        taken, self._free_blocks = self._free_blocks[:count], self._free_blocks[count:]
        return taken.tolist()

    def steps(self) -> Iterator[ExpectedStep]:
        for step_id in range(1, NUM_STEPS + 1):
            step = self._step(step_id)
            if step.decode_tokens or step.chunk_tokens:
                yield step

    def _step(self, step_id: int) -> ExpectedStep:
        rng, accounts = self._rng, self._accounts
        removed = [row for row in accounts if rng.random() < 0.08]
        for row in removed:
            self._free_blocks = np.concatenate([self._free_blocks, accounts.pop(row).blocks])
        added = [self._new_row(row) for row in rng.permutation(NUM_ROWS).tolist() if self._is_added(row)]
        appended: list[tuple[int, int]] = []
        for row, account in accounts.items():
            room = MAX_LEN // BLOCK_SIZE - len(account.blocks)
            is_full = account.num_computed >= len(account.blocks) * BLOCK_SIZE
            count = min(room, int(rng.choice([1, 1, 1, 2])) if account.is_decoding and is_full else 0)
            blocks = self.take_blocks(count)
            account.blocks += blocks
            appended += [(row, block) for block in blocks]
        decode_tokens, left = [], MAX_TOKENS
        for row in sorted(accounts):
            account = accounts[row]
            if account.is_decoding:
                position = account.num_computed
                decode_tokens.append(Token(row, PADDING - row, position, account.slot(position)))
                account.num_computed += 1
                left -= 1
        # Rows of earlier steps store their KV first, then new ones in the order of the plan.
        new = [row.row for row in added]
        chunks, chunk_tokens, completed = {}, [], []
        for row in [*sorted(set(accounts) - set(new)), *new]:
            account = accounts[row]
            missing = max(0, len(account.token_ids) - account.num_computed)
            count = min(missing, left, int(rng.integers(1, 1800)))
            if missing and count and rng.random() < 0.9:
                for position in range(account.num_computed, account.num_computed + count):
                    chunk_tokens.append(Token(row, account.token_ids[position], position, account.slot(position)))
                account.num_computed += count
                chunks[row] = count
                left -= count
                if account.is_decoding:
                    completed.append(row)
        plan = StepPlan(
            step_id,
            removed_rows=ints(*sorted(removed)),
            added_rows=tuple(added),
            appended_block_rows=ints(*(row for row, _ in appended)),
            appended_block_ids=ints(*(block for _, block in appended)),
            chunk_rows=ints(*sorted(chunks)),
            chunk_num_tokens=ints(*(chunks[row] for row in sorted(chunks))),
        )
        sampling_rows = sorted([*(token.row for token in decode_tokens), *completed])
        return ExpectedStep(plan, decode_tokens, chunk_tokens, sampling_rows, accounts)

    def _is_added(self, row: int) -> bool:
        return row not in self._accounts and self._rng.random() < 0.2

    def _new_row(self, row: int) -> NewRow:
        rng = self._rng
        length = int(rng.choice([rng.integers(1, 30), rng.integers(1, MAX_LEN - 100)]))
        num_cached = min(length, int(rng.integers(0, 20)) * BLOCK_SIZE) if rng.random() < 0.5 else 0
        account = Account(
            rng.integers(0, 100, length).tolist(), min(num_cached, length - 1), num_cached,
            self.take_blocks(-(-length // BLOCK_SIZE)),
        )  # fmt: skip
        self._accounts[row] = account
        return NewRow(
            row=row, sequence_id=row, token_ids=ints(*account.token_ids), num_prompt_tokens=length,
            num_computed_tokens=account.num_computed, num_cached_tokens=num_cached, block_ids=ints(*account.blocks),
            sampling=RowSampling(),
        )  # fmt: skip


def check_mixed(sections: MixedSections[np.ndarray], micro_batch_tokens: tuple[int, ...], step: ExpectedStep) -> None:
    tokens = [*step.decode_tokens, *step.chunk_tokens]
    assert sections.token_ids[: len(tokens)].tolist() == [token.token_id for token in tokens]
    assert sections.positions[: len(tokens)].tolist() == [token.position for token in tokens]
    assert sections.slots[: len(tokens)].tolist() == [token.slot for token in tokens]
    assert (sections.slots[len(tokens) :] < BLOCK_SIZE).all()
    decode_rows = sections.decode_rows.tolist()
    expected_rows = [token.row for token in step.decode_tokens]
    assert decode_rows == expected_rows + [PADDING] * (len(decode_rows) - len(expected_rows))
    for row, account in step.accounts.items():
        assert sections.context_lens[row] == account.num_computed
    last = {token.row: index for index, token in enumerate(tokens)}
    sampling_tokens = sections.sampling_tokens[: len(step.sampling_rows)].tolist()
    assert sampling_tokens == [last[row] for row in step.sampling_rows]
    # Each query is in one tile, which says its place and what of its row's context lies before the micro-batch.
    covered: list[int] = []
    edge = 0
    for tiles, num_tokens in zip(sections.tiles, micro_batch_tokens, strict=True):
        for row, first, count, position, chunk_start in tiles.reshape(-1, 5).tolist():
            for i in range(count):
                token = tokens[edge + first + i]
                assert (token.row, token.position) == (row, position + i)
            if count:
                own = [t.position for t in tokens[edge : edge + num_tokens] if t.row == row]
                assert chunk_start == own[0]
            covered += range(edge + first, edge + first + count)
        edge += num_tokens
    assert sorted(covered) == list(range(len(step.decode_tokens), len(tokens)))


def apply_updates(tables: np.ndarray, updates: np.ndarray) -> None:
    """Updates the tables as the kernel begin_decode does."""
    for row, index, block in updates[1 : 1 + 3 * updates[0]].reshape(-1, 3):
        tables[row, index] = block


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_packed_steps_say_what_the_plans_do(seed: int, is_sharded: bool) -> None:
    batch = Batch(
        num_rows=NUM_ROWS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_model_len=MAX_LEN,
        max_num_batched_tokens=MAX_TOKENS, vocab_size=100,
    )  # fmt: skip
    layout = InputLayout(NUM_ROWS)
    packer = Packer(batch, StepShapes(NUM_ROWS, MAX_TOKENS, is_sharded=is_sharded), layout)
    tables = np.full_like(batch.block_tables, 10**6)
    seen = set()
    for step in RandomPlans(seed).steps():
        packed: PackedStep = packer.pack(step.plan, batch.apply(step.plan))
        for row in packed.whole_table_rows:
            tables[row, : batch.num_blocks[row]] = batch.block_tables[row, : batch.num_blocks[row]]
        sections = layout.decode_sections(packed.array)
        apply_updates(tables, sections.block_updates)
        for row, account in step.accounts.items():
            assert tables[row, : len(account.blocks)].tolist() == account.blocks
        num_sampling = len(step.sampling_rows)
        assert sections.sampling_rows.tolist() == step.sampling_rows + [PADDING] * (NUM_ROWS - num_sampling)
        assert num_sampling <= packed.batch_size <= NUM_ROWS
        shape = packed.mixed_shape
        assert (shape is None) == (not step.chunk_tokens)
        if shape is not None:
            mixed = layout.mixed_sections(packed.array, shape)
            assert np.shares_memory(layout.sampling_tokens(packed.array), mixed.sampling_tokens)
            check_mixed(mixed, shape.micro_batch_tokens, step)
            assert len(shape.micro_batch_tokens) == (2 if is_sharded and shape.num_tokens >= MIN_SPLIT_TOKENS else 1)
            seen.add(len(shape.micro_batch_tokens))
        seen.add("whole tables" if len(packed.whole_table_rows) > len(step.plan.added_rows) else "updates")
    assert seen == {"whole tables", "updates", 1} | ({2} if is_sharded else set())


def test_sections_are_aligned_and_apart() -> None:
    shapes, layout = StepShapes(5, 1801, is_sharded=True), InputLayout(5)
    for shape in (*shapes.mixed, shapes.largest):
        array = np.zeros(layout.mixed_length(shape), np.int32)
        sections = layout.mixed_sections(array, shape)
        *arrays, tiles = vars(sections).values()
        for index, section in enumerate([*arrays, *tiles]):
            start = section.__array_interface__["data"][0] - array.__array_interface__["data"][0]
            assert start % 16 == 0
            assert (section == 0).all()
            section.fill(index + 1)
        decode = layout.decode_sections(array)
        assert (decode.block_updates == 1).all() and (decode.sampling_rows == 2).all()


def test_padding_has_no_rows_and_no_queries() -> None:
    batch = Batch(
        num_rows=5, num_blocks=9, block_size=4, max_model_len=32, max_num_batched_tokens=300, vocab_size=9
    )  # fmt: skip
    shapes, layout = StepShapes(5, 300, is_sharded=False), InputLayout(5)
    for shape in shapes.mixed:
        sections = layout.mixed_sections(Packer(batch, shapes, layout).pack_padding(shape), shape)
        assert (sections.sampling_rows == PADDING).all() and (sections.decode_rows == PADDING).all()
        assert sections.block_updates[0] == 0
        assert (sections.slots < batch.block_size).all()
        assert all((tiles.reshape(-1, 5)[:, 2] == 0).all() for tiles in sections.tiles)


def test_micro_batches_have_the_steps_tokens_in_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_chunks, num_decodes = int(rng.integers(1, 7)), int(rng.integers(0, 5))
        rows, starts = rng.permutation(20)[:num_chunks], rng.integers(0, 50, num_chunks)
        counts = rng.integers(1, 40, num_chunks)
        total = int(counts.sum()) + num_decodes
        first = int(rng.integers(num_decodes, total + 1))
        work = make_work(rows, starts, counts, rng.permutation(20)[:num_decodes])
        halves = [tokens_of(*half) for half in deal_chunks(work, (first, total - first + int(rng.integers(0, 9))))]
        assert [len(half) for half in halves] == [first - num_decodes, total - first]
        assert halves[0] + halves[1] == tokens_of(rows, starts, counts)


def mixed_work(num_tokens: int, num_chunks: int = 1, num_decodes: int = 0) -> StepWork:
    counts = np.full(num_chunks, (num_tokens - num_decodes) // num_chunks)
    counts[0] += num_tokens - num_decodes - counts.sum()
    return make_work(np.arange(num_chunks), np.zeros(num_chunks, int), counts, np.arange(num_chunks, 256)[:num_decodes])


def test_mixed_steps_are_padded_little_and_large_ones_not_at_all() -> None:
    shapes = StepShapes(256, 8192, is_sharded=False)
    for num_tokens in (1, 64, 65, 1000, 3841, 4096, 7936, 8192):
        shape = shapes.mixed_shape(mixed_work(num_tokens))
        assert num_tokens <= shape.num_tokens <= num_tokens + MAX_PADDING_TOKENS
        assert shape in shapes.mixed
    for num_tokens in (4097, 6000, 7935):
        shape = shapes.mixed_shape(mixed_work(num_tokens))
        assert shape.num_tokens == num_tokens and shape not in shapes.mixed
    # Many short chunks have more tiles than a captured step has room for.
    shape = shapes.mixed_shape(mixed_work(400, num_chunks=100))
    assert shape.micro_batch_tiles == (100,) and shape.num_tokens == 400
    assert shapes.mixed_shape(mixed_work(400, num_decodes=3)).num_decode_rows == 256


def test_ladders_end_at_the_largest_step() -> None:
    for most in (1, 3, 64, 100, 256, 300, 1000):
        assert batch_sizes(most)[-1] == most and token_counts(most)[-1] == most
        shapes = StepShapes(most, 99, is_sharded=False)
        assert all(shapes.batch_size(count) >= count for count in range(most + 1))
