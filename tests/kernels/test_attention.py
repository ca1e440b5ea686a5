"""Attention kernels and the store of keys and values, compared with plain torch in float64 on random inputs.

They run through Triton's interpreter, or on a GPU. Outputs are poisoned first, and so is what a kernel must not read.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tandem_worker.kernels import decode_attention as decode_attention_module
from tandem_worker.kernels.decode_attention import DecodeAttention
from tandem_worker.kernels.prefill_attention import prefill_attention
from tandem_worker.kernels.query_tiles import cut_tiles
from tandem_worker.kernels.store_kv import store_kv
from tandem_worker.layers.rotary import apply_rotary
from tests.kernels.comparison import DTYPE, EPS, ON_GPU, assert_near, normed, random, slow_in_interpreter
from tests.kernels.paged_pool import ATTENTION_TOLERANCE, Pool, finish_plan, random_rotary

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@pytest.mark.parametrize("num_rows", [1, 7, 48, slow_in_interpreter(64), 125, 126, slow_in_interpreter(130)])
def test_rows_of_one_length_are_cut_alike(device: torch.device, monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Each row is cut in two, until the rows alone make two rounds of an H100's programs. There is room for the
    partial results.
    """
    monkeypatch.setattr(decode_attention_module, "_num_processors", lambda device: 132)
    attention = DecodeAttention(130, 16, 8, 32, device)
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    items = attention.plan(rows, torch.full_like(rows, 640), rows).items
    num_splits = items[items[:, 0] >= 0, 2].unique().tolist()
    assert len(num_splits) == 1
    if num_rows >= 48:
        assert num_splits == [2 if num_rows < 126 else 1]
    assert len(items) * 16 <= len(attention._partials)


# Heads, KV heads, head_dim, block size
ON_GPU_ALONE = [(16, 8, 128, 16)] if ON_GPU else []
DECODE_SHAPES = [(4, 2, 32, 16), (3, 1, 64, 5), (2, 2, 32, 1), (8, 1, 128, 64), *ON_GPU_ALONE]
# A program computes one head, so two show as much as eight.
PREFILL_SHAPES = [(4, 2, 32, 16), (3, 1, 64, 5), (2, 2, 32, 1), (2, 1, 128, 64), *ON_GPU_ALONE]
DECODE_ROWS = {4: (4, -1, 0, 2), 6: (4, 2, 0, -1, 1, 3), 9: (4, 2, 0, -1, 1, 3, -1, -1, -1)}
"""Decoding rows and padding rows, by their number"""
KERNEL_FORMS = list(itertools.product((1, 20), (False, True)))
"""The number of processors, which decides the number of splits, and whether the kernel stores the new KV"""


def decode_cases() -> list[Any]:
    """Every shape with every number of rows and every form. In the interpreter a quarter of them runs by default: each
    shape meets each number of rows, and each number of rows each form.
    """
    cases = []
    for (i, shape), (j, num_rows) in itertools.product(enumerate(DECODE_SHAPES), enumerate(DECODE_ROWS)):
        for k, form in enumerate(KERNEL_FORMS):
            case = (*shape, num_rows, *form)
            cases.append(case if k == (i + j) % len(KERNEL_FORMS) else slow_in_interpreter(*case))
    return cases


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_rows", "num_processors", "stores"), decode_cases()
)
def test_decode_attention(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, num_heads: int, num_kv_heads: int, head_dim: int,
    block_size: int, num_rows: int, num_processors: int, stores: bool,
) -> None:  # fmt: skip
    """In each of the kernel's forms, for few rows and for more; with few splits and many; twice, as the counters of the
    splits must end as they began.
    """
    monkeypatch.setattr(decode_attention_module, "_num_processors", lambda device: num_processors)
    rows = DECODE_ROWS[num_rows]
    contexts = [1, 64, 65, 66, 2000 if ON_GPU else 260]
    pool = Pool(contexts, num_heads, num_kv_heads, head_dim, block_size, device)
    attention = DecodeAttention(16, num_heads, num_kv_heads, head_dim, device)
    q_norm, k_norm = random(head_dim, device=device), random(head_dim, device=device)
    rotary = random_rotary(max(contexts), head_dim, device)
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
        finish_plan(device)
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


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size"), PREFILL_SHAPES)
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
    q_norm, rotary = random(head_dim, device=device), random_rotary(max(contexts), head_dim, device)
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
