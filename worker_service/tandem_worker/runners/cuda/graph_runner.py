"""Owns the CUDA graphs: captures them, and runs a packed step by replaying them.

A step is run as a few stages, each captured by itself for each of its sizes: the forward pass of a decode step with
the LM head; the forward pass of a mixed step; the LM head of a mixed step; the gathering of the ranks' logits; and each
sampler that can be captured. So the number of graphs is the sum of the stages' sizes, not their product. For a size
that has no graph, as a large mixed step may have, the same kernels are launched one by one, with the same result.

All graphs share one memory pool, as one runs at a time.
"""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.cuda.forward_pass import ForwardPass
from tandem_worker.runners.cuda.packer import PackedStep, Packer
from tandem_worker.runners.cuda.step_shapes import StepShapes
from tandem_worker.runners.cuda.token_sampler import SamplerKind, SamplingChoice, TokenSampler

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

    def __init__(self, forward: ForwardPass, sampler: TokenSampler) -> None:
        self._sampler = sampler
        self._decode = Stage(forward.decode)
        self._mixed = Stage(forward.mixed)
        self._head = Stage(forward.head)
        self._gather = Stage(sampler.gather)
        self._samplers = {
            SamplerKind.PLAIN: Stage(sampler.sample_plain),
            SamplerKind.TRUNCATED: Stage(sampler.sample_truncated),
        }

    def run_forward(self, packed: PackedStep, num_sampling_rows: int) -> None:
        """From the step's input, which is on the device, to the local logits of the sampling rows."""
        if packed.mixed_shape is None:
            self._decode.run(packed.batch_size)
            return
        self._mixed.run(packed.mixed_shape)
        if num_sampling_rows:
            self._head.run(packed.batch_size)

    def run_sampler(self, packed: PackedStep, choice: SamplingChoice) -> None:
        """From the local logits to the sampled tokens."""
        num_rows = choice.num_rows
        if not num_rows:
            return
        if choice.needs_all_logits:
            self._gather.run(packed.batch_size)
        if choice.kind is SamplerKind.GENERAL:
            self._sampler.sample_generally(num_rows)
        else:
            self._samplers[choice.kind].run(packed.batch_size)

    def capture(self, shapes: StepShapes, packer: Packer, state: DeviceState) -> None:
        """Captures every stage for each of its sizes; afterwards the state is that of an empty batch.

        Stages and sizes that take the most memory come first: their memory then serves the others.
        """
        batch_stages: list[Stage[int]] = [self._decode, self._head, *self._samplers.values()]
        if state.is_sharded:
            batch_stages.append(self._gather)
        # Everything is launched once before any capture, as kernels are loaded and libraries initialised then.
        for shape in reversed(shapes.mixed):
            state.write_input(packer.pack_padding(shape))
            self._mixed.launch(shape)
        for size in reversed(shapes.batch_sizes):
            for stage in batch_stages:
                stage.launch(size)
        torch.cuda.synchronize()
        pool = None
        for shape in reversed(shapes.mixed):
            pool = self._mixed.capture(shape, pool)
        for size in reversed(shapes.batch_sizes):
            for stage in batch_stages:
                pool = stage.capture(size, pool)

    def clear(self) -> None:
        """Lets go of the graphs: NCCL ends only after those that its kernels are in."""
        self._mixed.clear()
        for stage in (self._decode, self._head, self._gather, *self._samplers.values()):
            stage.clear()
