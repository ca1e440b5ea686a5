"""Qwen3 (dense), as in transformers' Qwen3ForCausalLM. Knows nothing of rows, plans or sampling."""

import torch
from torch import nn
from torch.nn.functional import linear, silu

from worker_service.layers.attention import Attention, AttentionMetadata
from worker_service.layers.norm import RMSNorm
from worker_service.layers.rotary import apply_rotary, build_rotary_table
from worker_service.model_config import ModelConfig

PACKED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Our weight -> the checkpoint's, which it holds one above the other."""


def _weight(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Qwen3Attention(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        num_projected = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = _weight(dtype, num_projected * self.head_dim, config.hidden_size)
        self.o_proj = _weight(dtype, config.hidden_size, self.num_heads * self.head_dim)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.attention = attention

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        qkv = linear(x, self.qkv_proj).view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q = apply_rotary(self.q_norm(q), rotary)
        k = apply_rotary(self.k_norm(k), rotary)
        return linear(self.attention(q, k, v, cache, metadata).flatten(1), self.o_proj)


class Qwen3MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = _weight(dtype, 2 * config.intermediate_size, config.hidden_size)
        self.down_proj = _weight(dtype, config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.down_proj)


class Qwen3Layer(nn.Module):
    def __init__(self, config: ModelConfig, attention: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Qwen3Attention(config, attention, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Qwen3MLP(config, dtype)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, metadata)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """Weights are uninitialised until worker_service.weights has filled checkpoint_targets()."""

    def __init__(self, config: ModelConfig, attention: Attention, num_positions: int, dtype: torch.dtype) -> None:
        """num_positions: the longest context that will be served."""
        super().__init__()
        self.config = config
        self.embed_tokens = _weight(dtype, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config, attention, dtype) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = _weight(dtype, config.vocab_size, config.hidden_size)
        table = build_rotary_table(config, num_positions, dtype)
        self.register_buffer("rotary_table", table, persistent=False)  # (positions, 2, head_dim // 2)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """token_ids and positions (tokens,), caches (layers, 2, blocks, block_size, KV heads, head_dim) -> hidden
        states (tokens, hidden_size).
        """
        x = self.embed_tokens[token_ids]
        rotary = self.rotary_table[positions]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotary, cache, metadata)
        return self.norm(x)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden_size) -> (rows, vocab_size), float32 or wider."""
        weight = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits = linear(hidden, weight)
        return logits if logits.dtype == torch.float64 else logits.float()

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
