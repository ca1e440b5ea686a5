"""`python -m tests.chaos`: runs parts of the harness, keeps their results and fills the table in docs/reliability.md.

A run that was interrupted goes on with the next piece. The exit status is 1 where a promise is not met.
"""

import argparse
import sys
from pathlib import Path

from tests.chaos.harness.definitions import Form
from tests.chaos.harness.parts import PARTS
from tests.chaos.harness.results import FOLDER, ChaosError, join, run_part
from tests.chaos.harness.table import DOCUMENT, fill, table


def main(arguments: list[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--form", type=Form, choices=list(Form), default=Form.FULL)
    parser.add_argument("--afresh", action="store_true", help="begin again, whatever results there are")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--commit", help="the commit that is tried; git is asked by default")
    parser.add_argument("--pieces", type=_indexes, metavar="INDEX,...", help="only these pieces of one part, from 0")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="FOLDER", help="run nothing: join the pieces that these folders have"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if given.pieces and len(given.parts) != 1:
        parser.error("--pieces is of one part")
    is_met = True
    for part in PARTS:
        if given.parts and part.name not in given.parts:
            continue
        try:
            if given.join:
                rows = join(part, given.form, given.join, given.results, commit=given.commit)
            else:
                rows = run_part(
                    part, given.form, given.results, afresh=given.afresh, commit=given.commit, only=given.pieces
                )
        except ChaosError as error:
            print(f"chaos: {error}", file=sys.stderr)
            return 2
        for row in rows:
            is_met &= row.is_met
            print(f"{'met' if row.is_met else 'NOT MET'}: {row.promise}: {row.tried}: {row.found}", flush=True)
    if given.results == FOLDER:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), table(PARTS, FOLDER)))
    return 0 if is_met else 1


def _indexes(text: str) -> set[int]:
    return {int(index) for index in text.split(",")}


if __name__ == "__main__":
    sys.exit(main())
