"""Engines of real processes, on a small random model in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.services import Engine
from tests.support.model_factory import save_random_model

VOCAB_SIZE = 1024
"""The vocabulary of the embedded model's tokenizer, which the random model uses."""

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # With a wide initialisation, greedy outputs don't fall into loops.
    return save_random_model(
        tmp_path_factory.mktemp("model"),
        dtype="float64",
        seed=5,
        initializer_range=0.3,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="module")
def start_engine(model_folder: Path) -> Iterator[StartEngine]:
    """Gives a function that starts engines; their processes are ended after the module's last test."""
    engines: list[Engine] = []

    def start(model: Path | str = model_folder, **settings: Any) -> Engine:
        engines.append(Engine(model, **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
