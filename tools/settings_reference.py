"""Writes docs/settings.md, the list of all settings of the services, from their dataclasses. With --check, fails where
the committed file differs instead.
"""

import dataclasses
import html
import sys
from collections.abc import Iterable
from typing import Any, TypeAlias

from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.options import flag_of
from tools.generate_stubs import ROOT
from tools.generated_file import write_or_check

REFERENCE = ROOT / "docs" / "settings.md"
SERVICES = {"scheduler": SchedulerSettings, "worker": WorkerSettings, "gateway": GatewaySettings}

Field: TypeAlias = "dataclasses.Field[Any]"

HEAD = """# Settings

<!-- Made from the settings' dataclasses by `make docs`; a change made here is lost. -->

All settings of `tandem-scheduler`, `tandem-worker` and `tandem-gateway`. `tandem serve`, which starts all three, takes
the same flags. `--max-num-seqs` is also the variable `TANDEM_MAX_NUM_SEQS` and the key `max-num-seqs` of a file for
`--config`. [operations.md](operations.md) says how they are read, and what to do with the more important ones.

| flag | of | default | meaning |
|---|---|---|---|
"""


def text() -> str:
    """The document."""
    settings: dict[str, dict[str, Field]] = {}
    for service, settings_class in SERVICES.items():
        for field in dataclasses.fields(settings_class):
            settings.setdefault(field.name, {})[service] = field
    lines = [
        f"| `{flag_of(name)}` | {', '.join(fields)} | {_defaults(fields.values())} | {_meaning(*fields.values())} |"
        for name, fields in sorted(settings.items())
    ]
    return HEAD + "\n".join(lines) + "\n"


def _defaults(fields: Iterable[Field]) -> str:
    """The default, or those of the services in turn where they differ."""
    defaults = [str(field.default) for field in fields if field.default not in (None, "")]
    return ", ".join(f"`{default.lower()}`" for default in dict.fromkeys(defaults))


def _meaning(field: Field, *_: Field) -> str:
    about = field.metadata
    details = [f"in {about['unit']}"] if about["unit"] else []
    if about["choices"]:
        details.append("one of " + ", ".join(f"`{choice}`" for choice in about["choices"]))
    if about["minimum"] is not None:
        details.append(f"at least {about['minimum']:g}")
    if about["maximum"] is not None:
        details.append(f"at most {about['maximum']:.12g}")
    return html.escape(about["text"], quote=False) + (f" ({'; '.join(details)})" if details else "")


def main() -> int:
    """Exit status 1 if --check finds a difference."""
    stale = "docs/settings.md differs from the services' settings; run make docs"
    return write_or_check(REFERENCE, text(), stale)


if __name__ == "__main__":
    sys.exit(main())
