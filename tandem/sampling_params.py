"""How to sample and when to stop, with vLLM's names."""

from dataclasses import dataclass

from tandem.v1 import inference_pb2


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """None takes the model's own default, then the API's (see protos/tandem/v1/inference.proto)."""

    n: int | None = None
    """Independent outputs for the prompt."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    """Report each token's log-probability, and those of this many likeliest tokens."""
    skip_special_tokens: bool | None = None

    def sampling(self) -> inference_pb2.SamplingParams:
        return inference_pb2.SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )

    def stopping(self) -> inference_pb2.StoppingCriteria:
        return inference_pb2.StoppingCriteria(
            max_tokens=self.max_tokens,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )

    def output(self) -> inference_pb2.OutputOptions:
        return inference_pb2.OutputOptions(num_logprobs=self.logprobs, skip_special_tokens=self.skip_special_tokens)
