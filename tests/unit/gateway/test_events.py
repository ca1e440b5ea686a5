"""Events whose surroundings are made once are the events that would be made each time."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem_gateway.events import TextEvents, event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, TEXTS, st.lists(TEXTS))
def test_an_event_is_what_it_would_be_if_it_were_made_alone(model: str, request_id: str, texts: list[str]) -> None:
    def data(text: str) -> dict[str, Any]:
        return {"id": request_id, "model": model, "choices": [{"index": 0, "delta": {"content": text}, "end": None}]}

    events = TextEvents(lambda text: event(data(text)))
    for text in [*texts, model]:
        made = events.of(text)
        assert made == event(data(text))
        assert made.startswith(b"data: ") and made.endswith(b"\n\n") and made.count(b"\n") == 2
        assert json.loads(made[6:]) == data(text)
