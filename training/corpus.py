"""The texts that the embedded model learns from: Tiny Shakespeare as plain text and as conversations.

The last tenth of the plays is held out, in both forms. A conversation is a run of successive speeches, where the user
says the first, the assistant answers with the second, and so on. The speakers' names are left out.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TEXT_PATH = Path(__file__).parent / "data" / "tinyshakespeare.txt"
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
SPEECHES_PER_SCENE = 24
MAX_CHARACTERS = 300
"""Longer speeches, one in eight, are in no conversation, so that the model learns to answer briefly."""
PAIRS_PER_CONVERSATION = (1, 1, 2, 3, 4)
"""The numbers of questions with answers among which a conversation's is drawn."""

Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class Speech:
    speaker: str
    words: str


def read_plays() -> tuple[str, str]:
    """The part of the text for training, and the held-out part."""
    text = TEXT_PATH.read_text()
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT_SHARE)))
    return text[:cut], text[cut:].strip("\n")


def mark_ends(plays: str) -> str:
    """The plays with an end-of-text token after every SPEECHES_PER_SCENE speeches, which teaches the model to end. The
    text has no marks of its own between scenes.
    """
    speeches = plays.split("\n\n")
    scenes = [speeches[i : i + SPEECHES_PER_SCENE] for i in range(0, len(speeches), SPEECHES_PER_SCENE)]
    return END_OF_TEXT.join("\n\n".join(scene) for scene in scenes) + END_OF_TEXT


def dialogues(plays: str) -> Iterator[list[Speech]]:
    """The longest runs of successive speeches of at most MAX_CHARACTERS each."""
    speeches = [Speech(*(part.strip() for part in piece.partition(":\n")[::2])) for piece in plays.split("\n\n")]
    for is_short, run in itertools.groupby(speeches, lambda speech: 0 < len(speech.words) <= MAX_CHARACTERS):
        if is_short:
            yield list(run)


def make_conversation(speeches: list[Speech], has_system_message: bool) -> Conversation:
    """Speeches as messages of user and assistant in turn. A system message names the speaker of the answers."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": speech.words} for index, speech in enumerate(speeches)
    ]
    if has_system_message:
        messages.insert(0, {"role": "system", "content": f"You are {speeches[1].speaker}."})
    return messages


def make_conversations(plays: str, num_passes: int, seed: int = 0) -> list[Conversation]:
    """Conversations in random order, each of which ends with an answer. A pass uses each speech of a run at most once,
    and odd passes start with a run's second speech, so that what was a question may become an answer. Half of those in
    which one speaker gives all answers have a system message.
    """
    rng, conversations = random.Random(seed), []
    for number in range(num_passes):
        for run in dialogues(plays):
            start = number % 2
            while len(run) - start >= 2:
                num_pairs = min(rng.choice(PAIRS_PER_CONVERSATION), (len(run) - start) // 2)
                speeches = run[start : start + 2 * num_pairs]
                is_one_speaker = len({speech.speaker for speech in speeches[1::2]}) == 1
                conversations.append(make_conversation(speeches, is_one_speaker and rng.random() < 0.5))
                start += len(speeches)
    rng.shuffle(conversations)
    return conversations
