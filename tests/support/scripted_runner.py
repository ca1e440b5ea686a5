"""A worker that says what a test tells it to, whatever it is asked. Unlike FakeRunner it checks no plan."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from tandem_shared.step_plan import StepPlan, StepResult, WorkerInfo
from tests.support.fake_worker import FakePendingStep
from tests.support.tokenizers import embedded


@dataclass
class ScriptedRow:
    num_prompt_tokens_left: int
    output: Iterator[int]


class ScriptedRunner:
    """A Runner with the embedded model's vocabulary. Sequences say the texts of `scripts`, one each, as they come; each
    text ends with the first EOS token, and the tokens past it are EOS too. `prompts` has their prompts, with special
    tokens. Each step takes one permit of the gate; without a gate it takes none.
    """

    def __init__(self, info: WorkerInfo, gate: threading.Semaphore | None = None) -> None:
        self.info = info
        self.progress = 0
        self.scripts: list[str] = []
        self.prompts: list[str] = []
        self._gate = gate
        self._tokenizer = embedded()
        self._rows: dict[int, ScriptedRow] = {}

    def reset(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> FakePendingStep:
        for row in plan.removed_rows.tolist():
            del self._rows[row]
        sampling = {index for index, row in self._rows.items() if not row.num_prompt_tokens_left}
        for new in plan.added_rows:
            self.prompts.append(self._tokenizer.decode(new.token_ids.tolist(), skip_special_tokens=False))
            self._rows[new.row] = ScriptedRow(len(new.token_ids) - new.num_computed_tokens, self._tokens())
        for index, count in zip(plan.chunk_rows.tolist(), plan.chunk_num_tokens.tolist(), strict=True):
            self._rows[index].num_prompt_tokens_left -= count
            if not self._rows[index].num_prompt_tokens_left:
                sampling.add(index)
        token_ids = [next(self._rows[index].output) for index in sorted(sampling)]
        result = StepResult(plan.step_id, [1] * len(token_ids), token_ids)
        return FakePendingStep(result, self._gate, 0.0)

    def _tokens(self) -> Iterator[int]:
        yield from self._tokenizer.encode(self.scripts.pop(0), add_special_tokens=False).ids
        while True:
            yield self.info.eos_token_ids[0]
