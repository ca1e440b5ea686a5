"""The flags that say how an output is made, and the SamplingParams that they make."""

import argparse
from pathlib import Path
from typing import Any

from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput
from tandem_shared.errors import ConfigError
from tandem_shared.sampling_fields import REQUEST_FIELDS

HELP_TEXTS = {"seed": "makes the output repeatable; default: one per request"}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    for field in REQUEST_FIELDS:
        default = "what the model recommends" if field.has_model_default else field.default
        help_text = HELP_TEXTS.get(field.name, f"default: {default}")
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.kind, help=help_text)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="a file with the JSON schema that the output follows")
    form.add_argument("--regex", metavar="PATTERN", help="a regular expression that matches the whole output")
    form.add_argument("--choice", action="append", metavar="TEXT", help="a possible output; may be repeated")


def params_of(options: argparse.Namespace, **others: Any) -> SamplingParams:
    """The params of add_sampling_flags, and others beside them."""
    values = {field.name: getattr(options, field.name) for field in REQUEST_FIELDS}
    return SamplingParams(**values, stop=tuple(options.stop), **others)


def form_of(options: argparse.Namespace) -> StructuredOutput | None:
    """The form of add_form_flags, if any. Raises ConfigError for a file that can't be read."""
    if options.json_schema is not None:
        try:
            return StructuredOutput(json=Path(options.json_schema).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json-schema: {error}") from error
    if options.regex is not None:
        return StructuredOutput(regex=options.regex)
    return None if options.choice is None else StructuredOutput(choice=options.choice)
