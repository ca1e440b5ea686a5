"""Draws docs/images/top.svg: what `tandem top` shows of the embedded model under a load.

Usage: python -m tools.draw_top
"""

import io
import re
import time
from pathlib import Path

from rich.console import Console

from tandem import SamplingParams, TandemClient
from tandem.commands.dashboard import draw, look
from tandem.processes import Services
from tandem_shared.config import SchedulerSettings, WorkerSettings

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "top.svg"
PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 3


def main() -> None:
    with Services(WorkerSettings(port=0, num_blocks=256), SchedulerSettings(port=0, max_num_seqs=8)) as services:
        services.wait_until_ready(60)
        with TandemClient(services.address) as client:
            params = SamplingParams(n=11, max_tokens=1000, ignore_eos=True)
            for index in range(40):
                client.generate(f"{PROMPT}{index % 4}", SamplingParams(max_tokens=4))
            stream = client.generate_stream(PROMPT, params)
            next(stream)
            time.sleep(2)
            before = look(client)
            time.sleep(2)
            console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, highlight=False)
            console.print(draw(before, look(client)))
    # A picture in a document may load no fonts.
    IMAGE.write_text(re.sub(r"\s*@font-face {.*?}", "", console.export_svg(title="tandem top"), flags=re.DOTALL))


if __name__ == "__main__":
    main()
