"""Attention by our own Triton kernels, in bfloat16, for any block size.

A decode step's attention is one kernel a layer, with the QK-norms, the rotary embedding and the KV store in it. A mixed
step takes three: the keys' norm, rotary embedding and store; the chunks' attention; and that of the decoding rows.
"""

from dataclasses import dataclass

import torch

from tandem_worker.attention.backend import MixedTokens
from tandem_worker.kernels.decode_attention import DecodeAttention, DecodeRows
from tandem_worker.kernels.prefill_attention import prefill_attention
from tandem_worker.kernels.store_kv import store_kv
from tandem_worker.layers.norm import RMSNorm


@dataclass(frozen=True)
class _MixedPlan:
    tokens: MixedTokens
    decode: DecodeRows | None
    """None where no row decodes"""


class TritonAttention:
    """See CapturableAttention in backend.py."""

    def __init__(self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._decode_attention = DecodeAttention(max_rows, num_heads, num_kv_heads, head_dim, device)

    def plan_decode(self, rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> DecodeRows:
        return self._decode_attention.plan(rows, context_lens, block_tables)

    def plan_mixed(self, tokens: MixedTokens) -> _MixedPlan:
        if tokens.decode_rows is None:
            return _MixedPlan(tokens, None)
        return _MixedPlan(tokens, self.plan_decode(tokens.decode_rows, tokens.context_lens, tokens.block_tables))

    def __call__(
        self,
        qkv: torch.Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary_table: torch.Tensor,
        cache: torch.Tensor,
        metadata: DecodeRows | _MixedPlan,
    ) -> torch.Tensor:
        num_heads = qkv.shape[1] - 2 * cache.shape[3]
        out = torch.empty(len(qkv), num_heads * qkv.shape[2], dtype=qkv.dtype, device=qkv.device)
        q_weight, k_weight, eps = norm_weights(q_norm, k_norm)
        if isinstance(metadata, DecodeRows):
            self._decode_attention(qkv, q_weight, k_weight, eps, rotary_table, cache, metadata, out, stores=True)
            return out
        tokens, decode = metadata.tokens, metadata.decode
        store_kv(qkv, k_weight, eps, rotary_table, tokens.positions, tokens.slots, cache)
        prefill_attention(qkv, q_weight, eps, rotary_table, cache, tokens.block_tables, tokens.tiles, out)
        if decode is not None:
            self._decode_attention(qkv, q_weight, k_weight, eps, rotary_table, cache, decode, out, stores=False)
        return out


def norm_weights(
    q_norm: RMSNorm | None, k_norm: RMSNorm | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """The weights of both norms and their eps, as the kernels take them."""
    if q_norm is None or k_norm is None:
        assert q_norm is k_norm, "a model has both norms or neither"
        return None, None, 0.0
    return q_norm.weight, k_norm.weight, q_norm.eps
