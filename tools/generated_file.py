"""What tools have in common that write one file, and with --check compare it instead."""

import sys
from pathlib import Path


def write_or_check(path: Path, text: str, stale: str) -> int:
    """Writes the text. With --check among the arguments it says `stale` where the file has another one. Returns the
    exit status, which is then 1.
    """
    if sys.argv[1:] != ["--check"]:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print(stale, file=sys.stderr)
        return 1
    return 0
