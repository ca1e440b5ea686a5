"""Reads frozen settings from command-line flags, environment variables and a file (config_file.py). A flag wins over
its variable, and that over the file.

This file knows how to read, check and describe the fields of a settings dataclass, not what they mean; config.py has
the dataclasses. A field named `max_num_seqs` is the flag --max-num-seqs and the variable TANDEM_MAX_NUM_SEQS. An empty
variable counts as not set.
"""

import argparse
import dataclasses
import difflib
import itertools
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tandem_shared.errors import ConfigError

ENVIRONMENT_PREFIX = "TANDEM_"
API_KEY_VARIABLE = "TANDEM_API_KEY"
"""The variable with the API key of commands that call a server. It is no setting of a service."""
MAX_NUMBER = 2**31 - 1
"""The largest value of a number without a maximum of its own, as tokens, blocks and rows are counted in int32."""
_SERVICE_VARIABLE = re.compile(r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""The names of variables that Kubernetes, like Docker's old links, sets for a Service; all but NAME_PORT."""
_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""How the value of NAME_PORT begins if Kubernetes has set it. As a setting of ours it would be a number."""

T = TypeVar("T")
U = TypeVar("U")


class Given(NamedTuple):
    """A value as somebody wrote it, and where, for messages about it."""

    text: str
    source: str


def option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    is_list: bool = False,
) -> Any:
    """Makes a field of a settings dataclass. text is what --help says of it; its value is in `unit` and limited by
    minimum, maximum and choices. is_list: it is text that may hold several values, with commas between them.
    """
    metadata = {
        "text": text,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "is_list": is_list,
    }
    return dataclasses.field(default=default, metadata=metadata)


def add_options(
    parser: argparse.ArgumentParser,
    *classes: type,
    without: Iterable[str] = (),
    synonyms: Mapping[str, str] | None = None,
) -> None:
    """Adds a flag for each field except those in `without`, and one for each of its synonyms (other names -> fields). A
    field that two classes share is added once.
    """
    known = set(without)
    synonyms = synonyms or {}
    for settings_class in classes:
        for field in dataclasses.fields(settings_class):
            if field.name in known:
                continue
            known.add(field.name)
            parser.add_argument(
                flag_of(field.name),
                *(flag_of(other) for other, name in synonyms.items() if name == field.name),
                default=None,
                dest=field.name,
                metavar=_value_type(settings_class, field.name).__name__.upper(),
                help=_help_of(field).replace("%", "%%"),
            )


def spell_out_booleans(arguments: Sequence[str], *classes: type) -> list[str]:
    """The arguments with a value for each flag of a field that is true or false: --enforce-eager becomes
    --enforce-eager=true, and --no-enforce-eager becomes --enforce-eager=false, unless true or false follows.
    """
    names = {field.name for cls in classes for field in dataclasses.fields(cls) if _value_type(cls, field.name) is bool}
    values = {flag_of(name): f"{flag_of(name)}=true" for name in names}
    values |= {flag_of(f"no_{name}"): f"{flag_of(name)}=false" for name in names}
    return [
        argument if next_one.lower() in ("true", "false") else values.get(argument, argument)
        for argument, next_one in itertools.pairwise([*arguments, ""])
    ]


def _help_of(field: "dataclasses.Field[Any]") -> str:
    """What --help says, such as "size of a KV block [in tokens; default 16; environment TANDEM_BLOCK_SIZE]"."""
    details = [f"in {field.metadata['unit']}"] if field.metadata["unit"] else []
    if field.metadata["choices"]:
        details.append(f"one of {', '.join(field.metadata['choices'])}")
    if field.default not in (None, ""):
        details.append(f"default {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
    details.append(f"environment {variable_of(field.name)}")
    return f"{field.metadata['text']} [{'; '.join(details)}]"


def read_settings(
    settings_class: type[T],
    arguments: argparse.Namespace,
    environment: Mapping[str, str],
    file: Mapping[str, Given] | None = None,
) -> T:
    """Builds the settings. file: what a file says of fields. Raises ConfigError, which names the flag, the variable or
    the place in the file that is wrong.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings_class):  # type: ignore[arg-type]
        raw, source = getattr(arguments, field.name, None), flag_of(field.name)
        variable = variable_of(field.name)
        if raw is None and _is_ours(variable, environment.get(variable, "")):
            raw, source = environment[variable], variable
        if raw is None and file and field.name in file:
            raw, source = file[field.name]
        if raw is not None:
            values[field.name] = _convert(raw, source, _value_type(settings_class, field.name), field.metadata)
    return settings_class(**values)


def list_fields(*classes: type) -> set[str]:
    """The fields whose text may hold several values."""
    return {field.name for cls in classes for field in dataclasses.fields(cls) if field.metadata["is_list"]}


def refuse_unknown_variables(environment: Mapping[str, str], classes: Iterable[type]) -> None:
    """Raises ConfigError for a variable TANDEM_* that is not a setting of these classes, such as a misspelt one."""
    known = {API_KEY_VARIABLE, *(variable_of(field.name) for cls in classes for field in dataclasses.fields(cls))}
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known and _is_ours(name, value):
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown environment variable {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _is_ours(name: str, value: str) -> bool:
    """Whether a variable is meant as a setting. It is not if it is empty, or if Kubernetes made it, which gives every
    container some for each Service of its namespace, such as one called `tandem` or `tandem-worker`.
    """
    is_link = name.endswith("_PORT") and _LINK_ADDRESS.match(value)
    return bool(value) and not is_link and not _SERVICE_VARIABLE.fullmatch(name)


def to_arguments(settings: Any) -> list[str]:
    """The flags with which a command reads equal settings."""
    arguments = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            # With =, as a value may begin with a dash.
            arguments.append(f"{flag_of(field.name)}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments


def option_names(names: Iterable[str]) -> set[str]:
    """The environment variables of some fields."""
    return {variable_of(name) for name in names}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _value_type(settings_class: type, name: str) -> type:
    """The type of a field's values: int for `int` and for `int | None`."""
    hint = typing.get_type_hints(settings_class)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return typing.cast(type, hint)


def _convert(raw: str, source: str, value_type: type, metadata: Mapping[str, Any]) -> Any:
    value: Any
    if value_type is bool:
        if raw.lower() not in ("true", "false"):
            raise ConfigError(f"{source} must be true or false, is {raw!r}")
        return raw.lower() == "true"
    try:
        value = value_type(raw)
    except ValueError:
        raise ConfigError(f"{source} must be of type {value_type.__name__}, is {raw!r}") from None
    _check(value, raw, source, value_type, metadata)
    return value


def _check(value: Any, shown: object, source: str, value_type: type, metadata: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value outside the field's limits. It names the source, and the value as shown."""
    minimum, maximum, choices = metadata["minimum"], metadata["maximum"], metadata["choices"]
    if value_type is not str and maximum is None:
        maximum = MAX_NUMBER
    # Written so that NaN fails too.
    if minimum is not None and not value >= minimum:
        raise ConfigError(f"{source} must be at least {minimum}, is {shown}")
    if maximum is not None and not value <= maximum:
        raise ConfigError(f"{source} must be at most {maximum}, is {shown}")
    if choices and value not in choices:
        raise ConfigError(f"{source} must be one of {', '.join(choices)}, is {shown!r}")


def split_keywords(
    values: Mapping[str, object], first: type[T], second: type[U], synonyms: Mapping[str, str] | None = None
) -> tuple[T, U]:
    """Makes two settings of keyword arguments, each of the fields that it has. None stands for a field's default.
    synonyms: other names -> fields. Raises ConfigError for a keyword that neither has, for one that is given twice, and
    for a value that its field can't have.
    """
    synonyms = synonyms or {}
    fields = [{field.name for field in dataclasses.fields(cls)} for cls in (first, second)]  # type: ignore[arg-type]
    known = fields[0] | fields[1]
    renamed: dict[str, object] = {}
    for name, value in values.items():
        own_name = synonyms.get(name, name)
        if own_name not in known:
            near = difflib.get_close_matches(name, [*known, *synonyms], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {name}{hint} (known: {', '.join(sorted([*known, *synonyms]))})")
        if own_name in renamed:
            raise ConfigError(f"{name}: is given twice, as {own_name} is the same")
        renamed[own_name] = value
    one, other = (
        cls(
            **{name: _taken(cls, name, value) for name, value in renamed.items() if name in names and value is not None}
        )
        for cls, names in zip((first, second), fields, strict=True)
    )
    return typing.cast(T, one), typing.cast(U, other)


def _taken(settings_class: type, name: str, value: object) -> object:
    """The value in its field's own type. Raises ConfigError if the field can't have it."""
    [field] = (field for field in dataclasses.fields(settings_class) if field.name == name)
    value_type = _value_type(settings_class, name)
    accepted = {int: numbers.Integral, float: numbers.Real}.get(value_type, value_type)
    if not isinstance(value, accepted) or (isinstance(value, bool) and value_type is not bool):
        raise ConfigError(f"{name} must be of type {value_type.__name__}, is {value!r}")
    taken = value_type(value)
    _check(taken, value, name, value_type, field.metadata)
    return taken
