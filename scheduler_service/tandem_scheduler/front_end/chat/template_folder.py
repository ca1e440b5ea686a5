"""Reads the chat templates of a model's folder, and the special tokens that templates name. Renders nothing.

The files are those that transformers reads, in its order: chat_template.jinja with additional_chat_templates/*.jinja,
or else chat_template in tokenizer_config.json. Last comes chat_template.json, where processors keep theirs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_shared.errors import ModelError
from tandem_shared.model_folder import exists, read_json, read_json_bytes

DEFAULT = "default"
TOOL_USE = "tool_use"
KEY = "chat_template"
MAX_TEMPLATE_CHARACTERS = 1024 * 1024
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that transformers gives to templates as variables."""


@dataclass(frozen=True)
class ChatTemplates:
    """A model's chat templates by name, as Jinja text, and its special tokens by the names of SPECIAL_TOKENS."""

    sources: dict[str, str]
    special_tokens: dict[str, str]


def read_chat_templates(folder: Path) -> ChatTemplates | None:
    """None if the folder has no chat template. Raises ModelError, which names file and key, where one can't be read."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path, is_optional=True)
    processor_path = folder / "chat_template.json"
    sources = (
        _read_files(folder)
        or _sources_of(config.get(KEY), config_path)
        or _sources_of(read_json(processor_path, is_optional=True).get(KEY), processor_path)
    )
    return ChatTemplates(sources, _special_tokens_of(config)) if sources else None


def _read_files(folder: Path) -> dict[str, str]:
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if exists(folder / "chat_template.jinja"):
        paths[DEFAULT] = folder / "chat_template.jinja"
    sources = {}
    for name, path in paths.items():
        try:
            sources[name] = _checked(read_json_bytes(path).decode(), path)
        except UnicodeDecodeError as error:
            raise ModelError(f"{path}: {error}") from error
    return sources


def _sources_of(value: object, path: Path) -> dict[str, str]:
    """The templates of a value: a text, or a list of objects with name and template."""
    if value is None:
        return {}
    named = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    if not isinstance(named, list):
        raise ModelError(f"{path}: {KEY} must be a text or a list")
    sources = {}
    for each in named:
        name, template = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ModelError(f"{path}: {KEY} has an element without name and template")
        sources[name] = _checked(template, path)
    return sources


def _checked(template: str, path: Path) -> str:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise ModelError(f"{path}: {KEY} has more than {MAX_TEMPLATE_CHARACTERS} characters")
    return template


def _special_tokens_of(config: dict[str, Any]) -> dict[str, str]:
    """A token is a text, or an object that has it as `content`."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens
