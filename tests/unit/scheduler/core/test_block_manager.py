"""The block manager against a brute-force model: a dictionary from block to the whole text before it."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import xxhash
from hypothesis import given, settings

from tandem_scheduler.core.block_manager import BlockManager, CachedBlock

NUM_BLOCKS = 9

HASHES = {
    "xxh3": xxhash.xxh3_64_intdigest,
    "all collide": lambda data, seed: 0,
    "some collide": lambda data, seed: xxhash.xxh3_64_intdigest(data, seed) % 3,
    "blind to parents": lambda data, seed: xxhash.xxh3_64_intdigest(data),
}


@dataclass
class Holder:
    """A sequence as the block manager's caller: prompt tokens under a salt, in blocks of its own or shared."""

    tokens: list[int]
    salt: str
    blocks: list[int] = field(default_factory=list)


class Model:
    """Drives a block manager as the scheduler does; knows by itself what each block holds."""

    def __init__(self, block_size: int, hash_fn: Callable[[bytes, int], int]) -> None:
        self.size = block_size
        self.manager = BlockManager(NUM_BLOCKS, block_size, hash_fn=hash_fn)
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.holders: list[Holder] = []
        self.num_hits = 0

    def enter(self, tokens: list[int], salt: str) -> None:
        manager, ids = self.manager, array("i", tokens)
        keys: list[int] = []
        manager.extend_keys(keys, ids, salt)
        assert len(keys) == len(tokens) // self.size
        hits = manager.match(keys, ids, salt)
        for index, hit in enumerate(hits):
            text = (salt, tuple(tokens[: (index + 1) * self.size]))
            assert self.contents[hit.block_id] == text, "a hit on other contents"
        num_new = -(-len(tokens) // self.size) - len(hits)
        if num_new > manager.num_available - manager.num_evictable_among(hits):
            return
        holder = Holder(tokens, salt, manager.acquire(hits))
        new = manager.allocate(num_new)
        held = {block_id for other in self.holders for block_id in other.blocks} | set(holder.blocks)
        assert not held & set(new) and 0 not in new and len(set(new)) == len(new), "a used block is handed out"
        for block_id in new:
            self.contents.pop(block_id, None)
        holder.blocks += new
        self.holders.append(holder)
        self.num_hits += len(hits)
        parent: CachedBlock | None = hits[-1] if hits else None
        for index in range(len(hits), len(keys)):
            block_tokens = ids[index * self.size : (index + 1) * self.size].tobytes()
            self.contents[holder.blocks[index]] = (salt, tuple(tokens[: (index + 1) * self.size]))
            parent = manager.register(holder.blocks[index], keys[index], parent, salt, block_tokens)

    def leave(self, index: int) -> None:
        if self.holders:
            self.manager.release(self.holders.pop(index % len(self.holders)).blocks)

    def check(self) -> None:
        references = Counter(block_id for holder in self.holders for block_id in holder.blocks)
        self.manager.check_integrity(references)
        assert self.manager.num_used == len(references)
        assert self.manager.num_free + self.manager.num_cached + self.manager.num_used == NUM_BLOCKS - 1


moves = st.one_of(
    st.tuples(st.just("enter"), st.lists(st.integers(0, 1), min_size=1, max_size=9), st.sampled_from(["", "salt"])),
    st.tuples(st.just("leave"), st.integers(0, 5)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("forget"), st.integers(1, NUM_BLOCKS - 1)),
)


@pytest.mark.parametrize("hash_name", HASHES)
def test_against_the_model(hash_name: str) -> None:
    """Whatever the hash, a hit is on the same tokens, after the same tokens, under the same salt."""
    num_hits = 0

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(block_size=st.integers(1, 3), moves=st.lists(moves, min_size=5, max_size=40))
    def check(block_size: int, moves: list[tuple]) -> None:
        nonlocal num_hits
        model = Model(block_size, HASHES[hash_name])
        for name, *arguments in moves:
            match name:
                case "enter":
                    model.enter(*arguments)
                case "leave":
                    model.leave(*arguments)
                case "reset":
                    assert model.manager.reset_cache() >= 0 == model.manager.num_cached
                case "forget":
                    model.manager.forget(arguments)
            model.check()
        num_hits += model.num_hits

    check()
    assert num_hits > 0


def enter(manager: BlockManager, tokens: list[int], salt: str = "") -> list[int]:
    """Block ids of a new sequence whose full blocks are all registered."""
    ids, keys = array("i", tokens), []
    manager.extend_keys(keys, ids, salt)
    hits = manager.match(keys, ids, salt)
    blocks = manager.acquire(hits) + manager.allocate(-(-len(tokens) // manager.block_size) - len(hits))
    parent = hits[-1] if hits else None
    size = manager.block_size
    for index in range(len(hits), len(keys)):
        parent = manager.register(
            blocks[index], keys[index], parent, salt, ids[index * size : (index + 1) * size].tobytes()
        )
    return blocks


def test_the_padding_block_is_never_handed_out() -> None:
    manager = BlockManager(5, 2)
    assert manager.num_total == 4
    assert sorted(manager.allocate(4)) == [1, 2, 3, 4]
    assert manager.num_available == 0


def test_least_recently_used_is_evicted_first_and_tails_before_their_parents() -> None:
    manager = BlockManager(5, 2)
    old, new = enter(manager, [1, 1, 2, 2]), enter(manager, [3, 3, 4, 4])
    manager.release(old)
    manager.release(new)
    assert manager.num_cached == 4
    assert manager.allocate(3) == [old[1], old[0], new[1]]


def test_a_hit_needs_the_same_salt() -> None:
    manager = BlockManager(9, 2)
    first = enter(manager, [1, 1, 2, 2], "a")
    assert enter(manager, [1, 1, 2, 2], "a") == first
    assert not set(enter(manager, [1, 1, 2, 2], "b")) & set(first)


def test_collisions_are_no_hits() -> None:
    """With one key for everything, only the block that was registered last can be found."""
    manager = BlockManager(9, 2, hash_fn=lambda data, seed: 7)
    first = enter(manager, [1, 1])
    second = enter(manager, [2, 2])
    assert first != second
    ids = array("i", [1, 1])
    assert manager.match([7], ids, "") == []
    manager.release(first)
    manager.release(second)
    assert (manager.num_free, manager.num_cached) == (7, 1)


def test_same_tokens_after_other_tokens_are_no_hit() -> None:
    """A hash that ignores the parent makes the second blocks collide; their parents tell them apart."""
    manager = BlockManager(9, 2, hash_fn=HASHES["blind to parents"])
    enter(manager, [1, 1, 5, 5])
    other = enter(manager, [2, 2])
    ids, keys = array("i", [2, 2, 5, 5]), []
    manager.extend_keys(keys, ids, "")
    assert [hit.block_id for hit in manager.match(keys, ids, "")] == other


def test_releasing_twice_is_our_bug() -> None:
    manager = BlockManager(5, 2)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError):
        manager.release(blocks)
