"""Records docs/images/top.svg: what `tandem top` shows while a load comes to the embedded model, its worker is killed
and comes back, and the load ends. The picture is animated by CSS, which works where scripts don't, as in an <img>.

Usage: python -m tools.draw_top
"""

import asyncio
import io
import random
import re
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console

from tandem import AsyncTandemClient, SamplingParams, TandemClient
from tandem.commands.dashboard import Look, draw, look
from tandem.processes import Services
from tandem_shared.config import SchedulerSettings, WorkerSettings

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "top.svg"
INTERVAL_S = 0.5
NUM_FRAMES = 40
LOAD_FRAMES = range(2, 26)
KILL_FRAME = 14
REQUESTS_PER_S = 1.7
PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 3


def main() -> None:
    with Services(WorkerSettings(port=0, num_blocks=256), SchedulerSettings(port=0, max_num_seqs=8)) as services:
        services.wait_until_ready(60)
        looks = asyncio.run(record(services))
    IMAGE.write_text(animated([frame_of(*pair) for pair in pairwise(looks)]))


async def record(services: Services) -> list[Look]:
    """NUM_FRAMES + 1 looks at the server, INTERVAL_S apart."""
    source, looks, requests = random.Random(1), [], set()
    async with AsyncTandemClient(services.address) as client:
        with TandemClient(services.address) as watcher:
            next_arrival = 0.0
            for number in range(NUM_FRAMES + 1):
                looks.append(await asyncio.to_thread(look, watcher))
                if number == KILL_FRAME:
                    kill_worker(services)
                while number in LOAD_FRAMES and next_arrival <= (number - LOAD_FRAMES[0]) * INTERVAL_S:
                    next_arrival += source.expovariate(REQUESTS_PER_S)
                    num_tokens = source.randint(50, 150)
                    params = SamplingParams(n=source.choice([1, 1, 3]), max_tokens=num_tokens, ignore_eos=True)
                    requests.add(asyncio.create_task(client.generate(f"{PROMPT}{source.randrange(4)}", params)))
                await asyncio.sleep(INTERVAL_S)
        await asyncio.gather(*requests)
    return looks


def kill_worker(services: Services) -> None:
    """Kills the process that serves, as it runs below its supervisor."""
    assert services.worker is not None
    for process in psutil.Process(services.worker.pid).children():
        process.kill()


def frame_of(before: Look, after: Look) -> str:
    """A picture of what `tandem top` draws."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(draw(before, after))
    # A picture in a document may load no fonts.
    return re.sub(r"\s*@font-face {.*?}", "", console.export_svg(title="tandem top", unique_id="top"), flags=re.DOTALL)


def animated(frames: list[str]) -> str:
    """One picture of pictures that differ in their text alone. Where motion is not wanted, it is one of them."""
    matrix = re.compile(r'<g class="top-matrix">(.*?)</g>', re.DOTALL)
    groups = []
    for number, frame in enumerate(frames):
        styles = dict(re.findall(r"\.(top-r\d+) {(.*?)}", frame))
        [text] = matrix.findall(frame)
        # Ends of lines, and clips at them: all text is within its line.
        text = re.sub(r'<text[^>]*>\n</text>| clip-path="[^"]*"', "", text)
        # What a style's number means differs from frame to frame.
        for name, style in styles.items():
            text = text.replace(f'class="{name}"', f'style="{style.strip()}"')
        still = " still" if number == KILL_FRAME - 1 else ""
        groups.append(f'<g class="top-matrix frame{still}" style="animation-delay: {number * INTERVAL_S}s">{text}</g>')
    css = f"""
    .frame {{ visibility: hidden; animation: show {len(frames) * INTERVAL_S}s step-end infinite }}
    @keyframes show {{ 0% {{ visibility: visible }} {100 / len(frames)}% {{ visibility: hidden }} }}
    @media (prefers-reduced-motion: reduce) {{ .frame {{ animation: none }} .still {{ visibility: visible }} }}
    </style>"""
    whole = re.sub(r"\s*\.top-r\d+ {.*?}", "", frames[0]).replace("</style>", css)
    return matrix.sub(lambda _: "\n".join(groups), whole)


if __name__ == "__main__":
    main()
