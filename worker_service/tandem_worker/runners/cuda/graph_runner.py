"""Owns the CUDA graphs: captures them, and runs a packed step by replaying them.

A step is run as a few stages, each captured by itself for each of its sizes: the forward pass of a decode step with
the LM head; the forward pass of a mixed step; the LM head of a mixed step; the logits stage; the sampler of each
selection of rows; and the log-probabilities. So the number of graphs is the sum of the stages' sizes, not their
product. For a size that has no graph, as a large mixed step may have, the same kernels are launched one by one, with
the same result.

All graphs share one memory pool, as one runs at a time.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from tandem_shared.host.progress import Progress
from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.cuda.forward_pass import ForwardPass
from tandem_worker.runners.cuda.packer import PackedStep, Packer
from tandem_worker.runners.cuda.selections import SAMPLED, Selection, StepSampling
from tandem_worker.runners.cuda.step_shapes import StepShapes
from tandem_worker.runners.cuda.token_sampler import TokenSampler

Size = TypeVar("Size", bound=Hashable)


class Stage(Generic[Size]):
    """A piece of a step, and its graphs by size. What it reads and writes must stay where it is."""

    def __init__(self, launch: Callable[[Size], None]) -> None:
        """launch(size) launches the stage's kernels one by one."""
        self.launch = launch
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}

    def run(self, size: Size) -> None:
        graph = self._graphs.get(size)
        if graph is None:
            self.launch(size)
        else:
            graph.replay()

    def capture(self, size: Size, pool: Any) -> Any:
        """Returns the memory pool for the next graph. The stage must have been launched for the size before."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are watched: NCCL has threads of its own, which ask for the progress of its work.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.launch(size)
        self._graphs[size] = graph
        return graph.pool()

    def clear(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


class GraphRunner:
    """The stages of a step."""

    def __init__(self, forward: ForwardPass, sampler: TokenSampler, shapes: StepShapes) -> None:
        self._shapes = shapes
        self._decode = Stage(forward.decode)
        self._mixed = Stage(forward.mixed)
        self._head = Stage(forward.head)
        self._adjust = Stage(sampler.adjust)
        self._samplers: dict[Selection, Stage[int]] = {
            selection: Stage(functools.partial(sampler.sample, selection)) for selection in SAMPLED
        }
        self._report = Stage(sampler.report)

    def run_forward(self, packed: PackedStep, num_sampling_rows: int) -> None:
        """From the step's input, which is on the device, to the local logits of the sampling rows."""
        if packed.mixed_shape is None:
            self._decode.run(packed.batch_size)
            return
        self._mixed.run(packed.mixed_shape)
        if num_sampling_rows:
            self._head.run(packed.batch_size)

    def run_logits_stage(self, sampling: StepSampling) -> None:
        """From the local logits to the adjusted ones of the rows that ask."""
        self._run_selection(self._adjust, Selection.ADJUSTED, sampling)

    def run_samplers(self, sampling: StepSampling) -> None:
        """From the logits to the sampled tokens."""
        for selection, stage in self._samplers.items():
            self._run_selection(stage, selection, sampling)

    def run_reports(self, sampling: StepSampling) -> None:
        """The log-probabilities of the rows that ask, once the tokens are sampled."""
        self._run_selection(self._report, Selection.REPORTED, sampling)

    def _run_selection(self, stage: Stage[int], selection: Selection, sampling: StepSampling) -> None:
        count = sampling.counts[selection]
        if count:
            # In most steps all rows are plain ones, which get the sizes that decode steps have.
            is_plain = selection is Selection.PLAIN
            stage.run(self._shapes.batch_size(count) if is_plain else self._shapes.selection_size(count))

    def capture(self, packer: Packer, state: DeviceState) -> None:
        """Captures every stage for each of its sizes; afterwards the state is that of an empty batch.

        Stages and sizes that take the most memory come first: their memory then serves the others.
        """
        shapes = self._shapes
        plain = self._samplers[Selection.PLAIN]
        others = [stage for stage in self._samplers.values() if stage is not plain]
        stages = [(stage, size) for size in reversed(shapes.batch_sizes) for stage in (self._decode, self._head, plain)]
        stages += [
            (stage, size)
            for size in reversed(shapes.selection_sizes)
            for stage in (self._adjust, *others, self._report)
        ]
        num_graphs = len(shapes.mixed) + len(stages)
        # Everything is launched once before any capture, as kernels are loaded and libraries initialised then.
        with Progress("compiling and loading kernels", num_graphs, "sizes") as progress:
            for shape in reversed(shapes.mixed):
                state.write_input(packer.pack_padding(shape))
                self._mixed.launch(shape)
                progress.advance()
            for stage, size in stages:
                stage.launch(size)
                progress.advance()
            torch.cuda.synchronize()
        pool = None
        with Progress("capturing CUDA graphs", num_graphs, "graphs") as progress:
            for shape in reversed(shapes.mixed):
                pool = self._mixed.capture(shape, pool)
                progress.advance()
            for stage, size in stages:
                pool = stage.capture(size, pool)
                progress.advance()

    def clear(self) -> None:
        """Lets go of the graphs: NCCL ends only after those that its kernels are in."""
        self._mixed.clear()
        for stage in (self._decode, self._head, self._adjust, *self._samplers.values(), self._report):
            stage.clear()
