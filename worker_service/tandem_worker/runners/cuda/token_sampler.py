"""From a step's logits to its tokens, on a GPU: which sampler serves the rows, what of the logits it needs, and the
log-probabilities that rows ask for.

Three samplers draw the same tokens from the same logits, each for more options than the one before. The plain kernel
serves greedy rows and rows with a temperature, and needs only a rank's shard of the logits. The truncating kernel also
cuts to a top-k up to MAX_TOP_K, with top-p and min-p. The reference sampler (sampler.py) serves everything, and is the
only one that is not captured. The cheapest one that does what all of a step's rows ask serves them all.
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from tandem_shared.step_plan import Int32Array
from tandem_worker.kernels.sampling import MAX_TOP_K, SamplingKernels
from tandem_worker.models.model import Model
from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.logprobs import LogprobRows, QueuedLogprobs, logprob_rows, pack_logprobs
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.sampler import sample
from tandem_worker.runners.transfers import to_device, to_host


class SamplerKind(Enum):
    PLAIN = auto()
    """Greedy, and temperature"""
    TRUNCATED = auto()
    """With top-k up to MAX_TOP_K, and top-p and min-p beside it, too"""
    GENERAL = auto()
    """The reference sampler"""


@dataclass(frozen=True)
class SamplingChoice:
    """How a step's rows are sampled."""

    kind: SamplerKind
    needs_all_logits: bool
    """Whether the logits of all ranks' shards must be put together"""
    num_rows: int
    """How many rows are sampled from"""
    logprobs: LogprobRows | None
    """The rows whose log-probabilities are reported, if any"""


class TokenSampler:
    """Samples the tokens of the sampling rows. gather, sample_plain and sample_truncated can be captured."""

    def __init__(self, model: Model, state: DeviceState, options: RowOptions) -> None:
        self._model, self._state, self._options = model, state, options
        communicator = model.communicator
        num_rows, vocab_size = state.logits.shape
        device = state.logits.device
        self._kernels = self._local_kernels = SamplingKernels(num_rows, vocab_size, device)
        if state.is_sharded:
            self._local_kernels = SamplingKernels(
                num_rows, vocab_size, device, communicator.shard, communicator.all_gather
            )

    def choose(self, rows: Int32Array) -> SamplingChoice:
        """Looks at what the step's sampling rows ask for, on the host."""
        kind = self._cheapest_kind(rows)
        logprobs = logprob_rows(rows, self._options)
        needs_all = self._state.is_sharded and (kind is not SamplerKind.PLAIN or logprobs is not None)
        return SamplingChoice(kind, needs_all, len(rows), logprobs)

    def _cheapest_kind(self, rows: Int32Array) -> SamplerKind:
        top_k, has_threshold = self._options.top_k[rows], self._options.has_threshold[rows]
        if (top_k > MAX_TOP_K).any() or (has_threshold & (top_k == 0)).any():
            return SamplerKind.GENERAL
        return SamplerKind.TRUNCATED if (top_k > 0).any() else SamplerKind.PLAIN

    def gather(self, batch_size: int) -> None:
        """Puts the shards' logits together."""
        self._model.lm_head.gather_logits(self._state.local_logits[:batch_size], self._state.logits[:batch_size])

    def sample_plain(self, batch_size: int) -> None:
        self._launch(self._local_kernels, self._state.local_logits, batch_size, is_truncated=False)

    def sample_truncated(self, batch_size: int) -> None:
        self._launch(self._kernels, self._state.logits, batch_size, is_truncated=True)

    def _launch(self, kernels: SamplingKernels, logits: torch.Tensor, batch_size: int, *, is_truncated: bool) -> None:
        state = self._state
        kernels(
            logits[:batch_size], state.sampling_rows[:batch_size], state.context_lens, self._options.on_device,
            state.last_tokens, state.sampled[:batch_size], is_truncated=is_truncated,
        )  # fmt: skip

    def sample_generally(self, num_rows: int) -> None:
        """Any top-k, and top-p or min-p without one. It has no padding rows."""
        state = self._state
        rows = state.sampling_rows[:num_rows].long()
        logits = state.logits[:num_rows].float()
        options = self._options.of(rows, state.context_lens[rows].long())
        sampled = sample(logits, options, any_random=True, any_truncated=True).int()
        is_bad = logits.isnan().any(-1) | ~logits.amax(-1).isfinite()
        # torch's cumulative sums may differ from rank to rank.
        sampled = self._model.communicator.agree(sampled.masked_fill(is_bad, -1))
        state.last_tokens[rows] = sampled.clamp(min=0)
        state.sampled[:num_rows] = sampled

    def report(self, choice: SamplingChoice) -> QueuedLogprobs | None:
        """The log-probabilities that rows ask for, on their way to the host; None where no row asks for any."""
        asked = choice.logprobs
        if asked is None:
            return None
        device = self._state.logits.device
        places = to_device(np.array(asked.places), device)
        packed = pack_logprobs(
            self._state.logits[places].float(),
            self._state.sampled[places].clamp(min=0).long(),
            max(asked.num_top),
            to_device(asked.requested_ids, device).long(),
        )
        return QueuedLogprobs(asked, to_host(packed))
