"""The log-probability kernels against tandem_worker/runners/logprobs.py, the plain reference."""

import pytest
import torch

from tandem_worker.kernels.report_logprobs import LogprobKernels
from tandem_worker.runners.logprobs import pack_logprobs
from tests.kernels.comparison import ON_GPU, slow_in_interpreter

# The interpreter's numpy warns of -inf - -inf, which the kernels allow for.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    ("vocab_size", "num_top"),
    [(5000, 20), (70, 5), slow_in_interpreter(4097, 1), *([(151_936, 20)] if ON_GPU else [])],
)
@pytest.mark.parametrize("is_compact", [False, True])
def test_reports(device: torch.device, poisoned_memory: None, vocab_size: int, num_top: int, is_compact: bool) -> None:
    num_rows, num_requested = 6, 7
    logits = torch.randn(num_rows, vocab_size) * 3
    # Ties, among the likeliest tokens and everywhere; and a row with few possible tokens.
    logits[0] = logits[0].round()
    logits[1] = 0.0
    logits[2, 10:] = -torch.inf
    logits = logits.bfloat16().to(device)
    rows = torch.tensor([4, 2, 0, 5, -1, 1], dtype=torch.int32, device=device)
    token_ids = torch.randint(0, vocab_size, (num_rows,), dtype=torch.int32).to(device)
    token_ids[2] = 3
    token_ids[3] = logits[3].argmax()
    requested = torch.randint(0, vocab_size, (num_rows, num_requested), dtype=torch.int32).to(device)
    # A padding slot, a padding row, and no report of the sampling row 5.
    indices = torch.tensor([3, -1, 0, 4, 1, 2], dtype=torch.int32, device=device)
    used = indices[[0, 2, 4, 5]].long()
    kernels = LogprobKernels(num_rows, vocab_size, num_top, num_requested, device)
    inputs = logits[indices.long()] if is_compact else logits
    kernels(inputs, indices, rows, token_ids, requested, is_compact=is_compact)
    expected = pack_logprobs(
        logits[used].double(), token_ids[used].long(), num_top, requested[rows[used].long()].long()
    )  # fmt: skip
    out = kernels.out[[0, 2, 4, 5]]
    assert torch.equal(out[:, : 1 + num_top], expected[:, : 1 + num_top])
    logprobs, its_logprobs = (each[:, 1 + num_top :].contiguous().view(torch.float32) for each in (out, expected))
    torch.testing.assert_close(logprobs, its_logprobs, rtol=1e-5, atol=1e-5)
    assert not kernels.out[[1, 3]].any()
