"""What is asked of a server: random prompts of token ids, output lengths, and the times at which requests are due."""

import itertools
import math
import random
from dataclasses import dataclass

WORDS = (
    "time", "year", "people", "way", "day", "man", "woman", "life", "child", "world", "school", "state", "family",
    "group", "country", "hand", "part", "place", "week", "system", "question", "work", "number", "night", "point",
    "home", "water", "room", "mother", "money", "story", "month",
)  # fmt: skip
"""Words that are one token each, with the space before them, in the vocabularies of most models."""


@dataclass(frozen=True)
class Ask:
    """One request, and when it is due."""

    prompt: list[int] | str
    """Token ids, or the text of a chat's only message."""
    num_output_tokens: int
    temperature: float
    seed: int
    after_s: float
    """Seconds since the start of the run."""


@dataclass(frozen=True)
class Workload:
    """How requests are drawn. Lengths are drawn evenly between two numbers of tokens."""

    input_length: tuple[int, int]
    output_length: tuple[int, int]
    vocab_size: int
    """Token ids of prompts are below this number."""
    temperature: float
    seed: int
    is_chat: bool = False
    """Whether prompts are texts. Their lengths are numbers of words then."""

    def asks(self, count: int, rate: float, run: int) -> list[Ask]:
        """count requests of a Poisson process of `rate` a second, all at once if that is infinite. The prompts of every
        run differ, so that none is in the server's prefix cache.
        """
        # A text as a seed is hashed, so that neighbouring seeds and runs have nothing in common.
        rng = random.Random(f"{self.seed}/{run}")
        gaps = [0.0 if math.isinf(rate) else rng.expovariate(rate) for _ in range(count)]
        return [
            Ask(
                self._prompt(rng, rng.randint(*self.input_length)),
                rng.randint(*self.output_length),
                self.temperature,
                rng.getrandbits(31),
                after_s,
            )
            for after_s in itertools.accumulate(gaps)
        ]

    def _prompt(self, rng: random.Random, length: int) -> list[int] | str:
        if self.is_chat:
            return " ".join(rng.choices(WORDS, k=length))
        return [rng.randrange(self.vocab_size) for _ in range(length)]
