"""Micro-batches: tokens of a step that go through the layers by themselves, so that one micro-batch's sums over the
ranks hide behind another's work.
"""

from typing import Any

import torch

from tandem_worker.ranks.communicator import Communicator


class MicroBatch:
    """Some tokens of a step on their way through the layers."""

    def __init__(self, x: torch.Tensor, metadata: Any, communicator: Communicator, *, is_alone: bool) -> None:
        """x (tokens, hidden_size); metadata is the attention's own. is_alone: the step has no other micro-batch."""
        self.metadata = metadata
        self._x, self._communicator, self._is_alone = x, communicator, is_alone
        self._summed: torch.cuda.Event | None = None

    def sum(self, share: torch.Tensor) -> None:
        """Makes the sum of all ranks' shares, (tokens, hidden_size), the hidden states: beside the other micro-batches'
        work, where there are any.
        """
        self._x = share
        if self._is_alone:
            self._communicator.all_reduce(share)
        else:
            self._summed = self._communicator.begin_all_reduce(share)

    def hidden(self) -> torch.Tensor:
        """The hidden states, (tokens, hidden_size), once the last sum is done."""
        if self._summed is not None:
            self._summed.wait()
        return self._x
