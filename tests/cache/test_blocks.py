"""Who owns which block: nothing leaks, nothing is used twice, and only equal beginnings are shared."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fastvl_lab import RequestError
from fastvl_lab.cache.blocks import BlockPool, Table

N, SIZE = 12, 4
TOKENS = st.lists(st.sampled_from([1, 2, ("picture", 0), ("picture", 1)]), min_size=1, max_size=20)


class Pool(RuleBasedStateMachine):
    """Random admissions, growth, endings and cancellations against a model: what every block would hold."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(N, SIZE)
        self.live: dict[int, tuple[Table, list, str, int]] = {}  # table, tokens, family, total
        self.content: dict[int, tuple] = {}  # block -> family and all tokens up to its end, as they were written
        self.number = 0

    @rule(
        target=sequences,
        tokens=TOKENS,
        more=st.integers(0, 40),
        all_at_once=st.booleans(),
        family=st.sampled_from("ab"),
        reuse=st.booleans(),
    )
    def admit(self, tokens: list, more: int, all_at_once: bool, family: str, reuse: bool) -> object:
        before = (self.pool.n_available, self.pool.n_used, self.pool.n_kept)
        total = len(tokens) + more
        first = total if all_at_once else len(tokens)
        try:
            table = self.pool.admit(tokens, total, first=None if all_at_once else first, family=family, reuse=reuse)
        except RequestError:
            assert before == (self.pool.n_available, self.pool.n_used, self.pool.n_kept)
            # Whatever can be shared, free room was too little, or will never be enough.
            assert -(-first // SIZE) > before[0] - before[2] or total > N * SIZE
            return multiple()
        assert total <= N * SIZE
        assert table.reused < len(tokens)
        assert reuse or table.reused == 0
        for number, block in enumerate(table.blocks):  # what is shared holds exactly these tokens
            assert self.content[block] == (family, *tokens[: (number + 1) * SIZE])
        if table.source is not None:
            block, n = table.source
            shared = len(table.blocks) * SIZE
            assert self.content[block][: shared + n + 1] == (family, *tokens[: shared + n])
            assert table.reused == shared + n
        self.number += 1
        self.live[self.number] = (table, list(tokens), family, len(tokens) + more)
        return self.number

    @rule(sequence=sequences, more=TOKENS)
    def extend(self, sequence: int, more: list) -> None:
        if sequence not in self.live:
            return
        table, tokens, family, total = self.live[sequence]
        n_written = len(table.blocks) * SIZE
        if n_written >= len(tokens):  # the prompt is in; tokens are made
            tokens += more[: total - len(tokens)]
        if self.pool.n_missing(table, len(tokens)) > self.pool.n_available:
            with pytest.raises(AssertionError, match="promised"):
                self.pool.extend(table, len(tokens))
            del tokens[(len(table.blocks) + table.promised) * SIZE :]
        in_use = {block for other, *_ in self.live.values() for block in other.blocks}
        new = self.pool.extend(table, len(tokens))
        assert not in_use & set(new)
        self.pool.copied(table)
        for number in range(len(table.blocks)):
            if table.blocks[number] in new and (number + 1) * SIZE <= len(tokens):
                self.content[table.blocks[number]] = (family, *tokens[: (number + 1) * SIZE])
            elif table.blocks[number] in new:
                self.content.pop(table.blocks[number], None)
        for number, block in enumerate(table.blocks):  # a block that was begun before has become full
            if block not in self.content and (number + 1) * SIZE <= len(tokens):
                self.content[block] = (family, *tokens[: (number + 1) * SIZE])

    @rule(sequence=consumes(sequences), finished=st.booleans())
    def end(self, sequence: int, finished: bool) -> None:
        table, tokens, family, _ = self.live.pop(sequence)
        if finished:
            self.pool.keep(table, tokens[: len(table.blocks) * SIZE], family=family)
        self.pool.free(table)
        assert table.blocks == []
        assert table.promised == 0

    @invariant()
    def every_block_is_free_kept_or_used(self) -> None:
        used = [block for table, *_ in self.live.values() for block in table.blocks]
        used += [table.source[0] for table, *_ in self.live.values() if table.source]
        assert self.pool.n_used == len(set(used))
        assert self.pool.n_used + self.pool.n_kept <= N
        assert self.pool.n_available >= 0
        promised = sum(table.promised for table, *_ in self.live.values())
        assert self.pool.n_available == N - self.pool.n_used - promised

    def teardown(self) -> None:
        for table, *_ in self.live.values():
            self.pool.free(table)
        assert self.pool.n_used == 0
        assert self.pool.n_available == N


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def _finished(pool: BlockPool, tokens: Sequence, total: int | None = None, family: str | None = None) -> Table:
    """A sequence that came and went; the tokens that are left behind can be found."""
    table = pool.admit(tokens, total or len(tokens), family=family)
    pool.extend(table, len(tokens))
    pool.copied(table)
    pool.keep(table, tokens, family=family)
    pool.free(table)
    return table


def test_a_prompt_that_begins_alike_shares_whole_blocks_and_copies_what_is_common_of_the_next() -> None:
    pool = BlockPool(8, 4)
    _finished(pool, range(12))
    table = pool.admit([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 99], 16)
    assert (len(table.blocks), table.reused) == (2, 10)
    assert table.source is not None
    assert table.source[1] == 2


def test_the_last_token_is_always_computed() -> None:
    pool = BlockPool(8, 4)
    _finished(pool, range(8))
    assert pool.admit(range(8), 8).reused == 7
    assert pool.admit([0], 8).reused == 0


def test_the_same_tokens_in_another_place_or_family_are_not_shared() -> None:
    pool = BlockPool(16, 4)
    _finished(pool, [1, 2, 3, 4, 5, 6, 7, 8], family="a")
    assert pool.admit([5, 6, 7, 8, 9], 8, family="a").reused == 0
    assert pool.admit([1, 2, 3, 4, 5, 6], 8, family="b").reused == 0
    assert pool.admit([1, 2, 3, 4, 5, 6], 8, family="a").reused == 5


def test_what_was_used_last_stays_longest_and_the_end_of_a_sequence_goes_before_its_beginning() -> None:
    pool = BlockPool(6, 4)
    _finished(pool, range(8))  # two blocks
    _finished(pool, range(100, 108))  # two more
    _finished(pool, range(8))  # the first again
    table = pool.admit(range(200, 212), 12)  # three: two are free, one is taken from the second sequence
    pool.extend(table, 12)
    assert pool.admit([*range(100, 108), 0], 9).reused == 4
    assert pool.n_kept == 2


def test_a_second_sequence_of_the_same_content_leaves_no_second_copy() -> None:
    pool = BlockPool(8, 4)
    tables = [pool.admit(range(8), 8) for _ in range(2)]
    for table in tables:
        pool.extend(table, 8)
    for table in tables:
        pool.keep(table, range(8))
        pool.free(table)
    assert (pool.n_kept, pool.n_used, pool.n_available) == (2, 0, 8)


def test_room_that_is_promised_is_not_promised_again() -> None:
    pool = BlockPool(4, 4)
    table = pool.admit([1], 12)  # three of four blocks, none taken yet
    with pytest.raises(RequestError, match=r"needs 2 cache blocks of 4 tokens for its 8 tokens, and 1 of 4 can be had"):
        pool.admit([2], 8)
    pool.free(table)
    assert pool.admit([2], 8).promised == 2


def test_room_beyond_what_was_promised_is_taken_while_there_is_some_and_one_alone_always_has_it() -> None:
    pool = BlockPool(4, 4)
    first, second = (pool.admit([n], 16, first=4) for n in range(2))
    for table in (first, second):
        pool.extend(table, 8)
    assert [pool.n_missing(table, 9) for table in (first, second)] == [1, 1]
    assert pool.n_available == 0
    pool.free(second)
    pool.extend(first, 16)
    assert first.blocks == [0, 1, 2, 3]
    with pytest.raises(RequestError, match=r"needs 5 cache blocks of 4 tokens for its 17 tokens"):
        BlockPool(4, 4).admit([1], 17, first=4)


def test_sequences_that_grow_side_by_side_lie_in_one_piece_each() -> None:
    """A read of one then is a view; blocks handed out as they come would leave each scattered among the others."""
    pool = BlockPool(12, SIZE)
    tables = [pool.admit([1], 3 * SIZE, reuse=False) for _ in range(3)]
    for length in range(1, 3 * SIZE + 1):
        for table in tables:
            pool.extend(table, length)
    assert [table.blocks for table in tables] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    pool.free(tables[1])
    tables.append(pool.admit([1], 4 * SIZE, reuse=False))  # there are not so many neighbours left
    assert tables[3].home == range(0)
    pool.extend(tables[3], 4 * SIZE)
    assert sorted(tables[3].blocks) == [3, 4, 5, 9]
    for table in (tables[0], tables[2], tables[3]):
        pool.free(table)
    assert pool.n_available == 12
