"""Grammars on a CUDA device: every token is one that the row's grammar allows, however many plans are in flight."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import FinishReason, SchedulerConfig, SequenceRequest
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.structured_output import GrammarCompiler, choice_grammar, json_schema_grammar, regex_grammar
from tandem_worker.runners.cuda.cuda_runner import CudaRunner
from tandem_worker.startup import build_runner
from tests.support.engine import Engine
from tests.support.model_factory import save_random_model
from tests.support.tokenizers import EMBEDDED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Kernels are compiled.
    pytest.mark.timeout(600),
]

EOS, COMMA, VOCAB_SIZE = 1017, 11, 1024
NUM_ROWS, NUM_BLOCKS, FEW_BLOCKS = 24, 512, 60
GRAMMARS = [
    regex_grammar("[a-z]{2,12}( [a-z]{2,12}){0,5}[.!]?"),
    choice_grammar(["to be", "to be or not", "to be or not to be"]),
    json_schema_grammar('{"type": "array", "items": {"enum": ["a", 1, null, [true]]}}'),
    json_schema_grammar('{"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}}'),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random_model(
        tmp_path_factory.mktemp("model"),
        dtype="bfloat16",
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.04,
        eos_token_id=EOS,
    )
    shutil.copy(EMBEDDED, folder)
    return folder


def make_runner(folder: Path, *, enforce_eager: bool) -> CudaRunner:
    settings = WorkerSettings(
        model=str(folder),
        dtype="bfloat16",
        device="cuda",
        attention_backend="triton",
        num_blocks=NUM_BLOCKS,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=256,
        enforce_eager=enforce_eager,
    )
    runner = build_runner(settings)
    assert isinstance(runner, CudaRunner)
    return runner


def make_requests() -> list[SequenceRequest]:
    """Every fourth has no grammar, the last one has a grammar that is wrong."""
    requests = []
    for index in range(40):
        rng = np.random.default_rng(index)
        sampling = RowSampling(
            temperature=float(rng.choice([0.0, 0.8])),
            top_k=int(rng.choice([0, 20])),
            top_p=float(rng.choice([1.0, 0.9])),
            presence_penalty=float(rng.choice([0.0, 1.0])),
            seed=index,
        )
        lists = SamplingLists()
        if index % 4:
            start = COMMA if index % 3 == 0 else None
            text = GRAMMARS[index % len(GRAMMARS)] if index < 39 else "start: nothing"
            lists = SamplingLists(
                grammar=Grammar(text, start if index < 39 else None, ignore_eos=index % 5 == 0),
                logit_bias=((COMMA, 4.0),),
                allowed_token_ids=(*range(900), EOS) if index % 7 == 0 else (),
            )
        prompt = rng.integers(0, 1000, int(rng.integers(1, 60))).astype(np.int32)
        requests.append(SequenceRequest(index, prompt, 40, sampling, frozenset({EOS}), lists=lists))
    return requests


def execute(runner: CudaRunner, depth: int, num_blocks: int) -> Engine:
    runner.reset()
    config = SchedulerConfig(max_num_seqs=NUM_ROWS, max_num_batched_tokens=256, max_plans_in_flight=depth)
    engine = Engine(Scheduler(config, replace(runner.info, num_blocks=num_blocks)), runner)
    engine.add(*make_requests())
    engine.drain()
    assert (engine.scheduler.load().num_preemptions > 0) == (num_blocks == FEW_BLOCKS)
    return engine


def check(engine: Engine) -> None:
    """Each output is read by a matcher of its own, which refuses what its grammar does not allow."""
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB_SIZE, [EOS])
    num_read = num_ended = 0
    for request in make_requests():
        output, grammar = engine.outputs[request.sequence_id], request.lists.grammar
        reason = engine.finished[request.sequence_id].reason
        if grammar is not None and grammar.text == "start: nothing":
            assert reason is FinishReason.ERROR and not output
            continue
        assert reason is (FinishReason.STOP if output[-1] == EOS else FinishReason.LENGTH)
        if grammar is None:
            continue
        assert not request.lists.allowed_token_ids or set(output) <= set(request.lists.allowed_token_ids)
        start = grammar.start_after_token_id
        read = output if start is None else output[output.index(start) + 1 :] if start in output else []
        matcher = compiler.matcher(grammar.text)
        assert matcher.consume_tokens(read) or not read, matcher.get_error()
        num_read += len(read)
        num_ended += output[-1] == EOS
    assert num_read > 200 and num_ended >= 5


@pytest.mark.parametrize(("depth", "num_blocks"), [(1, NUM_BLOCKS), (2, FEW_BLOCKS), (4, NUM_BLOCKS)])
def test_every_token_is_one_that_the_grammar_allows(folder: Path, depth: int, num_blocks: int) -> None:
    outputs = []
    for enforce_eager in (False, True):
        engine = execute(make_runner(folder, enforce_eager=enforce_eager), depth, num_blocks)
        check(engine)
        outputs.append(engine.outputs)
    assert outputs[0] == outputs[1]
