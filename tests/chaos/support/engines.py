"""Engines of real processes for the harness: a small random model in float64, whose tokens are the same however it is
batched.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.e2e.conftest import VOCAB_SIZE
from tests.e2e.services import Engine
from tests.support.chats import QWEN3_TEMPLATE
from tests.support.model_factory import save_random_model
from tests.support.tokenizers import EMBEDDED, embedded


@contextlib.contextmanager
def random_model() -> Iterator[Path]:
    """A new folder with the model and the embedded model's tokenizer, which grammars need. Its name tells the processes
    that serve it, by their command lines.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        shutil.copy(EMBEDDED, folder)
        yield save_random_model(
            Path(folder),
            dtype="float64",
            seed=5,
            initializer_range=0.3,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=1024,
            eos_token_id=embedded().token_to_id("<|im_end|>"),
        )


@contextlib.contextmanager
def running_engine(**settings: Any) -> Iterator[Engine]:
    """An engine that serves the random model. settings: keywords of Engine."""
    with random_model() as model, contextlib.closing(Engine(model, **settings)) as engine:
        yield engine


def tokenizer_folder(folder: Path) -> Path:
    """A new folder inside `folder` with the random model's tokenizer and Qwen3's chat template, which knows tools."""
    made = folder / "tokenizer"
    made.mkdir()
    shutil.copy(EMBEDDED, made / "tokenizer.json")
    (made / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return made
