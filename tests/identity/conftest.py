"""The model of the identity suite, and the truth about its requests."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, Qwen3ForCausalLM

from tandem_scheduler.core.types import SequenceRequest
from tandem_shared.sampling_lists import adjusts_logits
from tandem_shared.step_plan import RowLogprobs
from tests.identity.requests import NUM_OUTPUT_TOKENS, NUM_REQUESTS, make_requests
from tests.identity.runs import Case, Run, assert_equal_reports, execute, prompt_reports
from tests.support.model_factory import save_random_model
from tests.support.transformers_sampling import adjusting_processors, drawing_processors


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A wide initialisation, so that greedy outputs don't fall into loops.
    return save_random_model(tmp_path_factory.mktemp("model"), dtype="float64", seed=3)


@dataclass(frozen=True)
class Truth:
    requests: list[SequenceRequest]
    run: Run


@pytest.fixture(scope="session")
def truth(folder: Path) -> Truth:
    """The base run, checked against transformers. Then some requests get stop ids that cut their outputs short, so that
    depths above one overshoot.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    requests = make_requests(model.config.vocab_size)
    base = execute(folder, Case(), requests)
    for request in requests:
        check_by_transformers(model, request, base)
    free = [it for it in requests if not adjusts_logits(it.sampling, it.lists)]
    assert len(free) == len(range(0, NUM_REQUESTS, 3))
    assert np.mean([len(set(base.outputs[it.sequence_id])) for it in free]) >= 20
    for index in range(0, NUM_REQUESTS, 3):
        key = requests[index].sequence_id
        tokens = base.outputs[key]
        stop = tokens[5 + index // 3]
        requests[index] = replace(requests[index], stop_token_ids=frozenset({stop}))
        base.outputs[key] = tokens[: tokens.index(stop) + 1]
        if key in base.logprobs:
            base.logprobs[key] = base.logprobs[key][: len(base.outputs[key])]
    return Truth(requests, base)


@torch.inference_mode()
def check_by_transformers(model: Qwen3ForCausalLM, request: SequenceRequest, run: Run) -> None:
    """Compares a request's tokens with transformers' generation, and its log-probabilities with the raw logits."""
    sampling, lists, vocab_size = request.sampling, request.lists, model.config.vocab_size
    prompt = torch.tensor(request.prompt_token_ids[None].astype(np.int64))
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NUM_OUTPUT_TOKENS,
        do_sample=False,
        eos_token_id=sorted(request.stop_token_ids) or None,
        logits_processor=LogitsProcessorList(
            adjusting_processors(sampling, lists, prompt.shape[1], vocab_size)
            + drawing_processors(sampling, vocab_size)
        ),
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = generated.sequences[0, prompt.shape[1] :].tolist()
    assert run.outputs[request.sequence_id] == output
    num_top = sampling.num_logprobs
    if num_top is None and not lists.logprob_token_ids:
        assert request.sequence_id not in run.logprobs
    else:
        expected = [
            expected_report(logits[0], token_id, num_top or 0, lists.logprob_token_ids)
            for logits, token_id in zip(generated.logits, output, strict=True)
        ]
        assert_equal_reports(run.logprobs[request.sequence_id], expected)
    if sampling.num_prompt_logprobs is not None and prompt.shape[1] > 1:
        expected = [
            expected_report(logits, token_id, sampling.num_prompt_logprobs)
            for logits, token_id in zip(model(prompt).logits[0, :-1], prompt[0, 1:].tolist(), strict=True)
        ]
        assert_equal_reports(prompt_reports(run.prompt_logprobs[request.sequence_id]), expected)
    else:
        assert request.sequence_id not in run.prompt_logprobs


def expected_report(logits: torch.Tensor, token_id: int, num_top: int, requested: tuple[int, ...] = ()) -> RowLogprobs:
    distribution = logits.log_softmax(-1)
    tops = distribution.topk(num_top)
    return RowLogprobs(
        row=0,
        logprob=float(distribution[token_id]),
        top_token_ids=tuple(tops.indices.tolist()),
        top_logprobs=tuple(tops.values.tolist()),
        rank=1 + int((logits > logits[token_id]).sum()),
        requested_logprobs=tuple(distribution[list(requested)].tolist()),
    )
