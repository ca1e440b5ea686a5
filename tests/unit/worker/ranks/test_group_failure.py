"""How a process ends whose tensor-parallel group is lost."""

import subprocess
import sys

import pytest

from tests.e2e.waiting import WAIT_S


@pytest.mark.parametrize("state", ["never told", "loop is closed", "told"])
def test_a_lost_group_ends_its_process_whatever_became_of_the_server(state: str) -> None:
    """Calls the real fail() in a new process: before there is an event loop, after it has closed, and while it runs."""
    program = f"""
import asyncio, os, threading
from tests.support.builders import worker_info
from tests.support.fake_worker import FakeRunner
from tandem_worker.ranks import group_failure
from tandem_worker.service.servicer import WorkerServicer

group_failure.LAST_WORDS_S = 0.2

async def serve(servicer):
    failing = asyncio.create_task(servicer.run_until_failure())
    await asyncio.sleep(0)
    if {state!r} == "told":
        threading.Thread(target=group_failure.fail, args=["rank 1 is gone"], daemon=True).start()
        print("reason:", await failing, flush=True)
        await asyncio.sleep(60)
    failing.cancel()

if {state!r} != "never told":
    servicer = WorkerServicer(FakeRunner(worker_info()))
    group_failure.tell_failures(servicer.fail_from_thread)
    asyncio.run(serve(servicer))
group_failure.fail("rank 1 is gone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1, done.stderr
    assert "the tensor-parallel group is lost: rank 1 is gone" in done.stderr
    assert ("reason: the tensor-parallel group is lost: rank 1 is gone" in done.stdout) == (state == "told")
