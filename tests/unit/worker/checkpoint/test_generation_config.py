"""generation_config.json and the tokenizer's eos_token: what ends a sequence, sampling defaults, what is ignored."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram

from tandem_shared.errors import ModelError
from tandem_worker.checkpoint.generation_config import GenerationDefaults, read_generation_defaults

VOCAB_SIZE = 16
VOCABULARY = {"a": 0, "b": 1, "<in vocabulary>": 2}


def write_folder(folder: Path, **files: Any) -> Path:
    """A folder of these JSON files, and a tokenizer of ids 0 to 2 with two added tokens, 3 and 4."""
    tokenizer = Tokenizer(BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), "<turn>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"config": {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path, **files: Any) -> GenerationDefaults:
    return read_generation_defaults(write_folder(folder, **files), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # The tokenizer's alone: a string, an AddedToken, and a token of the vocabulary itself.
        ({"tokenizer_config": {"eos_token": "<end>"}}, (3,)),
        ({"tokenizer_config": {"eos_token": {"content": "<turn>", "lstrip": False, "special": True}}}, (4,)),
        ({"tokenizer_config": {"eos_token": "<in vocabulary>"}}, (2,)),
        # The tokenizer's and generation_config's, or config's where generation_config has none.
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<end>"}}, (5, 3)),
        ({"generation_config": {"eos_token_id": [5, 3]}, "tokenizer_config": {"eos_token": "<end>"}}, (5, 3)),
        ({"generation_config": {}, "config": {"eos_token_id": 6}, "tokenizer_config": {"eos_token": "<end>"}}, (6, 3)),
        ({"config": {"eos_token_id": [6, 7]}}, (6, 7)),
        ({"generation_config": {"eos_token_id": 5}, "config": {"eos_token_id": 6}}, (5,)),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": None}}, (5,)),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {}}, (5,)),
        # A token that is in tokenizer_config.json alone.
        (
            {"tokenizer_config": {"eos_token": "<new>", "added_tokens_decoder": {"9": {"content": "<new>"}}}},
            (9,),
        ),
        ({}, ()),
    ],
)
def test_eos_is_the_tokenizers_and_the_configs(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    defaults = read(tmp_path, **files)
    assert defaults.eos_token_ids == expected
    assert not defaults.warnings


def test_eos_is_found_in_a_unigram_vocabulary(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"eos_token": "</s>"})
    Tokenizer(Unigram([("<unk>", 0.0), ("</s>", 0.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    assert read_generation_defaults(tmp_path, VOCAB_SIZE).eos_token_ids == (1,)


def test_an_eos_that_can_never_come_is_a_warning(tmp_path: Path) -> None:
    config = {"eos_token": "<far>", "added_tokens_decoder": {"16": {"content": "<far>"}}}
    for tokenizer_config, problem in (
        ({"eos_token": "<gone>"}, "eos_token: '<gone>' is not in the tokenizer"),
        (config, "eos_token: '<far>' has the id 16, which the model's vocabulary of 16 does not reach"),
    ):
        defaults = read(tmp_path, tokenizer_config=tokenizer_config, generation_config={"eos_token_id": 5})
        assert defaults.eos_token_ids == (5,)
        [warning] = defaults.warnings
        assert "tokenizer_config.json: " + problem in warning


def test_without_a_tokenizer_its_eos_is_only_missed(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer_config={"eos_token": "<end>"})
    (tmp_path / "tokenizer.json").unlink()
    defaults = read_generation_defaults(tmp_path, VOCAB_SIZE)
    assert (defaults.eos_token_ids, len(defaults.warnings)) == ((), 1)


@pytest.mark.parametrize(
    ("generation_config", "ignored"),
    [
        ({"frequency_penalty": 0.5}, ["frequency_penalty 0.5"]),
        ({"no_repeat_ngram_size": 3, "typical_p": 0.9}, ["no_repeat_ngram_size 3", "typical_p 0.9"]),
        ({"max_new_tokens": 2048, "suppress_tokens": [5]}, ["max_new_tokens 2048", "suppress_tokens [5]"]),
        # Values that change nothing, as transformers 4 wrote them into every file.
        (
            {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1, "num_beams": 1, "max_length": 20,
             "bad_words_ids": None, "suppress_tokens": [], "min_length": 0, "guidance_scale": None},
            [],
        ),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "transformers_version": "5.0"}, []),
    ],
)  # fmt: skip
def test_what_is_ignored_is_a_warning(generation_config: dict[str, Any], ignored: list[str], tmp_path: Path) -> None:
    warnings = read(tmp_path, generation_config=generation_config).warnings
    assert len(warnings) == bool(ignored)
    for text in ignored:
        assert "generation_config.json: not supported yet, and ignored: " in warnings[0] and text in warnings[0]


def test_greedy_models_are_warned_of_too(tmp_path: Path) -> None:
    defaults = read(tmp_path, generation_config={"do_sample": False, "no_repeat_ngram_size": 3})
    assert defaults.sampling == {"temperature": 0.0}
    assert "no_repeat_ngram_size 3" in defaults.warnings[0]


def test_greedy_models_keep_what_changes_greedy_output(tmp_path: Path) -> None:
    asked = {"do_sample": False, "repetition_penalty": 1.05, "temperature": 0.6, "top_k": 20}
    assert read(tmp_path, generation_config=asked).sampling == {"temperature": 0.0, "repetition_penalty": 1.05}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"generation_config": {"eos_token_id": 16}}, r"generation_config\.json: eos_token_id: 16 is not in the voc"),
        ({"generation_config": {"eos_token_id": [[1]]}}, r"generation_config\.json: eos_token_id: "),
        ({"generation_config": {"eos_token_id": True}}, r"generation_config\.json: eos_token_id: "),
        ({"config": {"eos_token_id": "x"}}, r"/config\.json: eos_token_id: 'x'"),
        ({"generation_config": {"do_sample": "no"}}, r"generation_config\.json: do_sample: must be true or false"),
        ({"generation_config": {"temperature": [1]}}, r"generation_config\.json: temperature: "),
        ({"generation_config": {"top_k": 10**400}}, r"generation_config\.json: top_k: "),
        ({"generation_config": {"top_p": 0}}, r"generation_config\.json: top_p: 0 is out of range"),
        ({"generation_config": {"top_p": 1e-60}}, r"generation_config\.json: top_p: 1e-60 is out of range"),
        ({"generation_config": {"temperature": 1e39}}, r"generation_config\.json: temperature: 1e\+39 is out of range"),
        ({"generation_config": {"top_k": True}}, r"generation_config\.json: top_k: "),
        ({"tokenizer_config": {"eos_token": 5}}, r"tokenizer_config\.json: eos_token: must be a string"),
        ({"tokenizer_config": {"eos_token": {}}}, r"tokenizer_config\.json: eos_token: must be a string"),
        (
            {"tokenizer_config": {"eos_token": "x", "added_tokens_decoder": {"-1": {"content": "x"}}}},
            r"tokenizer_config\.json: added_tokens_decoder: 'x' has the id '-1'",
        ),
        (
            {"tokenizer_config": {"eos_token": "x"}, "tokenizer": {"added_tokens": [{"content": "x", "id": -1}]}},
            r"tokenizer\.json: added_tokens: 'x' has the id -1",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_file_and_key(files: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=problem):
        read(tmp_path, **files)
