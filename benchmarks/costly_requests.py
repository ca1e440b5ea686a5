"""The costliest request of each shape that the limits allow, and requests just past the limits, while 16 streams run.

Measured are the longest gap between two messages of any stream, the growth of the scheduler's peak memory, and how much
of the growth remains. Scheduler, worker and the streams' readers are processes of their own, and the worker computes
nothing and takes 10 ms a step (steady_worker.py). So a long gap comes from the scheduler or from the machine. The shape
"nothing" shows the machine's share; short shapes are repeated, so that the least of their gaps is the request's own.
Writes benchmarks/results/costly_requests.json.
"""

import argparse
import asyncio
import gc
import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer

from benchmarks.common import RESULTS, header, write_json
from benchmarks.steady_worker import MAX_MODEL_LEN
from tandem.client import REPLY_LIMIT
from tandem.processes import Services
from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.grpc_api.request_codec import MAX_REPLY_BYTES
from tandem_scheduler.front_end.reply_size import max_reply_size
from tandem_scheduler.front_end.text.encoder import MAX_PIECE_CHARACTERS
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model
from tandem_shared.rpc.grpc_options import DEFAULT_MAX_REQUEST_BYTES
from tandem_shared.sampling_lists import MAX_ALLOWED_TOKEN_IDS

NUM_STREAMS = 16
STEP_MS = 10.0
BEFORE_S = 1.0
"""How long the streams run alone before each shape."""
AFTER_S = 0.5
SHORT_S = 3.0
SERVICE = "/tandem.v1.InferenceService/"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
STREAM_TOKENS = 30_000


@dataclass(frozen=True)
class Shape:
    """Equal calls that are sent at once. request: encoded. stalled_s: seconds before their replies are read."""

    name: str
    method: str
    request: bytes
    num_calls: int = 1
    stalled_s: float = 0.0


def read_streams(address: str, commands: Connection) -> None:
    """The readers' process: reads the streams, and answers each (start, end) with the longest gap in milliseconds
    between two messages of a stream, of which at least one came between start and end.
    """
    gc.disable()
    arrivals: list[list[float]] = [[] for _ in range(NUM_STREAMS)]

    async def read(channel: grpc.aio.Channel, times: list[float]) -> None:
        request = generate([1, 2, 3], max_tokens=STREAM_TOKENS)
        async for _ in channel.unary_stream(f"{SERVICE}GenerateStream")(request):
            times.append(time.monotonic())

    async def run() -> None:
        async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
            tasks = [asyncio.create_task(read(channel, times)) for times in arrivals]
            while (asked := await asyncio.to_thread(commands.recv)) is not None:
                start, end = asked
                commands.send(max(longest_gap_ms(times, start, end) for times in arrivals))
            for task in tasks:
                task.cancel()

    asyncio.run(run())


def longest_gap_ms(times: list[float], start: float, end: float) -> float:
    gaps = [later - earlier for earlier, later in pairwise(times) if later > start and earlier < end]
    return 1000 * max(gaps, default=end - start)


def generate(prompt: Any, **fields: Any) -> bytes:
    """An encoded GenerateRequest. fields: values by name, for the request itself, its sampling, stopping or output."""
    request = inference_pb2.GenerateRequest()
    if isinstance(prompt, inference_pb2.Chat):
        request.prompt.chat.CopyFrom(prompt)
    elif isinstance(prompt, str):
        request.prompt.text = prompt
    else:
        request.prompt.token_ids.ids.extend(prompt)
    request.sampling.temperature = 0
    request.stopping.ignore_eos = True
    for part in (request.sampling, request.stopping, request.output, request):
        for name in fields.keys() & part.DESCRIPTOR.fields_by_name.keys():
            value = fields[name]
            if isinstance(value, (list, range)):
                getattr(part, name).extend(value)
            elif isinstance(value, dict):
                getattr(part, name).update(value)
            else:
                setattr(part, name, value)
    return request.SerializeToString()


def chat(num_messages: int, content: str, **fields: Any) -> inference_pb2.Chat:
    message = inference_pb2.ChatMessage(role="user", content=content)
    return inference_pb2.Chat(messages=[message] * num_messages, **fields)


def tokenize(text: str) -> bytes:
    return inference_pb2.TokenizeRequest(text=text).SerializeToString()


def detokenize(ids: Iterable[int]) -> bytes:
    return inference_pb2.DetokenizeRequest(token_ids=ids).SerializeToString()


def text_of(tokenizer: Tokenizer, num_tokens: int) -> str:
    """A text of slightly fewer than num_tokens tokens."""
    words = " ".join(f"word{index % 997}," for index in range(num_tokens))
    return tokenizer.decode(tokenizer.encode(words).ids[: num_tokens - 100])


def shapes(tokenizer: Tokenizer) -> list[Shape]:
    """The shapes that the limits allow, then those past the limits."""
    full, vocab_size = MAX_MODEL_LEN - 1, tokenizer.get_vocab_size()
    whole_message = DEFAULT_MAX_REQUEST_BYTES - 200
    words = "many words, " * (whole_message // 12)
    # With the texts and bytes of tokens, which the bound does not count, this is a little less than the limit.
    logprob_tokens = MAX_REPLY_BYTES * 11 // (20 * 64 * max_reply_size(vocab_size, 20))
    longest_token = max(range(vocab_size), key=lambda i: len(tokenizer.id_to_token(i) or ""))
    stops = [f"{index:02}" * 63 + "\u00ff" for index in range(64)]
    many: dict[str, Any] = {"num_choices": 64, "num_logprobs": 20}
    text, letters = text_of(tokenizer, full), "a" * MAX_PIECE_CHARACTERS
    stopping = generate([5], num_choices=64, max_tokens=300, stop_strings=stops, stop_token_ids=[vocab_size - 1] * 128)
    lists: dict[str, Any] = {
        "logit_bias": dict.fromkeys(range(vocab_size - 1024, vocab_size), -1.0),
        "allowed_token_ids": range(vocab_size - MAX_ALLOWED_TOKEN_IDS, vocab_size)
        if vocab_size > MAX_ALLOWED_TOKEN_IDS
        else [vocab_size - 1] * MAX_ALLOWED_TOKEN_IDS,
        "stop_token_ids": [vocab_size - 1] * 128,
        "stop_strings": stops,
        "min_tokens": 200,
    }
    requested = {"logprob_token_ids": range(20), "num_logprobs": 20}
    named = generate([5] * full, max_tokens=1, request_id="x" * 256, cache_salt="x" * 1024)
    allowed = [
        Shape("nothing", "", b""),
        Shape("text of a whole context", "Generate", generate(text, max_tokens=1)),
        Shape(f"one word of {len(letters)} letters", "Generate", generate(letters, max_tokens=1)),
        Shape("ids of a whole context", "Generate", generate([5] * full, max_tokens=1)),
        Shape("ids of a whole context, longest id and salt", "Generate", named),
        Shape("64 choices of 300 tokens, 64 stop strings, 128 stop ids", "GenerateStream", stopping),
        Shape(
            "64 choices of 300 tokens, the longest lists",
            "GenerateStream",
            generate([5], max_tokens=300, num_choices=64, bad_words=["abcdefgh" * 2] * 128, **lists),
        ),
        Shape(
            "64 choices of 300 tokens, 20 logprobs and 20 given tokens",
            "GenerateStream",
            generate([5], max_tokens=300, num_choices=64, **requested),
        ),
        Shape(
            "20 logprobs of each token of a whole context",
            "GenerateStream",
            generate([5] * full, max_tokens=1, num_prompt_logprobs=20),
        ),
        Shape("chat of 4096 messages", "Generate", generate(chat(4096, "x"), max_tokens=1)),
        Shape("chat of one message of a whole context", "Generate", generate(chat(1, text[:-200]), max_tokens=1)),
        Shape("64 choices of 300 tokens, 20 logprobs", "GenerateStream", generate([5], max_tokens=300, **many)),
        Shape(
            "the same of 4000, nothing read for 40 s", "GenerateStream", generate([5], max_tokens=4000, **many), 1, 40
        ),
        Shape(
            f"one reply of 64 choices of {logprob_tokens} tokens, 20 logprobs",
            "Generate",
            generate([5], max_tokens=logprob_tokens, **many),
        ),
        Shape("one reply of 64 choices of 2000 tokens", "Generate", generate([5], num_choices=64, max_tokens=2000)),
        Shape("Tokenize, 131072 tokens", "Tokenize", tokenize(text_of(tokenizer, 131_072))),
        Shape("Detokenize, 131072 ids", "Detokenize", detokenize([5] * 131_072)),
        Shape("Detokenize, 131072 ids of the longest token", "Detokenize", detokenize([longest_token] * 131_072)),
    ]
    refused = [
        Shape("4 MB of words", "Generate", generate(words)),
        Shape("ten times 4 MB of words at once", "Generate", generate(words), num_calls=10),
        Shape("chat of 4096 messages, 4 MB", "Generate", generate(chat(4096, "many words, " * 84))),
        Shape("chat of 4 MB of tools", "Generate", generate(chat(1, "", tools=['{"a":"' + "x" * 4000 + '"}'] * 1000))),
        Shape("chat of 4 MB of empty messages", "Generate", generate(chat(whole_message // 8, ""))),
        Shape("ten times a chat of 4 MB at once", "Generate", generate(chat(4000, "many words, " * 84)), num_calls=10),
        Shape("4 MB of letters", "Generate", generate("a" * whole_message)),
        Shape("4 MB of ids", "Generate", generate([5] * whole_message)),
        Shape("a context of ids that don't exist", "Generate", generate([2**32 - 1] * full)),
        Shape("4 MB of empty stop strings", "Generate", generate([5], stop_strings=[""] * (whole_message // 2))),
        Shape("256 kB of empty stop strings", "Generate", generate([5], stop_strings=[""] * 131_000)),
        Shape("128 bad words of 256 characters", "Generate", generate([5], bad_words=["\u4e16" * 256] * 128)),
        Shape("800 kB of empty bad words", "Generate", generate([5], bad_words=[""] * 400_000)),
        Shape("800 kB of biases", "Generate", generate([5], logit_bias=dict.fromkeys(range(80_000), 1.0))),
        Shape("60000 stop ids", "Generate", generate([5], stop_token_ids=[5] * 60_000)),
        Shape("4 MB of model name", "Generate", generate([5], model="x" * whole_message)),
        Shape("250 kB of request id", "Generate", generate([5], request_id="x" * 250_000)),
        Shape("250 kB of salt", "Generate", generate([5], cache_salt="x" * 250_000)),
        Shape(
            "one reply of 64 choices of 5000 tokens, 20 logprobs", "Generate", generate([5], max_tokens=5000, **many)
        ),
        Shape("Tokenize, 4 MB", "Tokenize", tokenize(words)),
        Shape("Detokenize, 4 MB of ids", "Detokenize", detokenize([5] * whole_message)),
        Shape("4 MB that are no message", "Generate", b"\xff" * whole_message),
    ]
    return allowed + refused


async def send(address: str, shape: Shape) -> str:
    """Makes the calls. Returns the statuses with which they ended."""
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        return " ".join(sorted(set(await asyncio.gather(*(_call(channel, shape) for _ in range(shape.num_calls))))))


async def _call(channel: grpc.aio.Channel, shape: Shape) -> str:
    try:
        if shape.method == "GenerateStream":
            call = channel.unary_stream(f"{SERVICE}{shape.method}")(shape.request)
            await asyncio.sleep(shape.stalled_s)
            async for _ in call:
                pass
        elif shape.method:
            await channel.unary_unary(f"{SERVICE}{shape.method}")(shape.request, metadata=REPLY_LIMIT)
        else:
            await asyncio.sleep(2)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def memory_mib(pid: int, field: str) -> float:
    """VmRSS or VmHWM of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(services: Services, pid: int, shape: Shape, commands: Connection) -> dict[str, Any]:
    time.sleep(BEFORE_S)
    before = memory_mib(pid, "VmRSS")
    # Resets the recorded peak to the present memory.
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    start = time.monotonic()
    status = asyncio.run(send(services.address, shape))
    took_s = time.monotonic() - start
    time.sleep(AFTER_S)
    commands.send((start, time.monotonic()))
    gap_ms = commands.recv()
    return {
        "status": status,
        "took_s": round(took_s, 2),
        "longest_gap_ms": round(gap_ms, 1),
        "peak_memory_growth_mib": round(memory_mib(pid, "VmHWM") - before, 1),
        "memory_growth_afterwards_mib": round(memory_mib(pid, "VmRSS") - before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="embedded", help="folder with tokenizer.json, or 'embedded'")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each short shape")
    parser.add_argument("--only", help="measure only shapes with this in their name")
    parser.add_argument("--out", type=Path, default=RESULTS / "costly_requests.json")
    arguments = parser.parse_args()
    folder = resolve_model(arguments.tokenizer, TOKENIZER_FILES)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    scheduler = SchedulerSettings(port=0, log_level="error", api_server_count=0, tokenizer=str(folder))
    program = ("benchmarks.steady_worker", str(STEP_MS), str(folder))
    by_shape = {}
    with Services(WorkerSettings(port=0), scheduler, worker_program=program) as services:
        services.wait_until_ready(60)
        assert services.scheduler is not None
        pid = services.scheduler.pid
        commands, theirs = multiprocessing.Pipe()
        reader = multiprocessing.get_context("spawn").Process(target=read_streams, args=(services.address, theirs))
        reader.start()
        time.sleep(2)
        for shape in shapes(tokenizer):
            if arguments.only is None or arguments.only in shape.name:
                runs = [measure(services, pid, shape, commands)]
                while runs[0]["took_s"] < SHORT_S and len(runs) < arguments.repeats:
                    runs.append(measure(services, pid, shape, commands))
                by_shape[shape.name] = {
                    **{name: runs[0][name] for name in ("status", "took_s", "memory_growth_afterwards_mib")},
                    "peak_memory_growth_mib": max(run["peak_memory_growth_mib"] for run in runs),
                    "longest_gap_ms": [run["longest_gap_ms"] for run in runs],
                }
                print(f"{shape.name}: {by_shape[shape.name]}", flush=True)
        commands.send(None)
        reader.join()
    report = header("the costliest requests, beside streams") | {
        "num_streams": NUM_STREAMS,
        "step_ms": STEP_MS,
        "max_model_len": MAX_MODEL_LEN,
        "tokenizer": arguments.tokenizer.rstrip("/").rsplit("/", 1)[-1],
        "by_shape": by_shape,
    }
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()
