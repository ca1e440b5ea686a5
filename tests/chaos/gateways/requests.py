"""The HTTP requests of the clients: every kind of answer that the gateway makes of a stream of tokens."""

from typing import Any

from tests.e2e.services import random_prompt

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
NUM_IDS = 1000
"""Prompts of token ids have ids below it, which are all in the vocabulary."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"lines": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 8}},
    "required": ["lines"],
    "additionalProperties": False,
}
THOUGHT_AND_CALLS = (
    "start: <think> WORDS </think> WORDS call call\n"
    'call: <tool_call> "{\\"name\\": \\"get_weather\\", \\"arguments\\": {\\"city\\": \\"" WORDS "\\"}}" </tool_call>\n'
    "WORDS: /([a-z]{1,9} ){8,12}/\n"
)
"""A grammar that makes a random model think, speak and call tools, in words of its own."""
NO_THOUGHT = {"enable_thinking": False}


def make_request(number: int, num_tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and body of one client's request. Kinds take turns and lengths differ. Every third one is unary."""
    path, body = KINDS[_kind(number)](number)
    length = num_tokens + 5 * (number % 20)
    limit = {"max_output_tokens": length} if path == RESPONSES else {"max_tokens": length}
    fields: dict[str, Any] = {"temperature": 0, "seed": number, **limit, **body}
    if number % 3 != 2:
        fields["stream"] = True
        if path != RESPONSES:
            fields["stream_options"] = {"include_usage": True}
    return path, fields


def num_sequences(path: str, body: dict[str, Any]) -> int:
    """The number of sequences that the scheduler has of the request at most."""
    is_list = path == COMPLETIONS and isinstance(body["prompt"][0], list)
    return int(body.get("n", 1)) * (len(body["prompt"]) if is_list else 1)


def _kind(number: int) -> str:
    # Each kind comes as a stream and as a unary call, as 3 does not divide the number of kinds.
    return list(KINDS)[number % len(KINDS)]


def _ids(number: int) -> list[int]:
    return random_prompt(5 + 3 * (number % 20), NUM_IDS, seed=number)


def _messages(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": f"You are ROMEO, number {number}."},
        {"role": "user", "content": "What hour is it? " * (number % 5 + 1)},
    ]


def _chat(number: int, **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHATS, {"messages": _messages(number), **fields}


KINDS: dict[str, Any] = {
    "completion": lambda n: (COMPLETIONS, {"prompt": _ids(n), "ignore_eos": True}),
    "completion with n and log-probabilities": lambda n: (
        COMPLETIONS,
        {"prompt": _ids(n), "n": 2, "temperature": 0.8, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True},
    ),
    "two prompts": lambda n: (COMPLETIONS, {"prompt": [_ids(n), _ids(n + 500)], "ignore_eos": True}),
    "chat": lambda n: _chat(n, ignore_eos=True),
    "chat with n and log-probabilities": lambda n: _chat(
        n, n=2, temperature=0.8, logprobs=True, top_logprobs=2, ignore_eos=True
    ),
    "chat with thought and tools": lambda n: _chat(
        n,
        tools=TOOLS,
        structured_outputs={"grammar": THOUGHT_AND_CALLS},
        chat_template_kwargs=NO_THOUGHT,
        temperature=0.8,
        max_tokens=400,
    ),
    "chat with a call that is required": lambda n: _chat(
        n, tools=TOOLS, tool_choice="required", chat_template_kwargs=NO_THOUGHT, temperature=0.8
    ),
    "chat with a JSON schema": lambda n: _chat(
        n,
        response_format={"type": "json_schema", "json_schema": {"name": "lines", "schema": SCHEMA}},
        chat_template_kwargs=NO_THOUGHT,
        temperature=0.8,
    ),
    "chat with penalties, biases and bad words": lambda n: _chat(
        n, presence_penalty=0.5, repetition_penalty=1.2, logit_bias={"9": 3.0}, bad_words=["the"], ignore_eos=True
    ),
    "response": lambda n: (RESPONSES, {"input": f"What hour is it, number {n}?", "ignore_eos": True}),
}
"""The kinds of requests, by the names that the results have."""
