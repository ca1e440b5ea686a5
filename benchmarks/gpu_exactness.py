"""How far fast mode in bf16 on a GPU is from transformers in float32, on the Qwen3-0.6B shape with random weights.

Usage: python -m benchmarks.gpu_exactness OUT_JSON TOKENIZER_JSON TEXT [COMMIT]

First the logit error is measured by teacher forcing, through prefill chunks and decode steps. Then the outputs of both
services over gRPC, greedy and seeded, are compared with the reference on the same tokens. Where the reference would
have taken another token, the scores of the two must be closer in the reference than NUM_ERRORS times the largest logit
error; otherwise the exit status is 1. The reference reads the tokens of the output, so each position is judged by
itself.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import write_checkpoint
from benchmarks.common import BenchmarkError, header, write_json
from benchmarks.teacher_forcing import ForcedText, logits_through_plans, relative_errors
from tandem.client import TandemClient
from tandem.processes import Services
from tandem.sampling_params import SamplingParams
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists, adjusts_logits
from tandem_worker.runners.logits_stage import adjust
from tandem_worker.runners.sampler import gumbel_noise, truncate
from tandem_worker.startup import build_runner

NUM_ERRORS = 4
NUM_PROMPTS = 64
PROMPT_LENS = (16, 600)
OUTPUT_LEN = 128
FORCED_LEN = 704
FORCED_PROMPT_LENS = (16, 127, 128, 129, 300, 450, 575, 640)
MAX_CHUNK_TOKENS = 256
FAST = {
    "dtype": "bfloat16",
    "device": "cuda",
    "attention_backend": "triton",
    "num_blocks": 4096,
    "max_num_seqs": NUM_PROMPTS,
}
FAST_SETTINGS = WorkerSettings(**FAST)  # type: ignore[arg-type]
SAMPLINGS = {
    "greedy": RowSampling(temperature=0.0),
    "temperature": RowSampling(temperature=0.6),
    "top_k_top_p": RowSampling(temperature=0.6, top_k=20, top_p=0.95),
}
TURNS = ("greedy", "temperature", "greedy", "top_k_top_p")

SAME, NEAR_TIE, NEAR_CUT, FAILED = KINDS = ("same", "near_tie", "near_cut", "failed")


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is sampled from."""

    prompt: list[int]
    sampling: RowSampling
    lists: SamplingLists = NO_LISTS


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on n tokens: the kind of each, and the gap between its score and the best that the reference could
    take, which is inf if the reference could not take the token.
    """

    kinds: list[str]
    gaps: list[float]


def judge(
    scaled: torch.Tensor, is_kept: torch.Tensor, noise: torch.Tensor, token_ids: torch.Tensor, tolerance: float
) -> Verdicts:
    """Judges given tokens (n,) by the reference's logits over the temperature, by what its truncation keeps of them,
    and by the noise, each (n, vocab_size). The reference takes the best sum of logit and noise.

    NEAR_TIE: the token was kept, and its score is below the best by less than tolerance. NEAR_CUT: the same is true if
    tokens whose logits are within tolerance of the smallest kept one count as kept or as cut, whichever helps the
    token.
    """
    scores = scaled + noise
    cut = scaled.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)
    may_be_kept, must_be_kept = scaled > cut - tolerance, scaled >= cut + tolerance

    def score_among(candidates: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~candidates, -torch.inf).gather(1, token_ids[:, None])[:, 0]

    best, choice = scores.masked_fill(~is_kept, -torch.inf).max(-1)
    gap = best - score_among(is_kept)
    gap_at_best = scores.masked_fill(~must_be_kept, -torch.inf).amax(-1) - score_among(may_be_kept)
    kinds = np.full(len(token_ids), FAILED, dtype=object)
    for kind, has_it in ((NEAR_CUT, gap_at_best < tolerance), (NEAR_TIE, gap < tolerance), (SAME, choice == token_ids)):
        kinds[has_it.cpu().numpy()] = kind
    return Verdicts(kinds.tolist(), gap.tolist())


@torch.inference_mode()
def judge_output(reference: Any, request: Request, output: list[int], logit_error: float) -> Verdicts:
    """Judges a request's output by the transformers model `reference`; logit_error is the largest that is measured."""
    logits = reference(
        torch.tensor([request.prompt + output[:-1]], device=reference.device), logits_to_keep=len(output)
    ).logits[0]
    sampling, lists = request.sampling, request.lists
    if adjusts_logits(sampling, lists):
        adjusted = [adjust(line, sampling, lists, request.prompt, output[:place]) for place, line in enumerate(logits)]
        logits = torch.stack(adjusted)
    temperature = sampling.temperature or 1.0
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    # The position of each token in its sequence.
    positions = torch.arange(len(output), device=logits.device) + len(request.prompt)
    is_kept = torch.isfinite(
        truncate(
            scaled,
            torch.full_like(positions, sampling.top_k),
            torch.full_like(positions, sampling.top_p, dtype=scaled.dtype),
            torch.full_like(positions, sampling.min_p, dtype=scaled.dtype),
        )
    )
    noise = torch.zeros_like(scaled)
    if sampling.temperature > 0:
        seed, choice_index = (torch.full_like(positions, n) for n in (sampling.seed, sampling.choice_index))
        noise = gumbel_noise(seed, choice_index, positions, logits.shape[1]).to(scaled.dtype)
    token_ids = torch.tensor(output, device=logits.device)
    return judge(scaled, is_kept, noise, token_ids, NUM_ERRORS * logit_error / temperature)


@torch.inference_mode()
def measure_logit_error(runner: Any, reference: Any, texts: Sequence[ForcedText]) -> dict[str, Any]:
    """Errors of a CudaRunner's logits against the reference: after the prompts, and after each later token."""
    relative, largest = [], 0.0
    for text, logits in zip(texts, logits_through_plans(runner, texts, MAX_CHUNK_TOKENS), strict=True):
        ids = torch.tensor([text.token_ids], device=reference.device)
        expected = reference(ids, logits_to_keep=len(logits)).logits[0]
        relative.append(relative_errors(logits, expected))
        largest = max(largest, float((logits - expected).abs().max()))
    decode_errors = np.concatenate([errors[1:] for errors in relative])
    return {
        "prompts": len(texts),
        "relative_max_after_prompts": max(float(errors[0]) for errors in relative),
        "decode_positions": len(decode_errors),
        "relative_max_decoding": float(decode_errors.max()),
        "relative_mean_decoding": float(decode_errors.mean()),
        "absolute_max": largest,
    }


def generate(folder: Path, requests: Sequence[Request]) -> list[list[int]]:
    """The outputs of both services in fast mode, all requests at once."""

    def output(request: Request) -> list[int]:
        # Every field is set, as the checkpoint has defaults of its own.
        row = request.sampling
        params = SamplingParams(
            temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p, seed=row.seed,
            max_tokens=OUTPUT_LEN, ignore_eos=True,
        )  # fmt: skip
        return list(client.generate(request.prompt, params).choices[0].token_ids)

    with Services(
        replace(FAST_SETTINGS, model=str(folder), port=0), SchedulerSettings(model=str(folder), port=0)
    ) as services:
        services.wait_until_ready(300)
        with TandemClient(services.address) as client, ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(output, requests))


def summarize(verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """Counts over the outputs of one sampling."""
    firsts = [next((kind for kind in verdict.kinds if kind != SAME), SAME) for verdict in verdicts]
    kinds = [kind for verdict in verdicts for kind in verdict.kinds]
    gaps = [
        gap for verdict in verdicts for kind, gap in zip(verdict.kinds, verdict.gaps, strict=True) if kind == NEAR_TIE
    ]
    return {
        "outputs": len(firsts),
        "outputs_by_first_difference": {kind: Counter(firsts)[kind] for kind in KINDS},
        "positions": len(kinds),
        "positions_by_difference": {kind: Counter(kinds)[kind] for kind in KINDS},
        "largest_near_tie": max(gaps, default=None),
    }


def cut_prompts(ids: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """Slices of the text, evenly spread."""
    stride = (len(ids) - max(lengths)) // len(lengths)
    if stride < 1:
        raise BenchmarkError(f"{len(ids)} tokens of text are too few for {len(lengths)} prompts")
    return [ids[i * stride : i * stride + length] for i, length in enumerate(lengths)]


def main() -> None:
    out, tokenizer_json, text_path = map(Path, sys.argv[1:4])
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    ids = Tokenizer.from_file(str(tokenizer_json)).encode(text_path.read_text()[:200_000]).ids
    prompts = cut_prompts(ids, np.linspace(*PROMPT_LENS, NUM_PROMPTS).astype(int).tolist())
    names = [TURNS[i % len(TURNS)] for i in range(NUM_PROMPTS)]
    requests = [Request(prompts[i], replace(SAMPLINGS[name], seed=i)) for i, name in enumerate(names)]
    forced = cut_prompts(ids, [FORCED_LEN] * len(FORCED_PROMPT_LENS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint("0.6b", folder, tokenizer_json)
        outputs = generate(folder, requests)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
        runner = build_runner(replace(FAST_SETTINGS, model=str(folder)))
    error = measure_logit_error(runner, reference, list(map(ForcedText, forced, FORCED_PROMPT_LENS)))
    verdicts: dict[str, list[Verdicts]] = {name: [] for name in SAMPLINGS}
    for name, request, output in zip(names, requests, outputs, strict=True):
        verdicts[name].append(judge_output(reference, request, output, error["absolute_max"]))
    what = "fast mode in bf16 on a GPU against transformers float32, Qwen3-0.6B shape, random weights, real text"
    result = header(what, sys.argv[4] if len(sys.argv) > 4 else None) | {
        "device": torch.cuda.get_device_name(),
        "settings": FAST,
        "teacher_forced_error": error,
        "tolerance_in_errors": NUM_ERRORS,
        "prompt_tokens": PROMPT_LENS,
        "output_tokens": OUTPUT_LEN,
        "samplings": {name: summarize(of_sampling) for name, of_sampling in verdicts.items()},
    }
    write_json(out, result)
    print(json.dumps({name: result[name] for name in ("teacher_forced_error", "samplings")}, indent=1))
    if any(summary["positions_by_difference"][FAILED] for summary in result["samplings"].values()):
        sys.exit("some tokens are further from the reference's than the error explains")


if __name__ == "__main__":
    main()
