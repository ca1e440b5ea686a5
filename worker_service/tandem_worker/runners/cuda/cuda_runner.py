"""Executes step plans on an NVIDIA GPU, fast: CUDA graphs over state that lives on the device.

Theory of operation. A step of a small model takes the GPU about a millisecond, and launching its few hundred kernels
takes the CPU longer. So the kernels are captured in CUDA graphs, and everything that they read lies on the device at a
fixed place: block tables, context lengths, every row's last token and its sampling options (device_state.py). The host
keeps its own copy of what it must decide by (batch.py); no step waits for the GPU to tell it anything, but for those of
rows with grammars.

For each plan the host does four things:
1. It checks the plan and applies it to the batch (Batch.apply), and writes the options and block tables of new rows.
2. It packs what changes from step to step into one int32 array (packer.py, input_layout.py), padded to a size for which
   there are graphs (step_shapes.py), and selects samplers by what each row asks (selections.py).
3. It copies the array to the device and replays the graphs of the step's stages (graph_runner.py): forward pass
   (forward_pass.py), and what rows ask of logits stage, samplers and log-probabilities (token_sampler.py). A stage
   without a graph of that size has the same kernels launched one by one.
4. It queues the copy of the sampled ids to the host, and returns; PendingStep.wait blocks until they are there.

So a steady decode step of rows that ask for nothing but a temperature costs the CPU one small copy to the device, two
graph launches and one copy back.

What may surprise:
- A sampled token is written to last_tokens on the device, and the row's next step reads it there. The next plan is
  executed before the host has seen the token.
- Steps in which rows with grammars sample are the exception: the host queues the forward pass, waits for the tokens of
  the step before, and queues the rest once it has computed what the grammars allow (grammar_feed.py).
- In a decode step the kernels themselves count context_lens up; in a mixed step the host's counts replace them.
- Padding rows have the number PADDING_ROW and the kernels pass over them; padding tokens store their KV in block 0.
"""

import time

import torch

from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.kernels import launcher
from tandem_worker.models.model import Model
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.cuda.forward_pass import ForwardPass
from tandem_worker.runners.cuda.grammar_feed import GrammarFeed
from tandem_worker.runners.cuda.graph_runner import GraphRunner
from tandem_worker.runners.cuda.input_layout import InputLayout
from tandem_worker.runners.cuda.packer import Packer
from tandem_worker.runners.cuda.step_shapes import StepShapes
from tandem_worker.runners.cuda.token_sampler import TokenSampler
from tandem_worker.runners.logits_stage import Grammars
from tandem_worker.runners.logprobs import QueuedPromptLogprobs, prompt_positions
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.step_results import PendingStep, Timing
from tandem_worker.runners.transfers import to_host


class CudaRunner:
    """A model, its KV pool and the persistent batch, on one GPU. The model's operations are TritonOperations."""

    def __init__(
        self,
        model: Model,
        cache: torch.Tensor,
        batch: Batch,
        info: WorkerInfo,
        grammars: Grammars,
        *,
        use_graphs: bool = True,
    ) -> None:
        """cache (layers, 2, blocks, block_size, KV heads, head_dim). Captures the graphs if use_graphs; else steps run
        the same kernels, padded to the same sizes, one launch after the other.
        """
        self.info = info
        self.model = model
        self.cache = cache
        self._batch = batch
        self._options = RowOptions(batch.num_rows, cache.device)
        is_sharded = model.communicator.shard.size > 1
        shapes = StepShapes(batch.num_rows, batch.max_num_batched_tokens, is_sharded=is_sharded)
        layout = InputLayout(batch.num_rows)
        self._packer = Packer(batch, shapes, layout)
        self._state = DeviceState(model, batch, shapes, layout, cache.device)
        self._sampler = TokenSampler(model, self._state, self._options)
        self._grammars = GrammarFeed(grammars, self._sampler.set_masks, batch.num_rows, info.vocab_size)
        self._graphs = GraphRunner(ForwardPass(model, cache, self._state, layout), self._sampler, shapes)
        if use_graphs:
            self._graphs.capture(self._packer, self._state)
        # The end of the step that was queued last, for the GPU's idle time before the next.
        self._ended: torch.cuda.Event | None = None

    @property
    def progress(self) -> int:
        """The number of kernels compiled. A step that compiles none needs no other sign of life than its result."""
        return launcher.num_compiled

    @property
    def last_tokens(self) -> torch.Tensor:
        """(rows,) int32: each row's last sampled token, which a decoding row's next step reads"""
        return self._state.last_tokens

    @property
    def logits(self) -> torch.Tensor:
        """(rows, vocab_size): the last step's logits, in the order of its sampling rows. A group of ranks has those of
        the rows whose log-probabilities were reported, in their order.
        """
        return self._state.logits

    def reset(self) -> None:
        self._batch.reset()
        self._grammars.reset()
        self._ended = None

    def close(self) -> None:
        torch.cuda.synchronize()
        self._graphs.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Applies the plan and queues its work; InvalidPlan, with nothing applied, if the batch can't follow it."""
        work = self._batch.apply(plan)
        self._options.set(plan.added_rows)
        self._sampler.add(plan.added_rows)
        self._grammars.add(plan.added_rows)
        packed = self._packer.pack(plan, work)
        self._state.write_block_tables(packed.whole_table_rows, self._batch.block_tables, self._batch.num_blocks)
        rows = work.sampling_rows
        sampling = self._sampler.select(rows, has_new_rows=bool(plan.added_rows))
        prepared_ns = time.time_ns()
        started = _record_event()
        self._state.write_input(packed.array)
        self._graphs.run_forward(packed, len(rows))
        fault_codes = self._grammars.before_sampling(rows)
        self._graphs.run_logits_stage(sampling)
        self._graphs.run_samplers(sampling)
        self._graphs.run_reports(sampling)
        logprobs = self._sampler.queue_reports(sampling)
        prompt_logprobs = self._prompt_logprobs(work)
        token_ids = to_host(self._state.sampled[: len(rows)])
        previous_ended, self._ended = self._ended, _record_event()
        self._grammars.after_sampling(rows, token_ids, self._ended)
        timing = Timing(prepared_ns, started, self._ended, previous_ended)
        return PendingStep(plan.step_id, rows.tolist(), token_ids, timing, logprobs, prompt_logprobs, fault_codes)

    def _prompt_logprobs(self, work: StepWork) -> QueuedPromptLogprobs | None:
        asked = prompt_positions(work, self._batch, self._options)
        if asked is None:
            return None
        # The chunks' tokens follow those of the decoding rows.
        return self._sampler.report_prompts(self._state.hidden[len(work.decode_rows) :], asked)


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
