"""Parallel layers: what the ranks compute from their slices of a checkpoint adds up to the whole layer."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tandem_worker.checkpoint.targets import CheckpointTarget, ShardedLayer, causal_lm_targets
from tandem_worker.layers.operations import TorchOperations
from tandem_worker.layers.parallel import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard

DTYPE = torch.float64
HIDDEN_SIZE = 6
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


class OneOfSeveral(Communicator):
    """A rank whose group is in this process: it computes its share alone, and is given the others' logits."""

    shares: torch.Tensor

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.shares


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(sum(shape)))


def fill(targets: Mapping[str, CheckpointTarget], checkpoint: Mapping[str, torch.Tensor]) -> None:
    assert targets.keys() == checkpoint.keys()
    for name, target in targets.items():
        assert checkpoint[name].shape == target.shape
        target.view.copy_(checkpoint[name][target.part])


@SIZES
def test_outputs_of_packed_column_parallel_layers_are_those_of_the_checkpoints_layers(size: int) -> None:
    q, k, x = random(8, HIDDEN_SIZE), random(4, HIDDEN_SIZE), random(3, HIDDEN_SIZE)
    outputs: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    for rank in range(size):
        heads, kv_heads = Shard(rank, size).divide(4, 2), Shard(rank, size).divide_kv_heads(2, 2)
        layer = ColumnParallelLinear(HIDDEN_SIZE, {"q_proj": heads, "k_proj": kv_heads}, DTYPE)
        fill(layer.targets("attn.qk_proj"), {"attn.q_proj.weight": q, "attn.k_proj.weight": k})
        part = (x @ layer.weight.T).split([heads.num_local, kv_heads.num_local], dim=1)
        outputs["q"].append(part[0])
        outputs["k"].append(part[1])
    torch.testing.assert_close(torch.cat(outputs["q"], dim=1), x @ q.T)
    # With four ranks and two KV heads, ranks 0 and 1 hold the first one, ranks 2 and 3 the second.
    torch.testing.assert_close(torch.cat(outputs["k"][:: max(1, size // 2)], dim=1), x @ k.T)


@SIZES
def test_shares_of_a_row_parallel_layer_add_up_to_residual_and_output(size: int) -> None:
    weight, x, residual = random(HIDDEN_SIZE, 8), random(3, 8), random(3, HIDDEN_SIZE)
    total = torch.zeros_like(residual)
    for rank in range(size):
        inputs = Shard(rank, size).divide(8)
        layer = RowParallelLinear(inputs, HIDDEN_SIZE, DTYPE, TorchOperations(), Shard(rank, size))
        fill(layer.targets("o_proj"), {"o_proj.weight": weight})
        total += layer(x[:, inputs.part], residual.clone())
    torch.testing.assert_close(total, residual + x @ weight.T)


@SIZES
@pytest.mark.parametrize("vocab_size", [3, 37, 64])
def test_embeddings_and_logits_of_a_divided_vocabulary_are_those_of_the_whole(vocab_size: int, size: int) -> None:
    """Also where the vocabulary is padded, and where it is so small that the last ranks hold none of it."""
    weight, hidden, token_ids = random(vocab_size, HIDDEN_SIZE), random(2, HIDDEN_SIZE), torch.arange(vocab_size)
    group = [OneOfSeveral(Shard(rank, size)) for rank in range(size)]
    layers = [VocabParallelEmbedding(vocab_size, HIDDEN_SIZE, DTYPE, communicator) for communicator in group]
    for layer in layers:
        fill(layer.targets("embed_tokens"), {"embed_tokens.weight": weight})
    torch.testing.assert_close(sum(layer(token_ids) for layer in layers), weight, atol=0, rtol=0)
    local: list[torch.Tensor] = [hidden @ layer.weight.T for layer in layers]
    for communicator, layer, logits in zip(group, layers, local, strict=True):
        communicator.shares = torch.stack(local)
        torch.testing.assert_close(layer.gather_logits(logits), hidden @ weight.T)
        if size > 1:
            out = torch.full((2, vocab_size), torch.nan, dtype=DTYPE)
            assert layer.gather_logits(logits, out) is out
            torch.testing.assert_close(out, hidden @ weight.T)


def test_padding_rows_of_a_divided_vocabulary_are_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))
    for rank, num_held in enumerate((16, 16, 5, 0)):
        layer = VocabParallelEmbedding(37, HIDDEN_SIZE, DTYPE, Communicator(Shard(rank, 4)))
        assert layer.weight[:num_held].isnan().all()
        assert (layer.weight[num_held:] == 0).all()
        assert len(layer.weight) == 16


def test_tensors_are_named_as_in_the_checkpoint() -> None:
    model: Any = nn.Module()
    model.embed_tokens = model.lm_head = VocabParallelEmbedding(8, HIDDEN_SIZE, DTYPE, Communicator())
    model.mlp = nn.Module()
    inner = Shard().divide(4)
    model.mlp.gate = ReplicatedLinear(HIDDEN_SIZE, 3, DTYPE)
    model.mlp.gate_up_proj = ColumnParallelLinear(HIDDEN_SIZE, {"gate_proj": inner, "up_proj": inner}, DTYPE)
    assert not isinstance(model.mlp.gate, ShardedLayer)
    tied = {f"model.{name}.weight" for name in ("embed_tokens", "mlp.gate", "mlp.gate_proj", "mlp.up_proj")}
    assert causal_lm_targets(model).keys() == tied
    model.lm_head = VocabParallelEmbedding(8, HIDDEN_SIZE, DTYPE, Communicator())
    assert causal_lm_targets(model).keys() == tied | {"lm_head.weight"}
