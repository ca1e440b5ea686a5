"""Hostile calls of every RPC: the messages and the metadata that are sent. Makes no calls itself."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message
from hypothesis import strategies as st
from smg_grpc_proto import vllm_engine_pb2

from tandem.internal.v1 import engine_pb2, worker_pb2
from tandem.v1 import control_pb2, inference_pb2
from tandem_shared.structured_output import json_schema_grammar
from tests.chaos.messages.chats import chat_request
from tests.chaos.messages.hostile_bytes import draw, hostile, swept
from tests.chaos.messages.hostile_sessions import RPC as EXECUTE_STEPS
from tests.chaos.messages.statuses import ATTACH, SERVICES, request_class
from tests.e2e.services import generate_request

SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}, "required": ["name"]}'
FOR_SMG = "/vllm.grpc.engine.VllmEngine/Generate"
ABORT_FOR_SMG = "/vllm.grpc.engine.VllmEngine/Abort"
STREAM = "/tandem.v1.InferenceService/GenerateStream"


@dataclass(frozen=True)
class Case:
    """A call to make. kind: what is hostile about it."""

    rpc: str
    kind: str
    payloads: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()


metadata = st.tuples(
    st.sampled_from(["tandem-max-reply-bytes", "x-custom", "x-custom-bin", "tandem-session-secret-bin", "user-agent"]),
    st.sampled_from(["", "0", "-1", "1", "8388608", "9" * 40, "1e9", " ", "~" * 3000]),
).map(lambda pair: (pair[0], pair[1].encode() if pair[0].endswith("-bin") else pair[1]))


Makers = dict[type[Message], list[Callable[[], Message]]]


def right_messages(opening: worker_pb2.OpenSession, fingerprint: str) -> Makers:
    """Valid messages of each request type that has fields. Hostile ones are made from them."""

    def generate() -> inference_pb2.GenerateStreamRequest:
        request = generate_request([5, 6, 7], 4, temperature=0.8, seed=3)
        request.stopping.stop_strings.append("never")
        request.stopping.stop_token_ids.append(9)
        request.sampling.min_p = 0.1
        request.sampling.presence_penalty = 0.5
        request.sampling.repetition_penalty = 1.1
        request.sampling.logit_bias[8] = 1.5
        request.sampling.bad_words.append("king")
        request.stopping.min_tokens = 2
        request.output.num_logprobs = 2
        request.output.num_prompt_logprobs = 1
        request.output.logprob_token_ids.append(7)
        request.num_choices = 2
        request.cache_salt = "salt"
        request.priority = 1
        return request

    def generate_form() -> inference_pb2.GenerateStreamRequest:
        request = generate_request([5, 6, 7], 8, temperature=0.8, seed=3)
        request.structured_output.json_schema = SCHEMA
        request.structured_output.start_after_token_id = 9
        return request

    def submit() -> engine_pb2.AttachRequest:
        request = engine_pb2.SubmitRequest(
            request_id="attached",
            first_handle=1,
            num_choices=2,
            prompt_token_ids=b"\1\0\0\0\2\0\0\0",
            max_tokens=3,
            sampling=worker_pb2.RowSampling(
                temperature=0.5,
                top_p=1.0,
                frequency_penalty=0.5,
                repetition_penalty=1.1,
                seed=1,
                min_tokens=1,
                num_logprobs=1,
                num_prompt_logprobs=1,
            ),
            lists=worker_pb2.SamplingLists(
                stop_token_ids=b"\x09\0\0\0",
                bias_token_ids=b"\x07\0\0\0\x08\0\0\0",
                biases=[1.5, -1.5],
                bad_word_token_ids=b"\x05\0\0\0\x06\0\0\0\x04\0\0\0",
                bad_word_lengths=[2, 1],
                logprob_token_ids=b"\x01\0\0\0",
            ),
            stop_token_ids=[9],
            fingerprint=fingerprint,
        )
        return engine_pb2.AttachRequest(submit=request)

    def submit_form() -> engine_pb2.AttachRequest:
        request = submit()
        request.submit.lists.grammar.text = json_schema_grammar(SCHEMA)
        request.submit.lists.grammar.start_after_token_id = 9
        return request

    def generate_for_smg() -> Message:
        sampling = vllm_engine_pb2.SamplingParams(
            temperature=0.8, top_k=5, max_tokens=4, min_tokens=1, stop=["never"], stop_token_ids=[9], n=2, logprobs=2,
            seed=-3, logit_bias={8: 1.5},
        )  # fmt: skip
        prompt = vllm_engine_pb2.TokenizedInput(original_text="text", input_ids=[5, 6, 7])
        request: Message = vllm_engine_pb2.GenerateRequest(tokenized=prompt, sampling_params=sampling, stream=True)
        return request

    def generate_form_for_smg() -> Message:
        sampling = vllm_engine_pb2.SamplingParams(json_schema=SCHEMA, max_tokens=8, prompt_logprobs=1)
        request: Message = vllm_engine_pb2.GenerateRequest(text="Hello", sampling_params=sampling)
        return request

    stop = engine_pb2.AttachRequest(stop=engine_pb2.StopSequence(handle=1, num_output_tokens=2))
    close = engine_pb2.AttachRequest(close=engine_pb2.CloseRequest(first_handle=1))
    alive = engine_pb2.AttachRequest(alive=engine_pb2.Alive(process_id=1))
    detokenize = inference_pb2.DetokenizeRequest(token_ids=[1, 2, 3], skip_special_tokens=False)
    return {
        inference_pb2.GenerateStreamRequest: [generate, generate_form, chat_request],
        inference_pb2.GenerateRequest: [
            lambda: inference_pb2.GenerateRequest.FromString(generate().SerializeToString()),
            lambda: inference_pb2.GenerateRequest.FromString(generate_form().SerializeToString()),
            lambda: inference_pb2.GenerateRequest.FromString(chat_request().SerializeToString()),
        ],
        inference_pb2.TokenizeRequest: [
            lambda: inference_pb2.TokenizeRequest(text="Hello, world <|im_end|>"),
            lambda: inference_pb2.TokenizeRequest(chat=chat_request().prompt.chat),
        ],
        inference_pb2.DetokenizeRequest: [lambda: copy.deepcopy(detokenize)],
        vllm_engine_pb2.GenerateRequest: [generate_for_smg, generate_form_for_smg],
        vllm_engine_pb2.AbortRequest: [lambda: vllm_engine_pb2.AbortRequest(request_ids=["nobody", "attached"])],
        control_pb2.AbortRequest: [lambda: control_pb2.AbortRequest(request_id="nobody")],
        engine_pb2.AttachRequest: [
            submit, submit_form, *(lambda m=m: copy.deepcopy(m) for m in (stop, close, alive)),
        ],
        worker_pb2.ExecuteStepsRequest: [lambda: worker_pb2.ExecuteStepsRequest(open=opening)],
    }  # fmt: skip


def cases_of(rpc: str, makers: Makers) -> st.SearchStrategy[Case]:
    request = request_class(rpc)
    own = makers.get(request, [request])
    message = st.one_of([hostile(make) for make in own])
    one = message.map(lambda drawn: Case(rpc, drawn[0], (drawn[1],)))
    if SERVICES[rpc[1:].partition("/")[0]].methods_by_name[rpc.rpartition("/")[2]].client_streaming:
        right = st.sampled_from([make().SerializeToString() for make in own])
        several = st.lists(message.map(lambda drawn: drawn[1]) | right, max_size=6)
        one = one | several.map(lambda payloads: Case(rpc, "stream", tuple(payloads)))
    plain = own[0]().SerializeToString()
    compressible = (b"\x7a\x80\x10" + b"z" * 2048,)
    odd = st.one_of(
        st.just(Case(rpc, "no message", ())),
        st.just(Case(rpc, "two messages", (plain, plain))),
        st.just(Case(rpc, "compressed", compressible)),
        st.just(Case(rpc, "huge metadata", (plain,), (("x-huge", "h" * 20_000),))),
        st.sampled_from(["x", "/", "/x", "%00"]).map(lambda tail: Case(f"{rpc}{tail}", "unknown method", (plain,))),
        st.lists(metadata, min_size=1, max_size=3).map(lambda pairs: Case(rpc, "metadata", (plain,), tuple(pairs))),
    )
    return st.integers(0, 19).flatmap(lambda number: one if number else odd)


def draw_cases(rpcs: Sequence[str], makers: Makers, count: int, seed: int) -> list[Case]:
    """`count` cases in random order. RPCs have equal shares, but those of inference, Attach and ExecuteSteps five times
    as much. Requests to GenerateStream and Attach with one field at a limit are always among them, and right ones to
    the RPCs that SMG calls.
    """
    at_limits = [
        Case(rpc, "at a limit", (payload,))
        for rpc, request in ((STREAM, inference_pb2.GenerateStreamRequest), (ATTACH, engine_pb2.AttachRequest))
        for _, payload in swept(makers[request][0])
        if rpc in rpcs
    ]
    at_limits += [
        *(Case(FOR_SMG, "right", (make().SerializeToString(),)) for make in makers[vllm_engine_pb2.GenerateRequest]),
        *(Case(ABORT_FOR_SMG, "right", (make().SerializeToString(),)) for make in makers[vllm_engine_pb2.AbortRequest]),
        # A field that comes very often.
        Case(FOR_SMG, "at a limit", (vllm_engine_pb2.GenerateRequest(stream=True).SerializeToString() * 450_000,)),
    ]
    count -= len(at_limits)
    weights = {rpc: 5 if "Inference" in rpc or rpc in (ATTACH, EXECUTE_STEPS, FOR_SMG) else 1 for rpc in rpcs}
    unit = count / sum(weights.values())
    cases = [
        case
        for index, rpc in enumerate(rpcs)
        for case in draw(cases_of(rpc, makers), max(1, math.ceil(unit * weights[rpc])), 1000 * seed + index)
    ]
    random.Random(seed).shuffle(cases)
    cases = cases[:count] + at_limits
    random.Random(seed).shuffle(cases)
    return cases
