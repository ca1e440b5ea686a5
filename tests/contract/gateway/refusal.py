"""What both tests of the gateway use."""

from collections.abc import Awaitable
from typing import Any

import openai
import pytest

PROMPT = "ROMEO:\n"


async def refusal(call: Awaitable[Any]) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await call
    return caught.value
