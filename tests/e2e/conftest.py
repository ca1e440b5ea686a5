"""Engines of real processes, on a small random model in float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.services import Engine
from tests.support.model_factory import save_random_model

VOCAB_SIZE = 1024
"""As many as the embedded model's tokenizer has, which stands in for the random model's."""

StartEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A wide initialisation, so that greedy outputs don't fall into loops.
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
    """Starts engines, and ends their processes, whatever became of them, after the module's last test."""
    engines: list[Engine] = []

    def start(model: Path | str = model_folder, **settings: Any) -> Engine:
        engines.append(Engine(model, **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
