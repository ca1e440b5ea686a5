"""Qwen3 (dense), as in transformers' Qwen3ForCausalLM. Knows nothing of rows, plans or sampling."""

import torch
from torch import nn

from worker_service.layers.norm import RMSNorm
from worker_service.layers.operations import Operations
from worker_service.layers.rotary import build_rotary_table
from worker_service.model_config import ModelConfig

PACKED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Our weight -> the checkpoint's, which it holds one above the other."""


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Qwen3Attention(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        num_projected = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = _weight(dtype, num_projected * self.head_dim, config.hidden_size)
        self.o_proj = _weight(dtype, config.hidden_size, config.num_attention_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.operations = operations

    def forward(
        self, x: torch.Tensor, norm: RMSNorm, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        qkv = self.operations.norm_linear(x, norm, self.qkv_proj)
        qkv = qkv.view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        out = self.operations.attention(qkv, self.q_norm, self.k_norm, rotary_table, cache, metadata)
        return self.operations.linear_add(out, self.o_proj, x)


class Qwen3MLP(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = _weight(dtype, 2 * config.intermediate_size, config.hidden_size)
        self.down_proj = _weight(dtype, config.hidden_size, config.intermediate_size)
        self.operations = operations

    def forward(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        inner = self.operations.norm_gate_up(x, norm, self.gate_up_proj)
        return self.operations.linear_add(inner, self.down_proj, x)


class Qwen3Layer(nn.Module):
    def __init__(self, config: ModelConfig, operations: Operations, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, operations, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Qwen3MLP(config, operations, dtype)

    def forward(
        self, x: torch.Tensor, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: object
    ) -> torch.Tensor:
        x = self.self_attn(x, self.input_layernorm, rotary_table, cache, metadata)
        return self.mlp(x, self.post_attention_layernorm)


class Qwen3(nn.Module):
    """Weights are uninitialised until worker_service.weights has filled checkpoint_targets()."""

    def __init__(self, config: ModelConfig, operations: Operations, num_positions: int, dtype: torch.dtype) -> None:
        """num_positions: the longest context that will be served."""
        super().__init__()
        self.config = config
        self.operations = operations
        self.embed_tokens = _weight(dtype, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config, operations, dtype) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _weight(dtype, config.vocab_size, config.hidden_size)
        table = build_rotary_table(config, num_positions, dtype)
        self.register_buffer("rotary_table", table, persistent=False)  # (positions, 2, head_dim // 2)

    def forward(self, x: torch.Tensor, caches: torch.Tensor, metadata: object) -> torch.Tensor:
        """Embedded tokens (tokens, hidden_size), caches (layers, 2, blocks, block_size, KV heads, head_dim), the
        operations' own metadata -> hidden states (tokens, hidden_size), before the last norm. May write over x.
        """
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, self.rotary_table, cache, metadata)
        return x

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, vocab_size), written to `out` where it is given."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return self.operations.norm_linear(hidden, self.norm, weight, out)

    def checkpoint_targets(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensor names -> where their contents go: views of the weights."""
        targets: dict[str, torch.Tensor] = {}
        head_dim, inner = self.config.head_dim, self.config.intermediate_size
        num_heads, num_kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        rows = {
            "qkv_proj": [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim],
            "gate_up_proj": [inner, inner],
        }
        for name, parameter in self.named_parameters():
            path, _, leaf = name.rpartition(".")
            if leaf in PACKED_MODULES:
                parts = zip(PACKED_MODULES[leaf], parameter.split(rows[leaf]), strict=True)
                targets |= {f"model.{path}.{part}.weight": view for part, view in parts}
            elif name == "lm_head":
                targets["lm_head.weight"] = parameter
            else:
                targets[f"model.{name.removesuffix('.weight')}.weight"] = parameter
        return targets
