"""Random requests, workers and configurations for the scheduler core, small enough to get into each other's way."""

import hypothesis.strategies as st

from tandem_scheduler.core.types import SchedulerConfig
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, Grammar, SamplingLists
from tandem_shared.step_plan import WorkerInfo
from tests.support.builders import GREEDY, create_request, worker_info

VOCAB_SIZE = 16
SEQUENCE_IDS = list(range(8))

prefixes = st.sampled_from([(), (1,) * 4, (1,) * 16, (1,) * 15 + (2,), (1,) * 32])
prompts = st.builds(lambda a, b: [*a, *b], prefixes, st.lists(st.integers(1, 2), max_size=18)).filter(len)
samplings = st.one_of(
    st.just(GREEDY),
    st.builds(RowSampling, seed=st.integers(0, 3), choice_index=st.integers(0, 1)),
    st.builds(
        RowSampling,
        presence_penalty=st.sampled_from([0.0, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.25]),
        min_tokens=st.sampled_from([0, 5]),
        num_prompt_logprobs=st.sampled_from([None, 0, 2]),
    ),
)
FEW_IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2, unique=True).map(tuple)
lists = st.just(NO_LISTS) | st.builds(
    SamplingLists,
    stop_token_ids=FEW_IDS,
    logit_bias=FEW_IDS.map(lambda ids: tuple((token_id, 0.5) for token_id in ids)),
    bad_words=st.lists(st.tuples(st.integers(0, VOCAB_SIZE - 1)), max_size=2).map(tuple),
    grammar=st.none() | st.just(Grammar("start: /a/")),
)
requests = st.builds(
    create_request,
    st.sampled_from(SEQUENCE_IDS),
    prompts,
    st.integers(1, 40),
    sampling=samplings,
    lists=lists,
    stop_token_ids=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
    priority=st.integers(0, 2),
    cache_salt=st.sampled_from(["", "", "other"]),
    deadline=st.none() | st.integers(0, 20),
)


@st.composite
def workers(draw: st.DrawFn) -> WorkerInfo:
    """Workers whose pools hold from one sequence to all."""
    block_size = draw(st.sampled_from([1, 2, 16]))
    num_slots = draw(st.sampled_from([64, 96, 512]))
    return worker_info(
        vocab_size=VOCAB_SIZE,
        max_model_len=draw(st.sampled_from([40, 72, 90])),
        block_size=block_size,
        num_blocks=num_slots // block_size + 1,
        max_num_rows=draw(st.integers(2, 8)),
        max_num_batched_tokens=draw(st.sampled_from([8, 16, 64])),
    )


configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from([8, 12, 64]),
    max_chunk_tokens=st.sampled_from([None, 1, 3, 8]),
    max_plans_in_flight=st.integers(1, 4),
    max_num_waiting=st.sampled_from([3, 100]),
    enable_prefix_caching=st.sampled_from([True, True, False]),
    admission_watermark=st.sampled_from([0.0, 0.01, 0.2]),
)
