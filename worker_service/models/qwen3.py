"""Qwen3 (dense), as in transformers' Qwen3ForCausalLM. Knows nothing of rows, plans or sampling."""

import torch
from torch import nn
from torch.nn.functional import linear

from worker_service.communicator import Communicator
from worker_service.layers.norm import RMSNorm
from worker_service.layers.operations import Operations
from worker_service.layers.rotary import build_rotary_table
from worker_service.model_config import ModelConfig
from worker_service.weights import CheckpointTarget

PACKED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Our weight -> the checkpoint's, which it holds one above the other."""


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _row_parallel_add(
    operations: Operations, communicator: Communicator, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """residual plus a linear layer whose inputs are dealt out over the ranks; may be in place."""
    if communicator.shard.size == 1:
        return operations.linear_add(x, weight, residual)
    return residual.add_(communicator.all_reduce(linear(x, weight)))


class Qwen3Attention(nn.Module):
    """config is the rank's own, here and below."""

    def __init__(
        self, config: ModelConfig, operations: Operations, dtype: torch.dtype, communicator: Communicator
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        num_projected = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = _weight(dtype, num_projected * self.head_dim, config.hidden_size)
        self.o_proj = _weight(dtype, config.hidden_size, config.num_attention_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.operations, self.communicator = operations, communicator

    def forward(
        self, x: torch.Tensor, norm: RMSNorm, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        qkv = self.operations.norm_linear(x, norm, self.qkv_proj)
        qkv = qkv.view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        out = self.operations.attention(qkv, self.q_norm, self.k_norm, rotary_table, cache, metadata)
        return _row_parallel_add(self.operations, self.communicator, out, self.o_proj, x)


class Qwen3MLP(nn.Module):
    def __init__(
        self, config: ModelConfig, operations: Operations, dtype: torch.dtype, communicator: Communicator
    ) -> None:
        super().__init__()
        self.gate_up_proj = _weight(dtype, 2 * config.intermediate_size, config.hidden_size)
        self.down_proj = _weight(dtype, config.hidden_size, config.intermediate_size)
        self.operations, self.communicator = operations, communicator

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        inner = self.operations.norm_gate_up(x, norm, self.gate_up_proj)
        return _row_parallel_add(self.operations, self.communicator, inner, self.down_proj, x)


class Qwen3Layer(nn.Module):
    def __init__(
        self, config: ModelConfig, operations: Operations, dtype: torch.dtype, communicator: Communicator
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, operations, dtype, communicator)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Qwen3MLP(config, operations, dtype, communicator)

    def forward(
        self, x: torch.Tensor, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        x = self.self_attn(x, self.input_layernorm, rotary_table, cache, metadata)
        return self.mlp(x, self.post_attention_layernorm)


class Qwen3(nn.Module):
    """One rank's part of a model, or a whole one. Weights are uninitialised until worker_service.weights has filled
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
            Qwen3Layer(local, operations, dtype, self.communicator) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _weight(dtype, local.vocab_size, config.hidden_size)
        table = build_rotary_table(config, num_positions, dtype)
        self.register_buffer("rotary_table", table, persistent=False)  # (positions, 2, head_dim // 2)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64 -> (tokens, hidden_size). Each rank looks up its part of the vocabulary."""
        shard, num_local = self.communicator.shard, self.local_config.vocab_size
        if shard.size == 1:
            return self.embed_tokens[token_ids]
        local_ids = token_ids - shard.rank * num_local
        is_mine = (local_ids >= 0) & (local_ids < num_local)
        x = self.embed_tokens[local_ids.clamp(0, num_local - 1)].masked_fill(~is_mine[:, None], 0)
        return self.communicator.all_reduce(x)

    def forward(self, x: torch.Tensor, caches: torch.Tensor, metadata: object) -> torch.Tensor:
        """Embedded tokens (tokens, hidden_size), caches (layers, 2, blocks, block_size, KV heads of this rank,
        head_dim), the operations' own metadata -> hidden states (tokens, hidden_size), before the last norm. May write
        over x.
        """
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, self.rotary_table, cache, metadata)
        return x

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, vocab_size), written to `out` where it is given."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if self.communicator.shard.size == 1:
            return self.operations.norm_linear(hidden, self.norm, weight, out)
        local = self.operations.norm_linear(hidden, self.norm, weight)
        # The last ranks' padding comes last.
        logits = self.communicator.all_gather(local)[:, : self.config.vocab_size]
        return logits if out is None else out.copy_(logits)

    def checkpoint_targets(self) -> dict[str, CheckpointTarget]:
        """The checkpoint's tensor names -> what of them this rank holds, and where: views of the weights."""
        config, shard, head_dim = self.config, self.communicator.shard, self.config.head_dim
        heads = _times(shard.part(config.num_attention_heads), head_dim)
        kv_heads = _times(shard.kv_heads(config.num_key_value_heads), head_dim)
        inner, vocabulary = shard.part(config.intermediate_size), shard.part(config.vocab_size)
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        # Of the checkpoint's tensor: how long the dimension that is dealt out is, and this rank's part.
        rows: dict[str, tuple[int, slice]] = {
            "q_proj": (num_heads * head_dim, heads),
            "k_proj": (num_kv_heads * head_dim, kv_heads),
            "v_proj": (num_kv_heads * head_dim, kv_heads),
            "gate_proj": (config.intermediate_size, inner),
            "up_proj": (config.intermediate_size, inner),
            "embed_tokens": (config.vocab_size, vocabulary),
            "lm_head": (config.vocab_size, vocabulary),
        }
        columns = {"o_proj": (num_heads * head_dim, heads), "down_proj": (config.intermediate_size, inner)}
        targets: dict[str, CheckpointTarget] = {}

        def add(name: str, view: torch.Tensor) -> None:
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            if leaf in rows:
                length, part = rows[leaf]
                # What pads the vocabulary is nobody's: zeros.
                view[part.stop - part.start :].zero_()
                view = view[: part.stop - part.start]
                targets[name] = CheckpointTarget(view, (length, view.shape[1]), (part, slice(None)))
            elif leaf in columns:
                length, part = columns[leaf]
                targets[name] = CheckpointTarget(view, (view.shape[0], length), (slice(None), part))
            else:
                targets[name] = CheckpointTarget(view, tuple(view.shape), (slice(None),) * view.dim())

        for name, parameter in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            if leaf in PACKED_MODULES:
                parts = PACKED_MODULES[leaf]
                views = parameter.split([rows[part][1].stop - rows[part][1].start for part in parts])
                for part, view in zip(parts, views, strict=True):
                    add(f"model.{path}.{part}.weight", view)
            else:
                add(
                    "lm_head.weight" if name == "lm_head" else f"model.{name.removesuffix('.weight')}.weight", parameter
                )
        return targets


def _times(part: slice, count: int) -> slice:
    return slice(part.start * count, part.stop * count)
