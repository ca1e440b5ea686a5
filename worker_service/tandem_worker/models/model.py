"""What the rest of the worker knows of a model, whichever its family."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from tandem_worker.checkpoint.model_config import ModelConfig
from tandem_worker.checkpoint.targets import CheckpointTarget
from tandem_worker.layers.operations import Operations
from tandem_worker.layers.parallel import VocabParallelEmbedding
from tandem_worker.ranks.communicator import Communicator


class Model(Protocol):
    """One rank's part of a model, or a whole one."""

    config: ModelConfig
    """The whole model's"""
    operations: Operations
    communicator: Communicator
    embed_tokens: VocabParallelEmbedding
    lm_head: VocabParallelEmbedding
    """Puts the ranks' logits together; embed_tokens itself where the two are tied"""
    after_layer: Callable[[], None] | None
    """Called after each layer, if set"""

    @property
    def tied_weights(self) -> Mapping[str, str]:
        """Tensors that a checkpoint may have and the model does not use -> the targets that they should equal. Both by
        the checkpoint's names.
        """

    def __call__(self, caches: torch.Tensor, *inputs: tuple[torch.Tensor, Any]) -> list[torch.Tensor]:
        """The hidden states of each micro-batch after the layers and before the last norm, (tokens, hidden_size).

        caches (layers, 2, blocks, block_size, KV heads of this rank, head_dim). An input is a micro-batch of the step:
        its embeddings (tokens, hidden_size), which may be overwritten, and the operations' own metadata of it. While
        one micro-batch computes, another's sums over the ranks are on their way. Later ones see earlier ones' KV.
        """

    def compute_local_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of hidden states, (rows, hidden_size) -> (rows, this rank's token ids), in `out` where it is
        given.
        """

    def checkpoint_targets(self) -> dict[str, CheckpointTarget]:
        """What this rank holds of each tensor of the checkpoint, by the checkpoint's names: views of the weights."""
