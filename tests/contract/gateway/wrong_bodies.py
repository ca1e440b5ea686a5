"""Bodies that the gateway refuses."""

from typing import Any

from tests.contract.gateway.refusal import PROMPT
from tests.support.chats import USER

TEXT_FORMAT = {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}
JSON_FORMAT = {"type": "json_schema", "json_schema": TEXT_FORMAT}
FUNCTION = {"name": "f", "arguments": "{"}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
IMAGE = {"type": "input_image", "image_url": "x"}

WRONG_BODIES: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", {"prompt": PROMPT, "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": "many"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 10**6, "stream": True}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"10000": 1}}, 400, "logit_bias[10000]"),
    ("/v1/completions", {"prompt": PROMPT, "logprobs": 50}, 400, "logprobs"),
    ("/v1/completions", {"prompt": PROMPT, "n": 65}, 400, "n"),
    ("/v1/completions", {"prompt": PROMPT, "suffix": "a"}, 400, "suffix"),
    ("/v1/completions", {"prompt": [10**6], "echo": True}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": [USER], "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": PROMPT, "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("/v1/completions", {"prompt": PROMPT, "guided_regex": "("}, 400, "guided_regex"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", [], 400, None),
    ("/v1/completions", {"prompt": {}}, 400, "prompt"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt[0]"),
    ("/v1/completions", {"prompt": "a", "model": 5}, 400, "model"),
    ("/v1/completions", {"prompt": "a", "response_format": JSON_FORMAT}, 400, "response_format"),
    ("/v1/chat/completions", {"messages": [USER], "logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [USER], "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ("/v1/chat/completions", {"messages": [USER], "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/chat/completions", {"messages": [USER], "tool_choice": {"type": "custom"}}, 400, "tool_choice.type"),
    ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [USER, CALL]}, 400, "messages[1].tool_calls[0].function.arguments"),
    ("/v1/responses", {"input": []}, 400, "input"),
    ("/v1/responses", {"input": "a", "text": {"format": TEXT_FORMAT}}, 400, "text.format"),
    ("/v1/responses", {"input": [{"role": "user", "content": [IMAGE]}]}, 400, "input[0].content[0]"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [USER], "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [USER], "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"messages": [USER], "modalities": ["audio"]}, 400, "modalities"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0]",
    ),
    ("/v1/responses", {"input": [{"type": "image_generation_call"}]}, 400, "input[0]"),
    ("/v1/responses", {"input": "a", "n": 2}, 400, "n"),
    ("/v1/responses", {"input": "a", "seed": "x"}, 400, "seed"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens"),
    ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"]}, 400, "include"),
    ("/v1/responses", {"input": "a", "metadata": {"a": float("nan")}}, 400, None),
    ("/v1/responses", {"input": "a", "metadata": {"a": float("inf")}, "stream": True}, 400, None),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"\ud800": "x"}}, 400, None),
    ("/tokenize", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": "a", "guided_choice": ["\ud800"]}, 400, "guided_choice"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {}}, 400, "structured_outputs"),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"xml": "a"}}, 400, "structured_outputs.xml"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"5": "much"}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": [None] * 100}, 400, "prompt[0]"),
    ("/v1/completions", {"prompt": [[1]] * 257}, 400, "prompt"),
    ("/v1/chat/completions", {"messages": [USER] * 20_000}, 400, "messages"),
    ("/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "a"}] * 20_000}, 400, "tools"),
    (
        "/v1/chat/completions",
        {"messages": [USER], "logit_bias": {str(n): None for n in range(9999)}},
        400,
        "logit_bias",
    ),
    ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
    ("/tokenize", {"prompt": "a", "model": "\ud800"}, 404, "model"),
    ("/tokenize", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ("/detokenize", {"tokens": [1], "model": "\ud800"}, 404, "model"),
    ("/detokenize", {"tokens": [10**7]}, 400, "tokens"),
    ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
    ("/v1/nothing", {}, 404, None),
]
"""Path, body, status, and the param of the error, None if it is not compared."""
