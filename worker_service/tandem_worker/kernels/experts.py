"""A mixture of experts' linear layers as grouped matrix products: tokens sorted by expert, tiles of one expert each.

How many tokens each expert gets is known to the device alone, so there are as many programs as there could be tiles;
those that find none for them end at once.
"""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.launcher import Kernel

BLOCK_N = 64
BLOCK_K = 64


@triton.jit
def _grouped_linear(
    x, weight, order, ends, out, num_pairs,
    CHOSEN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr,
    GATE_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A pair is a token and one of its CHOSEN experts. `order` holds the pairs sorted by expert, and ends[e] is the end
    of expert e's pairs in it.

    With GATE_UP, x has one row a token, and out, one row a place in that order, is silu(gate) * up. Else x has one row
    a place, and out one row a pair.
    """
    tile = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_PAD)
    end = tl.load(ends + experts, mask=experts < EXPERTS, other=num_pairs)
    begin = tl.load(ends + experts - 1, mask=(experts > 0) & (experts <= EXPERTS), other=0)
    begin = tl.where(experts < EXPERTS, begin, end)
    num_tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(num_tiles, axis=0)
    expert = tl.sum((tiles_end <= tile).to(tl.int32), axis=0)
    if expert < EXPERTS:
        is_mine = experts == expert
        first_tile = tl.sum(tl.where(is_mine, tiles_end - num_tiles, 0), axis=0)
        places = tl.sum(tl.where(is_mine, begin, 0), axis=0) + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = places < tl.sum(tl.where(is_mine, end, 0), axis=0)
        pairs = tl.load(order + places, mask=mask, other=0)
        sources = pairs // CHOSEN if GATE_UP else places
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        x_places = x + sources.to(tl.int64)[:, None] * K + inner[None, :]
        rows_of_expert = 2 * N if GATE_UP else N
        w_places = weight + (expert.to(tl.int64) * rows_of_expert + columns)[None, :] * K + inner[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            in_k = start + inner < K
            w_mask = in_k[:, None] & (columns < N)[None, :]
            values = tl.load(x_places + start, mask=mask[:, None] & in_k[None, :], other=0.0)
            acc = tl.dot(values, tl.load(w_places + start, mask=w_mask, other=0.0), acc)
            if GATE_UP:
                up_acc = tl.dot(values, tl.load(w_places + N * K + start, mask=w_mask, other=0.0), up_acc)
        if GATE_UP:
            acc = acc * tl.sigmoid(acc) * up_acc
        targets = places if GATE_UP else pairs
        out_places = out + targets.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_places, acc.to(out.dtype.element_ty), mask=mask[:, None] & (columns < N)[None, :])


_kernel = Kernel(_grouped_linear)


def mix_experts_grouped(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the outputs of each token's chosen experts, (tokens, hidden_size).

    x (tokens, hidden_size), gate_up (experts, 2 * inner, hidden_size), down (experts, hidden_size, inner). chosen
    (tokens, experts a token) has the numbers of each token's experts, and weights, of the same shape, their weights.
    """
    num_experts, hidden_size, inner = down.shape
    num_tokens, num_chosen = chosen.shape
    num_pairs = num_tokens * num_chosen
    sorted_experts, order = chosen.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=x.device)
    ends = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    order = order.int()
    # A tile has about as many rows as an expert has tokens.
    block_m = min(128, max(16, triton.next_power_of_2(num_pairs // num_experts)))
    num_tiles = triton.cdiv(num_pairs, block_m) + min(num_experts, num_pairs)

    def launch(source: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, is_gate_up: bool) -> torch.Tensor:
        width, num_outputs = source.shape[1], out.shape[1]
        _kernel(
            (num_tiles, triton.cdiv(num_outputs, BLOCK_N), 1), source, weight, order, ends, out, num_pairs,
            CHOSEN=num_chosen, N=num_outputs, K=width, EXPERTS=num_experts,
            EXPERTS_PAD=triton.next_power_of_2(num_experts), GATE_UP=is_gate_up,
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=8 if block_m > 64 else 4,
        )  # fmt: skip
        return out

    middle = launch(x, gate_up, x.new_empty(num_pairs, inner), is_gate_up=True)
    outputs = launch(middle, down, x.new_empty(num_pairs, hidden_size), is_gate_up=False)
    return torch.bmm(weights[:, None], outputs.view(num_tokens, num_chosen, hidden_size))[:, 0]
