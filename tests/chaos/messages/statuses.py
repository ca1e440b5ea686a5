"""The statuses that each RPC may answer to any input, and what it must answer to some inputs. The source is the
comments of the protos, of gRPC's own protos (health, reflection, channelz) and docs/deployment.md, not observed
behaviour.

UNKNOWN and INTERNAL are in no list, since they would be the server's own faults.
"""

import math
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from smg_grpc_proto import vllm_engine_pb2

from tandem.internal.v1 import engine_pb2, worker_pb2
from tandem.v1 import control_pb2, inference_pb2
from tandem_shared.rpc import reflection
from tests.chaos.messages.chats import may_be_right

FILES = (
    inference_pb2,
    control_pb2,
    engine_pb2,
    worker_pb2,
    health_pb2,
    reflection,
    reflection_pb2,
    channelz_pb2,
    vllm_engine_pb2,
)
SERVICES: dict[str, ServiceDescriptor] = {
    service.full_name: service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()
}

LEFT_OUT = {
    f"/vllm.grpc.engine.VllmEngine/{method}" for method in ("Embed", "StartProfile", "StopProfile", "SubscribeKvEvents")
}
"""RPCs that Tandem does not have."""

ALWAYS = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED}
"""OK; bytes that are no message or break a rule; a message that is too large, or too many open calls."""
DEADLINE = {StatusCode.DEADLINE_EXCEEDED}
"""The caller's own deadline, for answers that may take long."""
NOT_FOUND = {StatusCode.NOT_FOUND}

TABLE: dict[str, set[StatusCode]] = {
    "/tandem.v1.InferenceService/Generate": ALWAYS | DEADLINE | {StatusCode.ALREADY_EXISTS},
    "/tandem.v1.InferenceService/GenerateStream": ALWAYS | DEADLINE | {StatusCode.ALREADY_EXISTS},
    "/tandem.v1.InferenceService/Tokenize": ALWAYS,
    "/tandem.v1.InferenceService/Detokenize": ALWAYS,
    "/tandem.v1.InferenceService/GetModelInfo": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/Generate": ALWAYS | DEADLINE | {StatusCode.ALREADY_EXISTS},
    "/vllm.grpc.engine.VllmEngine/HealthCheck": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/FlushCache": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/Abort": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/GetModelInfo": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/GetServerInfo": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/GetLoads": ALWAYS,
    "/vllm.grpc.engine.VllmEngine/GetTokenizer": ALWAYS,
    "/tandem.v1.ControlService/GetServerInfo": ALWAYS,
    "/tandem.v1.ControlService/GetLoad": ALWAYS,
    "/tandem.v1.ControlService/GetMetrics": ALWAYS,
    "/tandem.v1.ControlService/Abort": ALWAYS | NOT_FOUND,
    "/tandem.v1.ControlService/Drain": ALWAYS | DEADLINE | {StatusCode.ABORTED},
    "/tandem.v1.ControlService/Undrain": ALWAYS,
    "/tandem.v1.ControlService/ResetPrefixCache": ALWAYS,
    "/tandem.internal.v1.EngineService/Attach": ALWAYS | DEADLINE,
    "/tandem.internal.v1.WorkerService/GetWorkerInfo": ALWAYS,
    "/tandem.internal.v1.WorkerService/ExecuteSteps": ALWAYS | {StatusCode.FAILED_PRECONDITION, StatusCode.ABORTED},
    "/grpc.health.v1.Health/Check": ALWAYS | NOT_FOUND,
    "/grpc.health.v1.Health/Watch": ALWAYS | DEADLINE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": ALWAYS,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ALWAYS,
    "/grpc.channelz.v1.Channelz/GetTopChannels": ALWAYS,
    "/grpc.channelz.v1.Channelz/GetServers": ALWAYS,
    "/grpc.channelz.v1.Channelz/GetServer": ALWAYS | NOT_FOUND,
    "/grpc.channelz.v1.Channelz/GetServerSockets": ALWAYS | NOT_FOUND,
    "/grpc.channelz.v1.Channelz/GetChannel": ALWAYS | NOT_FOUND,
    "/grpc.channelz.v1.Channelz/GetSubchannel": ALWAYS | NOT_FOUND,
    "/grpc.channelz.v1.Channelz/GetSocket": ALWAYS | NOT_FOUND,
}
OF_KIND: dict[str, set[StatusCode]] = {
    "compressed": {StatusCode.UNIMPLEMENTED},
    "unknown method": {StatusCode.UNIMPLEMENTED},
    "huge metadata": {StatusCode.RESOURCE_EXHAUSTED},
}
"""Calls that are wrong for any RPC, except that the socket between the scheduler's processes takes compressed ones."""

ATTACH = "/tandem.internal.v1.EngineService/Attach"

MAX_SMALL_BYTES = 4096
"""The largest message that may not be refused for its size alone."""

REFUSED = {StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED}

AnyGenerateRequest = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest


def request_class(rpc: str) -> Any:
    service, _, method = rpc[1:].partition("/")
    return GetMessageClass(SERVICES[service].methods_by_name[method].input_type)


def allowed(rpc: str, kind: str, payload: bytes | None, model: inference_pb2.Usage | Any) -> set[StatusCode]:
    """The statuses of a call with this kind of fault and this first message. model: GetModelInfo's response."""
    if kind in OF_KIND and not (kind == "compressed" and rpc == ATTACH):
        return OF_KIND[kind] | (TABLE.get(rpc, set()) & DEADLINE)
    if payload is None or kind == "metadata":
        return TABLE[rpc]
    try:
        message = request_class(rpc).FromString(payload)
    except DecodeError:
        return REFUSED
    must_refuse = refusal_of(message, model)
    if must_refuse is None or (len(payload) > MAX_SMALL_BYTES and not must_refuse):
        return TABLE[rpc]
    return REFUSED if must_refuse else TABLE[rpc] - {StatusCode.INVALID_ARGUMENT}


def refusal_of(message: Message, model: Any) -> bool | None:
    """Whether the proto's comments say that the message is INVALID_ARGUMENT; None if they say neither."""
    if isinstance(message, AnyGenerateRequest):
        return _refusal_of_generate(message, model)
    if isinstance(message, inference_pb2.DetokenizeRequest):
        is_bad = message.model not in ("", model.model) or any(each >= model.vocab_size for each in message.token_ids)
        return is_bad or (False if len(message.token_ids) < 1000 else None)
    if isinstance(message, control_pb2.AbortRequest):
        return not _is_request_id(message.request_id)
    return None


def _refusal_of_generate(request: AnyGenerateRequest, model: Any) -> bool | None:
    prompt, sampling, stopping, output = request.prompt, request.sampling, request.stopping, request.output
    ids, stops = prompt.token_ids.ids, stopping.stop_strings
    has_ids, has_chat = prompt.HasField("token_ids"), prompt.HasField("chat")
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else model.max_model_len - len(ids)
    is_right = (
        prompt.HasField("text") + has_ids + has_chat == 1
        and (not has_ids or (0 < len(ids) < model.max_model_len and max(ids) < model.vocab_size))
        and (has_ids or has_chat or prompt.text != "")
        and (not has_chat or may_be_right(prompt.chat))
        and 0 <= sampling.temperature < math.inf
        and (not sampling.HasField("top_p") or 0 < sampling.top_p <= 1)
        and 0 <= sampling.min_p <= 1
        and (not stopping.HasField("max_tokens") or 1 <= stopping.max_tokens <= model.max_model_len - len(ids))
        and stopping.min_tokens <= max_tokens
        and _are_lists_right(request, model)
        and (not request.HasField("structured_output") or _may_be_right(request.structured_output, model))
        and -2 <= sampling.presence_penalty <= 2
        and -2 <= sampling.frequency_penalty <= 2
        and (not sampling.HasField("repetition_penalty") or 0 < sampling.repetition_penalty < math.inf)
        and len(stops) <= 64
        and all(1 <= len(stop) <= 1024 for stop in stops)
        and sum(map(len, stops)) <= 8192
        and len(stopping.stop_token_ids) <= 128
        and all(each < model.vocab_size for each in stopping.stop_token_ids)
        and output.num_logprobs <= 20
        and output.num_prompt_logprobs <= 20
        and (not request.HasField("num_choices") or 1 <= request.num_choices <= 64)
        and _is_request_id(request.request_id)
        and len(request.cache_salt.encode()) <= 1024
        and request.model in ("", model.model)
    )
    if not is_right:
        return True
    # The number of tokens in a text or a conversation is not known here, nor the size of a unary reply, nor whether a
    # grammar is right, nor whether a token is left where only some are allowed.
    is_known = has_ids and all(len(word.encode()) < 32 for word in sampling.bad_words)
    is_bounded = request.HasField("structured_output") or bool(sampling.allowed_token_ids)
    is_stream = isinstance(request, inference_pb2.GenerateStreamRequest)
    return False if is_known and is_stream and not is_bounded else None


def _are_lists_right(request: AnyGenerateRequest, model: Any) -> bool:
    sampling, requested = request.sampling, request.output.logprob_token_ids
    ids = [*sampling.logit_bias, *sampling.allowed_token_ids, *requested]
    return (
        all(token_id < model.vocab_size for token_id in ids)
        and len(sampling.logit_bias) <= 1024
        and all(-100 <= bias <= 100 for bias in sampling.logit_bias.values())
        and len(sampling.allowed_token_ids) <= 16384
        and len(sampling.bad_words) <= 128
        and all(1 <= len(word) <= 256 for word in sampling.bad_words)
        and len(requested) == len(set(requested)) <= 20
    )


def _may_be_right(form: inference_pb2.StructuredOutput, model: Any) -> bool:
    """Whether a form is right as far as can be said without a look into its text."""
    kinds = [form.HasField(name) for name in ("json_schema", "regex", "choice", "lark")]
    texts = form.choice.texts
    return (
        sum(kinds) + form.json_object == 1
        and (not form.HasField("choice") or (1 <= len(texts) <= 1024 and all(texts)))
        and form.start_after_token_id < model.vocab_size
        and max(map(len, [form.json_schema, form.regex, form.lark, *texts])) <= 131072
    )


def _is_request_id(text: str) -> bool:
    return len(text.encode()) <= 256 and text.isprintable()
