"""Which attention backend is taken under which conditions, and what is said where the wanted one can't run."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_worker.attention.choice import Conditions, choose
from tandem_worker.startup import build_runner

HOPPER = Conditions(
    capability=(9, 0), dtype=torch.bfloat16, head_dim=128, widths=(1024, 3072, 2048), block_size=256,
    installed=frozenset({"triton", "flash_attn"}),
)  # fmt: skip


def test_the_fastest_that_can_run_is_taken() -> None:
    assert choose("auto", HOPPER) == "triton"
    assert choose("auto", replace(HOPPER, block_size=16)) == "triton"
    assert choose("auto", replace(HOPPER, installed=frozenset())) == "torch"
    assert choose("auto", replace(HOPPER, capability=None)) == "torch"


@pytest.mark.parametrize("name", ["triton", "flash-attn", "torch"])
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert choose(name, HOPPER) == name


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"capability": None}, "it needs a GPU"),
        ({"installed": frozenset({"flash_attn"})}, "triton is not installed"),
        ({"capability": (7, 5)}, "older than compute capability 8.0"),
        ({"dtype": torch.float32}, "it computes in bfloat16, not torch.float32"),
        ({"head_dim": 80}, "head_dim 80 is not 32, 64 or 128"),
        ({"widths": (1000, 3072, 2048)}, "is not a multiple of 64"),
    ],
)
def test_what_our_kernels_cant_do_is_left_to_torch(changes: dict[str, Any], problem: str) -> None:
    conditions = replace(HOPPER, **changes)
    assert choose("auto", conditions) == "torch"
    for name in ("triton", "flash-attn"):
        with pytest.raises(ConfigError, match=f"--attention-backend {name}: .*{problem}"):
            choose(name, conditions)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"installed": frozenset({"triton"})}, r"install tandem-llm\[flash-attn\]"),
        ({"capability": (8, 0)}, r"only been tried on GPUs of compute capability 9.0 \(Hopper\)"),
        ({"capability": (10, 0)}, "only been tried on GPUs"),
        ({"head_dim": 32}, "only been tried with head_dim 64 and 128, not 32"),
        ({"block_size": 16}, "--block-size to be a multiple of 256, not 16"),
    ],
)
def test_flash_attn_is_refused_where_it_has_not_been_tried(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend flash-attn: it .*{problem}"):
        choose("flash-attn", replace(HOPPER, **changes))
    assert choose("auto", replace(HOPPER, **changes)) == "triton"


def test_a_fallback_on_a_gpu_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    choose("auto", replace(HOPPER, capability=None))
    assert not caplog.records
    choose("auto", replace(HOPPER, head_dim=48))
    assert "plain torch instead of the fast kernels: head_dim 48 is not 32, 64 or 128" in caplog.text


@pytest.mark.parametrize("name", ["triton", "flash-attn"])
def test_a_worker_on_a_cpu_refuses_kernels(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--attention-backend {name}: it needs a GPU"):
        build_runner(WorkerSettings(device="cpu", attention_backend=name))
