"""Workers of several ranks give the tokens of one rank, end together, and leave no process behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from tandem.v1 import inference_pb2
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists
from tests.e2e.hosts import entering, ip, network_namespaces
from tests.e2e.services import REPOSITORY, Engine, Service, generate_request, random_prompt
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.model_factory import save_random_model
from tests.support.transformers_sampling import adjusting_processors

NUM_TOKENS = 40
VOCAB_SIZE = 1027
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
CHANGES = RowSampling(repetition_penalty=1.5, frequency_penalty=0.25)
PROMPTS = [random_prompt(3 + 7 * index, VOCAB_SIZE, seed=index) for index in range(12)]


def make_requests() -> list[inference_pb2.GenerateStreamRequest]:
    """Requests that are greedy, with temperature, and with temperature and top-k, in turn. Every second one has its
    logits changed.
    """
    requests = [
        generate_request(prompt, NUM_TOKENS, temperature=0.9 if index % 3 else 0.0, seed=index)
        for index, prompt in enumerate(PROMPTS)
    ]
    for request in requests[2::3]:
        request.sampling.top_k = 7
    for request, prompt in list(zip(requests, PROMPTS, strict=True))[::2]:
        request.sampling.repetition_penalty = CHANGES.repetition_penalty
        request.sampling.frequency_penalty = CHANGES.frequency_penalty
        request.sampling.allowed_token_ids.extend(allowed_token_ids(prompt))
    return requests


def allowed_token_ids(prompt: list[int]) -> tuple[int, ...]:
    return tuple(range(prompt[0] % 3, VOCAB_SIZE, 3))


def start(folder: Path, tp_size: int, num_blocks: int = 40) -> Engine:
    """With 40 blocks some of the requests are preempted."""
    return Engine(folder, worker_flags=["--tp-size", str(tp_size), "--num-blocks", str(num_blocks)])


def run(engine: Engine) -> list[list[int]]:
    return [stream.result() for stream in [engine.stream(request) for request in make_requests()]]


@pytest.mark.slow
@pytest.mark.parametrize("config", [pytest.param(CONFIGS["dense"], id="dense"), pytest.param(CONFIGS["moe"], id="moe")])
def test_tokens_are_those_of_one_rank_and_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, dtype="float64", vocab_size=VOCAB_SIZE, **config)
    outputs, num_preemptions = {}, 0
    for tp_size in (1, 2, 4):
        engine = start(folder, tp_size)
        try:
            outputs[tp_size] = run(engine)
            num_preemptions += engine.load().num_preemptions
        finally:
            engine.close()
    assert num_preemptions > 0
    assert outputs[2] == outputs[1]
    assert outputs[4] == outputs[1]
    # The eager experts are the only ones of transformers that compute in float64.
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    for index, (prompt, output) in list(enumerate(zip(PROMPTS, outputs[1], strict=True)))[::3]:
        ids = torch.tensor([prompt])
        lists = SamplingLists(allowed_token_ids=allowed_token_ids(prompt))
        changes = [] if index % 2 else adjusting_processors(CHANGES, lists, len(prompt), VOCAB_SIZE)
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            logits_processor=LogitsProcessorList(changes),
        )
        assert output == expected[0, len(prompt) :].tolist()
    assert sum(len(set(output)) for output in outputs[1]) / len(PROMPTS) > 10


@pytest.mark.slow
def test_tokens_of_eight_ranks_are_those_of_one(tmp_path: Path) -> None:
    """Each of the two KV heads is held by four ranks, and eight ranks don't divide a vocabulary of 1027."""
    folder = save_random_model(tmp_path, dtype="float64", vocab_size=VOCAB_SIZE, **CONFIGS["dense"])
    outputs = []
    for tp_size in (1, 8):
        engine = start(folder, tp_size)
        try:
            outputs.append(run(engine))
        finally:
            engine.close()
    assert outputs[0] == outputs[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_random_model(folder, dtype="float64", vocab_size=VOCAB_SIZE, max_position_embeddings=1024)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = start(folder, 2, num_blocks=200)
    yield engine
    engine.close()


def ranks_of(worker: Service) -> list[psutil.Process]:
    """Rank 0 and its children."""
    leader = worker.serving()
    return [leader, *leader.children(recursive=True)]


def wait_all_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    # A zombie has ended; its parent has not read its status yet.
    def is_gone(process: psutil.Process) -> bool:
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(lambda: all(map(is_gone, processes)), f"the end of {processes}", timeout_s)


def lose(engine: Engine, victim: int, number: signal.Signals, timeout_s: float) -> list[psutil.Process]:
    """Sends a rank a signal while streams run; checks that the whole group ends and the streams go on with the next
    group, which the supervisor starts. Gives the ended group's processes.
    """
    requests = [generate_request(prompt, 700, seed=index) for index, prompt in enumerate(PROMPTS[:2])]
    truth = [stream.result() for stream in [engine.stream(request) for request in requests]]
    streams = [engine.stream(request) for request in requests]
    for stream in streams:
        stream.wait_tokens(10)
    ranks = ranks_of(engine.worker)
    assert len(ranks) == 2
    ranks[victim].send_signal(number)
    wait_all_gone([rank for rank in ranks if number == signal.SIGKILL or rank is not ranks[victim]], timeout_s)
    wait_until(lambda: engine.load().num_worker_losses == 1, "the scheduler sees the loss")
    assert all(stream.is_running() for stream in streams)
    assert [stream.result() for stream in streams] == truth
    return ranks


@pytest.mark.slow
def test_a_killed_rank_ends_the_group_and_streams_go_on(engine: Engine) -> None:
    ranks = lose(engine, 1, signal.SIGKILL, 10)
    assert f"rank 1 (process {ranks[1].pid})" in engine.worker.log_file.read_text()


@pytest.mark.slow
def test_a_killed_rank_0_leaves_nothing_behind(engine: Engine) -> None:
    lose(engine, 0, signal.SIGKILL, 10)


@pytest.mark.slow
def test_a_frozen_rank_ends_the_group(engine: Engine) -> None:
    ranks = lose(engine, 1, signal.SIGSTOP, 30)
    log = engine.worker.log_file.read_text()
    assert f"rank 1 (process {ranks[1].pid}) has been silent" in log
    wait_all_gone(ranks, 10)


@pytest.mark.parametrize(
    "receivers", [pytest.param(1, id="rank_0"), pytest.param(2, id="all_ranks", marks=pytest.mark.slow)]
)
def test_sigterm_ends_all_ranks_well(receivers: int, engine: Engine) -> None:
    """SIGTERM comes in the middle of streams, to rank 0 or, as some supervisors send it, to all ranks."""
    streams = [engine.stream(generate_request(prompt, 900)) for prompt in PROMPTS[:2]]
    for stream in streams:
        stream.wait_tokens(10)
    ranks = ranks_of(engine.worker)
    for rank in reversed(ranks[:receivers]):
        rank.send_signal(signal.SIGTERM)
    wait_all_gone(ranks, 20)
    assert engine.worker.process.wait(WAIT_S) == 0
    assert "lost" not in engine.worker.log_file.read_text()


@pytest.mark.slow
def test_sigterm_beside_a_frozen_rank_leaves_nothing_behind(engine: Engine) -> None:
    ranks = ranks_of(engine.worker)
    ranks[1].send_signal(signal.SIGSTOP)
    engine.worker.signal(signal.SIGTERM)
    wait_all_gone(ranks, 60)


def test_a_port_that_is_taken_ends_all_ranks(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--model", str(folder), "--device", "cpu", "--num-threads", "1", "--tp-size", "2"]
        process = subprocess.run(
            [sys.executable, "-m", "tandem_worker", *flags, "--port", str(taken.getsockname()[1])],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
    assert process.returncode == 2
    assert "port" in process.stderr and "the tensor-parallel group is lost" not in process.stderr


@pytest.mark.parametrize(
    ("flags", "environment", "problem"),
    [
        (["--tp-size", "3"], {}, "--tp-size 3 does not divide num_attention_heads, 4"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "--tp-size is 1, but WORLD_SIZE is 2"),
    ],
)
def test_a_group_that_cannot_be_is_refused(
    flags: list[str], environment: dict[str, str], problem: str, folder: Path
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tandem_worker", "--model", str(folder), "--device", "cpu", *flags],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert process.returncode != 0
    assert problem in process.stderr


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Makes two network namespaces with a link between them; gives the command that enters each."""
    with network_namespaces(2) as holders:
        names = [f"td{pid}" for pid in holders]
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for number, (pid, name) in enumerate(zip(holders, names, strict=True), 1):
            ip("link", "set", name, "netns", str(pid))
            for command in (
                ["addr", "add", f"10.99.0.{number}/24", "dev", name],
                ["link", "set", name, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run([*entering(pid), "ip", *command], check=True)
        yield [" ".join(entering(pid)) for pid in holders]


def bytes_received(enter: str) -> int:
    """The bytes received by a host's network interface, loopback left out."""
    counters = subprocess.run(
        [*enter.split(), "cat", "/proc/net/dev"], check=True, capture_output=True, text=True
    ).stdout
    return sum(int(line.split()[1]) for line in counters.splitlines() if line.strip().startswith("td"))


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def can_make_hosts() -> bool:
    try:
        with two_hosts():
            return True
    except (OSError, subprocess.CalledProcessError, AssertionError):
        return False


@pytest.mark.slow
def test_ranks_on_two_hosts_meet_through_torchrun(folder: Path, tmp_path: Path) -> None:
    if not can_make_hosts():
        pytest.skip("may not make network namespaces here")
    one_rank = start(folder, 1)
    try:
        truth = run(one_rank)
    finally:
        one_rank.close()
    with two_hosts() as hosts, ExitStack() as stack:
        port_file, secret_file = tmp_path / "port", tmp_path / "session-secret"
        processes = []
        for number, enter in enumerate(hosts):
            log = stack.enter_context((tmp_path / f"host{number}.log").open("wb"))
            command = [
                *enter.split(), sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(number), "--master-addr", "10.99.0.1", "--master-port", "29400",
                "--module", "tandem_worker", "--model", str(folder), "--device", "cpu", "--dtype", "float64",
                "--num-threads", "1", "--num-blocks", "40", "--tp-size", "2", "--host", "10.99.0.1", "--port", "0",
                "--port-file", str(port_file), "--session-secret-file", str(secret_file),
            ]  # fmt: skip
            # A host's name does not resolve to an address that the other reaches, so Gloo is told the interface.
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"td{enter.split()[2]}"}
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(process.wait, WAIT_S)
            stack.callback(kill_group, process)
            processes.append(process)
        wait_until(lambda: port_file.exists() or any(p.poll() is not None for p in processes), "rank 0 listens")
        logs = [(tmp_path / f"host{number}.log").read_text() for number in range(2)]
        assert port_file.exists(), "\n".join(logs)
        address = f"10.99.0.1:{port_file.read_text().strip()}"
        before = [bytes_received(enter) for enter in hosts]
        client = subprocess.run(
            [
                *hosts[0].split(),
                sys.executable,
                "-m",
                "tests.e2e.one_host_client",
                address,
                str(folder),
                str(secret_file),
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert client.returncode == 0, client.stderr
        assert client.stdout.strip() == str(truth)
        # Each token of each layer has two sums of hidden_size float64 numbers, of which at least half must cross.
        num_tokens = sum(len(prompt) + NUM_TOKENS - 1 for prompt in PROMPTS)
        least = num_tokens * 2 * 2 * 32 * 8 // 2
        for enter, count in zip(hosts, before, strict=True):
            assert bytes_received(enter) - count > least
        # One host's torchrun is killed: its rank ends with it, and then the other host's rank.
        ranks = [rank for process in processes for rank in psutil.Process(process.pid).children(recursive=True)]
        assert len(ranks) == 2
        processes[1].kill()
        wait_all_gone(ranks, 20)
