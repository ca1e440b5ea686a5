"""Which part of a model each rank of a tensor-parallel group holds (Shoeybi et al. 2019, arXiv:1909.08053). Knows no
torch.
"""

from dataclasses import dataclass, replace

from tandem_shared.errors import ConfigError
from tandem_worker.checkpoint.model_config import ModelConfig

VOCAB_MULTIPLE = 8
"""A rank's share of the vocabulary is a multiple of this, so that rows of its bfloat16 logits start at 16 bytes."""


@dataclass(frozen=True)
class ShardedDimension:
    """A dimension of a checkpoint's tensor that the ranks divide."""

    length: int
    """The length in the checkpoint"""
    part: slice
    """The range that this rank holds"""

    @property
    def num_local(self) -> int:
        return int(self.part.stop - self.part.start)


@dataclass(frozen=True)
class Shard:
    """A rank's place in its group, and what follows from it.

    Query heads, the inner columns of the MLP and of each expert, and the vocabulary are divided evenly, in order, the
    vocabulary with padding at its end. KV heads are divided too; where there are fewer of them than ranks, each is held
    by several ranks.
    """

    rank: int = 0
    size: int = 1

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where the group can't divide the model."""
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
        """The config with this rank's own numbers of heads, KV heads, inner columns and (padded) vocabulary."""
        moe = config.moe
        return replace(
            config,
            vocab_size=self.vocab_share(config.vocab_size),
            intermediate_size=config.intermediate_size // self.size,
            num_attention_heads=config.num_attention_heads // self.size,
            num_key_value_heads=max(1, config.num_key_value_heads // self.size),
            moe=moe and replace(moe, moe_intermediate_size=moe.moe_intermediate_size // self.size),
        )

    def divide(self, count: int, width: int = 1) -> ShardedDimension:
        """A dimension of `count` equal units, such as heads of head_dim `width`, which the group's size divides."""
        return _in_units(self._part(count, count // self.size), count, width)

    def divide_kv_heads(self, num_kv_heads: int, head_dim: int) -> ShardedDimension:
        """The outputs of a projection to keys or values. With fewer KV heads than ranks each rank holds one of them."""
        if num_kv_heads >= self.size:
            return self.divide(num_kv_heads, head_dim)
        first = self.rank * num_kv_heads // self.size
        return _in_units(slice(first, first + 1), num_kv_heads, head_dim)

    def vocab_part(self, vocab_size: int) -> slice:
        """This rank's token ids; the last ranks may have fewer than the others, or none."""
        return self._part(vocab_size, self.vocab_share(vocab_size))

    def vocab_share(self, vocab_size: int) -> int:
        """The number of token ids of each rank, padding included."""
        return vocab_size if self.size == 1 else -(-vocab_size // self.size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def _part(self, length: int, share: int) -> slice:
        return slice(min(self.rank * share, length), min((self.rank + 1) * share, length))

    def _fail(self, problem: str) -> ConfigError:
        return ConfigError(f"--tp-size {self.size} {problem}")


def _in_units(part: slice, count: int, width: int) -> ShardedDimension:
    return ShardedDimension(count * width, slice(part.start * width, part.stop * width))
