"""Reads the prompt of a request, whether text, token ids or a conversation."""

import numpy as np

from tandem_scheduler.front_end.chat.chat_renderer import ChatRenderer
from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.list_checks import IDS_AT_ONCE, check_token_ids
from tandem_scheduler.front_end.text.encoder import INLINE_CHARACTERS, TextEncoder
from tandem_scheduler.front_end.violations import Violations
from tandem_shared.errors import InvalidRequest
from tandem_shared.step_plan import Int32Array, WorkerInfo

NO_IDS: Int32Array = np.empty(0, np.int32)


def is_long(params: GenerationParams) -> bool:
    """Whether reading the prompt costs too much for a request that is already known to be wrong."""
    num_characters, num_ids = len(params.prompt_text or ""), len(params.prompt_token_ids or ())
    return params.prompt_chat is not None or num_characters > INLINE_CHARACTERS or num_ids > IDS_AT_ONCE


async def read_prompt(
    params: GenerationParams,
    encoder: TextEncoder,
    chats: ChatRenderer,
    worker: WorkerInfo,
    violations: Violations,
) -> Int32Array:
    """The prompt's ids; NO_IDS if it is wrong."""
    text, token_ids, chat, limit = params.prompt_text, params.prompt_token_ids, params.prompt_chat, worker.max_model_len
    given = [name for name, value in (("text", text), ("token_ids", token_ids), ("chat", chat)) if value is not None]
    description = f"must have exactly one of text, token_ids and chat, has {' and '.join(given) or 'none'}"
    if not violations.check(len(given) == 1, "prompt", description):
        return NO_IDS
    field = f"prompt.{given[0]}"
    try:
        if token_ids is not None:
            prompt = await check_token_ids(field, token_ids, limit, worker.vocab_size)
        elif chat is not None:
            # The template writes the special tokens itself.
            rendered = await chats.render(field, chat)
            prompt = await encoder.encode(field, rendered, max_tokens=limit, add_special_tokens=False)
        else:
            assert text is not None
            prompt = await encoder.encode(field, text, max_tokens=limit)
    except InvalidRequest as error:
        violations.add(*error.violations)
        return NO_IDS
    violations.check(len(prompt) > 0, field, "is empty")
    violations.check(
        len(prompt) < limit, field, f"{len(prompt)} tokens leave no room for output in the context of {limit}"
    )
    return prompt
