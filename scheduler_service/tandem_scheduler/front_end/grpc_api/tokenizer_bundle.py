"""The model's tokenizer as a zip file, which gateways fetch to tokenize and to render chats themselves."""

import hashlib
import io
import zipfile
from pathlib import Path

from tandem_shared.model_folder import TOKENIZER_FILES, exists, read_json_bytes

CHUNK_BYTES = 64 * 1024
"""The size of the pieces in which a bundle is sent."""


def tokenizer_bundle(folder: Path) -> tuple[bytes, str]:
    """The zip file, and its SHA-256 digest in hexadecimal. Equal files give equal bytes. Raises ModelError for a file
    that can't be read.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        # Templates in a folder of their own are alternatives, which gateways do not look for.
        for name in TOKENIZER_FILES:
            if "/" not in name and exists(folder / name):
                # Without the file's time, so that servers of one model send the same.
                bundle.writestr(zipfile.ZipInfo(name), read_json_bytes(folder / name), zipfile.ZIP_DEFLATED)
    contents = buffer.getvalue()
    return contents, hashlib.sha256(contents).hexdigest()
