"""Each kernel against plain torch in float64 on random inputs: through Triton's interpreter, or on a GPU.

Outputs are poisoned first, and so is what a kernel must not read.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu

from tandem_worker.kernels import decode_attention as decode_attention_module
from tandem_worker.kernels.decode_attention import DecodeAttention
from tandem_worker.kernels.experts import mix_experts_grouped
from tandem_worker.kernels.linear import SKINNY_OUTPUTS, few_token_linear, is_skinny, skinny_linear
from tandem_worker.kernels.norm import rms_norm, silu_mul
from tandem_worker.kernels.prefill_attention import prefill_attention
from tandem_worker.kernels.query_tiles import cut_tiles
from tandem_worker.kernels.step_input import begin_decode, embed
from tandem_worker.kernels.store_kv import store_kv
from tandem_worker.layers.rotary import apply_rotary
from tandem_worker.ranks.shard import Shard

EPS = 1e-6
ON_GPU = torch.cuda.is_available()
# The interpreter multiplies the bits of bfloat16 matrices.
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
ATTENTION_TOLERANCE = 2e-2
"""Scores of random inputs reach 30, so that rounding q and k to bfloat16 shows."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels write to is NaN before. Inputs are the same in each run."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-12345)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))


def random(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DTYPE).to(device)


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-2) -> None:
    out, expected = out.double(), expected.double()
    assert out.shape == expected.shape
    assert out.isfinite().all()
    assert (out - expected).norm() / expected.norm() < tolerance


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1024), (3, 96), (5, 5120)])
def test_rms_norm(device: torch.device, num_tokens: int, size: int) -> None:
    x, weight = random(num_tokens, size, device=device), random(size, device=device)
    assert_near(rms_norm(x, weight, EPS), normed(x, weight))


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (3, 3072), (2, 37)])
def test_silu_mul(device: torch.device, num_tokens: int, size: int) -> None:
    x = random(num_tokens, 2 * size, device=device)
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(silu_mul(x), silu(gate) * up)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_outputs", "width"), [(48, 128), (130, 256), (64, 384), (100, 1152)])
def test_few_token_linear(device: torch.device, num_tokens: int, num_outputs: int, width: int) -> None:
    x, norm = random(num_tokens, width, device=device), random(width, device=device)
    weight = random(num_outputs, width, device=device, scale=width**-0.5)
    residual = random(num_tokens, num_outputs, device=device)
    assert_near(few_token_linear(x, weight), linear(x.double(), weight.double()))
    expected = residual.double() + linear(x.double(), weight.double())
    assert few_token_linear(x, weight, residual=residual) is residual
    assert_near(residual, expected)
    expected = linear(normed(x, norm), weight.double())
    assert_near(few_token_linear(x, weight, norm=norm, eps=EPS), expected)
    gate, up = expected.chunk(2, dim=-1)
    assert_near(few_token_linear(x, weight, norm=norm, eps=EPS, silu_mul=True), silu(gate) * up)


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 64])
@pytest.mark.parametrize(("num_outputs", "width"), [(64, 128), (192, 640)])
def test_skinny_linear(device: torch.device, num_tokens: int, num_outputs: int, width: int) -> None:
    x = random(num_tokens, width, device=device)
    weight = random(num_outputs, width, device=device, scale=width**-0.5)
    assert is_skinny(num_tokens, weight)
    expected = linear(x.double(), weight.double())
    assert_near(skinny_linear(x, weight), expected)
    gate, up = expected.chunk(2, dim=-1)
    assert_near(skinny_linear(x, weight, silu_mul=True), silu(gate) * up)


def test_what_is_not_skinny() -> None:
    weight = torch.empty(SKINNY_OUTPUTS + 64, 256, device="meta")
    assert is_skinny(64, weight[64:])
    assert not is_skinny(65, weight[64:])
    assert not is_skinny(1, weight)
    assert not is_skinny(1, weight[:96])
    assert not is_skinny(1, weight[:64, :192])


class Pool:
    """A KV pool with rows of random contexts in random blocks; every slot that is nobody's is NaN."""

    def __init__(
        self, context_lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size = block_size
        num_blocks = [-(-length // block_size) for length in context_lens]
        ids = torch.randperm(sum(num_blocks)) + 1
        # Longer than needed, so that the stride is not the length; what is past the context is no block at all.
        self.tables = torch.full((len(context_lens), max(num_blocks) + 3), 10**9, dtype=torch.int32)
        self.cache = torch.full((2, sum(num_blocks) + 1, block_size, num_kv_heads, head_dim), float("nan"), dtype=DTYPE)
        self.keys, self.values = [], []
        for row, (length, count) in enumerate(zip(context_lens, num_blocks, strict=True)):
            self.tables[row, :count] = ids[:count].int()
            ids = ids[count:]
            k, v = (torch.randn(length, num_kv_heads, head_dim).to(DTYPE) for _ in range(2))
            self.keys.append(k)
            self.values.append(v)
            slots = self.slots(row, 0, length)
            self.cache[0].flatten(0, 1)[slots] = k
            self.cache[1].flatten(0, 1)[slots] = v
        self.cache, self.tables = self.cache.to(device), self.tables.to(device)
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32, device=device)

    def slots(self, row: int, start: int, count: int) -> torch.Tensor:
        positions = torch.arange(start, start + count)
        return (
            self.tables.cpu()[row].long()[positions // self.block_size] * self.block_size + positions % self.block_size
        )

    def attend(
        self, qkv: torch.Tensor, q_norm: torch.Tensor, rotary: torch.Tensor, row: int, position: int
    ) -> torch.Tensor:
        """One token, (heads + 2 KV heads, head_dim), over [0, position] -> (heads * head_dim,) float64."""
        group = self.num_heads // self.num_kv_heads
        q = apply_rotary(normed(qkv[None, : self.num_heads], q_norm), rotary[position][None].double())[0].cpu()
        k = self.keys[row][: position + 1].double().repeat_interleave(group, 1)
        v = self.values[row][: position + 1].double().repeat_interleave(group, 1)
        weights = (torch.einsum("hd,thd->ht", q, k) * self.head_dim**-0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, v).flatten()


def test_plan_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of every row in one item, a row's items in a row, and never more than there is room for."""
    monkeypatch.setattr(decode_attention_module, "_num_processors", lambda device: 20)
    attention = DecodeAttention(64, 4, 2, 32, device)
    for contexts in ([1], [64], [65], [40000], [640] * 50, [1] * 63 + [30000], [5, 1000, 7, 3000]):
        lens = torch.tensor([0, *contexts], dtype=torch.int32, device=device)
        rows = torch.tensor([-1, *range(len(contexts), 0, -1)], dtype=torch.int32, device=device)
        items = attention.plan(rows, lens, lens).items.tolist()
        covered = {}
        for index, split, num_splits, split_len in items:
            if index >= 0:
                covered.setdefault(int(rows[index]), []).append((split, num_splits, split_len))
        assert list(covered) == rows[1:].tolist()
        for row, splits in covered.items():
            length = splits[0][2]
            assert splits == [(i, len(splits), length) for i in range(len(splits))]
            assert (len(splits) - 1) * length < int(lens[row]) <= len(splits) * length
        num_items = sum(map(len, covered.values()))
        assert [item[0] for item in items[num_items:]] == [-1] * (len(items) - num_items)
    assert len(covered[4]) == 32 and len(covered[2]) == 11


def test_rows_of_one_length_are_cut_alike(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two, until the rows alone make two rounds of an H100's programs; and there is room for the partials."""
    monkeypatch.setattr(decode_attention_module, "_num_processors", lambda device: 132)
    attention = DecodeAttention(130, 16, 8, 32, device)
    for num_rows in (1, 7, 48, 64, 125, 126, 130):
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        items = attention.plan(rows, torch.full_like(rows, 640), rows).items
        num_splits = items[items[:, 0] >= 0, 2].unique().tolist()
        assert len(num_splits) == 1
        if num_rows >= 48:
            assert num_splits == [2 if num_rows < 126 else 1]
        assert len(items) * 16 <= len(attention._partials)


SHAPES = [(4, 2, 32, 16), (3, 1, 64, 5), (2, 2, 32, 1), (8, 1, 128, 64), *([(16, 8, 128, 16)] if ON_GPU else [])]


@pytest.mark.parametrize("stores", [False, True])
@pytest.mark.parametrize("num_processors", [1, 20])
@pytest.mark.parametrize("rows", [(4, -1, 0, 2), (4, 2, 0, -1, 1, 3), (4, 2, 0, -1, 1, 3, -1, -1, -1)], ids=len)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
def test_decode_attention(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_heads: int, num_kv_heads: int, head_dim: int,
    block_size: int, rows: tuple[int, ...], num_processors: int, stores: bool,
) -> None:  # fmt: skip
    """In each of the kernel's forms, for few rows and for more; with few splits and many; twice, as the counters of the
    splits must end as they began.
    """
    monkeypatch.setattr(decode_attention_module, "_num_processors", lambda device: num_processors)
    contexts = [1, 64, 65, 66, 2000 if ON_GPU else 260]
    pool = Pool(contexts, num_heads, num_kv_heads, head_dim, block_size, device)
    attention = DecodeAttention(16, num_heads, num_kv_heads, head_dim, device)
    q_norm, k_norm = random(head_dim, device=device), random(head_dim, device=device)
    rotary = random(max(contexts), 2, head_dim // 2, device=device)
    for _ in range(2):
        qkv = random(len(rows), num_heads + 2 * num_kv_heads, head_dim, device=device)
        if stores:
            for index, row in enumerate(rows):
                # The new token's KV is in qkv alone.
                if row >= 0:
                    pool.cache.flatten(1, 2)[:, pool.slots(row, contexts[row] - 1, 1).to(device)] = float("nan")
                    k, v = qkv[index, num_heads:].split(num_kv_heads)
                    k = apply_rotary(normed(k, k_norm)[None], rotary[contexts[row] - 1][None].double())[0]
                    pool.keys[row][-1], pool.values[row][-1] = k.to(DTYPE).cpu(), v.cpu()
        out = torch.full((len(rows), num_heads * head_dim), float("nan"), dtype=DTYPE, device=device)
        decode = attention.plan(torch.tensor(rows, dtype=torch.int32, device=device), pool.context_lens, pool.tables)
        attention(qkv, q_norm, k_norm, EPS, rotary, pool.cache, decode, out, stores=stores)
        for index, row in enumerate(rows):
            if row < 0:
                assert out[index].isnan().all()
                continue
            expected = pool.attend(qkv[index], q_norm, rotary, row, contexts[row] - 1)
            assert_near(out[index].cpu(), expected, ATTENTION_TOLERANCE)
            slots = pool.slots(row, 0, contexts[row]).to(device)
            assert_near(pool.cache[0].flatten(0, 1)[slots].cpu(), pool.keys[row])
            assert torch.equal(pool.cache[1].flatten(0, 1)[slots].cpu(), pool.values[row])


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (16, 8, 128), (5, 1, 16)])
def test_store_kv(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    qkv = random(7, num_heads + 2 * num_kv_heads, head_dim, device=device)
    k_norm = random(head_dim, device=device)
    rotary = random(50, 2, head_dim // 2, device=device)
    positions = torch.tensor([3, 0, 49, 7, 8, 9, 10], dtype=torch.int32, device=device)
    slots = torch.tensor([5, 11, 2, 30, 31, 8, 9], dtype=torch.int32, device=device)
    cache = torch.full((2, 8, 4, num_kv_heads, head_dim), 7.0, dtype=DTYPE, device=device)
    before = qkv.clone()
    k, v = qkv.double()[:, num_heads:].split(num_kv_heads, dim=1)
    expected_k = apply_rotary(normed(k, k_norm), rotary[positions].double())
    store_kv(qkv, k_norm, EPS, rotary, positions, slots, cache)
    keys = slice(num_heads, num_heads + num_kv_heads)
    assert torch.equal(cache[0].flatten(0, 1)[slots.long()], qkv[:, keys])
    assert_near(qkv[:, keys], expected_k)
    before[:, keys] = qkv[:, keys]
    assert torch.equal(qkv, before)
    assert torch.equal(cache[1].flatten(0, 1)[slots.long()].double(), v)
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[slots.long()] = False
    assert (cache.flatten(1, 2)[:, untouched] == 7).all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), SHAPES)
def test_prefill_attention(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    contexts = [1, 300, 128, 129, 270]
    pool = Pool(contexts, num_heads, num_kv_heads, head_dim, block_size, device)
    # Whole prompts, a last token alone, and chunks that begin where earlier ones ended.
    chunks = [(3, 0, 129), (0, 0, 1), (1, 299, 1), (4, 100, 170), (2, 0, 100)]
    rows, starts, counts = map(np.array, zip(*chunks, strict=True))
    num_tokens = int(counts.sum())
    qkv = random(num_tokens + 2, num_heads + 2 * num_kv_heads, head_dim, device=device)
    token = 0
    for row, start, count in chunks:
        # The chunk's own KV is read from qkv, whatever the cache holds.
        own = torch.cat([pool.keys[row][start : start + count], pool.values[row][start : start + count]], dim=1)
        qkv[token : token + count, num_heads:] = own.to(device)
        pool.cache.flatten(1, 2)[:, pool.slots(row, start, count).to(device)] = float("nan")
        token += count
    qkv[num_tokens:, num_heads:] = float("nan")
    out = torch.full((num_tokens + 2, num_heads * head_dim), 3.0, dtype=DTYPE, device=device)
    out[:num_tokens] = float("nan")
    tiles = torch.from_numpy(cut_tiles(rows, starts, counts)).to(device)
    q_norm, rotary = random(head_dim, device=device), random(max(contexts), 2, head_dim // 2, device=device)
    prefill_attention(qkv, q_norm, EPS, rotary, pool.cache, pool.tables, tiles, out)
    assert (out[num_tokens:] == 3).all()
    token = 0
    for row, start, count in chunks:
        expected = torch.stack([pool.attend(qkv[token + i], q_norm, rotary, row, start + i) for i in range(count)])
        assert_near(out[token : token + count].cpu(), expected, ATTENTION_TOLERANCE)
        token += count


def test_cut_tiles_covers_every_token_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_chunks = int(rng.integers(1, 9))
        rows, starts = rng.permutation(20)[:num_chunks], rng.integers(0, 500, num_chunks)
        counts = rng.integers(1, 400, num_chunks)
        covered = []
        for row, first, count, position, start in cut_tiles(rows, starts, counts).tolist():
            assert 1 <= count <= 128
            assert start == starts[rows.tolist().index(row)]
            covered += [(first + i, row, position + i) for i in range(count)]
        chunks = zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True)
        tokens = [(row, start + i) for row, start, count in chunks for i in range(count)]
        assert sorted(covered) == [(index, *token) for index, token in enumerate(tokens)]


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


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 8, 8), (5, 3, 2), (150, 5, 2), (70, 1, 1)])
@pytest.mark.parametrize(("hidden_size", "inner"), [(96, 40), (128, 144)])
def test_experts(
    device: torch.device, num_tokens: int, num_experts: int, num_chosen: int, hidden_size: int, inner: int
) -> None:
    """With an expert that no token chooses, where there are enough."""
    x = random(num_tokens, hidden_size, device=device)
    gate_up = random(num_experts, 2 * inner, hidden_size, device=device, scale=hidden_size**-0.5)
    down = random(num_experts, hidden_size, inner, device=device, scale=inner**-0.5)
    scores = torch.rand(num_tokens, num_experts)
    if num_experts > num_chosen:
        scores[:, 1] = -1
    weights, chosen = (values.to(device) for values in scores.topk(num_chosen))
    weights = weights.to(DTYPE)
    expected = torch.zeros(num_tokens, hidden_size, dtype=torch.float64, device=device)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token].double(), chosen[token], strict=True):
            gate, up = linear(x[token].double(), gate_up[expert].double()).chunk(2)
            expected[token] += weight * linear(silu(gate) * up, down[expert].double())
    assert_near(mix_experts_grouped(x, gate_up, down, weights, chosen), expected)
