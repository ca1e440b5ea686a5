"""How far bf16 eager mode on a GPU is from transformers in float32, on the Qwen3-0.6B shape with random weights.

Usage: python -m benchmarks.gpu_exactness OUT_JSON TOKENIZER_DIR TEXT [COMMIT]

Two comparisons on real text: teacher-forced logits, relative error per position, through prefill and decode steps;
and greedy generation through both services over gRPC, with the first token that differs and the gap between the
reference's two likeliest tokens there.
"""

import datetime
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.teacher_forcing import relative_errors, teacher_forced_logits
from shared.config import SchedulerSettings, WorkerSettings
from tandem.client import TandemClient
from tandem.processes import Services
from tandem.sampling_params import SamplingParams
from worker_service.startup import build_runner

NUM_PROMPTS = 16
PROMPT_LEN = 128
OUTPUT_LEN = 128
TEACHER_FORCED_LEN = 1024
NUM_PREFILL = 768


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    """The 0.6B shape, weights of standard deviation 0.02 in bf16."""
    torch.manual_seed(0)
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
        eos_token_id=151645,
        bos_token_id=151643,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)


@torch.inference_mode()
def compare_logits(folder: Path, reference: Any, ids: list[int]) -> dict[str, Any]:
    runner = build_runner(WorkerSettings(model=str(folder), dtype="bfloat16", device="cuda", num_blocks=1024))
    logits = teacher_forced_logits(runner, ids, NUM_PREFILL)
    expected = reference(torch.tensor([ids], device="cuda")).logits[0]
    parts = {"prefill": slice(0, NUM_PREFILL), "decode": slice(NUM_PREFILL, None)}
    return {
        f"{name}_{statistic}": float(getattr(relative_errors(logits[part], expected[part]), statistic)())
        for name, part in parts.items()
        for statistic in ("max", "mean")
    }


def generate(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy output through both services, in bf16, all prompts at once."""
    worker = WorkerSettings(model=str(folder), dtype="bfloat16", device="cuda", port=0, gpu_memory_utilization=0.5)
    scheduler = SchedulerSettings(model=str(folder), port=0)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    with Services(worker, scheduler) as services:
        services.wait_until_ready(120)
        with TandemClient(services.address) as client, ThreadPoolExecutor(len(prompts)) as pool:
            replies = pool.map(lambda prompt: client.generate(prompt, params), prompts)
            return [list(reply.choices[0].token_ids) for reply in replies]


@torch.inference_mode()
def first_difference(reference: Any, prompt: list[int], output: list[int]) -> dict[str, Any]:
    """Where the reference, given the same tokens so far, would have taken another."""
    logits = reference(torch.tensor([prompt + output[:-1]], device="cuda")).logits[0, len(prompt) - 1 :]
    top = logits.topk(2, dim=-1)
    differs = (top.indices[:, 0].cpu() != torch.tensor(output)).nonzero()
    if not len(differs):
        return {"position": None}
    position = int(differs[0])
    gap = float(top.values[position, 0] - top.values[position, 1])
    return {
        "position": position,
        "reference_top_two_gap": gap,
        "took_second": bool(top.indices[position, 1] == output[position]),
    }


def main() -> None:
    out, tokenizer_folder, text_path = map(Path, sys.argv[1:4])
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    ids = tokenizer.encode(text_path.read_text()[:200_000]).ids
    stride = (len(ids) - PROMPT_LEN) // NUM_PROMPTS
    prompts = [ids[i * stride : i * stride + PROMPT_LEN] for i in range(NUM_PROMPTS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, tokenizer_folder)
        outputs = generate(folder, prompts)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
        errors = compare_logits(folder, reference, ids[:TEACHER_FORCED_LEN])
        differences = [first_difference(reference, p, o) for p, o in zip(prompts, outputs, strict=True)]
    result = {
        "what": "bf16 eager against transformers float32, Qwen3-0.6B shape, random weights, real text",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": sys.argv[4] if len(sys.argv) > 4 else "unknown",
        "teacher_forced_relative_error": {"tokens": TEACHER_FORCED_LEN, **errors},
        "greedy": {
            "prompts": NUM_PROMPTS,
            "prompt_tokens": PROMPT_LEN,
            "output_tokens": OUTPUT_LEN,
            "identical": sum(d["position"] is None for d in differences),
            "first_differences": differences,
        },
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["teacher_forced_relative_error"]), result["greedy"]["identical"], differences)


if __name__ == "__main__":
    main()
