"""Whether a worker has the model that this scheduler serves: its name, its tokenizer, its vocabulary.

What clients are told, and how their text becomes ids, is decided here, and the worker would compute any ids at all.
"""

import functools
from pathlib import Path

from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.config import SchedulerSettings, model_name
from tandem_shared.model_folder import tokenizer_digest
from tandem_shared.step_plan import WorkerInfo


class ModelCheck:
    """Says of a worker why it is not the one to use; nothing where it is."""

    def __init__(self, settings: SchedulerSettings, tokenizer_folder: Path) -> None:
        # A name that was chosen for clients says nothing of the model's own.
        self._name = "" if settings.served_model_name else model_name(settings)
        self._folder = tokenizer_folder
        # Who names another tokenizer than the model's means it.
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
