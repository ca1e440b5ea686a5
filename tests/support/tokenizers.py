"""Tokenizers that tests make: of known vocabularies, with the parts that decide how text is cut and joined."""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from tandem_scheduler.front_end.text.splitter import QWEN_PATTERN
from tandem_shared.model_folder import TOKENIZER_FILES, resolve_model

EMBEDDED = resolve_model("embedded", TOKENIZER_FILES) / "tokenizer.json"


def embedded() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED))


def qwen3_like() -> Tokenizer:
    """The embedded model's vocabulary and added tokens behind Qwen3's own normaliser and words."""
    parts = json.loads(EMBEDDED.read_text())
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    parts["normalizer"] = {"type": "NFC"}
    parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return Tokenizer.from_str(json.dumps(parts))


def byte_fallback() -> Tokenizer:
    """Like Llama 2's: words with a mark for the space, a token for each byte, and one for the end."""
    words = ["</s>", "▁", "a", "b", "▁a", "▁b", "é", "ab", "�"]
    vocabulary = {token: index for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("▁", "a"), ("▁", "b")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


class CountingTokenizer:
    """A tokenizer that counts how many tokens of its vocabulary are read one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def id_to_token(self, token_id: int) -> str | None:
        self.num_reads += 1
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token


class PanicException(BaseException):
    """Like pyo3_runtime.PanicException."""


class WatchedTokenizer:
    """A real tokenizer that keeps the texts that it was given. `on_encode` is called with each first."""

    def __init__(self, tokenizer: Tokenizer, on_encode: Callable[[str], None] = lambda text: None) -> None:
        self._tokenizer = tokenizer
        self._on_encode = on_encode
        self.texts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: bool) -> Any:
        self.texts.append(text)
        self._on_encode(text)
        return self._tokenizer.encode(text, **options)

    def encode_batch_fast(self, texts: list[str], **options: bool) -> Any:
        self.texts += texts
        self._on_encode(texts[0])
        return self._tokenizer.encode_batch_fast(texts, **options)
