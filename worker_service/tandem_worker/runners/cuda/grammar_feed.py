"""Brings each step's tokens to the grammars of its rows, and their masks to the device before the next step samples.

With step N the newest one that is queued, step N+1's masks need N's tokens on the host. The runner queues N+1's forward
pass first, so it runs while the host waits here for N's end and the masks are computed. A step in which no row with
a grammar samples does not wait.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem_shared.step_plan import Int32Array, NewRow
from tandem_worker.runners.logits_stage import Grammars, num_mask_words

SetMasks = Callable[[Int32Array, Int32Array], None]


@dataclass(frozen=True)
class _Sampled:
    """What a step samples."""

    rows: list[int]
    token_ids: torch.Tensor
    """(rows,), on the host once the step has ended"""
    ended: torch.cuda.Event


class GrammarFeed:
    """The grammars of one batch's rows, and what the device knows of them."""

    def __init__(self, grammars: Grammars, set_masks: SetMasks, num_rows: int, vocab_size: int) -> None:
        """set_masks(rows, bits) queues masks, as GrammarMasks has them, on their way to the device."""
        self._grammars = grammars
        self._set_masks = set_masks
        self._num_words = num_mask_words(vocab_size)
        self._has_grammar = np.zeros(num_rows, np.bool_)
        # Whether the mask that the device has of a row allows everything.
        self._is_open = np.zeros(num_rows, np.bool_)
        # The latest step, if a row with a grammar was sampled in it.
        self._latest: _Sampled | None = None

    def reset(self) -> None:
        """For a new session."""
        self._latest = None
        self._has_grammar[:] = False

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Takes note of rows that enter the batch. The device's masks of their rows allow nothing."""
        if not new_rows:
            return
        rows = [new.row for new in new_rows]
        self._has_grammar[rows] = [new.lists.grammar is not None for new in new_rows]
        self._is_open[rows] = False
        self._grammars.add(new_rows)

    def before_sampling(self, rows: Int32Array) -> Mapping[int, int]:
        """Queues the masks of a step's sampling rows, once the step before has ended. Gives fault codes by row."""
        latest, self._latest = self._latest, None
        constrained = rows[self._has_grammar[rows]]
        # Rows with a grammar that are not sampled now have left the batch since the latest step.
        if not len(constrained):
            return {}
        if latest is not None:
            latest.ended.synchronize()
            self._grammars.accept(latest.rows, latest.token_ids.tolist())
        masks = self._grammars.masks(constrained)
        if len(masks.rows):
            self._is_open[masks.rows] = False
            self._set_masks(masks.rows, masks.bits)
        # The others have not started.
        waiting = constrained[~np.isin(constrained, masks.rows) & ~self._is_open[constrained]]
        if len(waiting):
            self._is_open[waiting] = True
            self._set_masks(waiting, np.full((len(waiting), self._num_words), -1, np.int32))
        return masks.fault_codes

    def after_sampling(self, rows: Int32Array, token_ids: torch.Tensor, ended: torch.cuda.Event) -> None:
        """Takes note of a step that is queued. token_ids (rows,) are on the host after `ended`."""
        if self._has_grammar[rows].any():
            self._latest = _Sampled(rows.tolist(), token_ids, ended)
