"""From a step's logits to its tokens and log-probabilities, on a GPU.

The logits stage comes first: it writes the adjusted logits of the rows that ask for that (kernels/adjust_logits.py).
Then each selection of rows (selections.py) is sampled by kernels of its own: plain ones for greedy rows and rows with a
temperature, which need only a rank's shard of the logits; those that also cut to a top-k; and those that find what
top-p or min-p keep of the whole vocabulary. Last come the log-probabilities of the rows that ask for them. Each of
these works on the rows of its selection alone, and is not run where that is empty.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_shared.sampling_fields import MAX_LOGPROBS
from tandem_shared.sampling_lists import MAX_LOGPROB_TOKEN_IDS
from tandem_shared.step_plan import Int32Array, NewRow
from tandem_worker.kernels.adjust_logits import adjust_logits
from tandem_worker.kernels.best_tokens import BatchTensors
from tandem_worker.kernels.report_logprobs import LogprobKernels
from tandem_worker.kernels.sampling import SamplingKernels
from tandem_worker.models.model import Model
from tandem_worker.runners.cuda.adjusted_rows import AdjustedRowsState
from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.cuda.selections import RowSelections, Selection, StepSampling
from tandem_worker.runners.logprobs import MAX_PROMPT_LOGITS, PromptPositions, QueuedLogprobs, QueuedPromptLogprobs
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.transfers import copy_to, padded, to_device, to_host


class TokenSampler:
    """Samples the tokens of the sampling rows. adjust, sample and report can be captured: they launch kernels for a
    number of slots, of which those past the selection's end are padding.
    """

    def __init__(self, model: Model, state: DeviceState, options: RowOptions) -> None:
        self._model, self._state = model, state
        communicator = model.communicator
        num_rows, vocab_size = state.logits.shape
        device = state.logits.device
        self._batch = BatchTensors(
            state.sampling_rows, state.context_lens, options.on_device, state.last_tokens, state.sampled
        )
        self._kernels = self._local_kernels = SamplingKernels(num_rows, vocab_size, device)
        if state.is_sharded:
            self._local_kernels = SamplingKernels(
                num_rows, vocab_size, device, communicator.shard, communicator.all_gather
            )
        self._part = communicator.shard.vocab_part(vocab_size)
        self._adjusted_rows = AdjustedRowsState(num_rows, vocab_size, self._part, device)
        self._selections = RowSelections(num_rows, options)
        self._lists = to_device(self._selections.lists, device).clone()
        self._reports = LogprobKernels(num_rows, vocab_size, MAX_LOGPROBS, MAX_LOGPROB_TOKEN_IDS, device)
        self._prompt_reports = LogprobKernels(MAX_PROMPT_LOGITS, vocab_size, MAX_LOGPROBS, 0, device)
        self._prompt_slots = torch.arange(MAX_PROMPT_LOGITS, dtype=torch.int32, device=device)
        # By row, the tokens whose log-probabilities it asks for.
        self._requested = torch.zeros(num_rows, MAX_LOGPROB_TOKEN_IDS, dtype=torch.int32, device=device)

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Writes what must be known of rows that enter the batch."""
        self._adjusted_rows.add(new_rows)
        asking = [new for new in new_rows if new.lists.logprob_token_ids]
        if asking:
            ids = padded([new.lists.logprob_token_ids for new in asking], MAX_LOGPROB_TOKEN_IDS)
            rows = to_device(np.array([new.row for new in asking]), self._requested.device)
            self._requested.index_copy_(0, rows, to_device(ids, self._requested.device))

    def select(self, rows: Int32Array, *, has_new_rows: bool) -> StepSampling:
        """Looks at what the step's sampling rows ask for, on the host, and queues the lists' copy to the device where
        they have changed. has_new_rows: whether rows have entered the batch since the last step.
        """
        sampling, has_changed = self._selections.select(rows, has_new_rows=has_new_rows)
        if has_changed:
            copy_to(self._lists, self._selections.lists)
        return sampling

    def set_masks(self, rows: np.ndarray, bits: Int32Array) -> None:
        """What the grammars of these rows allow: see AdjustedRowsState.set_masks. To be called before adjust."""
        self._adjusted_rows.set_masks(rows, bits)

    def adjust(self, num_slots: int) -> None:
        """The logits stage."""
        state = self._state
        adjust_logits(
            state.local_logits, state.adjusted_logits, self._lists[Selection.ADJUSTED, :num_slots], self._batch,
            self._adjusted_rows.rows, self._part.start, self._part.stop - self._part.start,
        )  # fmt: skip

    def sample(self, selection: Selection, num_slots: int) -> None:
        state, batch = self._state, self._batch
        indices = self._lists[selection, :num_slots]
        is_adjusted = selection >= Selection.ADJUSTED_PLAIN
        local = state.adjusted_logits if is_adjusted else state.local_logits
        if selection in (Selection.PLAIN, Selection.ADJUSTED_PLAIN):
            self._local_kernels.sample_plain(local, indices, batch)
            return
        logits = self._gathered(local, indices, state.all_adjusted_logits if is_adjusted else state.logits)
        is_top_k = selection in (Selection.TOP_K, Selection.ADJUSTED_TOP_K)
        sample = self._kernels.sample_top_k if is_top_k else self._kernels.sample_threshold
        sample(logits, indices, batch, is_compact=state.is_sharded)

    def report(self, num_slots: int) -> None:
        """The log-probabilities of the sampled tokens and of others, in their place on the device."""
        state = self._state
        indices = self._lists[Selection.REPORTED, :num_slots]
        logits = self._gathered(state.local_logits, indices, state.logits)
        self._reports(logits, indices, self._batch.rows, self._batch.out, self._requested, is_compact=state.is_sharded)

    def queue_reports(self, sampling: StepSampling) -> QueuedLogprobs | None:
        """The log-probabilities that report() has computed, on their way to the host; None where no row asks."""
        asked = sampling.reported
        if asked is None:
            return None
        packed = to_host(self._reports.out[: len(asked.rows)])
        width = 2 + 2 * self._reports.num_top + asked.most_requested
        return QueuedLogprobs(asked, packed[:, :width])

    def report_prompts(self, hidden: torch.Tensor, asked: PromptPositions) -> QueuedPromptLogprobs:
        """The log-probabilities of prompt tokens, on their way to the host. hidden (tokens, hidden_size) are the hidden
        states of the tokens of the step's chunks. Launches its kernels one by one.
        """
        device = hidden.device
        places, token_ids = to_device(asked.places, device), to_device(asked.token_ids, device)
        packed = []
        for part in asked.slices():
            logits = self._model.compute_local_logits(hidden.index_select(0, places[part]))
            logits = self._model.lm_head.gather_logits(logits)
            slots = self._prompt_slots[: len(logits)]
            # A copy, as a kernel's arguments must start at a multiple of 16 bytes.
            self._prompt_reports(logits, slots, slots, token_ids[part].clone(), self._requested, is_compact=True)
            packed.append(to_host(self._prompt_reports.out[: len(logits)]))
        return QueuedPromptLogprobs(asked.parts, packed)

    def _gathered(self, local: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The whole logits of the rows at `indices`, in the order of the slots; those of all rows in their order where
        a rank has the whole vocabulary.
        """
        if not self._state.is_sharded:
            return local
        # Padding slots gather the first row.
        shares = local.index_select(0, indices.clamp(min=0))
        return self._model.lm_head.gather_logits(shares, out[: len(indices)])
