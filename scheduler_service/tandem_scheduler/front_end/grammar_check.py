"""Checks the form that a request wants its output to have, and makes a grammar of it.

Compiling a grammar takes up to half a second, without the GIL, so it is done by a few threads. What bounds it is in
tandem_shared/structured_output.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tandem_scheduler.front_end.generation_params import GenerationParams, StructuredOutput
from tandem_scheduler.front_end.text.patient_threads import PatientThreads
from tandem_scheduler.front_end.violations import Violations
from tandem_shared.model_folder import tokenizer_digest
from tandem_shared.sampling_lists import MAX_GRAMMAR_BYTES, Grammar
from tandem_shared.step_plan import WorkerInfo
from tandem_shared.structured_output import (
    GrammarCompiler,
    GrammarError,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    load_compiler,
    regex_grammar,
)

FIELD = "structured_output"
MAX_CHOICES = 1024
NUM_THREADS = 2
"""The threads that check grammars. Further grammars wait in turn."""

KINDS = ("json_schema", "json_object", "regex", "choice", "lark")


class GrammarChecker:
    """The checking of grammars, for all calls of a front end."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Loads the tokenizer of the folder once more, as llguidance needs it. That takes long and holds the GIL, so it
        is not left to the first request. Raises ModelError.
        """
        self._digest = tokenizer_digest(folder)
        self._threads = PatientThreads(NUM_THREADS, "grammars")
        self._compiler: GrammarCompiler | None = None
        self._reason = ""
        size = tokenizer.get_vocab_size()
        try:
            # No worker is known yet, and so no end-of-sequence token. For the check any token will do that texts can be
            # written without. The last one is: it is an added token, or a long word.
            self._compiler = load_compiler(folder, size, [size - 1])
        except GrammarError as error:
            self._reason = str(error)

    async def read(self, params: GenerationParams, worker: WorkerInfo, violations: Violations) -> Grammar | None:
        """The grammar of the request's output. None if the request has none, or what it has is wrong."""
        form = params.structured_output
        if form is None:
            return None
        kind = _check_sizes(form, worker, violations)
        if kind is None or violations:
            return None
        if reason := self._reason or self._reason_against(worker):
            violations.check(False, FIELD, f"is not possible here: {reason}")
            return None
        try:
            text = await self._threads.call(self._compile, kind, getattr(form, kind))
        except GrammarError as error:
            violations.check(False, f"{FIELD}.{kind}", str(error))
            return None
        return Grammar(text, form.start_after_token_id, params.ignore_eos)

    def _reason_against(self, worker: WorkerInfo) -> str:
        """Why this worker can't follow a grammar that is checked here. Empty if it can."""
        if not worker.eos_token_ids:
            return "the model has no end-of-sequence token"
        if worker.tokenizer_digest == self._digest:
            return ""
        return f"the worker's model has {'another' if worker.tokenizer_digest else 'no'} tokenizer.json"

    def _compile(self, kind: str, value: Any) -> str:
        text = _CONVERTERS[kind](value)
        if len(text) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"has {len(text)} characters as a grammar, which must be {MAX_GRAMMAR_BYTES} at most")
        assert self._compiler is not None, "a reason was given"
        self._compiler.check(text)
        return text


_CONVERTERS: dict[str, Callable[[Any], str]] = {
    "json_schema": json_schema_grammar,
    "json_object": lambda _: json_object_grammar(),
    "regex": regex_grammar,
    "choice": choice_grammar,
    "lark": lark_grammar,
}


def _check_sizes(form: StructuredOutput, worker: WorkerInfo, violations: Violations) -> str | None:
    """The kind of form that is asked for. None if there is not exactly one."""
    start = form.start_after_token_id
    is_token = start is None or 0 <= start < worker.vocab_size
    violations.check(is_token, f"{FIELD}.start_after_token_id", f"{start} is not in the vocabulary")
    kinds = [kind for kind in KINDS if getattr(form, kind) not in (None, False)]
    if not violations.check(
        len(kinds) == 1, FIELD, f"must have exactly one of {', '.join(KINDS)}, has {', '.join(kinds) or 'none'}"
    ):
        return None
    [kind] = kinds
    field = f"{FIELD}.{kind}"
    if form.choice is not None:
        num_texts = len(form.choice)
        if not violations.check(1 <= num_texts <= MAX_CHOICES, field, f"must have 1 to {MAX_CHOICES} texts"):
            return None
        violations.check(all(form.choice), field, "has an empty text")
        num_characters = sum(map(len, form.choice))
    else:
        num_characters = 0 if kind == "json_object" else len(getattr(form, kind))
    violations.check(num_characters <= MAX_GRAMMAR_BYTES, field, f"must have {MAX_GRAMMAR_BYTES} characters at most")
    return kind
