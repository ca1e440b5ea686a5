"""The HTTP application: its routes, and what happens to every request."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tandem.calls import build
from tandem.v1 import inference_pb2
from tandem_gateway import chat, completions, responses
from tandem_gateway.connection import BoundedRequests, metadata_of, while_connected
from tandem_gateway.conversation import chat_of
from tandem_gateway.engine import Engine, Fields
from tandem_gateway.errors import ApiError, JsonAnswer, add_error_handlers, error_response
from tandem_gateway.metrics import CountedRequests, HttpMetrics
from tandem_gateway.page import read_page
from tandem_gateway.problems import name_params, refuse
from tandem_gateway.protocol import ChatBody, ChatOptions, CompletionBody, DetokenizeBody, TokenizeBody
from tandem_gateway.responses_protocol import ResponseBody
from tandem_gateway.traces import telemetry_of
from tandem_shared import VERSION
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.rpc.api_keys import KeyFile
from tandem_shared.tracing import SpanExport


def make_app(settings: GatewaySettings) -> FastAPI:
    """The application of one process. It connects to the scheduler once it serves. Raises ConfigError for a file of
    keys that is wrong.
    """
    keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
    traces = SpanExport(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(settings)
        try:
            yield
        finally:
            await app.state.engine.close()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    # The pages of documentation would load scripts from elsewhere. /openapi.json stays.
    # A path with a slash too many is unknown: the redirect that FastAPI would answer with is no answer of OpenAI's API.
    app = FastAPI(
        title="Tandem",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=JsonAnswer,
        telemetry=telemetry_of(traces),
    )
    app.state.metrics = HttpMetrics()
    add_error_handlers(app)
    app.add_middleware(
        BoundedRequests,
        keys=keys,
        max_body_bytes=settings.http_max_body_bytes,
        body_timeout_s=settings.http_body_timeout_s,
    )
    app.add_middleware(CountedRequests, metrics=app.state.metrics)
    _add_generation(app)
    _add_models(app)
    _add_tokens(app)
    _add_state(app)
    return app


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/completions", response_model=None)
    async def create_completion(request: Request, body: CompletionBody) -> Any:
        return await completions.create(_engine(request), request, body)

    @app.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: Request, body: ChatBody) -> Any:
        return await chat.create(_engine(request), request, body)

    @app.post("/v1/responses", response_model=None)
    async def create_response(request: Request, body: ResponseBody) -> Any:
        return await responses.create(_engine(request), request, body)


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [await _model(request)]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(request: Request, name: str) -> dict[str, Any]:
        model = await _model(request)
        if model["id"] != name:
            message = f"model: is not served; the served model is {model['id']!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model


async def _model(request: Request) -> dict[str, Any]:
    info = await _engine(request).model_info(metadata_of(request))
    # max_model_len is vLLM's.
    common = {"object": "model", "created": int(time.time()), "owned_by": "tandem"}
    return {"id": info.model, **common, "root": info.model, "max_model_len": info.max_model_len}


def _add_tokens(app: FastAPI) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request, body: TokenizeBody) -> dict[str, Any]:
        name_params(request, text="prompt")
        body.check_unknown()
        if (body.prompt is None) == (body.messages is None):
            raise refuse("prompt", "exactly one of prompt and messages must be given")
        prompt: Fields = {"text": body.prompt}
        if body.messages is not None:
            options = ChatOptions(
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            prompt = {"chat": chat_of(body.messages, body.tools or (), options)}
        fields = {"model": body.model, "add_special_tokens": body.add_special_tokens, **prompt}
        message = build(inference_pb2.TokenizeRequest, **fields)
        metadata = metadata_of(request)
        ids = await while_connected(request, _engine(request).tokenize(message, metadata))
        info = await _engine(request).model_info(metadata)
        return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(request: Request, body: DetokenizeBody) -> dict[str, Any]:
        name_params(request, token_ids="tokens")
        body.check_unknown()
        # As in vLLM, special tokens stay.
        fields = {"model": body.model, "token_ids": body.tokens, "skip_special_tokens": False}
        message = build(inference_pb2.DetokenizeRequest, **fields)
        work = _engine(request).detokenize(message, metadata_of(request))
        return {"prompt": await while_connected(request, work)}


def _add_state(app: FastAPI) -> None:
    @app.get("/health", response_model=None)
    async def health(request: Request) -> Any:
        """200 if a request would be run now, else 503. It needs no key, as the gRPC health service needs none."""
        if not await _engine(request).is_ready():
            return error_response(ApiError(503, "the scheduler has no worker, or is draining"))
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text = await request.app.state.metrics.text(_engine(request), metadata_of(request))
        return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    page = read_page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return page
