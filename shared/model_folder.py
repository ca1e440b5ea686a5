"""Where a model's files are: a folder, the one inside the package, or a download from the hub. Reads no weights."""

import importlib.resources
from pathlib import Path

from shared.errors import ModelError

EMBEDDED_MODEL = "embedded"

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
ALL_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json"]


def resolve_model(name: str, files: list[str]) -> Path:
    """The folder of a model: `name` if that is a folder, the embedded model, else the hub's files of that id.

    Raises ModelError where there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if name == EMBEDDED_MODEL:
        return Path(str(importlib.resources.files("tandem"))) / "embedded_model"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: no such folder, and no hub id of the form OWNER/NAME")
    # Slow to import, and most models are folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{name}: no such folder, and the hub gave nothing: {error}") from error
