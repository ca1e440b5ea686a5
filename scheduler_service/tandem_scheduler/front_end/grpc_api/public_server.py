"""The public gRPC server of one front end: tokenizer, front end and servicers. It is the same in the step loop's
process and in a process of its own, and knows neither.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from tandem.v1 import control_pb2_grpc
from tandem_scheduler.engine_interface import Engine, EngineListener
from tandem_scheduler.front_end.chat.chat_renderer import ChatRenderer
from tandem_scheduler.front_end.chat.template_folder import read_chat_templates
from tandem_scheduler.front_end.front_end import FrontEnd
from tandem_scheduler.front_end.grammar_check import GrammarChecker
from tandem_scheduler.front_end.grpc_api.inference_servicer import SERVICE_NAME, InferenceServicer
from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.config import SchedulerSettings, model_name
from tandem_shared.errors import TandemError
from tandem_shared.rpc.api_keys import KeyFile, Scope
from tandem_shared.rpc.authorizer import Authorizer
from tandem_shared.rpc.credentials import server_credentials
from tandem_shared.rpc.grpc_options import is_loopback
from tandem_shared.rpc.interceptors import load_interceptors
from tandem_shared.rpc.server import Register, Server

CONTROL_SERVICE = "tandem.v1.ControlService"

NUM_OTHER_CALLS = 64
"""How many calls may be open beside those that the engine has waiting or running."""

GENERATING = ("Generate", "GenerateStream")
"""The methods, of whatever service, whose calls are requests."""

STOP_GRACE_S = 1.0
"""How long calls whose requests have ended may take to send their last messages."""


class PublicServer:
    def __init__(
        self,
        settings: SchedulerSettings,
        tokenizer_folder: Path,
        attach: Callable[[EngineListener], Engine],
        control: control_pb2_grpc.ControlServiceServicer,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        shares_port: bool = False,
        ends_process: bool = False,
    ) -> None:
        """Raises ConfigError and ModelError. ends_process: the process ends after stop(), with all its connections."""
        self._settings = settings
        self._ends_process = ends_process
        scopes: dict[str, Scope | None] = {SERVICE_NAME: Scope.INFERENCE, CONTROL_SERVICE: Scope.CONTROL}
        keys = KeyFile(settings.api_key_file) if settings.api_key_file else None
        named_interceptors = load_interceptors(settings.interceptor)
        tokenizer = load_tokenizer(tokenizer_folder)
        self._chats = ChatRenderer(read_chat_templates(tokenizer_folder))
        grammars = GrammarChecker(tokenizer_folder, tokenizer)
        has_traces = bool(settings.otlp_traces_endpoint)
        self.front_end = FrontEnd(tokenizer, self._set_ready, grammars, self._chats, has_traces=has_traces)
        inference = InferenceServicer(self.front_end, model_name(settings))
        services: dict[str, Register] = {
            SERVICE_NAME: inference.add_to,
            CONTROL_SERVICE: lambda s: control_pb2_grpc.add_ControlServiceServicer_to_server(control, s),
        }
        small_calls = [CONTROL_SERVICE, f"{SERVICE_NAME}/GetModelInfo"]
        self._inference_services = [SERVICE_NAME]
        if settings.vllm_engine_service:
            # Its messages come with an extra.
            from tandem_scheduler.front_end.grpc_api import vllm_engine_servicer as vllm

            servicer = vllm.VllmEngineServicer(
                self.front_end, control, settings, tokenizer_folder, inference.token_limit
            )
            services[vllm.SERVICE_NAME] = servicer.add_to
            small_calls += [f"{vllm.SERVICE_NAME}/{method}" for method in vllm.SMALL_METHODS]
            self._inference_services.append(vllm.SERVICE_NAME)
            scopes |= {f"{vllm.SERVICE_NAME}/{method}": scope for method, scope in vllm.SCOPES.items()}
        self._server = Server(
            services,
            small_calls=small_calls,
            interceptors=[Authorizer(keys, scopes, _open_scopes(settings)), *named_interceptors, *interceptors],
            credentials=server_credentials(settings),
            health_port=settings.health_port,
            shares_port=shares_port,
            max_request_bytes=settings.max_request_bytes,
            max_open_calls=settings.max_num_seqs + settings.max_num_waiting + NUM_OTHER_CALLS,
            # One connection fills the batch, however few may wait: many clients have just one.
            num_unshared_calls=settings.max_num_seqs,
            on_refusal=self._note_refusal,
        )
        self.front_end.connect(attach(self.front_end))

    async def start(self) -> int:
        """Listens. Returns the port."""
        port = await self._server.start(self._settings.host, self._settings.port)
        await self._server.set_ready([CONTROL_SERVICE], True)
        return port

    async def stop(self) -> None:
        """Lets calls whose requests have ended send their last messages."""
        await (self._server.finish(STOP_GRACE_S) if self._ends_process else self._server.stop(STOP_GRACE_S))
        await self._chats.close()

    def _note_refusal(self, method: str, error: Exception) -> None:
        if method.rpartition("/")[2] in GENERATING and isinstance(error, TandemError):
            self.front_end.note_refusal(error)

    async def _set_ready(self, is_ready: bool) -> None:
        await self._server.set_ready(self._inference_services, is_ready)


def _open_scopes(settings: SchedulerSettings) -> tuple[Scope, ...]:
    """What callers may do at a server without API keys: everything where only this machine reaches it, where callers
    have shown certificates, and where it was told so.
    """
    is_open = is_loopback(settings.host) or settings.tls_client_ca or settings.insecure
    return tuple(Scope) if is_open else (Scope.INFERENCE,)
