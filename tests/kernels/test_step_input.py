"""Kernels that prepare a step's input, compared with plain torch on random inputs.

They run through Triton's interpreter, or on a GPU. Outputs are poisoned first, and so is what a kernel must not read.
"""

import pytest
import torch

from tandem_worker.kernels.step_input import begin_decode, embed
from tandem_worker.ranks.shard import Shard
from tests.kernels.comparison import DTYPE, random

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("num_updates", [0, 5, 300])
def test_begin_decode(device: torch.device, num_updates: int) -> None:
    tables = torch.arange(20 * 40, dtype=torch.int32, device=device).view(20, 40)
    context_lens = torch.arange(20, dtype=torch.int32, device=device)
    last_tokens = torch.arange(20, dtype=torch.int32, device=device) * 3
    embedding = random(64, 48, device=device)
    rows = torch.tensor([4, -1, 7, 19], dtype=torch.int32, device=device)
    cells = torch.randperm(20 * 40)[:num_updates]
    updates = torch.full((1 + 3 * 300,), -5, dtype=torch.int32)
    updates[0] = num_updates
    entries = torch.stack([cells // 40, cells % 40, cells + 100_000], 1)
    updates[1 : 1 + 3 * num_updates] = entries.flatten().int()
    expected = tables.clone().flatten()
    expected[cells.to(device)] = (cells + 100_000).int().to(device)
    x = begin_decode(rows, updates.to(device), tables, context_lens, last_tokens, embedding)
    assert torch.equal(x[[0, 2, 3]], embedding[[12, 21, 57]])
    assert torch.equal(tables.flatten(), expected)
    grown = torch.tensor([i + (i in (4, 7, 19)) for i in range(20)], dtype=torch.int32, device=device)
    assert torch.equal(context_lens, grown)


def test_embed(device: torch.device) -> None:
    embedding = random(64, 48, device=device)
    last_tokens = torch.tensor([9, 8, 7], dtype=torch.int32, device=device)
    ids = torch.tensor([5, -1, 63, -3], dtype=torch.int32, device=device)
    out = torch.full((4, embedding.shape[1]), float("nan"), dtype=DTYPE, device=device)
    assert embed(ids, last_tokens, embedding, out) is out
    assert torch.equal(out, embedding[[5, 9, 63, 7]])


@pytest.mark.parametrize("num_tokens", [60, 64])
def test_ranks_embed_their_part_of_the_vocabulary(device: torch.device, num_tokens: int) -> None:
    """So that the sum is the whole's. With 60 tokens over 3 ranks, some of the last one's rows are padding."""
    shards = [Shard(rank, 3) for rank in range(3)]
    share = shards[0].vocab_share(num_tokens)
    whole = random(3 * share, 48, device=device)
    last_tokens = torch.tensor([share - 1, share, num_tokens - 1, 0], dtype=torch.int32, device=device)
    rows = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=device)
    ids = torch.tensor([0, share - 1, share, 2 * share, num_tokens - 1, -1, -3], dtype=torch.int32, device=device)
    decoded, embedded = torch.zeros(4, 48, device=device), torch.zeros(len(ids), 48, device=device)
    for shard in shards:
        part, first = whole[shard.rank * share : (shard.rank + 1) * share], shard.rank * share
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        tables, lens = torch.zeros(4, 4, dtype=torch.int32, device=device), torch.zeros_like(last_tokens)
        decoded += begin_decode(rows, nothing, tables, lens, last_tokens, part, first)
        out = torch.full((len(ids), 48), float("nan"), dtype=DTYPE, device=device)
        embedded += embed(ids, last_tokens, part, out, first)
    assert torch.equal(decoded, whole[last_tokens[rows]].float())
    tokens = torch.cat([ids[:5], last_tokens[[0, 2]]])
    assert torch.equal(embedded, whole[tokens].float())
