"""Draws the load of a server, from two answers of GetLoad and the time between them."""

import time
from dataclasses import dataclass

import grpc
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tandem.client import TandemClient
from tandem.outputs import text_of
from tandem.v1 import control_pb2, inference_pb2
from tandem_shared.errors import TandemError

BAR_WIDTH = 40
WORKER_STATES = {
    control_pb2.WORKER_STATE_CONNECTING: "no worker yet",
    control_pb2.WORKER_STATE_READY: "worker ready",
    control_pb2.WORKER_STATE_LOST: "worker lost",
}


@dataclass(frozen=True)
class Look:
    """What a server said of itself at a time, in seconds of time.monotonic()."""

    at: float
    model: inference_pb2.GetModelInfoResponse | None
    """None while the server has seen no worker."""
    server: control_pb2.GetServerInfoResponse
    load: control_pb2.GetLoadResponse


def look(client: TandemClient) -> Look:
    """Asks the server. Raises what the client raises."""
    server = client.server_info()
    has_worker = server.worker_state != control_pb2.WORKER_STATE_CONNECTING
    return Look(time.monotonic(), client.model_info() if has_worker else None, server, client.load())


def watch(client: TandemClient, interval_s: float, *, once: bool) -> int:
    """Draws until it is interrupted, or once. Raises what the client raises if the server is not there at first."""
    console = Console(highlight=False, markup=False)
    before = look(client)
    if once or not console.is_terminal:
        time.sleep(interval_s)
        console.print(draw(before, look(client)))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                after = look(client)
            except (TandemError, grpc.RpcError) as error:
                live.update(Text(f"{text_of(error)}\n\nasking again every {interval_s:g} s", style="red"), refresh=True)
            else:
                live.update(draw(before, after), refresh=True)
                before = after
            time.sleep(interval_s)


def draw(before: Look, after: Look) -> RenderableType:
    """A table of what is now, and of what happened between two looks."""
    load, server = after.load, after.server
    seconds = max(after.at - before.at, 1e-9)
    # The counters of a server that was started again begin at 0.
    is_same = after.server.uptime.ToTimedelta() >= before.server.uptime.ToTimedelta()
    old = before.load if is_same else control_pb2.GetLoadResponse()
    state = WORKER_STATES.get(server.worker_state, "unknown") + (", draining" if server.draining else "")
    model = "no model yet" if after.model is None else f"{after.model.model} ({after.model.dtype})"
    uptime = str(server.uptime.ToTimedelta()).partition(".")[0]

    table = Table.grid(padding=(0, 2))
    table.add_row("sequences", f"{load.num_running_sequences} running, {load.num_waiting_sequences} waiting")
    table.add_row("KV blocks", _kv_text(load))
    table.add_row("", Bar(max(load.num_total_blocks, 1), 0, load.num_used_blocks, width=BAR_WIDTH, color="green"))
    output, prompt, admitted, cached, steps, overshoot = (
        getattr(load, name) - getattr(old, name)
        for name in (
            "num_output_tokens",
            "num_prompt_tokens",
            "num_admitted_prompt_tokens",
            "num_cached_prompt_tokens",
            "num_steps",
            "num_overshoot_tokens",
        )
    )
    # A token that turns out to be past a stop moves from the output to the overshoot, perhaps in a later interval.
    output = max(output, 0)
    sampled = output + overshoot
    table.add_row("output", f"{output / seconds:,.0f} tokens/s")
    table.add_row("prompts", f"{prompt / seconds:,.0f} tokens/s accepted")
    now = f"{cached / admitted:.0%} of the prompt tokens now, " if admitted else ""
    ever = f"{load.num_cached_prompt_tokens / max(load.num_admitted_prompt_tokens, 1):.0%}"
    table.add_row("prefix cache hits", f"{now}{ever} since the start")
    table.add_row("steps", f"{steps / seconds:,.1f}/s, {load.num_steps_in_flight} in flight")
    table.add_row("step time", _step_time_text(old, load, seconds))
    table.add_row("overshoot", f"{overshoot / sampled:.1%} of the sampled tokens" if sampled else "none")
    table.add_row("preemptions", f"{load.num_preemptions:,}")
    table.add_row("lost workers", f"{load.num_worker_losses:,}")
    style = "bold" if server.worker_state == control_pb2.WORKER_STATE_READY else "bold red"
    title = Text(f"{model}: {state}; Tandem {server.version}, up {uptime}", style=style)
    return Group(title, Text(), table)


def _kv_text(load: control_pb2.GetLoadResponse) -> str:
    total = max(load.num_total_blocks, 1)
    return (
        f"{load.num_used_blocks / total:.0%} used, {load.num_cached_blocks / total:.0%} cached, of "
        f"{load.num_total_blocks:,} blocks of {load.block_size_tokens} tokens"
    )


def _step_time_text(old: control_pb2.GetLoadResponse, load: control_pb2.GetLoadResponse, seconds: float) -> str:
    """The mean time of the steps that ended between two answers, seconds apart, and what share of the time that is."""
    count = load.num_step_results - old.num_step_results
    if not count:
        return "no step has ended"
    step_ns, gpu_ns, gap_ns = (
        getattr(load, name) - getattr(old, name) for name in ("step_time_ns", "gpu_time_ns", "gpu_gap_ns")
    )
    gpu = f", {gpu_ns / count / 1e6:.2f} ms on the GPU" if gpu_ns else ""
    gap = f", {gap_ns / count / 1e6:.2f} ms idle before" if gap_ns else ""
    # A step counts when it ends, so a long one may have begun before the interval.
    return f"{step_ns / count / 1e6:.2f} ms{gpu}{gap}; worker {min(step_ns / 1e9 / seconds, 1):.0%} busy"
