"""Blocks of the KV pool: allocation, reference counts, the prefix cache and its eviction.

Knows block ids and token bytes; nothing of sequences, rows or steps. Every block but the padding block is
free (holds nothing), cached (held by the prefix cache alone, evictable) or used (referenced by a sequence).
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from tandem_shared.step_plan import PADDING_BLOCK

HashFunction = Callable[[bytes, int], int]
"""(bytes, seed) -> key. Keys form a chain: the seed is the parent block's key."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedBlock:
    """A full block whose contents are known: its tokens, after all those of its parents, under a salt."""

    block_id: int
    key: int
    parent: "CachedBlock | None"
    salt: str
    tokens: bytes


class BlockManager:
    """Hands out blocks 1 to num_blocks - 1. A freed block that is registered stays in the prefix cache until
    its place is needed, least recently used first.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        hash_fn: HashFunction = xxhash.xxh3_64_intdigest,
    ) -> None:
        self.block_size = block_size
        self.num_total = num_blocks - 1
        self._hash = hash_fn
        self._free = deque(range(PADDING_BLOCK + 1, num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._num_references = [0] * num_blocks
        self._registered: list[CachedBlock | None] = [None] * num_blocks
        self._by_key: dict[int, CachedBlock] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_available

    def extend_keys(self, keys: list[int], token_ids: "array[int]", salt: str) -> None:
        """Extends a hash chain to all full blocks of token_ids (int32)."""
        size = self.block_size
        for start in range(len(keys) * size, len(token_ids) - size + 1, size):
            seed = keys[-1] if keys else self._hash(salt.encode(), 0)
            keys.append(self._hash(token_ids[start : start + size].tobytes(), seed))

    def match(self, keys: list[int], token_ids: "array[int]", salt: str) -> list[CachedBlock]:
        """The longest cached prefix. Compares parents, salt and tokens, so equal keys alone are not a hit."""
        hits: list[CachedBlock] = []
        parent = None
        for index, key in enumerate(keys):
            block = self._by_key.get(key)
            if block is None:
                break
            tokens = token_ids[index * self.block_size : (index + 1) * self.block_size].tobytes()
            if not _is_same(block, parent, salt, tokens):
                break
            hits.append(block)
            parent = block
        return hits

    def longest_prefix(self, token_ids: "array[int]", salt: str) -> int:
        """How many tokens at the start of token_ids are in cached blocks. Changes nothing."""
        keys: list[int] = []
        self.extend_keys(keys, token_ids, salt)
        return len(self.match(keys, token_ids, salt)) * self.block_size

    def num_evictable_among(self, hits: Iterable[CachedBlock]) -> int:
        """How many of the hits count as available now, and no longer once they are acquired."""
        return sum(self._num_references[hit.block_id] == 0 for hit in hits)

    def acquire(self, hits: Iterable[CachedBlock]) -> list[int]:
        """Takes a reference to each hit. Returns their block ids."""
        block_ids = []
        for hit in hits:
            if self._num_references[hit.block_id] == 0:
                del self._evictable[hit.block_id]
            self._num_references[hit.block_id] += 1
            block_ids.append(hit.block_id)
        return block_ids

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks to write. The caller has made sure that so many are available."""
        block_ids = []
        for _ in range(count):
            if self._free:
                block_id = self._free.popleft()
            else:
                block_id, _ = self._evictable.popitem(last=False)
                self._unregister(block_id)
            self._num_references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def release(self, block_ids: list[int]) -> None:
        """Gives back a sequence's references, the last block first, so that it will be evicted before its parents."""
        for block_id in reversed(block_ids):
            self._num_references[block_id] -= 1
            assert self._num_references[block_id] >= 0, f"block {block_id} released too often"
            if self._num_references[block_id] == 0:
                if self._registered[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._evictable[block_id] = None

    def register(self, block_id: int, key: int, parent: CachedBlock | None, salt: str, tokens: bytes) -> CachedBlock:
        """Offers a used, full block to the prefix cache. Returns the block that stands for these contents there: an
        equal one that was there before, or this one.
        """
        present = self._by_key.get(key)
        if present is not None:
            if _is_same(present, parent, salt, tokens):
                return present
            # The keys collide, or the present block's parent was evicted, so that no prompt can reach it any more.
            self._drop_from_cache(present.block_id)
        block = CachedBlock(block_id, key, parent, salt, tokens)
        self._by_key[key] = block
        self._registered[block_id] = block
        return block

    def forget(self, block_ids: Iterable[int]) -> None:
        """Takes blocks out of the prefix cache because their contents can't be trusted."""
        for block_id in block_ids:
            if self._registered[block_id] is not None:
                self._drop_from_cache(block_id)

    def reset_cache(self) -> int:
        """Forgets every cached block that no sequence uses. Returns how many there were."""
        count = len(self._evictable)
        self.forget(list(self._evictable))
        return count

    def check_integrity(self, references: Counter[int]) -> None:
        """Raises AssertionError unless the counts are those of `references` (block id -> holders)."""
        counted = {block_id: count for block_id, count in enumerate(self._num_references) if count}
        assert counted == dict(references), f"references {counted} != holders {dict(references)}"
        free, cached, used = set(self._free), set(self._evictable), set(counted)
        assert len(free) == len(self._free), "a block is free twice"
        everything = sorted([*free, *cached, *used])
        assert everything == list(range(1, self.num_total + 1)), "a block is lost or in two states"
        assert self.num_used == len(used), "free + cached + used is not the total"
        registered = {block.block_id: block for block in self._registered if block is not None}
        assert registered.keys() >= cached, "an unregistered block is cached"
        assert not registered.keys() & free, "a free block is registered"
        assert {block.key: block for block in registered.values()} == self._by_key, "the index differs from the blocks"

    def _drop_from_cache(self, block_id: int) -> None:
        self._unregister(block_id)
        if block_id in self._evictable:
            del self._evictable[block_id]
            self._free.append(block_id)

    def _unregister(self, block_id: int) -> None:
        block = self._registered[block_id]
        assert block is not None
        self._registered[block_id] = None
        del self._by_key[block.key]


def _is_same(block: CachedBlock, parent: CachedBlock | None, salt: str, tokens: bytes) -> bool:
    return block.parent is parent and block.tokens == tokens and block.salt == salt
