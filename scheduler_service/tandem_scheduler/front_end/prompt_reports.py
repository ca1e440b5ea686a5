"""The log-probabilities of a prompt's tokens, from when the engine reports them until the reader takes them."""

from array import array

from tandem_scheduler.front_end.logprob_buffer import LogprobBuffer, logprob_bytes
from tandem_shared.step_plan import Int32Array, PromptLogprobs


class PromptReports:
    """The reports of one prompt. They come in the order of their positions, from 1 on."""

    def __init__(self, prompt_token_ids: Int32Array, num_logprobs: int) -> None:
        self._token_ids = prompt_token_ids
        self._bytes_per_token = logprob_bytes(num_logprobs, 0)
        self._unread = LogprobBuffer()
        self._next_position = 1

    def __len__(self) -> int:
        """How many reports were not taken yet."""
        return len(self._unread)

    @property
    def num_unread_bytes(self) -> int:
        return len(self) * self._bytes_per_token

    def add(self, report: PromptLogprobs) -> None:
        expected = self._next_position + len(self)
        assert report.first_position == expected, f"position {report.first_position} follows {expected - 1}"
        self._unread.extend(report)

    def take(self, max_tokens: int) -> tuple["array[int]", LogprobBuffer]:
        """The tokens of the first max_tokens reports, and the reports."""
        logprobs = self._unread.take(max_tokens)
        start = self._next_position
        self._next_position += len(logprobs)
        return array("i", self._token_ids[start : self._next_position].tolist()), logprobs

    def drop(self) -> None:
        """Forgets the reports that were not taken. The caller adds no others."""
        self._unread = LogprobBuffer()
