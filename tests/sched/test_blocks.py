"""The block pool against a model of it that is too simple to be wrong."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.sched.blocks import ROOT, BlockPool, block_key

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["take", "share", "give_back", "remember", "clear"]), st.integers(0, 99)),
    max_size=80,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 6), OPERATIONS)
def test_blocks_are_conserved_and_found_by_key_until_they_are_reused(
    num_blocks: int, operations: list[tuple[str, int]]
) -> None:
    pool = BlockPool(num_blocks)
    users = [0] * num_blocks
    keyed: dict[bytes, int] = {}
    freed: list[int] = []  # keyed blocks without users, least recently used first
    tables: list[list[int]] = []
    for kind, number in operations:
        if kind == "take" and pool.num_free:
            block = pool.take()
            assert users[block] == 0
            if block in keyed.values():
                assert block == freed[0], (
                    "the least recently used goes first, and only when no blank one is left"
                )
                assert pool.num_free + 1 == len(freed)
                keyed = {key: holder for key, holder in keyed.items() if holder != block}
                freed.remove(block)
            users[block] = 1
            tables.append([block])
        elif kind == "share" and keyed:
            key = sorted(keyed)[number % len(keyed)]
            block = pool.find(key)
            assert block is not None
            pool.share(block)
            users[block] += 1
            tables.append([block])
            freed = [other for other in freed if other != block]
        elif kind == "give_back" and tables:
            (block,) = table = tables.pop(number % len(tables))
            pool.give_back(table)
            users[block] -= 1
            if not users[block] and block in keyed.values():
                freed.append(block)
        elif kind == "remember" and tables:
            (block,) = tables[number % len(tables)]
            key = block_key(ROOT, bytes([number]))
            pool.remember(block, key)
            if key not in keyed and block not in keyed.values():
                keyed[key] = block
        elif kind == "clear":
            assert pool.clear() == len(freed)
            keyed = {key: block for key, block in keyed.items() if block not in freed}
            freed = []
        assert [pool.users(block) for block in range(num_blocks)] == users
        assert pool.num_free == users.count(0)
        assert all(pool.find(key) == block for key, block in keyed.items())


def test_a_table_is_given_back_from_its_end() -> None:
    pool = BlockPool(3)
    table = [pool.take() for _ in range(3)]
    for number, block in enumerate(table):
        pool.remember(block, bytes([number]))
    pool.give_back(table)
    assert [pool.take() for _ in range(3)] == table[::-1]


def test_a_key_names_everything_before_its_block() -> None:
    first, other = block_key(ROOT, b"1"), block_key(ROOT, b"2")
    assert len({first, other, block_key(first, b"3"), block_key(other, b"3")}) == 4
    assert block_key(first, b"3") == block_key(block_key(ROOT, b"1"), b"3")
