"""Tensor-parallel ranks as processes, each with a scheduler of its own, which makes the same plans as the others'."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tandem_scheduler.core.types import SequenceRequest
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard
from tests.identity.runs import Case, Run, execute

SILENCE_LIMIT = timedelta(seconds=60)
"""How long a rank waits for another one that has failed."""


def run_ranks(size: int, folder: Path, case: Case, requests: list[SequenceRequest], meeting: Path) -> list[Run]:
    """What each rank's run gave. meeting: an empty folder in which the ranks find each other."""
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as processes:
        arguments = (size, folder, case, requests, meeting / "store")
        runs = [processes.submit(run_rank, number, *arguments) for number in range(size)]
        return [run.result() for run in runs]


def run_rank(number: int, size: int, folder: Path, case: Case, requests: list[SequenceRequest], store: Path) -> Run:
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), size), rank=number, world_size=size, timeout=SILENCE_LIMIT
    )
    run = execute(folder, case, requests, Communicator(Shard(number, size)))
    dist.destroy_process_group()
    return run
