"""Which new rows of a plan are wrong by themselves, by the comments of worker.proto and without the worker's code."""

from tandem_shared.sampling_lists import SamplingLists
from tandem_shared.step_plan import PADDING_BLOCK, NewRow, WorkerInfo

MAX_LOGPROBS = 20


def is_wrong(new: NewRow, info: WorkerInfo) -> bool:
    """Whether a new row is invalid by itself, whatever else the batch holds."""
    count, sampling = len(new.token_ids), new.sampling
    most_blocks = -(-info.max_model_len // info.block_size)
    return not (
        new.row in range(info.max_num_rows)
        and all(0 <= each < info.vocab_size for each in new.token_ids.tolist())
        and all(PADDING_BLOCK < each < info.num_blocks for each in new.block_ids.tolist())
        and -(-count // info.block_size) <= len(new.block_ids) <= most_blocks
        and 1 <= new.num_prompt_tokens <= count <= info.max_model_len
        and new.num_cached_tokens <= count
        and new.num_computed_tokens == min(new.num_cached_tokens, count - 1)
        and 0 <= sampling.temperature < float("inf")
        and 0 < sampling.top_p <= 1
        and 0 <= sampling.min_p <= 1
        and (sampling.num_logprobs or 0) <= MAX_LOGPROBS
        and (sampling.num_prompt_logprobs or 0) <= MAX_LOGPROBS
        and -2 <= sampling.presence_penalty <= 2
        and -2 <= sampling.frequency_penalty <= 2
        and 0 < sampling.repetition_penalty < float("inf")
        and _are_lists_right(new.lists, info.vocab_size)
    )


def _are_lists_right(lists: SamplingLists, vocab_size: int) -> bool:
    bias_ids = [token_id for token_id, _ in lists.logit_bias]
    word_ids = [token_id for word in lists.bad_words for token_id in word]
    ids = [*lists.stop_token_ids, *bias_ids, *lists.allowed_token_ids, *word_ids, *lists.logprob_token_ids]
    return (
        all(0 <= token_id < vocab_size for token_id in ids)
        and all(-100 <= bias <= 100 for _, bias in lists.logit_bias)
        and len(set(bias_ids)) == len(bias_ids) <= 1024
        and all(1 <= len(word) <= 32 for word in lists.bad_words)
        and len(lists.stop_token_ids) <= 256
        and len(lists.allowed_token_ids) <= 16384
        and len(lists.bad_words) <= 256
        and len(lists.logprob_token_ids) <= 20
    )
