"""Every field that OpenAI's client and vLLM's server know is one here, is refused, or is known to change nothing."""

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import ValidationError

from tandem_gateway.protocol import (
    UNSUPPORTED,
    WITHOUT_EFFECT,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from tandem_gateway.responses_protocol import ResponseBody
from tandem_shared.errors import InvalidRequest

VLLM_COMMON = """
    add_special_tokens allowed_token_ids bad_words cache_salt echo ec_transfer_params frequency_penalty ignore_eos
    include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids logprobs max_tokens min_p
    min_tokens model n presence_penalty priority prompt_logprobs repetition_detection repetition_penalty request_id
    response_format return_mm_kwargs return_token_ids return_token_offsets return_tokens_as_token_ids
    routed_experts_prompt_start seed session_id skip_special_tokens spaces_between_special_tokens stop stop_token_ids
    stream stream_interval stream_options structured_outputs temperature thinking_token_budget top_k top_p
    truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
"""
VLLM_COMPLETION = "prompt prompt_embeds suffix"
VLLM_CHAT = """
    add_generation_prompt chat_template chat_template_kwargs continue_final_message documents include_reasoning
    max_completion_tokens media_io_kwargs messages mm_processor_kwargs parallel_tool_calls reasoning_effort
    return_prompt_text tool_choice tools top_logprobs
"""
VLLM_RESPONSE = """
    background cache_salt enable_response_messages ignore_eos include include_stop_str_in_output input instructions
    logit_bias max_output_tokens max_tool_calls metadata mm_processor_kwargs model parallel_tool_calls
    previous_input_messages previous_response previous_response_id priority prompt prompt_cache_key reasoning
    repetition_penalty request_id seed service_tier skip_special_tokens stop store stream structured_outputs temperature
    text tool_choice tools top_k top_logprobs top_p truncation user vllm_xargs
"""
VLLM_TOKENIZE = """
    add_generation_prompt add_special_tokens chat_template chat_template_kwargs continue_final_message messages
    mm_processor_kwargs model prompt return_token_strs tools
"""
BODIES: list[tuple[type[Body], Any, str]] = [
    (CompletionBody, completion_create_params.CompletionCreateParamsBase, VLLM_COMMON + VLLM_COMPLETION),
    (ChatBody, chat_create_params.CompletionCreateParamsBase, VLLM_COMMON + VLLM_CHAT),
    (ResponseBody, response_create_params.ResponseCreateParamsBase, VLLM_RESPONSE),
    (TokenizeBody, None, VLLM_TOKENIZE),
]


@pytest.mark.parametrize(("body", "openai_params", "vllm_fields"), BODIES)
def test_no_field_of_openais_or_vllms_is_unknown(body: type[Body], openai_params: Any, vllm_fields: str) -> None:
    theirs = {*getattr(openai_params, "__annotations__", ()), *vllm_fields.split()}
    further = set(ChatBody.model_fields) if body is ResponseBody else set()
    assert theirs - set(body.model_fields) - further - UNSUPPORTED.keys() - WITHOUT_EFFECT == set()


MANY = 1000
WRONG: list[Any] = [
    [None] * MANY,
    [[None] * MANY] * MANY,
    [{"role": "user", "content": [None] * MANY}] * MANY,
    [{"role": "assistant", "tool_calls": [None] * MANY}] * MANY,
    [{"type": "reasoning", "content": [None] * MANY, "summary": [None] * MANY}] * MANY,
    [{"type": "function_call_output", "call_id": "a", "output": [None] * MANY}] * MANY,
    {str(number): None for number in range(MANY)},
    {"choice": [None] * MANY},
]


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, ResponseBody, TokenizeBody, DetokenizeBody])
def test_what_is_wrong_many_times_is_not_told_many_times(body: type[Body]) -> None:
    """A body of a few megabytes kept the gateway's process from all else for half a minute."""
    for name in body.model_fields:
        for value in WRONG:
            try:
                body.model_validate({name: value})
            except ValidationError as error:
                assert error.error_count() < 30, (name, value)


@pytest.mark.parametrize(
    ("field", "nothing", "something"),
    [
        # What vLLM's own defaults are asks for nothing, in whichever way JSON writes a number.
        ("length_penalty", 1.0, 2.0),
        ("length_penalty", 1, True),
        ("thinking_token_budget", -1, 100),
        ("echo", False, 0),
        ("return_token_ids", None, True),
    ],
)
def test_what_is_not_supported_may_be_sent_if_it_asks_for_nothing(field: str, nothing: Any, something: Any) -> None:
    ChatBody.model_validate({"messages": [], field: nothing}).check_unknown()
    with pytest.raises(InvalidRequest, match=field):
        ChatBody.model_validate({"messages": [], field: something}).check_unknown()


def test_structured_outputs_may_have_all_fields_of_vllms_class() -> None:
    sent = {
        "json": None, "regex": "a", "choice": None, "grammar": None, "json_object": None, "structural_tag": None,
        "disable_any_whitespace": False, "disable_additional_properties": False, "whitespace_pattern": None,
    }  # fmt: skip
    body = CompletionBody.model_validate({"prompt": "a", "structured_outputs": sent})
    assert body.structured_outputs is not None and body.structured_outputs.regex == "a"
