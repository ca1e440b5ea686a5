"""Reads what a model folder says of generation: sampling defaults, and which tokens end a sequence. Knows no torch.

As in vLLM, a sequence ends at any eos_token_id of generation_config.json (of config.json, where that file has none) and
at the tokenizer's own eos_token, which is the only one that some folders have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem_shared.model_folder import TOKENIZER_FILE, exists
from tandem_shared.sampling_fields import MODEL_DEFAULT_FIELDS
from tandem_worker.checkpoint.config_file import ConfigFile, brief

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

IGNORED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "frequency_penalty": (0,),
    "guidance_scale": (1,),
    "max_length": (20,),
    "max_new_tokens": (),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "presence_penalty": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Keys of generation_config.json that change outputs and that Tandem doesn't apply -> the values that change nothing.

null and empty values change nothing either.
"""

GREEDY_FIELDS = ("repetition_penalty",)
"""The fields that a folder's defaults keep where do_sample is false, as they change greedy output too."""


@dataclass(frozen=True)
class GenerationDefaults:
    """The model's defaults for requests that leave sampling out."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Sampling fields by name, without those that have no default"""
    warnings: tuple[str, ...] = ()
    """For the log: what the folder asks and Tandem does not do"""


def read_generation_defaults(folder: Path, vocab_size: int) -> GenerationDefaults:
    """Reads the folder's defaults. Raises ModelError, naming file and key."""
    path = folder / GENERATION_FILE
    file = ConfigFile(path, None if exists(path) else {})
    has_eos = file.values.get("eos_token_id") is not None
    eos_token_ids = _read_eos(file if has_eos else ConfigFile(folder / "config.json"), vocab_size)
    tokenizer_eos, warnings = _read_tokenizer_eos(folder, vocab_size)
    eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *tokenizer_eos]))
    warnings += _ignored_keys(file)
    is_greedy = not file.flag("do_sample", True)
    sampling: dict[str, float] = {"temperature": 0.0} if is_greedy else {}
    for each in MODEL_DEFAULT_FIELDS:
        value = file.values.get(each.name)
        if value is None or (is_greedy and each.name not in GREEDY_FIELDS):
            continue
        if isinstance(value, bool) or not isinstance(value, int | each.kind) or not each.allows(value):
            raise file.fail(each.name, f"{brief(value)} is out of range")
        sampling[each.name] = value
    return GenerationDefaults(eos_token_ids, sampling, warnings)


def _read_eos(file: ConfigFile, vocab_size: int) -> tuple[int, ...]:
    eos = file.values.get("eos_token_id")
    eos_token_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    for token_id in eos_token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise file.fail("eos_token_id", f"{brief(token_id)} is not in the vocabulary of {vocab_size}")
    return eos_token_ids


def _ignored_keys(file: ConfigFile) -> tuple[str, ...]:
    asked = [
        f"{key} {brief(value)}"
        for key, harmless in IGNORED.items()
        if (value := file.values.get(key)) not in (None, [], {}, "", *harmless)
    ]
    return (f"{file.path}: not supported yet, and ignored: {', '.join(asked)}",) if asked else ()


def _read_tokenizer_eos(folder: Path, vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The id of tokenizer_config.json's eos_token, if there is one; and warnings."""
    path = folder / TOKENIZER_CONFIG_FILE
    if not exists(path):
        return (), ()
    file = ConfigFile(path)
    token = file.values.get("eos_token")
    if token is None:
        return (), ()
    # A token that is an AddedToken is written with all its fields.
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise file.fail("eos_token", f"must be a string or an object with 'content', is {brief(token)}")
    token_id = _find_token(folder, file, content)
    if token_id is None:
        return (), (f"{path}: eos_token: {brief(content)} is not in the tokenizer, and stops nothing",)
    if token_id >= vocab_size:
        problem = f"{brief(content)} has the id {token_id}, which the model's vocabulary of {vocab_size} does not reach"
        return (), (f"{path}: eos_token: {problem}",)
    return (token_id,), ()


def _find_token(folder: Path, tokenizer_config: ConfigFile, content: str) -> int | None:
    for file, key, token_id in _tokens_named(folder, tokenizer_config, content):
        if type(token_id) is not int or token_id < 0:
            raise file.fail(key, f"{brief(content)} has the id {brief(token_id)}")
        return token_id
    return None


def _tokens_named(folder: Path, tokenizer_config: ConfigFile, content: str) -> Iterator[tuple[ConfigFile, str, Any]]:
    """The ids that the folder gives a token, each with the file and the key where it stands.

    tokenizer.json comes before tokenizer_config.json, and added tokens before the vocabulary.
    """
    if exists(folder / TOKENIZER_FILE):
        file = ConfigFile(folder / TOKENIZER_FILE)
        for token in file.typed("added_tokens", list):
            if isinstance(token, dict) and token.get("content") == content:
                yield file, "added_tokens", token.get("id")
        vocabulary = file.typed("model", dict).get("vocab")
        if isinstance(vocabulary, dict) and content in vocabulary:
            yield file, "model", vocabulary[content]
        elif isinstance(vocabulary, list):
            # A Unigram's vocabulary is a list of (token, score), in the order of the ids.
            for token_id, pair in enumerate(vocabulary):
                if isinstance(pair, list) and pair[:1] == [content]:
                    yield file, "model", token_id
    for key, token in tokenizer_config.typed("added_tokens_decoder", dict).items():
        if isinstance(token, dict) and token.get("content") == content:
            yield tokenizer_config, "added_tokens_decoder", int(key) if key.isdecimal() and len(key) < 20 else key
