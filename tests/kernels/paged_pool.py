"""A KV pool with random contents, and the attention over it in float64."""

import torch

from tandem_worker.layers.rotary import apply_rotary
from tests.kernels.comparison import DTYPE, normed

ATTENTION_TOLERANCE = 2e-2
"""Scores of random inputs are large, so that rounding q and k to bfloat16 shows."""


class Pool:
    """A KV pool with rows of random contexts in random blocks; slots that belong to no row are NaN."""

    def __init__(
        self, context_lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, block_size: int,
        device: torch.device, unused_entry: int = 10**9,
    ) -> None:  # fmt: skip
        """unused_entry is what block tables hold past a row's blocks; the default is no block at all."""
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size = block_size
        num_blocks = [-(-length // block_size) for length in context_lens]
        ids = torch.randperm(sum(num_blocks)) + 1
        # The tables are longer than needed, so that their stride is not a row's length.
        self.tables = torch.full((len(context_lens), max(num_blocks) + 3), unused_entry, dtype=torch.int32)
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
        self, qkv: torch.Tensor, q_norm: torch.Tensor | None, rotary: torch.Tensor, row: int, position: int
    ) -> torch.Tensor:
        """A token's attention over positions [0, position] in float64, (heads * head_dim,), from its qkv (heads + 2 KV
        heads, head_dim). The row's keys are normalised and rotated already.
        """
        q = rotated(qkv[: self.num_heads], q_norm, rotary[position]).cpu()
        q = q.view(self.num_kv_heads, -1, self.head_dim)  # The heads of a group follow one another.
        k, v = self.keys[row][: position + 1].double(), self.values[row][: position + 1].double()
        weights = (torch.einsum("kgd,tkd->kgt", q, k) * self.head_dim**-0.5).softmax(-1)
        return torch.einsum("kgt,tkd->kgd", weights, v).flatten()


def random_rotary(num_positions: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """cos and sin of random angles, (positions, 2, head_dim // 2). Rotations keep lengths: if cos and sin were any
    numbers, scores would be twice as large, and so would the effect of rounding.
    """
    angles = torch.rand(num_positions, head_dim // 2) * 2 * torch.pi
    return torch.stack([angles.cos(), angles.sin()], 1).to(DTYPE).to(device)


def finish_plan(device: torch.device) -> None:
    """Waits for the plan's kernels. In a model other kernels run between them and attention, which relies on that
    (kernels/gdc.py).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()


def rotated(heads: torch.Tensor, norm: torch.Tensor | None, rotary: torch.Tensor) -> torch.Tensor:
    """A token's heads, (heads, head_dim), after the norm, if there is one, and rotary embedding, in float64. rotary
    (2, head_dim // 2), of the token's position.
    """
    heads = heads.double() if norm is None else normed(heads, norm)
    return apply_rotary(heads[None], rotary[None].double())[0]
