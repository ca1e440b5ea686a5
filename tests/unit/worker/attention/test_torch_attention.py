"""Paged attention against a plain softmax over each row's own positions, in a pool whose every other slot is NaN."""

import numpy as np
import pytest
import torch

from tandem_worker.attention import torch_attention as module
from tandem_worker.attention.torch_attention import AttentionMetadata, DecodeGroup, group_decodes, torch_attention


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("most_gathered", [1, 64, 32768])
def test_decode_rows_of_unequal_context_read_their_own_slots_only(
    block_size: int, most_gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_GATHERED_TOKENS", most_gathered)
    generator = torch.Generator().manual_seed(0)
    lens = [700, 40, 39, 5, 1, 1]
    num_blocks = [-(-n // block_size) for n in lens]
    cache = torch.full((2, sum(num_blocks) + 1, block_size, 2, 8), torch.nan, dtype=torch.float64)
    tables = torch.zeros(len(lens), max(num_blocks), dtype=torch.int64)
    ids = torch.randperm(sum(num_blocks), generator=generator) + 1
    keys, values, slots = [], [], []
    for row, (length, blocks) in enumerate(zip(lens, ids.split(num_blocks), strict=True)):
        tables[row, : len(blocks)] = blocks
        positions = torch.arange(length)
        here = blocks[positions // block_size] * block_size + positions % block_size
        k, v = torch.randn(2, length, 2, 8, generator=generator, dtype=torch.float64)
        # The step itself stores the last position.
        for pool, x in zip(cache, (k, v), strict=True):
            pool.flatten(0, 1)[here[:-1]] = x[:-1]
        keys.append(k), values.append(v), slots.append(here[-1:])
    q = torch.randn(len(lens), 4, 8, generator=generator, dtype=torch.float64)
    out = torch_attention(
        q,
        torch.stack([k[-1] for k in keys]),
        torch.stack([v[-1] for v in values]),
        cache,
        AttentionMetadata(
            positions=torch.tensor(lens) - 1,
            slot_mapping=torch.cat(slots),
            chunks=(),
            decode_start=0,
            decode_block_tables=tables,
            decode_context_lens=torch.tensor(lens),
            decode_groups=group_decodes(num_blocks, block_size),
        ),
    )
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        for head in range(4):
            weights = (k[:, head // 2] @ q[row, head] / np.sqrt(8)).softmax(0)
            torch.testing.assert_close(out[row, head], weights @ v[:, head // 2])


def test_one_long_context_does_not_pad_the_short_ones() -> None:
    assert group_decodes([500, *[1] * 199], 16) == (DecodeGroup(1, 500), DecodeGroup(199, 1))
    assert group_decodes([10] * 300, 16) == (DecodeGroup(204, 10), DecodeGroup(96, 10))
    assert group_decodes([3, 2, 1], 16) == (DecodeGroup(3, 3),)
    assert group_decodes([], 16) == ()


def test_groups_hold_every_row_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.choice([1, 16, 256]))
        blocks = sorted((int(b) for b in rng.geometric(0.01, rng.integers(1, 257))), reverse=True)
        groups = group_decodes(blocks, size)
        assert sum(g.num_rows for g in groups) == len(blocks)
        first = 0
        for group in groups:
            mine = blocks[first : first + group.num_rows]
            assert group.num_blocks == max(mine)
            gathered = group.num_rows * group.num_blocks * size
            assert gathered <= module.MAX_GATHERED_TOKENS or group.num_rows == 1
            first += group.num_rows
