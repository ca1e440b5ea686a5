"""Random mixtures of what requests ask: each ends as it does alone, preempted or not, at every depth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import FinishReason, SchedulerConfig, SequenceRequest
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.engine import Engine
from tests.support.model_factory import save_random_model

VOCAB = 64
IDS = st.integers(0, VOCAB - 1)
FEW = st.integers(0, 7)
SAMPLINGS = st.builds(
    RowSampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 3, 50]),
    top_p=st.sampled_from([1.0, 1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.75, 1.5]),
    seed=st.integers(0, 3),
    choice_index=st.integers(0, 1),
    min_tokens=st.integers(0, 12),
    num_logprobs=st.none() | st.integers(0, 3),
    num_prompt_logprobs=st.none() | st.integers(0, 3),
)
LISTS = st.builds(
    SamplingLists,
    stop_token_ids=st.lists(FEW | IDS, max_size=4, unique=True).map(tuple),
    logit_bias=st.dictionaries(IDS, st.floats(-30, 30, width=32), max_size=4).map(lambda it: tuple(it.items())),
    # Few tokens, so that some requests have none left, and end with an error.
    allowed_token_ids=st.sampled_from([(), tuple(range(9)), (0, 1)]),
    bad_words=st.lists(st.lists(FEW, min_size=1, max_size=3).map(tuple), max_size=12).map(tuple),
    logprob_token_ids=st.lists(IDS, max_size=2).map(tuple),
)
REQUESTS = st.lists(
    st.builds(
        lambda prompt, sampling, lists: SequenceRequest(
            0, np.array(prompt, np.int32), 16, sampling, frozenset(lists.stop_token_ids), lists=lists
        ),
        st.lists(FEW, min_size=1, max_size=12),
        SAMPLINGS,
        st.just(NO_LISTS) | LISTS,
    ),
    min_size=2,
    max_size=6,
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    """A runner of 12 blocks of 4 tokens. A request needs up to 7 of them, so requests preempt each other."""
    folder = save_random_model(tmp_path_factory.mktemp("model"), dtype="float64", vocab_size=VOCAB)
    return build_runner(
        WorkerSettings(
            model=str(folder), dtype="float64", device="cpu", block_size=4, num_blocks=13, max_num_seqs=8, num_threads=1
        )
    )


@settings(max_examples=20)
@given(REQUESTS, st.integers(1, 4), st.sampled_from([None, 3]), st.booleans())
def test_a_request_ends_as_it_does_alone(
    runner: TorchRunner, requests: list[SequenceRequest], depth: int, chunk: int | None, prefix_caching: bool
) -> None:
    requests = [replace(request, sequence_id=index) for index, request in enumerate(requests)]
    together = execute(runner, requests, depth, chunk, prefix_caching=prefix_caching)
    for request in requests:
        alone = execute(runner, [request], 1, None, prefix_caching=False)
        assert together[request.sequence_id] == alone[request.sequence_id]


def execute(
    runner: TorchRunner, requests: list[SequenceRequest], depth: int, chunk: int | None, *, prefix_caching: bool
) -> dict[int, tuple[list[int], FinishReason, str | None]]:
    """The tokens, finish reasons and errors by sequence id."""
    runner.reset()
    config = SchedulerConfig(
        max_chunk_tokens=chunk, max_plans_in_flight=depth, enable_prefix_caching=prefix_caching, admission_watermark=0
    )
    engine = Engine(Scheduler(config, runner.info), runner)
    engine.add(*requests)
    engine.drain()
    return {key: (engine.outputs[key], finished.reason, finished.error) for key, finished in engine.finished.items()}
