"""Qwen3, dense and mixture-of-experts, as in transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM. Knows nothing of
rows, plans or sampling.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from tandem_worker.checkpoint.model_config import ModelConfig, MoEConfig
from tandem_worker.checkpoint.targets import CheckpointTarget, causal_lm_targets
from tandem_worker.layers.experts import Experts
from tandem_worker.layers.norm import RMSNorm
from tandem_worker.layers.operations import Operations
from tandem_worker.layers.parallel import (
    ColumnParallelLinear,
    ParallelExperts,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tandem_worker.layers.rotary import build_rotary_table
from tandem_worker.models.micro_batch import MicroBatch
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard


class Qwen3Attention(nn.Module):
    """Attention with norms of queries and keys. Like the MLPs below, it takes hidden states x, (tokens, hidden_size),
    and the norm before it, and gives this rank's share of x plus output: the sum over the ranks is the whole.
    """

    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads = shard.divide(config.num_attention_heads, config.head_dim)
        kv_heads = shard.divide_kv_heads(config.num_key_value_heads, config.head_dim)
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}, dtype
        )
        self.o_proj = RowParallelLinear(heads, config.hidden_size, dtype, operations, shard)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
        self.operations = operations

    def forward(
        self, x: torch.Tensor, norm: RMSNorm, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        qkv = self.operations.norm_linear(x, norm, self.qkv_proj.weight)
        qkv = qkv.view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        out = self.operations.attention(qkv, self.q_norm, self.k_norm, rotary_table, cache, metadata)
        return self.o_proj(out, x)


class Qwen3MLP(nn.Module):
    """A gated MLP."""

    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype, shard: Shard) -> None:
        super().__init__()
        inner = shard.divide(config.intermediate_size)
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, {"gate_proj": inner, "up_proj": inner}, dtype)
        self.down_proj = RowParallelLinear(inner, config.hidden_size, dtype, operations, shard)
        self.operations = operations

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return self.down_proj(self.operations.norm_gate_up(x, norm, self.gate_up_proj.weight), x)


class Qwen3MoE(nn.Module):
    """A mixture of experts in the MLP's place."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, operations: Operations, dtype: torch.dtype, shard: Shard
    ) -> None:
        super().__init__()
        inner = shard.divide(moe.moe_intermediate_size)
        self.gate = ReplicatedLinear(config.hidden_size, moe.num_experts, dtype)
        self.experts = ParallelExperts(moe.num_experts, config.hidden_size, inner, dtype)
        self.routed = Experts(
            self.gate.weight, self.experts.gate_up, self.experts.down, moe.num_experts_per_tok, moe.norm_topk_prob
        )
        self.operations, self.has_residual = operations, shard.rank == 0

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        out = self.operations.norm_experts(x, norm, self.routed)
        return x.add_(out) if self.has_residual else x.copy_(out)


class Qwen3Layer(nn.Module):
    """The modules of one layer; Qwen3.forward calls them."""

    def __init__(
        self, config: ModelConfig, operations: Operations, dtype: torch.dtype, shard: Shard, index: int
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, operations, dtype, shard)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp: nn.Module
        if config.moe and index in config.moe.layers:
            self.mlp = Qwen3MoE(config, config.moe, operations, dtype, shard)
        else:
            self.mlp = Qwen3MLP(config, operations, dtype, shard)


class Qwen3(nn.Module):
    """One rank's part of a model, or a whole one; a Model (models/model.py). The weights are uninitialised until
    checkpoint/weights.py has filled checkpoint_targets().
    """

    def __init__(
        self,
        config: ModelConfig,
        operations: Operations,
        num_positions: int,
        dtype: torch.dtype,
        communicator: Communicator | None = None,
    ) -> None:
        """config is the whole model's. num_positions: the longest context that will be served."""
        super().__init__()
        self.config = config
        self.operations = operations
        self.communicator = communicator or Communicator()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, self.communicator)
        self.layers = nn.ModuleList(
            Qwen3Layer(config, operations, dtype, self.communicator.shard, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = self.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, self.communicator)
        table = build_rotary_table(config, num_positions, dtype)
        self.register_buffer("rotary_table", table, persistent=False)  # (positions, 2, head_dim // 2)
        self.after_layer: Callable[[], None] | None = None

    def forward(self, caches: torch.Tensor, *inputs: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
        is_alone = len(inputs) == 1
        micro_batches = [MicroBatch(x, metadata, self.communicator, is_alone=is_alone) for x, metadata in inputs]
        for layer, cache in zip(cast(Iterable[Qwen3Layer], self.layers), caches, strict=True):
            for micro_batch in micro_batches:
                x, norm = micro_batch.hidden(), layer.input_layernorm
                micro_batch.sum(layer.self_attn(x, norm, self.rotary_table, cache, micro_batch.metadata))
            for micro_batch in micro_batches:
                micro_batch.sum(layer.mlp(micro_batch.hidden(), layer.post_attention_layernorm))
            if self.after_layer is not None:
                self.after_layer()
        return [micro_batch.hidden() for micro_batch in micro_batches]

    def compute_local_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.operations.norm_linear(hidden, self.norm, self.lm_head.weight, out)

    def checkpoint_targets(self) -> dict[str, CheckpointTarget]:
        return causal_lm_targets(self)

    @property
    def tied_weights(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
