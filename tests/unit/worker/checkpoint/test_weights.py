"""Checkpoints as people have them: which files are read, which tensors are taken, what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tandem_shared.errors import ModelError
from tandem_worker.checkpoint.targets import CheckpointTarget
from tandem_worker.checkpoint.weights import load_weights
from tandem_worker.ranks.shard import Shard
from tests.support.model_factory import save_random_model
from tests.unit.shared.test_model_folder import SPECIAL, make_special
from tests.unit.worker.ranks.test_shard import load
from tests.unit.worker.runners.test_exactness import make_runner

MOE: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}


def one_target() -> tuple[dict[str, CheckpointTarget], torch.Tensor]:
    """The targets of a model that has one tensor, "a" of shape (2, 3), and that tensor."""
    view = torch.full((2, 3), torch.nan)
    return {"a": CheckpointTarget(view, (2, 3), (slice(None), slice(None)))}, view


def read(folder: Path) -> torch.Tensor:
    targets, view = one_target()
    load_weights(folder, targets)
    return view


def write_index(folder: Path, *names: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_experts_are_the_same_model(size: int, tmp_path: Path) -> None:
    """As transformers 5 saves them with save_original_format=False, whole and for every rank."""
    apart = save_random_model(tmp_path / "apart", **MOE)
    fused = save_random_model(tmp_path / "fused", save_original_format=False, **MOE)
    names = load_file(fused / "model.safetensors").keys()
    assert {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= names
    assert make_runner(apart).info.fingerprint == make_runner(fused).info.fingerprint
    for rank in range(size):
        (expected, num_bytes), (model, num_read) = load(apart, Shard(rank, size)), load(fused, Shard(rank, size))
        assert num_read == num_bytes
        for one, other in zip(expected.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((4, 48, 32), r"experts\.3\.gate_proj\.weight: the model has no such tensor"),
        ((2, 48, 32), r"experts\.2\.gate_proj\.weight and 1 others: missing"),
        ((3, 46, 32), r"experts\.0\.gate_proj\.weight: has shape \[23, 32\], must be \[24, 32\]"),
        ((3, 49, 32), r"experts\.gate_up_proj: the model has no such tensor"),
        ((3, 48), r"experts\.gate_up_proj: the model has no such tensor"),
        ((2**40, 48, 0), r"experts\.0\.gate_proj\.weight: has shape \[24, 0\]"),
    ],
)
def test_fused_experts_of_a_wrong_shape_are_refused(shape: tuple[int, ...], problem: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, save_original_format=False, **MOE)
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.layers.1.mlp.experts.gate_up_proj": torch.zeros(shape)}, path)
    with pytest.raises(ModelError, match=problem):
        load(folder, Shard())


def test_shards_without_an_index_are_read_in_order(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "shards", max_shard_size="20KB")
    _, expected = load(folder, Shard())
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "model.safetensors.index.json").unlink()
    # Some systems leave such a file beside every file; it is not a shard.
    (folder / "._model-00001.safetensors").write_bytes(b"Mac OS X")
    _, num_bytes = load(folder, Shard())
    assert num_bytes == expected


def test_an_empty_folder_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json nor other"):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"y\.safetensors: a: is in the checkpoint twice"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "weight_scale_inv", "input_scale", "weight_packed"])
def test_quantised_tensors_are_called_so(name: str, tmp_path: Path) -> None:
    save_file({f"layers.0.q_proj.{name}": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"q_proj\.{name}: quantised models are not supported yet"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.bool])
def test_a_weight_that_is_no_float_is_refused_not_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a: is of type .*; quantised models are not supported yet"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    assert read(tmp_path).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "name",
    [
        "../x/model.safetensors",
        "/etc/shadow",
        "x/model.safetensors",
        "./model.safetensors",
        "..",
        ".",
        "",
        "a" * 5000,
        5,
        None,
        ["a"],
    ],
)
def test_an_index_names_only_files_in_its_folder(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for place in (folder, tmp_path / "x", folder / "x"):
        place.mkdir()
        save_file({"a": torch.zeros(2, 3)}, place / "model.safetensors")
    write_index(folder, name)
    with pytest.raises(ModelError, match=r"index\.json: weight_map: .* is not the name of a file in the folder"):
        read(folder)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("[]", "holds no JSON object"),
        ("no json", "Expecting value"),
        ("{}", "weight_map: is missing or empty"),
        ('{"weight_map": {}}', "weight_map: is missing or empty"),
        ('{"weight_map": ["a"]}', "weight_map: must be a dict"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_broken_index_is_refused_by_file_and_key(index: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=rf"model\.safetensors\.index\.json: {problem}"):
        read(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, "model-00001-of-00002.safetensors", "with\0null")
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: .*No such file"):
        read(tmp_path)


def test_links_to_files_outside_are_read_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file({"a": torch.ones(2, 3)}, tmp_path / "blob")
    (folder / "shard.safetensors").symlink_to("../blob")
    write_index(folder, "shard.safetensors")
    assert read(folder).sum() == 6


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "shard.safetensors", "model.safetensors.index.json"])
@pytest.mark.timeout(10)
def test_only_regular_files_are_opened(name: str, kind: str, tmp_path: Path) -> None:
    make_special(tmp_path / name, kind)
    with pytest.raises(ModelError, match="is not a regular file"):
        read(tmp_path)


HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 9) + b"{" * 9,
        struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + bytes(23),
    ],
)
def test_a_broken_header_is_refused_by_its_file(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(contents)
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        read(tmp_path)


NUMBERS = st.integers(-1, 30) | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, None, "2", [1]])
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F4", "I64", "BOOL", "C64", "X", 5, None])


@settings(deadline=None)
@given(
    dtype=DTYPES,
    shape=st.lists(NUMBERS, max_size=4),
    offsets=st.lists(NUMBERS, max_size=3),
    name=st.sampled_from(["a", "b", "__metadata__", "model.layers.0.mlp.experts.down_proj"]),
    num_bytes=st.sampled_from([0, 12, 24, 48]),
)
def test_any_header_gives_weights_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, shape: Any, offsets: Any, name: str, num_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
    try:
        assert read(folder).shape == (2, 3)
    except ModelError as error:
        assert "model.safetensors: " in str(error)
