"""Qwen3, dense and mixture-of-experts, as in transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM. Knows nothing of
rows, plans or sampling.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from tandem_worker.checkpoint.model_config import ModelConfig, MoEConfig
from tandem_worker.checkpoint.weights import CheckpointTarget
from tandem_worker.layers.experts import Experts
from tandem_worker.layers.norm import RMSNorm
from tandem_worker.layers.operations import Operations
from tandem_worker.layers.rotary import build_rotary_table
from tandem_worker.ranks.communicator import Communicator

PACKED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Our weight -> the checkpoint's, which it holds one above the other."""
ROW_DEALT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMN_DEALT = ("o_proj", "down_proj")
"""Modules whose outputs, or inputs, the ranks of a group share."""


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Qwen3Attention(nn.Module):
    """Like the MLPs below, gives this rank's share of residual plus output: the sum over the ranks is meant. Rank 0's
    share has the residual in it. config is the rank's own.
    """

    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype, rank: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        num_projected = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = _weight(dtype, num_projected * self.head_dim, config.hidden_size)
        self.o_proj = _weight(dtype, config.hidden_size, config.num_attention_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.operations = operations
        self.project_out = operations.linear_add if rank == 0 else operations.linear_over

    def forward(
        self, x: torch.Tensor, norm: RMSNorm, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        qkv = self.operations.norm_linear(x, norm, self.qkv_proj)
        qkv = qkv.view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        out = self.operations.attention(qkv, self.q_norm, self.k_norm, rotary_table, cache, metadata)
        return self.project_out(out, self.o_proj, x)


class Qwen3MLP(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype, rank: int) -> None:
        super().__init__()
        self.gate_up_proj = _weight(dtype, 2 * config.intermediate_size, config.hidden_size)
        self.down_proj = _weight(dtype, config.hidden_size, config.intermediate_size)
        self.operations = operations
        self.project_out = operations.linear_add if rank == 0 else operations.linear_over

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        inner = self.operations.norm_gate_up(x, norm, self.gate_up_proj)
        return self.project_out(inner, self.down_proj, x)


class Qwen3MoE(nn.Module):
    def __init__(
        self, config: ModelConfig, moe: MoEConfig, operations: Operations, dtype: torch.dtype, rank: int
    ) -> None:
        super().__init__()
        num_experts, inner = moe.num_experts, moe.moe_intermediate_size
        self.gate = _weight(dtype, num_experts, config.hidden_size)
        self.experts_gate_up = _weight(dtype, num_experts, 2 * inner, config.hidden_size)
        self.experts_down = _weight(dtype, num_experts, config.hidden_size, inner)
        self.experts = Experts(
            self.gate, self.experts_gate_up, self.experts_down, moe.num_experts_per_tok, moe.norm_topk_prob
        )
        self.operations, self.has_residual = operations, rank == 0

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        out = self.operations.norm_experts(x, norm, self.experts)
        return x.add_(out) if self.has_residual else x.copy_(out)


class Qwen3Layer(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype, rank: int, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, operations, dtype, rank)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp: nn.Module
        if config.moe and index in config.moe.layers:
            self.mlp = Qwen3MoE(config, config.moe, operations, dtype, rank)
        else:
            self.mlp = Qwen3MLP(config, operations, dtype, rank)


class _Part:
    """Tokens on their way through the layers."""

    def __init__(self, x: torch.Tensor, metadata: Any, communicator: Communicator, is_alone: bool) -> None:
        self.metadata = metadata
        self._x, self._communicator, self._is_alone = x, communicator, is_alone
        self._summed: torch.cuda.Event | None = None

    def sum(self, share: torch.Tensor) -> None:
        """Over the ranks; beside other parts' work, if there are any."""
        self._x = share
        if self._is_alone:
            self._communicator.all_reduce(share)
        else:
            self._summed = self._communicator.begin_all_reduce(share)

    def hidden(self) -> torch.Tensor:
        if self._summed is not None:
            self._summed.wait()
        return self._x


class Qwen3(nn.Module):
    """One rank's part of a model, or a whole one. Weights are uninitialised until checkpoint/weights.py has filled
    checkpoint_targets().
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
        local = self.local_config = self.communicator.shard.cut(config)
        self.embed_tokens = _weight(dtype, local.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen3Layer(local, operations, dtype, self.communicator.shard.rank, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _weight(dtype, local.vocab_size, config.hidden_size)
        table = build_rotary_table(config, num_positions, dtype)
        self.register_buffer("rotary_table", table, persistent=False)  # (positions, 2, head_dim // 2)
        # Called after each layer, if set.
        self.after_layer: Callable[[], None] | None = None

    @property
    def first_token(self) -> int:
        """Of this rank's part of the vocabulary."""
        return self.communicator.shard.rank * self.local_config.vocab_size

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64 -> (tokens, hidden_size). Each rank looks up its part of the vocabulary."""
        num_local = self.local_config.vocab_size
        if self.communicator.shard.size == 1:
            return self.embed_tokens[token_ids]
        local_ids = token_ids - self.first_token
        is_mine = (local_ids >= 0) & (local_ids < num_local)
        x = self.embed_tokens[local_ids.clamp(0, num_local - 1)].masked_fill(~is_mine[:, None], 0)
        return self.communicator.all_reduce(x)

    def forward(self, caches: torch.Tensor, *inputs: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
        """caches (layers, 2, blocks, block_size, KV heads of this rank, head_dim). Inputs are parts of a step's tokens:
        embeddings (tokens, hidden_size), which it may write over, and the operations' own metadata -> of each the
        hidden states (tokens, hidden_size), before the last norm.

        While one part computes, the sums over the ranks of another are on their way. Later parts see earlier ones' KV.
        """
        parts = [_Part(x, metadata, self.communicator, len(inputs) == 1) for x, metadata in inputs]
        for layer, cache in zip(cast(Iterable[Qwen3Layer], self.layers), caches, strict=True):
            for part in parts:
                x, norm = part.hidden(), layer.input_layernorm
                part.sum(layer.self_attn(x, norm, self.rotary_table, cache, part.metadata))
            for part in parts:
                part.sum(layer.mlp(part.hidden(), layer.post_attention_layernorm))
            if self.after_layer is not None:
                self.after_layer()
        return [part.hidden() for part in parts]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, vocab_size)"""
        local = self.compute_local_logits(hidden)
        if self.communicator.shard.size == 1:
            return local
        return self.gather_logits(local, local.new_empty(len(local), self.config.vocab_size))

    def compute_local_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, this rank's share of the vocabulary), written to `out` where it is given."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.operations.norm_linear(hidden, self.norm, weight, out)

    def gather_logits(self, local: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """All ranks' (rows, share of the vocabulary) -> out, (rows, vocab_size)."""
        shares = self.communicator.all_gather(local)
        for target, share in zip(out.split(shares.shape[2], dim=1), shares, strict=False):
            # The last ranks' padding comes last.
            target.copy_(share[:, : target.shape[1]])
        return out

    def checkpoint_targets(self) -> dict[str, CheckpointTarget]:
        """The checkpoint's tensor names -> what of them this rank holds, and where: views of the weights."""
        targets: dict[str, CheckpointTarget] = {}
        for name, parameter in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            if leaf in PACKED_MODULES:
                lengths = [self._dealt_out(part) for part in PACKED_MODULES[leaf]]
                views = parameter.split([part.stop - part.start for _, part in lengths])
                for part, view in zip(PACKED_MODULES[leaf], views, strict=True):
                    targets[f"model.{path}.{part}.weight"] = self._target(part, view)
            elif leaf in ("experts_gate_up", "experts_down"):
                parts = ("gate_proj", "up_proj") if leaf == "experts_gate_up" else ("down_proj",)
                for expert, weight in enumerate(parameter):
                    for part, view in zip(parts, weight.chunk(len(parts)), strict=True):
                        target = self._target(part, view, is_expert=True)
                        targets[f"model.{path}.experts.{expert}.{part}.weight"] = target
            elif name == "lm_head":
                targets["lm_head.weight"] = self._target(name, parameter)
            else:
                targets[f"model.{name.removesuffix('.weight')}.weight"] = self._target(leaf, parameter)
        return targets

    def _target(self, module: str, view: torch.Tensor, is_expert: bool = False) -> CheckpointTarget:
        """The weight of a module in the checkpoint, of which `view` is this rank's part."""
        if module in ROW_DEALT:
            length, part = self._dealt_out(module, is_expert)
            # What pads the vocabulary is nobody's: zeros.
            view[part.stop - part.start :].zero_()
            view = view[: part.stop - part.start]
            return CheckpointTarget(view, (length, view.shape[1]), (part, slice(None)))
        if module in COLUMN_DEALT:
            length, part = self._dealt_out(module, is_expert)
            return CheckpointTarget(view, (view.shape[0], length), (slice(None), part))
        return CheckpointTarget(view, tuple(view.shape), (slice(None),) * view.dim())

    def _dealt_out(self, module: str, is_expert: bool = False) -> tuple[int, slice]:
        """How long the dimension is that the ranks share, in the checkpoint, and this rank's part of it."""
        config, shard, head_dim = self.config, self.communicator.shard, self.config.head_dim
        if module in ("q_proj", "o_proj"):
            return config.num_attention_heads * head_dim, _times(shard.part(config.num_attention_heads), head_dim)
        if module in ("k_proj", "v_proj"):
            return config.num_key_value_heads * head_dim, _times(shard.kv_heads(config.num_key_value_heads), head_dim)
        if module in ("embed_tokens", "lm_head"):
            return config.vocab_size, shard.vocab_part(config.vocab_size)
        inner = config.moe.moe_intermediate_size if is_expert and config.moe else config.intermediate_size
        return inner, shard.part(inner)


def _times(part: slice, count: int) -> slice:
    return slice(part.start * count, part.stop * count)
