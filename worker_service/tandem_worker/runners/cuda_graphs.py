"""CUDA graphs by key, and the sizes that are worth one.

A step is padded to the next captured size. All graphs share one memory pool, as one runs at a time.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

MAX_PADDING = 256
"""Tokens that a step is padded by, at most: less time than launching a step's kernels one by one takes."""


def batch_sizes(max_rows: int) -> list[int]:
    """Rows of decode steps: dense where a step's time depends on them most, up to exactly max_rows."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_rows + 64, 64)]
    return sorted({min(size, max_rows) for size in ladder})


def token_counts(max_tokens: int) -> list[int]:
    """Tokens of steps with prompts: up to where launching kernel by kernel takes longer than running them, and the full
    step, as which most of a long prompt is computed.
    """
    ladder = [*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 4097, MAX_PADDING)]
    return [*(count for count in ladder if count < max_tokens), max_tokens]


class Graphs:
    """Captured calls. What they read and write must stay where it is."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def capture(self, key: Hashable, call: Callable[[], object]) -> None:
        """The call must have run before. Capture what takes the most memory first, which then serves the others."""
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL has threads of its own, which ask how its work is getting on.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        self._pool = graph.pool()
        self._graphs[key] = graph

    def clear(self) -> None:
        """NCCL ends only after the graphs that its kernels are in."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def replay(self, key: Hashable) -> None:
        self._graphs[key].replay()
