"""A second model family is a file and an entry: Llama, which has no norms of queries and keys, made of our layers.

The classes here are the shortest Model (models/model.py), and a pattern for another family. They are compared with
transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.teacher_forcing import teacher_forced_logits
from tandem_shared.errors import ModelError
from tandem_worker.checkpoint.config_file import ConfigFile
from tandem_worker.checkpoint.model_config import ModelConfig, read_decoder_config
from tandem_worker.checkpoint.targets import CheckpointTarget, causal_lm_targets
from tandem_worker.layers.norm import RMSNorm
from tandem_worker.layers.operations import Operations
from tandem_worker.layers.parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from tandem_worker.layers.rotary import build_rotary_table
from tandem_worker.models.micro_batch import MicroBatch
from tandem_worker.models.registry import ARCHITECTURES, Architecture
from tandem_worker.ranks.communicator import Communicator
from tests.support.model_factory import DEFAULTS
from tests.unit.worker.runners.test_exactness import make_runner


def read_llama_config(file: ConfigFile) -> ModelConfig:
    num_heads = file.whole("num_attention_heads")
    head_dim = file.whole("hidden_size") // num_heads
    return read_decoder_config(file, default_num_kv_heads=num_heads, default_head_dim=head_dim)


class LlamaLayer(nn.Module):
    def __init__(
        self, config: ModelConfig, operations: Operations, dtype: torch.dtype, communicator: Communicator
    ) -> None:
        super().__init__()
        shard, hidden_size, self.head_dim = communicator.shard, config.hidden_size, config.head_dim
        heads = shard.divide(config.num_attention_heads, config.head_dim)
        kv_heads = shard.divide_kv_heads(config.num_key_value_heads, config.head_dim)
        inner = shard.divide(config.intermediate_size)
        self.self_attn, self.mlp, self.operations = nn.Module(), nn.Module(), operations
        self.input_layernorm = RMSNorm(hidden_size, config.rms_norm_eps, dtype)
        projections = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        self.self_attn.qkv_proj = ColumnParallelLinear(hidden_size, projections, dtype)
        self.self_attn.o_proj = RowParallelLinear(heads, hidden_size, dtype, operations, shard)
        self.post_attention_layernorm = RMSNorm(hidden_size, config.rms_norm_eps, dtype)
        self.mlp.gate_up_proj = ColumnParallelLinear(hidden_size, {"gate_proj": inner, "up_proj": inner}, dtype)
        self.mlp.down_proj = RowParallelLinear(inner, hidden_size, dtype, operations, shard)

    def attend(self, x: torch.Tensor, rotary_table: torch.Tensor, cache: torch.Tensor, metadata: Any) -> torch.Tensor:
        qkv = self.operations.norm_linear(x, self.input_layernorm, self.self_attn.qkv_proj.weight)
        qkv = qkv.view(len(x), -1, self.head_dim)  # (tokens, heads + 2 KV heads, head_dim)
        return self.self_attn.o_proj(self.operations.attention(qkv, None, None, rotary_table, cache, metadata), x)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.operations.norm_gate_up(x, self.post_attention_layernorm, self.mlp.gate_up_proj.weight)
        return self.mlp.down_proj(inner, x)


class Llama(nn.Module):
    tied_weights: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        config: ModelConfig,
        operations: Operations,
        num_positions: int,
        dtype: torch.dtype,
        communicator: Communicator,
    ) -> None:
        super().__init__()
        self.config, self.operations, self.communicator = config, operations, communicator
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, communicator)
        layers = (LlamaLayer(config, operations, dtype, communicator) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, communicator)
        self.register_buffer("rotary_table", build_rotary_table(config, num_positions, dtype), persistent=False)
        self.after_layer: Callable[[], None] | None = None

    def forward(self, caches: torch.Tensor, *inputs: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
        is_alone = len(inputs) == 1
        micro_batches = [MicroBatch(x, metadata, self.communicator, is_alone=is_alone) for x, metadata in inputs]
        for layer, cache in zip(self.layers, caches, strict=True):
            for micro_batch in micro_batches:
                x = micro_batch.hidden()
                micro_batch.sum(layer.attend(x, self.rotary_table, cache, micro_batch.metadata))
            for micro_batch in micro_batches:
                micro_batch.sum(layer.feed_forward(micro_batch.hidden()))
            if self.after_layer is not None:
                self.after_layer()
        return [micro_batch.hidden() for micro_batch in micro_batches]

    def compute_local_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.operations.norm_linear(hidden, self.norm, self.lm_head.weight, out)

    def checkpoint_targets(self) -> dict[str, CheckpointTarget]:
        return causal_lm_targets(self)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**DEFAULTS, "initializer_range": 0.1}, architectures=["LlamaForCausalLM"])
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_second_family_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", Architecture(read_llama_config, Llama))
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.3
    runner = make_runner(folder)
    torch.testing.assert_close(teacher_forced_logits(runner, ids, num_prefill=60), expected, atol=1e-4, rtol=0)
    num_steps = 1 + len(ids) - 60
    assert runner.progress == num_steps * runner.model.config.num_hidden_layers, "a layer is not reported"


def test_an_architecture_that_is_not_registered_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"config\.json: architectures: \['LlamaForCausalLM'\] is not supported; "
        "Qwen3ForCausalLM and Qwen3MoeForCausalLM are",
    ):
        make_runner(folder)
