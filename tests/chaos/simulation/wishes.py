"""What simulated requests ask of sampling beside a temperature: random wishes, and what they mean to the fake worker,
made of the message without any code of the scheduler.
"""

from random import Random

from tokenizers import Tokenizer

from tandem.v1 import inference_pb2
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists

VOCAB_SIZE = 1024
"""The vocabulary size of the embedded model's tokenizer."""
WORDS = ("king", " my lord", "thou art", "\u00e9")


def add_wishes(rng: Random, request: inference_pb2.GenerateStreamRequest) -> None:
    """Sets each field in some requests. The floats are such as 32 bits hold exactly."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    if rng.random() < 0.15:
        sampling.presence_penalty = rng.choice([-0.5, 0.25])
        sampling.frequency_penalty = rng.choice([0.0, 1.5])
    if rng.random() < 0.15:
        sampling.repetition_penalty = rng.choice([0.5, 1.25])
    if rng.random() < 0.1:
        for token_id in rng.sample(range(VOCAB_SIZE), 3):
            sampling.logit_bias[token_id] = rng.choice([-100.0, 0.5])
    if rng.random() < 0.1:
        sampling.allowed_token_ids.extend(rng.sample(range(VOCAB_SIZE), 5))
    if rng.random() < 0.1:
        sampling.bad_words.extend(rng.sample(WORDS, 2))
    if rng.random() < 0.15:
        stopping.min_tokens = rng.randint(1, stopping.max_tokens)
    if rng.random() < 0.2:
        output.num_prompt_logprobs = rng.randrange(3)
    if rng.random() < 0.1:
        output.logprob_token_ids.extend(rng.sample(range(VOCAB_SIZE), 2))


def sampling_of(request: inference_pb2.GenerateStreamRequest, choice_index: int) -> RowSampling:
    """How the worker samples a choice of the request."""
    sampling, output = request.sampling, request.output
    reports_prompt = choice_index == 0 and output.HasField("num_prompt_logprobs")
    return RowSampling(
        temperature=sampling.temperature,
        seed=sampling.seed,
        choice_index=choice_index,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        min_tokens=request.stopping.min_tokens,
        num_prompt_logprobs=output.num_prompt_logprobs if reports_prompt else None,
    )


def lists_of(request: inference_pb2.GenerateStreamRequest, tokenizer: Tokenizer) -> SamplingLists:
    """The lists of the request. The simulated model has no end-of-sequence tokens."""
    sampling = request.sampling
    spellings = {
        tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        for word in sampling.bad_words
        for text in (word.lstrip(" "), " " + word.lstrip(" "))
    }
    return SamplingLists(
        stop_token_ids=tuple(set(request.stopping.stop_token_ids)) if request.stopping.min_tokens else (),
        logit_bias=tuple(sampling.logit_bias.items()),
        allowed_token_ids=tuple(set(sampling.allowed_token_ids)),
        bad_words=tuple(spellings),
        logprob_token_ids=tuple(request.output.logprob_token_ids),
    )
