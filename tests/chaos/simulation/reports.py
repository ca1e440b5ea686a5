"""Checks that the log-probabilities of each prompt leave the core once, in order, and before the first token."""

from typing import TYPE_CHECKING

from tandem_scheduler.core.types import StepOutputs
from tests.chaos.simulation.wishes import VOCAB_SIZE, sampling_of
from tests.support.builders import create_request, plain
from tests.support.fake_worker import expected_prompt_logprobs

if TYPE_CHECKING:
    from tests.chaos.simulation.world import World


class PromptReports:
    """What was reported so far of the prompts of a world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        # The next position of each sequence with reports, by its id.
        self._next: dict[int, int] = {}

    def take(self, outputs: StepOutputs) -> None:
        for sequence_id, report in outputs.prompt_logprobs:
            call, choice = self._world.sequences[sequence_id]
            message = call.asked.message
            sampling = sampling_of(message, choice)
            if sampling.num_prompt_logprobs is None:
                self._world.fail(f"request {call.asked.serial}: a report on a prompt that nobody asked for")
                continue
            position = self._next.get(sequence_id, 1)
            end = position + len(report.logprobs)
            self._next[sequence_id] = end
            request = create_request(0, message.prompt.token_ids.ids, sampling=sampling)
            truth = expected_prompt_logprobs(request, vocab_size=VOCAB_SIZE)
            got = plain((report.first_position, report.logprobs, report.ranks, report.top_token_ids))
            tops = slice((position - 1) * truth.num_top, (end - 1) * truth.num_top)
            positions = slice(position - 1, end - 1)
            right = plain((position, truth.logprobs[positions], truth.ranks[positions], truth.top_token_ids[tops]))
            if got != right:
                self._world.fail(f"request {call.asked.serial}: prompt reported as {got}, not {right}")
            self._world.count("prompt reported in parts" if position > 1 else "prompt reported")
        for sequence_id in outputs.sequence_ids:
            call, choice = self._world.sequences[sequence_id]
            num_due = len(call.asked.message.prompt.token_ids.ids) - 1
            asks = sampling_of(call.asked.message, choice).num_prompt_logprobs is not None
            if asks and self._next.get(sequence_id, 1) != num_due + 1:
                self._world.fail(f"request {call.asked.serial}: a token comes before the prompt is reported")
