"""A recorded run, late results, aborts, preemptions and worker losses included, replays to identical plans."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tandem_scheduler.core.types import Load, SchedulerConfig
from tandem_scheduler.engine.recorder import VERSION, RecordingError, RecordingScheduler, replay
from tandem_shared.errors import InvalidRequest, RequestIdInUse
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tests.support.builders import create_request, create_requests, worker_info
from tests.support.engine import Engine
from tests.support.fake_worker import FakeRunner, expected_tokens

LOGPROBS = 100

LISTS = SamplingLists(
    stop_token_ids=(1,),
    logit_bias=((2, 0.5), (3, -1.0)),
    bad_words=((4, 5), (6,)),
    logprob_token_ids=(7,),
    grammar=Grammar("start: /a/", start_after_token_id=8),
)

WORKER = worker_info(block_size=4, num_blocks=33, max_model_len=100)


def record_random_run(path: Path, seed: int) -> Load:
    """Records a run in which everything that can happen to a scheduler happens in a random order."""
    rng = np.random.default_rng(seed)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32, max_chunk_tokens=7, max_plans_in_flight=3)
    scheduler = RecordingScheduler(config, WORKER, path)
    engine = Engine(scheduler, FakeRunner(WORKER))
    requests = [
        replace(
            request,
            deadline=index + 2.0 if index % 4 == 3 else None,
            priority=index % 3,
            stop_token_ids=frozenset(expected_tokens(request)[5 + index % 20 :][:1]),
        )
        for index, request in enumerate(create_requests(40, prompt_len=20, max_tokens=30, common_prefix=range(9)))
    ]
    with pytest.raises(InvalidRequest):
        engine.add(create_request(prompt=range(200)))
    for move in range(400):
        if move % 10 == 0:
            engine.add(requests[move // 10])
        # A request comes every ten moves, which are one unit of time.
        scheduler.expire(move / 10)
        if rng.random() < 0.5:
            engine.launch()
        if rng.random() < 0.45 and engine.in_flight:
            engine.deliver()
        if move % 50 == 49:
            # The sequence may have ended; then the answer is None, which is recorded too.
            newest = requests[move // 10].sequence_id
            scheduler.abort(newest) if rng.random() < 0.5 else scheduler.stop(newest, 1)
        if move == 150:
            with pytest.raises(RequestIdInUse):
                engine.add(requests[15])
            scheduler.reset_prefix_cache()
        if move in (200, 300):
            engine.lose_worker()
            engine.launch()
            engine.attach_worker(FakeRunner(replace(WORKER, num_blocks=25, worker_instance_id=f"worker-{move}")))
    engine.runner.faulty.add(39)  # type: ignore[attr-defined]
    sampling = RowSampling(min_tokens=2, num_logprobs=2, num_prompt_logprobs=1)
    engine.add(create_request(LOGPROBS, range(10), sampling=sampling, lists=LISTS))
    engine.drain()
    scheduler.close()
    return scheduler.load()


@pytest.mark.parametrize("seed", range(3))
def test_replays_to_identical_plans(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "run.jsonl"
    load = record_random_run(path, seed)
    assert load.num_preemptions > 0 and load.num_worker_losses == 2 and load.num_overshoot_tokens > 0
    calls = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    expirations = [call["answer"] for call in calls if call["call"] == "expire"]
    results = [call["arguments"][0] for call in calls if call["call"] == "update"]
    assert any(result["prompt_logprobs"] for result in results)
    assert any(expirations) and not all(expirations), "calls that end nothing are written too"
    assert all(end["reason"] == "expired" for ends in expirations for end in ends)
    verdict = replay(path)
    assert verdict.difference is None and not verdict.is_truncated
    assert verdict.num_plans == load.num_steps


def change_plan(line: dict) -> None:
    line["answer"]["chunk_num_tokens"] = [3]


def change_argument(line: dict) -> None:
    line["arguments"][0]["prompt_token_ids"][0] += 1


def change_lists(line: dict) -> None:
    line["arguments"][0]["lists"] = {"logit_bias": [[2, 0.5]]}


@pytest.mark.parametrize(
    ("call", "change"), [("schedule", change_plan), ("add", change_argument), ("add", change_lists)]
)
def test_a_changed_file_is_seen(tmp_path: Path, call: str, change: Callable[[dict], None]) -> None:
    path = tmp_path / "run.jsonl"
    record_random_run(path, 0)
    lines = path.read_text().splitlines()
    number = next(n for n, text in enumerate(lines) if f'"call":"{call}"' in text and "error" not in text)
    line = json.loads(lines[number])
    change(line)
    lines[number] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    difference = replay(path).difference
    assert difference is not None and "schedule gave" in difference


def test_a_cut_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_random_run(path, 0)
    whole = replay(path)
    path.write_text(path.read_text()[:-5])
    verdict = replay(path)
    assert verdict.is_truncated and verdict.difference is None
    assert verdict.num_calls == whole.num_calls - 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello\n",
        "{}\n",
        f'{{"format":"tandem-schedule","version":{VERSION + 1}}}\n',
        f'{{"format":"tandem-schedule","version":{VERSION},"config":{{"nonsense":1}},"worker":{{}}}}\n',
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(RecordingError, match=r"run\.jsonl"):
        replay(path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_random_run(path, 0)
    lines = path.read_text().splitlines()
    lines[4] = lines[4][:-3]
    path.write_text("\n".join(lines))
    with pytest.raises(RecordingError, match="line 5"):
        replay(path)


def test_command_prints_the_verdict(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record_random_run(path, 0)
    command = [sys.executable, "-m", "tandem_scheduler.engine.recorder", str(path)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0 and "identical" in good.stdout
    path.write_text("nothing\n")
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "line 1" in bad.stderr


@pytest.mark.parametrize("is_there", [False, True])
def test_a_recording_holds_prompts_and_only_its_owner_reads_it(is_there: bool, tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    if is_there:
        path.touch(0o644)
    RecordingScheduler(SchedulerConfig(), WORKER, path).close()
    assert path.stat().st_mode & 0o777 == 0o600
