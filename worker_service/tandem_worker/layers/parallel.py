"""Layers whose weights the ranks of a tensor-parallel group divide (Shoeybi et al. 2019, arXiv:1909.08053).

A layer knows which slices of the checkpoint's tensors its rank holds. Most do not compute: a model hands their weights
to `Operations`, which fuse a linear layer with the norm, activation or sum beside it.
"""

from collections.abc import Mapping

import torch
from torch import nn

from tandem_worker.checkpoint.targets import CheckpointTarget, some_columns, some_rows
from tandem_worker.layers.operations import Operations
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard, ShardedDimension


def new_weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised weight."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class ReplicatedLinear(nn.Module):
    """A linear layer that every rank holds whole."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = new_weight(num_outputs, num_inputs, dtype=dtype)


class ColumnParallelLinear(nn.Module):
    """Linear layers whose outputs the ranks divide, packed into one weight (this rank's outputs, inputs)."""

    def __init__(self, num_inputs: int, outputs: Mapping[str, ShardedDimension], dtype: torch.dtype) -> None:
        """outputs: the checkpoint's names of the packed layers, from the weight's top row down."""
        super().__init__()
        self.outputs = outputs
        self.weight = new_weight(sum(rows.num_local for rows in outputs.values()), num_inputs, dtype=dtype)

    def targets(self, path: str) -> dict[str, CheckpointTarget]:
        parent, _, _ = path.rpartition(".")
        views = self.weight.split([rows.num_local for rows in self.outputs.values()])
        return {
            f"{parent}.{name}.weight": some_rows(view, rows)
            for (name, rows), view in zip(self.outputs.items(), views, strict=True)
        }


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs the ranks divide: weight (outputs, this rank's inputs)."""

    def __init__(
        self, inputs: ShardedDimension, num_outputs: int, dtype: torch.dtype, operations: Operations, shard: Shard
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.weight = new_weight(num_outputs, inputs.num_local, dtype=dtype)
        self.project = operations.linear_add if shard.rank == 0 else operations.linear_over

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """This rank's share of residual plus output, (tokens, outputs), perhaps in the residual's place: the sum over
        the ranks is the whole.

        x (tokens, this rank's inputs). The residual (tokens, outputs) is the same on all ranks; rank 0 adds it.
        """
        return self.project(x, self.weight, residual)

    def targets(self, path: str) -> dict[str, CheckpointTarget]:
        return {f"{path}.weight": some_columns(self.weight, self.inputs)}


class ParallelExperts(nn.Module):
    """The MLPs of a mixture of experts, each of whose inner columns the ranks divide.

    gate_up (experts, 2 * this rank's inner, hidden_size), the gate's rows above the up's; down (experts, hidden_size,
    this rank's inner).
    """

    def __init__(self, num_experts: int, hidden_size: int, inner: ShardedDimension, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.gate_up = new_weight(num_experts, 2 * inner.num_local, hidden_size, dtype=dtype)
        self.down = new_weight(num_experts, hidden_size, inner.num_local, dtype=dtype)

    def targets(self, path: str) -> dict[str, CheckpointTarget]:
        targets: dict[str, CheckpointTarget] = {}
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate, up = gate_up.chunk(2)
            targets[f"{path}.{expert}.gate_proj.weight"] = some_rows(gate, self.inner)
            targets[f"{path}.{expert}.up_proj.weight"] = some_rows(up, self.inner)
            targets[f"{path}.{expert}.down_proj.weight"] = some_columns(down, self.inner)
        return targets


class VocabParallelEmbedding(nn.Module):
    """An embedding table, or an LM head, whose token ids the ranks divide.

    weight (num_rows, hidden_size): num_rows is the same on every rank. Rows past the vocabulary's end are zeros.
    """

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, communicator: Communicator) -> None:
        super().__init__()
        shard = communicator.shard
        self.vocab_size, self.communicator = vocab_size, communicator
        self.vocab = ShardedDimension(vocab_size, shard.vocab_part(vocab_size))
        self.num_rows = shard.vocab_share(vocab_size)
        self.first_token = shard.rank * self.num_rows
        self.weight = new_weight(self.num_rows, hidden_size, dtype=dtype)
        self.weight[self.vocab.num_local :].zero_()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of token_ids, (tokens,) int64 -> (tokens, hidden_size)."""
        if self.communicator.shard.size == 1:
            return self.weight[token_ids]
        local_ids = token_ids - self.first_token
        is_local = (local_ids >= 0) & (local_ids < self.num_rows)
        x = self.weight[local_ids.clamp(0, self.num_rows - 1)].masked_fill(~is_local[:, None], 0)
        return self.communicator.all_reduce(x)

    def gather_logits(self, local: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """All ranks' logits, (rows, token ids of a rank) each -> (rows, vocab_size), in `out` where it is given. A
        single rank's logits are all of them, and given back as they are.
        """
        if self.communicator.shard.size == 1:
            return local
        out = local.new_empty(len(local), self.vocab_size) if out is None else out
        shares = self.communicator.all_gather(local)
        for target, share in zip(out.split(shares.shape[2], dim=1), shares, strict=False):
            # Padding comes last, so that only the last ranks' shares are cut, or left out.
            target.copy_(share[:, : target.shape[1]])
        return out

    def targets(self, path: str) -> dict[str, CheckpointTarget]:
        return {f"{path}.weight": some_rows(self.weight[: self.vocab.num_local], self.vocab)}
