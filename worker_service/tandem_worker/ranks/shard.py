"""Which part of a Qwen3 each rank of a tensor-parallel group holds (Shoeybi et al. 2019). Knows no torch."""

from dataclasses import dataclass, replace

from tandem_shared.errors import ConfigError
from tandem_worker.checkpoint.model_config import ModelConfig

VOCAB_MULTIPLE = 8
"""Of a rank's share of the vocabulary, so that rows of its bfloat16 logits start at 16 bytes."""


@dataclass(frozen=True)
class Shard:
    """A rank's place in its group. Query heads, the inner columns of the MLP and of each expert, and the vocabulary are
    dealt out evenly, in order; KV heads too, or each to as many ranks as there are more of than KV heads. The
    vocabulary is padded.
    """

    rank: int = 0
    size: int = 1

    def check(self, config: ModelConfig) -> None:
        """ConfigError where the model can't be cut into so many parts."""
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        if num_heads % self.size:
            raise self._fail(f"does not divide num_attention_heads, {num_heads}")
        if num_kv_heads % self.size and self.size % num_kv_heads:
            raise self._fail(f"neither divides num_key_value_heads, {num_kv_heads}, nor is a multiple of them")
        if config.intermediate_size % self.size:
            raise self._fail(f"does not divide intermediate_size, {config.intermediate_size}")
        if config.moe and config.moe.moe_intermediate_size % self.size:
            raise self._fail(f"does not divide moe_intermediate_size, {config.moe.moe_intermediate_size}")

    def cut(self, config: ModelConfig) -> ModelConfig:
        """The rank's own numbers of heads, KV heads, inner columns and (padded) vocabulary."""
        moe = config.moe
        return replace(
            config,
            vocab_size=self.vocab_share(config.vocab_size),
            intermediate_size=config.intermediate_size // self.size,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=max(1, config.num_key_value_heads // self.size),
            moe=moe and replace(moe, moe_intermediate_size=moe.moe_intermediate_size // self.size),
        )

    def part(self, length: int) -> slice:
        """This rank's of `length` things that are dealt out."""
        return self._part(length, length // self.size)

    def vocab_part(self, vocab_size: int) -> slice:
        """This rank's token ids; the last ranks may have fewer than the others, or none."""
        return self._part(vocab_size, self.vocab_share(vocab_size))

    def vocab_share(self, vocab_size: int) -> int:
        """Each rank's token ids, with the padding."""
        return vocab_size if self.size == 1 else -(-vocab_size // self.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def _part(self, length: int, share: int) -> slice:
        return slice(min(self.rank * share, length), min((self.rank + 1) * share, length))

    def kv_heads(self, num_kv_heads: int) -> slice:
        if num_kv_heads >= self.size:
            return self.part(num_kv_heads)
        first = self.rank * num_kv_heads // self.size
        return slice(first, first + 1)

    def _fail(self, problem: str) -> ConfigError:
        return ConfigError(f"--tp-size {self.size} {problem}")
