"""The rows' options on the device are those that the plan gave, in the types that the kernels read."""

import numpy as np
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import NewRow
from tandem_worker.runners.row_options import RowOptions


def new_row(row: int, sampling: RowSampling) -> NewRow:
    ids = np.array([1], np.int32)
    return NewRow(row, row, ids, 1, 0, 0, ids, sampling)


def test_values_reach_the_device() -> None:
    options = RowOptions(4, torch.device("cpu"))
    large = RowSampling(0.5, 2**32 - 1, 0.25, 0.125, 1.5, -0.5, 2.0, 2**64 - 1, 2**32 - 1, 2**32 - 1, 20)
    small = RowSampling(0.0, 7, 0.75, 0.5, seed=2**63 - 1, choice_index=1, min_tokens=3)
    options.set([new_row(3, large), new_row(1, small)])
    expected = {
        "temperature": np.array([0, 0, 0, 0.5], np.float32),
        # A limit that is larger than any vocabulary is as good as the largest int32.
        "top_k": np.array([0, 7, 0, 2**31 - 1], np.int32),
        "top_p": np.array([0, 0.75, 0, 0.25], np.float32),
        "min_p": np.array([0, 0.5, 0, 0.125], np.float32),
        "presence_penalty": np.array([0, 0, 0, 1.5], np.float32),
        "frequency_penalty": np.array([0, 0, 0, -0.5], np.float32),
        "repetition_penalty": np.array([0, 1, 0, 2], np.float32),
        "min_tokens": np.array([0, 3, 0, 2**31 - 1], np.int32),
        "seed": np.array([0, 2**63 - 1, 0, 2**64 - 1], np.uint64).view(np.int64),
        "choice_index": np.array([0, 1, 0, 2**32 - 1], np.int64),
    }
    assert options.on_device.keys() == expected.keys()
    for name, values in expected.items():
        held = options.on_device[name].numpy()
        assert (held.dtype, held.tolist()) == (values.dtype, values.tolist()), name
    rows = options.of(torch.tensor([1, 3]), torch.tensor([10, 20]))
    assert (rows.top_k.tolist(), rows.seed.tolist()) == ([7, 2**31 - 1], [2**63 - 1, -1])
    assert rows.position.tolist() == [10, 20]


def test_rows_that_are_not_new_keep_their_values() -> None:
    options = RowOptions(2, torch.device("cpu"))
    options.set([new_row(0, RowSampling(0.5, seed=1)), new_row(1, RowSampling(0.5, seed=2))])
    options.set([new_row(1, RowSampling(0.75, seed=3))])
    options.set([])
    assert options.on_device["seed"].tolist() == [1, 3]
    assert options.on_device["temperature"].tolist() == [0.5, 0.75]
