"""The rows' sampling options, on the device for the sampler and on the host to choose a sampler by."""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_shared.step_plan import NewRow
from tandem_worker.runners.sampler import SamplingRows
from tandem_worker.runners.transfers import to_device

MAX_INT32 = 2**31 - 1


class RowOptions:
    """Each array is (rows,). The entries of free rows mean nothing."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        self.on_device = {
            "temperature": zeros(torch.float32),
            "top_k": zeros(torch.int32),
            "top_p": zeros(torch.float32),
            "min_p": zeros(torch.float32),
            "seed": zeros(torch.int64),  # with the bits of the uint64
            "choice_index": zeros(torch.int64),
        }
        self.is_random = np.zeros(num_rows, np.bool_)
        # Rows with temperature 0 have no top-k and no threshold (top-p or min-p) here, as these change nothing.
        self.top_k = np.zeros(num_rows, np.int64)
        self.has_threshold = np.zeros(num_rows, np.bool_)
        self.num_logprobs = np.full(num_rows, -1, np.int32)

    @property
    def is_truncated(self) -> np.ndarray:
        return (self.top_k > 0) | self.has_threshold

    def set(self, new_rows: Sequence[NewRow]) -> None:
        if not new_rows:
            return
        rows = [new.row for new in new_rows]
        options = [new.sampling for new in new_rows]
        integers = [rows, [o.choice_index for o in options], [min(o.top_k, MAX_INT32) for o in options]]
        floats = [[o.temperature for o in options], [o.top_p for o in options], [o.min_p for o in options]]
        device = self.on_device["seed"].device
        index, choice_index, top_k = to_device(np.array(integers, np.int64), device)
        temperature, top_p, min_p = to_device(np.array(floats, np.float32), device)
        seed = to_device(np.array([o.seed for o in options], np.uint64).view(np.int64), device)
        values = {
            "temperature": temperature,
            "top_k": top_k.int(),
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "choice_index": choice_index,
        }
        for name, array in values.items():
            self.on_device[name][index] = array
        self.is_random[rows] = [o.temperature > 0 for o in options]
        self.top_k[rows] = [o.top_k if o.temperature > 0 else 0 for o in options]
        self.has_threshold[rows] = [o.temperature > 0 and (o.top_p < 1 or o.min_p > 0) for o in options]
        self.num_logprobs[rows] = [-1 if o.num_logprobs is None else o.num_logprobs for o in options]

    def of(self, rows: torch.Tensor, positions: torch.Tensor) -> SamplingRows:
        """The options of these rows, for the reference sampler. rows and positions (n,) int64 on the device."""
        options = {name: values[rows] for name, values in self.on_device.items()}
        return SamplingRows(**(options | {"top_k": options["top_k"].long()}), position=positions)
