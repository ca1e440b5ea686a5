"""The log-probabilities that rows ask for, of their output and of their prompts.

They are of the model's own distribution: the log_softmax of the logits before anything that a row asks of sampling.
They are computed on the device for the rows that ask, packed into one array there, which is copied to the host at once,
and read on the host when the step's tokens are in. The packed array is (n, 2 + 2 top + requested) int32, where `top` is
the largest number of likeliest tokens that one of the n asks for, and `requested` that of requested tokens. It has the
rank; the ids of the likeliest tokens; then, as float32, the log-probabilities of the token itself, of the likeliest
tokens and of the requested ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem_shared.step_plan import Float32Array, Int32Array, PromptLogprobs, RowLogprobs
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.transfers import padded

MAX_PROMPT_LOGITS = 256
"""The most positions of prompts whose logits are in memory at once."""


@dataclass(frozen=True)
class LogprobRows:
    """Those of a step's sampling rows that ask for log-probabilities. The lists are parallel."""

    rows: list[int]
    places: list[int]
    """Where each row is among the sampling rows"""
    num_top: list[int]
    """How many likeliest tokens each row asks for"""
    requested: list[tuple[int, ...]]
    """The tokens that each row asks for"""

    @property
    def most_requested(self) -> int:
        """The largest number of tokens that a row requests"""
        return max(map(len, self.requested))

    @property
    def requested_ids(self) -> Int32Array:
        """(n, most requested) with 0 where a row requests fewer."""
        return padded(self.requested, self.most_requested)


def logprob_rows(rows: Int32Array, options: RowOptions) -> LogprobRows | None:
    """Those of the sampling rows that ask; None if none does."""
    places = options.reports[rows].nonzero()[0]
    if not len(places):
        return None
    asking = rows[places]
    return LogprobRows(
        rows=asking.tolist(),
        places=places.tolist(),
        num_top=np.maximum(options.num_logprobs[asking], 0).tolist(),
        requested=[options.lists[row].logprob_token_ids for row in asking.tolist()],
    )


def pack_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, requested_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Packs log-probabilities as this file says. logits (n, vocab_size) in float32 or wider, token_ids (n,) int64,
    requested_ids (n, requested) int64.
    """
    top_ids = likeliest(logits, min(num_top, logits.shape[1]))
    wanted = [token_ids[:, None], top_ids] + ([] if requested_ids is None else [requested_ids])
    raw = logits.gather(1, torch.cat(wanted, 1))
    ranks = 1 + (logits > raw[:, :1]).sum(1, keepdim=True, dtype=torch.int32)
    logprobs = raw - logits.logsumexp(1, keepdim=True)
    return torch.cat([ranks, top_ids.int(), logprobs.float().view(torch.int32)], 1)


def likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """The ids (n, count) of the likeliest tokens, likeliest first, of equal ones the lowest id. On a GPU this waits."""
    if not count:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    top = logits.topk(count, dim=1)
    ids = top.indices.sort(dim=1).values
    order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    # topk takes any of those that are equal to the last one. There are seldom more of them than it takes.
    is_tied = (logits >= top.values[:, -1:]).sum(1, dtype=torch.int32) > count
    if is_tied.any():
        ids[is_tied] = logits[is_tied].sort(dim=1, descending=True, stable=True).indices[:, :count]
    return ids


@dataclass(frozen=True)
class QueuedLogprobs:
    """Packed log-probabilities of sampling rows, whose copy to the host is queued."""

    asked: LogprobRows
    packed: torch.Tensor

    def read(self, token_ids: list[int]) -> tuple[RowLogprobs, ...]:
        """The reports of the rows that sampled, once the copy is there. token_ids has those of all the step's sampling
        rows, and is negative where a row could not sample.
        """
        num_requested = self.asked.most_requested
        ranks, top_ids, logprobs = _unpack(self.packed, num_requested)
        first_requested = logprobs.shape[1] - num_requested
        return tuple(
            RowLogprobs(
                row=row,
                logprob=line[0],
                top_token_ids=tuple(ids[:num_top]),
                top_logprobs=tuple(line[1:first_requested][:num_top]),
                rank=rank,
                requested_logprobs=tuple(line[first_requested:][: len(requested)]),
            )
            for row, place, num_top, requested, rank, ids, line in zip(
                self.asked.rows, self.asked.places, self.asked.num_top, self.asked.requested,
                ranks.tolist(), top_ids.tolist(), logprobs.tolist(), strict=True,
            )
            if token_ids[place] >= 0
        )  # fmt: skip


@dataclass(frozen=True)
class PromptPart:
    """The prompt tokens of one row that a step reports: `count` of them from first_position on."""

    row: int
    first_position: int
    count: int
    num_top: int


@dataclass(frozen=True)
class PromptPositions:
    """Where a step's prompt log-probabilities come from. The arrays have an entry for each position, part by part."""

    parts: list[PromptPart]
    places: Int32Array
    """Where among the tokens of the step's chunks, which are in the order of chunk_rows, the position before it is"""
    token_ids: Int32Array
    """The prompt tokens"""

    @property
    def num_top(self) -> int:
        return max(part.num_top for part in self.parts)

    def slices(self) -> Iterator[slice]:
        """Slices of the positions whose logits are in memory at once."""
        starts = range(0, len(self.token_ids), MAX_PROMPT_LOGITS)
        return (slice(start, start + MAX_PROMPT_LOGITS) for start in starts)


def prompt_positions(work: StepWork, batch: Batch, options: RowOptions) -> PromptPositions | None:
    """What the step's chunks bring of prompt log-probabilities; None if that is nothing. A position's logits are about
    the token after it, so a chunk's last position brings the first token of the next chunk.
    """
    if not (options.num_prompt_logprobs[work.chunk_rows] >= 0).any():
        return None
    parts, places, token_ids = [], [], []
    first_places = np.cumsum(work.chunk_counts) - work.chunk_counts
    for row, place, start, count in zip(
        work.chunk_rows.tolist(), first_places.tolist(), work.chunk_starts.tolist(), work.chunk_counts.tolist(),
        strict=True,
    ):  # fmt: skip
        num_top = int(options.num_prompt_logprobs[row])
        num_reported = min(count, int(batch.num_prompt[row]) - 1 - start)
        if num_top >= 0 and num_reported > 0:
            parts.append(PromptPart(row, start + 1, num_reported, num_top))
            places.append(np.arange(place, place + num_reported, dtype=np.int32))
            token_ids.append(batch.token_ids[row][start + 1 : start + 1 + num_reported])
    return PromptPositions(parts, np.concatenate(places), np.concatenate(token_ids)) if parts else None


@dataclass(frozen=True)
class QueuedPromptLogprobs:
    """Packed log-probabilities of prompt tokens, in the slices that PromptPositions gives, whose copies are queued."""

    parts: Sequence[PromptPart]
    packed: Sequence[torch.Tensor]

    def read(self) -> tuple[PromptLogprobs, ...]:
        """The reports, once the copies are there, in ascending order of rows."""
        ranks, top_ids, logprobs = _unpack(torch.cat(list(self.packed)), 0)
        reports, start = [], 0
        for part in self.parts:
            lines = slice(start, start + part.count)
            start += part.count
            ids, tops = top_ids[lines, : part.num_top], logprobs[lines, 1 : 1 + part.num_top]
            reports.append(
                PromptLogprobs(
                    row=part.row,
                    first_position=part.first_position,
                    logprobs=logprobs[lines, 0],
                    ranks=ranks[lines],
                    num_top=ids.shape[1],
                    top_token_ids=ids.flatten(),
                    top_logprobs=tops.flatten(),
                )
            )
        return tuple(sorted(reports, key=lambda report: report.row))


def _unpack(packed: torch.Tensor, num_requested: int) -> tuple[Int32Array, Int32Array, Float32Array]:
    """Ranks (n,), ids (n, top) and log-probabilities (n, 1 + top + requested), all in the memory of `packed`."""
    values: Int32Array = packed.numpy()
    num_top = (values.shape[1] - 2 - num_requested) // 2
    return values[:, 0], values[:, 1 : 1 + num_top], values[:, 1 + num_top :].view(np.float32)
