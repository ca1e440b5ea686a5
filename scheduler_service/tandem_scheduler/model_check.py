"""Checks that a worker has the model that this scheduler serves: its name, its tokenizer, its vocabulary.

The scheduler tells clients the model's name and turns their text into ids, and the worker would compute any ids at all.
"""

import functools
from pathlib import Path

from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.config import SchedulerSettings, model_name
from tandem_shared.model_folder import tokenizer_digest
from tandem_shared.step_plan import WorkerInfo


class ModelCheck:
    """Says why a worker must not be used. Empty if it may."""

    def __init__(self, settings: SchedulerSettings, tokenizer_folder: Path) -> None:
        # A name that was chosen for clients says nothing about the model's own name.
        self._name = "" if settings.served_model_name else model_name(settings)
        self._folder = tokenizer_folder
        # A tokenizer that is named apart from the model is meant to differ from it.
        self._digest = "" if settings.tokenizer else tokenizer_digest(tokenizer_folder)

    def __call__(self, info: WorkerInfo) -> str:
        if self._name and info.model != self._name:
            return (
                f"the worker serves {info.model!r}, this scheduler {self._name!r}; give both the same --model, or this "
                "one --served-model-name"
            )
        if self._digest and info.tokenizer_digest:
            if info.tokenizer_digest != self._digest:
                return f"the worker's tokenizer.json is another than that in {self._folder}"
        elif self._num_tokens > info.vocab_size:
            return (
                f"the tokenizer in {self._folder} has {self._num_tokens} tokens, the worker's model a vocabulary of "
                f"{info.vocab_size}"
            )
        return ""

    @functools.cached_property
    def _num_tokens(self) -> int:
        return int(load_tokenizer(self._folder).get_vocab_size())
