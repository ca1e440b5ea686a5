"""The rows' sampling options, on the device for the sampler and on the host to choose a sampler by."""

import dataclasses
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch

from tandem_shared.sampling_fields import FIELDS
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists, adjusts_logits
from tandem_shared.step_plan import NewRow
from tandem_worker.runners.sampler import SamplingRows
from tandem_worker.runners.transfers import to_device

MAX_INT32 = 2**31 - 1

_INTEGERS = tuple(field for field in FIELDS if field.device_type in ("int32", "int64"))
_FLOATS = tuple(field for field in FIELDS if field.device_type == "float32")
_INT32_COLUMNS = tuple(column for column, field in enumerate(_INTEGERS, 1) if field.device_type == "int32")
"""Columns of the array that set() makes, whose first column has the rows."""
_get_integers = tuple(attrgetter(field.name) for field in _INTEGERS)
_get_floats = tuple(attrgetter(field.name) for field in _FLOATS)
_OF_SAMPLER = tuple(field.name for field in dataclasses.fields(SamplingRows) if field.name != "position")


class RowOptions:
    """Each array is (rows,). The entries of free rows mean nothing."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.on_device = {
            field.name: torch.zeros(num_rows, dtype=getattr(torch, str(field.device_type)), device=device)
            for field in (*_INTEGERS, *_FLOATS)
        }
        self.is_random = np.zeros(num_rows, np.bool_)
        # Rows with temperature 0 have no top-k and no threshold (top-p or min-p) here, as these change nothing.
        self.top_k = np.zeros(num_rows, np.int64)
        self.has_threshold = np.zeros(num_rows, np.bool_)
        # -1 for none.
        self.num_logprobs = np.full(num_rows, -1, np.int32)
        self.num_prompt_logprobs = np.full(num_rows, -1, np.int32)
        # Whether the row's tokens are sampled from other logits than the model's.
        self.adjusts = np.zeros(num_rows, np.bool_)
        # Whether log-probabilities of the row's output are reported.
        self.reports = np.zeros(num_rows, np.bool_)
        self.lists: list[SamplingLists] = [NO_LISTS] * num_rows

    @property
    def is_truncated(self) -> np.ndarray:
        return (self.top_k > 0) | self.has_threshold

    def set(self, new_rows: Sequence[NewRow]) -> None:
        if not new_rows:
            return
        rows = [new.row for new in new_rows]
        options = [new.sampling for new in new_rows]
        # All integers go to the device in one copy, and all floats in another.
        integers = np.array([rows, *([*map(get, options)] for get in _get_integers)], np.uint64)
        floats = np.array([[*map(get, options)] for get in _get_floats], np.float32)
        for column in _INT32_COLUMNS:
            np.minimum(integers[column], MAX_INT32, out=integers[column])
        device = self.on_device["seed"].device
        columns = [*to_device(integers.view(np.int64), device).unbind(), *to_device(floats, device).unbind()]
        for column in _INT32_COLUMNS:
            columns[column] = columns[column].int()
        for target, values in zip(self.on_device.values(), columns[1:], strict=True):
            target.index_copy_(0, columns[0], values)
        self.is_random[rows] = [o.temperature > 0 for o in options]
        self.top_k[rows] = [o.top_k if o.temperature > 0 else 0 for o in options]
        self.has_threshold[rows] = [o.temperature > 0 and (o.top_p < 1 or o.min_p > 0) for o in options]
        self.num_logprobs[rows] = [-1 if o.num_logprobs is None else o.num_logprobs for o in options]
        self.num_prompt_logprobs[rows] = [
            -1 if o.num_prompt_logprobs is None else o.num_prompt_logprobs for o in options
        ]
        self.reports[rows] = [
            new.sampling.num_logprobs is not None or bool(new.lists.logprob_token_ids) for new in new_rows
        ]
        self.adjusts[rows] = [adjusts_logits(new.sampling, new.lists) for new in new_rows]
        for new in new_rows:
            self.lists[new.row] = new.lists

    def of(self, rows: torch.Tensor, positions: torch.Tensor) -> SamplingRows:
        """The options of these rows, for the reference sampler. rows and positions (n,) int64 on the device."""
        options = {name: self.on_device[name][rows] for name in _OF_SAMPLER}
        return SamplingRows(**(options | {"top_k": options["top_k"].long()}), position=positions)
