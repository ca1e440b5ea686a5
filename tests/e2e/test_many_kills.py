"""Workers killed at random moments, again and again, under streams that never stop coming: nobody is accused of it.

The truth is the same requests on the same engine, undisturbed.
"""

import random
import threading
import time

import pytest

from tests.e2e.conftest import VOCAB_SIZE, StartEngine
from tests.e2e.services import Engine, generate_request, random_prompt, wait_ready
from tests.e2e.waiting import wait_until

NUM_STREAMS = 36
NUM_TOKENS = 300
NUM_KILLS = 30
MEAN_INTERVAL_S = 5.0
"""Every second time from a worker's readiness on, else from the kill before, so that starting workers are hit too."""
SEED = 20261127


class Client(threading.Thread):
    """Sends its request again whenever it has ended, until told to stop."""

    def __init__(self, engine: Engine, number: int) -> None:
        super().__init__(daemon=True)
        self._engine = engine
        self._number = number
        self.is_last = threading.Event()
        self.outputs: list[list[int]] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.is_last.is_set():
                self.outputs.append(self.generate())
        except BaseException as error:
            self.error = error

    def generate(self) -> list[int]:
        """Of unequal length; half of the clients are greedy, half seeded."""
        request = generate_request(
            random_prompt(5 + 7 * self._number, VOCAB_SIZE, seed=self._number),
            NUM_TOKENS + 5 * self._number,
            temperature=0.8 if self._number % 2 else 0.0,
            seed=self._number,
        )
        return self._engine.stream(request, timeout_s=600).result(timeout_s=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_kills_under_36_streams_end_nobody_and_change_no_token(start_engine: StartEngine) -> None:
    engine = start_engine()
    clients = [Client(engine, number) for number in range(NUM_STREAMS)]
    truth = [client.generate() for client in clients]
    for client in clients:
        client.start()
    rng = random.Random(SEED)
    for number in range(NUM_KILLS):
        if number % 2:
            wait_ready(engine.channel)
        time.sleep(rng.expovariate(1 / MEAN_INTERVAL_S))
        # There may be none between two lives.
        wait_until(lambda: engine.worker.serving().pid != engine.worker.process.pid, "a worker's process")
        engine.worker.serving().kill()
    for client in clients:
        client.is_last.set()
    for client, expected in zip(clients, truth, strict=True):
        client.join(600)
        assert not client.is_alive()
        assert client.error is None, client.error
        assert client.outputs and all(output == expected for output in client.outputs)
    load = engine.load()
    assert load.num_used_blocks == 0
    assert load.num_worker_losses >= NUM_KILLS // 2
