"""Use without a server: LLM runs both services as child processes and sends them requests. It can use a running server
too.
"""

import os
import random
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import grpc

from tandem.async_client import AsyncTandemClient
from tandem.batch import Progress, run_batch
from tandem.calls import ArrayOfIds, Metadata
from tandem.chat import Chat
from tandem.client import TandemClient
from tandem.loop_thread import LoopThread
from tandem.outputs import PromptsFailed, RequestOutput
from tandem.processes import ServiceFailed, Services
from tandem.prompts import ParamsForm, PromptForm, is_single, read_items
from tandem.sampling_params import SamplingParams
from tandem.tokenizer import Tokenizer
from tandem_shared.config import SYNONYMS, SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError, FieldViolation, InvalidRequest
from tandem_shared.options import split_keywords

STARTUP_TIMEOUT_S = 600.0
MIN_REQUESTS_AT_ONCE = 256
"""The number of requests that generate() has open at once, or twice max_num_seqs if that is more."""


class LLM:
    """A model to generate with. Leaving it as a context manager, close(), or the end of the program stops the services.
    On Linux they also stop when the thread that made this object ends. Threads may share it.
    """

    address: str
    """The HOST:PORT of the server."""
    client: TandemClient
    """A client of the server, for what LLM has no method for."""

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        address: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        seed: int | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        """Starts the services for a model, or uses the server at an address.

        model is a folder, a hub id, or "embedded" for the package's own model, which is the default. settings are
        fields of WorkerSettings and SchedulerSettings (tandem_shared/config.py), by name or by the name that vLLM or
        nano-vllm has for the same, such as tensor_parallel_size; environment variables are not read.
        address is the HOST:PORT of a running server, which has a model and settings of its own, so that neither can be
        given; credentials and metadata are as TandemClient takes them.
        seed makes the outputs of params without a seed repeatable: the first prompt that this object gets always has
        the same seed, and so on. trust_remote_code is there because vLLM has it; Tandem never runs code of a model's
        folder.

        Raises ConfigError for a wrong or unknown setting, and where the extra tandem-llm[worker] is not installed.
        Raises ServiceFailed, with what the services logged, if they do not start.
        """
        self._seeds = None if seed is None else random.Random(seed)
        services: Services | None = None
        log: IO[str] | None = None
        if address is None:
            if credentials is not None or metadata:
                raise ConfigError("credentials and metadata are for a server's address, and none is given")
            if model is not None:
                settings["model"] = os.fspath(model)
            if settings.get("num_kvcache_blocks") == -1:
                # It stands for as many as the memory allows in nano-vllm.
                settings["num_kvcache_blocks"] = None
            worker, scheduler = split_keywords({"port": 0, **settings}, WorkerSettings, SchedulerSettings, SYNONYMS)
            self._num_at_once = max(MIN_REQUESTS_AT_ONCE, 2 * scheduler.max_num_seqs)
            services, log = _start(worker, scheduler)
            address = services.address
        else:
            if model is not None or settings:
                raise ConfigError(f"model and settings are those of the server at {address}; give neither")
            self._num_at_once = MIN_REQUESTS_AT_ONCE
        self.address = address
        self.client = TandemClient(address, credentials, metadata=metadata)
        self._loop = LoopThread()
        self._async_client = self._loop.run(_connect(address, credentials, metadata))
        # Called by close(), when nothing refers to this object any more, or else at the end of the program.
        self._close = weakref.finalize(self, _close, self.client, self._async_client, self._loop, services, log)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the services, if this object started them. Further calls do nothing."""
        self._close()

    def generate(
        self,
        prompts: PromptForm | Iterable[PromptForm] | None = None,
        sampling_params: ParamsForm = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Iterable[int] | Iterable[Iterable[int]] | ArrayOfIds | None = None,
        priority: Sequence[int] | None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Returns one output for each prompt, in the order of the prompts.

        prompts is one prompt or several. A prompt is text, token ids (a list, or an array of numpy's), a Chat, or a
        dict with "prompt" or "prompt_token_ids". prompt_token_ids may be given in place of prompts, if all are token
        ids.
        sampling_params is for all prompts, or a list with those of each.
        use_tqdm shows a progress bar with the rates of prefill and decode; a function that makes the bar may be given.
        priority has a number for each prompt; a lower one is served earlier. lora_request must be None, and is there
        because vLLM has it.

        Raises InvalidRequest, before anything is generated, for what can be no prompt. If the server refuses one prompt
        of a list, or fails on it, the others are completed. Then PromptsFailed is raised, which has their outputs, and
        the errors by the prompts' indices. The error of a prompt that was not in a list is raised itself. A server that
        has too many requests is waited for. At an interrupt all requests are aborted.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise InvalidRequest(FieldViolation("prompts", "give either prompts or prompt_token_ids"))
        _refuse_given(lora_request=lora_request)
        given: Any = prompt_token_ids if prompts is None else prompts
        single = is_single(given)
        items = read_items([given] if single else given, sampling_params, self._seeds, priority)
        progress = _progress(use_tqdm, len(items))
        try:
            result = self._loop.run(run_batch(self._async_client, items, self._num_at_once, progress))
        finally:
            if progress is not None:
                progress.close()
        if result.errors and single:
            raise result.errors[0]
        if result.errors:
            raise PromptsFailed(result.errors, result.outputs)
        return [output for output in result.outputs if output is not None]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: ParamsForm = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: None = None,
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Returns the output of a conversation, or of each of several, as generate() does for prompts. The arguments
        from tools to chat_template_kwargs are those of Chat, for all conversations. The last two must be None, and are
        there because vLLM has them.
        """
        _refuse_given(chat_template=chat_template, lora_request=lora_request)
        options = (tools, add_generation_prompt, enable_thinking, chat_template_kwargs, continue_final_message)
        if len(messages) == 0 or isinstance(messages[0], Mapping):
            return self.generate(Chat(messages, *options), sampling_params, use_tqdm)  # type: ignore[arg-type]
        chats = []
        for index, each in enumerate(messages):
            try:
                chats.append(Chat(each, *options))  # type: ignore[arg-type]
            except InvalidRequest as error:
                raise InvalidRequest(
                    *(FieldViolation(f"conversations[{index}].{v.field}", v.description) for v in error.violations)
                ) from error
        return self.generate(chats, sampling_params, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """The params of a prompt that has none: all are the model's defaults, which the server knows."""
        return SamplingParams()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which asks the server."""
        return Tokenizer(self.client)


def _refuse_given(**arguments: object) -> None:
    """Raises InvalidRequest for arguments of vLLM's that are not None, which is all that Tandem can do with them."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise InvalidRequest(*(FieldViolation(name, "is not supported; leave it None") for name in given))


def _start(worker: WorkerSettings, scheduler: SchedulerSettings) -> tuple[Services, IO[str]]:
    """Starts the services, which log to a file that is shown only if they fail. Returns both."""
    print(f"starting the services for {worker.model} ...", file=sys.stderr)
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by _close())
    services = Services(worker, scheduler, log)
    try:
        services.__enter__()
        services.wait_until_ready(STARTUP_TIMEOUT_S)
    except BaseException as error:
        services.stop()
        log.seek(0)
        text = log.read()
        log.close()
        if isinstance(error, ServiceFailed):
            raise ServiceFailed(f"{error}\n{text}") from error
        raise
    return services, log


async def _connect(address: str, credentials: grpc.ChannelCredentials | None, metadata: Metadata) -> AsyncTandemClient:
    return AsyncTandemClient(address, credentials, metadata=metadata)


def _progress(use_tqdm: bool | Callable[..., Any], num_prompts: int) -> Progress | None:
    if not use_tqdm:
        return None
    if callable(use_tqdm):
        return Progress(use_tqdm(total=num_prompts, desc="prompts"))
    # Imported here because most programs never show a bar.
    from tqdm.auto import tqdm

    return Progress(tqdm(total=num_prompts, desc="prompts", dynamic_ncols=True))


def _close(
    client: TandemClient,
    async_client: AsyncTandemClient,
    loop: LoopThread,
    services: Services | None,
    log: IO[str] | None,
) -> None:
    try:
        client.close()
        loop.close(async_client.close())
    finally:
        try:
            if services is not None:
                services.stop()
        finally:
            if log is not None:
                log.close()
