"""What other engines reach in the same rows, printed and drawn beside Tandem's results.

Measured on H100s of 80GB (HBM3, 3.0 TB/s copied, about 790 TFLOP/s in bf16) with torch 2.11 and checkpoints of
benchmarks.checkpoint, each peer in process through its own LLM.generate, temperature 0.6, prefix caching on; see
docs/performance.md. The floor is arithmetic: a step reads the weights and each sequence's KV once at 3.0 TB/s, or does
its multiply-adds at 750 TFLOP/s, whichever is longer. There is no floor for two GPUs.

Through its own server, `vllm serve` 0.26.0 with 512 sequences at most, nano256's 256 requests sent at once as HTTP
streams gave 15,341 tokens/s for the 0.6B shape on one H100. benchmarks.serve measures the same with the rate inf.
"""

from collections.abc import Mapping
from typing import Any

VLLM, NANO_VLLM, FLOOR = "vLLM 0.24", "nano-vllm", "floor"

# The anchors by shape, sampling and number of GPUs; units are those of benchmarks.throughput.ROWS.
ANCHORS: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {
    ("0.6b", "temperature", 1): {
        "nano256": {VLLM: 7.52, NANO_VLLM: 8.65, FLOOR: 5.21},
        "decode_b1": {VLLM: 2.65, NANO_VLLM: 2.30, FLOOR: 0.42},
        "decode_b64": {VLLM: 3.62, NANO_VLLM: 4.07, FLOOR: 1.96},
        "decode_b256": {VLLM: 9.70, NANO_VLLM: 10.39, FLOOR: 6.67},
        "ttft_1024": {VLLM: 31.3, NANO_VLLM: 44.8, FLOOR: 1.4},
        "prefill_64x2048": {VLLM: 322_587, NANO_VLLM: 236_851, FLOOR: 672_000},
    },
    ("0.6b", "qwen3", 1): {
        "nano256": {VLLM: 7.43, FLOOR: 5.21},
        "decode_b1": {VLLM: 2.16, FLOOR: 0.42},
        "decode_b64": {VLLM: 3.73, FLOOR: 1.96},
        "decode_b256": {VLLM: 9.88, FLOOR: 6.67},
    },
    ("8b", "temperature", 1): {
        "nano256": {VLLM: 17.40, NANO_VLLM: 20.03, FLOOR: 13.8},
        "decode_b1": {VLLM: 6.84, NANO_VLLM: 8.04, FLOOR: 5.08},
        "decode_b64": {VLLM: 9.40, NANO_VLLM: 10.62, FLOOR: 7.06},
        "decode_b256": {VLLM: 17.76, NANO_VLLM: 20.29, FLOOR: 13.2},
        "ttft_1024": {VLLM: 40.5, NANO_VLLM: 74.1, FLOOR: 19.4},
        "prefill_64x2048": {VLLM: 41_116, NANO_VLLM: 38_748, FLOOR: 51_700},
    },
    ("8b", "temperature", 2): {
        "nano256": {VLLM: 10.94, NANO_VLLM: 14.76},
        "decode_b1": {VLLM: 4.53, NANO_VLLM: 6.20},
        "decode_b64": {VLLM: 5.98, NANO_VLLM: 7.85},
        "decode_b256": {NANO_VLLM: 16.43},
        "prefill_64x2048": {NANO_VLLM: 63_212},
    },
}


def anchors_of(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The anchors of each row of a results file of benchmarks.throughput; empty if its settings or device have none."""
    if report["scale"] != 1 or "H100" not in report["device"]:
        return {}
    return ANCHORS.get((report["shape"], report["sampling"], num_ranks(report)), {})


def num_ranks(report: Mapping[str, Any]) -> int:
    """The number of ranks of a run of benchmarks.throughput, from its results file."""
    return int(report["settings"].get("tp_size", 1))
