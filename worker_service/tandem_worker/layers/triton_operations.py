"""The operations of a Qwen3 layer on an NVIDIA GPU in bfloat16: Triton kernels for few tokens, cuBLAS for many."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from tandem_worker.kernels.decode_attention import DecodeAttention, DecodeRows
from tandem_worker.kernels.experts import mix_experts_grouped
from tandem_worker.kernels.linear import few_token_linear, is_few, is_skinny, skinny_linear
from tandem_worker.kernels.norm import rms_norm, silu_mul
from tandem_worker.kernels.prefill_attention import prefill_attention
from tandem_worker.kernels.store_kv import store_kv
from tandem_worker.layers.experts import Experts, route
from tandem_worker.layers.norm import RMSNorm


@dataclass(frozen=True)
class MixedMetadata:
    """One token of each decoding row comes first, then the tokens of chunks."""

    positions: torch.Tensor
    """(tokens,) int32"""
    slots: torch.Tensor
    """(tokens,) int32: where each token's KV goes; slots of block 0 are never read"""
    block_tables: torch.Tensor
    """(all rows, most blocks of one) int32"""
    tiles: torch.Tensor
    """(tiles, TILE_FIELDS) int32: the chunks' queries, see query_tiles.cut_tiles"""
    decode: DecodeRows | None
    """None where no row decodes"""


class TritonOperations:
    """Owns the scratch memory of its kernels, so it runs on one stream."""

    def __init__(self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._decode_attention = DecodeAttention(max_rows, num_heads, num_kv_heads, head_dim, device)

    def plan_decode(self, rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> DecodeRows:
        """The metadata of a step whose every token is a decoding row's. See DecodeRows."""
        return self._decode_attention.plan(rows, context_lens, block_tables)

    def norm_linear(
        self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if is_few(len(x), x.shape[1]):
            return few_token_linear(x, weight, norm=norm.weight, eps=norm.eps, out=out)
        x = rms_norm(x, norm.weight, norm.eps)
        if out is not None:
            return torch.mm(x, weight.t(), out=out)
        return skinny_linear(x, weight) if is_skinny(len(x), weight) else linear(x, weight)

    def norm_gate_up(self, x: torch.Tensor, norm: RMSNorm, weight: torch.Tensor) -> torch.Tensor:
        if is_few(len(x), x.shape[1]):
            return few_token_linear(x, weight, norm=norm.weight, eps=norm.eps, silu_mul=True)
        x = rms_norm(x, norm.weight, norm.eps)
        return skinny_linear(x, weight, silu_mul=True) if is_skinny(len(x), weight) else silu_mul(linear(x, weight))

    def linear_add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if is_few(len(x), x.shape[1]):
            return few_token_linear(x, weight, residual=residual)
        return residual.addmm_(x, weight.t())

    def linear_over(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if is_few(len(x), x.shape[1]):
            return few_token_linear(x, weight, out=residual)
        return torch.mm(x, weight.t(), out=residual)

    def norm_experts(self, x: torch.Tensor, norm: RMSNorm, experts: Experts) -> torch.Tensor:
        x = rms_norm(x, norm.weight, norm.eps)
        return mix_experts_grouped(x, experts.gate_up, experts.down, *route(x, experts))

    def attention(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm,
        k_norm: RMSNorm,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: DecodeRows | MixedMetadata,
    ) -> torch.Tensor:
        num_heads = qkv.shape[1] - 2 * cache.shape[3]
        out = torch.empty(len(qkv), num_heads * qkv.shape[2], dtype=qkv.dtype, device=qkv.device)
        norms = (q_norm.weight, k_norm.weight, q_norm.eps)
        if isinstance(metadata, DecodeRows):
            self._decode_attention(qkv, *norms, rotary_table, cache, metadata, out, stores=True)
            return out
        store_kv(qkv, *norms[1:], rotary_table, metadata.positions, metadata.slots, cache)
        prefill_attention(
            qkv, q_norm.weight, q_norm.eps, rotary_table, cache, metadata.block_tables, metadata.tiles, out
        )
        if metadata.decode is not None:
            self._decode_attention(qkv, *norms, rotary_table, cache, metadata.decode, out, stores=False)
        return out
