"""What a row asks of sampling as transformers' logits processors, for the truth about Tandem's own.

transformers has no presence or frequency penalty, which are a formula of numpy here, and draws otherwise than by Gumbel
noise, which is added here; test_sampler.py compares the noise with its definition.
"""

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists
from tandem_worker.runners.sampler import gumbel_noise


def adjusting_processors(
    sampling: RowSampling, lists: SamplingLists, num_prompt: int, vocab_size: int
) -> LogitsProcessorList:
    """The changes to a row's logits, in their order, from the ids of prompt and output. Numbers are those of the wire,
    which are float32.
    """
    processors = LogitsProcessorList()
    if lists.allowed_token_ids:
        processors.append(SuppressTokensLogitsProcessor(sorted({*range(vocab_size)} - {*lists.allowed_token_ids})))
    if lists.bad_words:
        words = [list(word) for word in lists.bad_words]
        processors.append(OutputAlone(NoBadWordsLogitsProcessor(words, eos_token_id=None), num_prompt))
    if sampling.min_tokens and lists.stop_token_ids:
        stop_ids = list(lists.stop_token_ids)
        processors.append(MinNewTokensLengthLogitsProcessor(num_prompt, sampling.min_tokens, stop_ids))
    if lists.logit_bias:
        biases = {(token_id,): wire(bias) for token_id, bias in lists.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(biases))
    processors.append(RepetitionPenaltyLogitsProcessor(wire(sampling.repetition_penalty)))
    processors.append(OutputAlone(CountPenalties(sampling), num_prompt))
    return processors


def drawing_processors(sampling: RowSampling, vocab_size: int) -> LogitsProcessorList:
    """Temperature, truncation and noise, after which the likeliest token is the draw; nothing for a greedy row."""
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(wire(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(wire(sampling.top_p)))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(wire(sampling.min_p)))
    processors.append(Noise(sampling, vocab_size))
    return processors


def wire(number: float) -> float:
    return float(np.float32(number))


class OutputAlone(LogitsProcessor):
    """Shows a processor the output without the prompt."""

    def __init__(self, processor: LogitsProcessor, num_prompt: int) -> None:
        self._processor, self._num_prompt = processor, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._processor(input_ids[:, self._num_prompt :], scores)


class CountPenalties(LogitsProcessor):
    """Frequency and presence penalty, by numpy."""

    def __init__(self, sampling: RowSampling) -> None:
        self._frequency, self._presence = wire(sampling.frequency_penalty), wire(sampling.presence_penalty)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = np.bincount(input_ids[0].numpy(), minlength=scores.shape[1])
        penalised = scores[0].numpy() - self._frequency * counts
        return torch.from_numpy(penalised - self._presence * (counts > 0))[None]


class Noise(LogitsProcessor):
    def __init__(self, sampling: RowSampling, vocab_size: int) -> None:
        self._key = [torch.tensor([number]) for number in (sampling.seed, sampling.choice_index)]
        self._vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + gumbel_noise(*self._key, torch.tensor([input_ids.shape[1]]), self._vocab_size)
