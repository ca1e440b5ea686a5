"""How many prompt tokens a step may have on this worker, so that no step delays the next token of all others for long.

A GPU takes the whole token budget in a fraction of a second, and the limit stays where it is. On a CPU a long prompt
in one step would take minutes. Knows durations, nothing of steps or clocks.
"""

TARGET_STEP_S = 1.0
MIN_TOKENS = 16
FIRST_TOKENS_ON_CPU = 256


class ChunkPace:
    """Follows the measured speed: down to what would have taken TARGET_STEP_S, up by doubling."""

    def __init__(self, max_tokens: int, device: str) -> None:
        """max_tokens is a step's token budget; device is the worker's, "cpu" or a GPU's name."""
        self._max_tokens = max_tokens
        self.limit = min(max_tokens, FIRST_TOKENS_ON_CPU) if device == "cpu" else max_tokens
        # How long the last step without prompt tokens took.
        self._decode_s = 0.0

    def note(self, num_prompt_tokens: int, seconds: float) -> None:
        """Takes the duration of a step with so many prompt tokens. The time that decoding alone takes is subtracted."""
        if not num_prompt_tokens:
            self._decode_s = seconds
            return
        seconds = max(seconds - self._decode_s, 0.0)
        if seconds > TARGET_STEP_S:
            self.limit = max(MIN_TOKENS, int(num_prompt_tokens * TARGET_STEP_S / seconds))
        elif seconds < TARGET_STEP_S / 2 and 2 * num_prompt_tokens >= self.limit:
            self.limit = min(2 * self.limit, self._max_tokens)
