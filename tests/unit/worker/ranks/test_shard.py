"""What each rank of a tensor-parallel group holds, and reads, of a checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tandem_shared.errors import ConfigError
from tandem_worker.checkpoint.weights import load_weights
from tandem_worker.layers.operations import TorchOperations
from tandem_worker.models.qwen3 import Qwen3
from tandem_worker.models.registry import read_model_config
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard
from tests.support.model_factory import save_random_model

CONFIGS: dict[str, dict[str, Any]] = {
    # No group size divides this vocabulary; the last of four ranks has less of it than the others.
    "dense": {"vocab_size": 259},
    # With four ranks each of two KV heads is held twice. The last rank has nothing of a vocabulary of three.
    "tied": {"vocab_size": 3, "tie_word_embeddings": True},
    "moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
}
REPLICATED = ("norm", "mlp.gate.")
BY_COLUMN = ("o_proj", "down_proj")


def load(folder: Path, shard: Shard) -> tuple[Qwen3, int]:
    config = read_model_config(folder)
    model = Qwen3(config, TorchOperations(), 64, torch.float32, Communicator(shard))
    for target in model.checkpoint_targets().values():
        target.view.fill_(torch.nan)
    loaded = load_weights(folder, model.checkpoint_targets(), model.tied_weights)
    return model, loaded.num_bytes


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_ranks_parts_put_together_are_the_checkpoint(config: dict[str, Any], size: int, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, **config)
    ranks = [load(folder, Shard(rank, size)) for rank in range(size)]
    targets = [model.checkpoint_targets() for model, _ in ranks]
    num_bytes = [0] * size
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in targets[0]:
            tensor, views = file.get_tensor(name), [rank_targets[name].view for rank_targets in targets]
            if any(part in name for part in REPLICATED):
                assert all(torch.equal(view, tensor) for view in views)
            elif "k_proj" in name or "v_proj" in name:
                heads, per_rank = tensor.view(2, 16, -1), max(1, 2 // size)
                for rank, view in enumerate(views):
                    first = rank * 2 // size
                    assert torch.equal(view, heads[first : first + per_rank].flatten(0, 1))
            else:
                dim = 1 if any(part in name for part in BY_COLUMN) else 0
                assert torch.equal(torch.cat(views, dim), tensor)
                if "embed_tokens" not in name and "lm_head" not in name:
                    assert {view.numel() for view in views} == {tensor.numel() // size}
            for rank, view in enumerate(views):
                num_bytes[rank] += view.nbytes
    # A rank reads no more than it holds, and all its memory is filled.
    assert [read for _, read in ranks] == num_bytes
    for model, _ in ranks:
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "does not divide num_attention_heads, 6"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, "neither divides num_key_value_heads, 3"),
        ({"intermediate_size": 50}, "does not divide intermediate_size, 50"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 30},
            "does not divide moe_intermediate_size, 30",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    model_config = read_model_config(save_random_model(tmp_path, **config))
    Shard(0, 1).check(model_config)
    with pytest.raises(ConfigError, match=f"--tp-size 4 {problem}"):
        Shard(0, 4).check(model_config)


MEASURE = """
import sys
from pathlib import Path
from tests.unit.worker.ranks.test_shard import load
from tandem_worker.ranks.shard import Shard

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before = peak_bytes()
_, num_bytes = load(Path(sys.argv[1]), Shard(int(sys.argv[2]), int(sys.argv[3])))
print(num_bytes, peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_rank_of_four_needs_a_fraction_of_the_host_memory(tmp_path: Path) -> None:
    """The memory is that of the weights and of the file's mapped pages. Where a rank reads some columns of a weight,
    all pages of the weight are mapped.
    """
    folder = save_random_model(
        tmp_path, dtype="float32", vocab_size=20000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6
    )
    size = (folder / "model.safetensors").stat().st_size

    def measure(rank: int, num_ranks: int) -> tuple[int, int]:
        command = [sys.executable, "-c", MEASURE, str(folder), str(rank), str(num_ranks)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        num_bytes, peak = map(int, output.split())
        return num_bytes, peak

    num_bytes, peak = measure(0, 1)
    assert num_bytes == pytest.approx(size, rel=0.01)
    assert peak > 1.8 * size
    for rank in (0, 3):
        num_bytes, rank_peak = measure(rank, 4)
        assert num_bytes == pytest.approx(size / 4, rel=0.02)
        assert rank_peak < 0.4 * peak
