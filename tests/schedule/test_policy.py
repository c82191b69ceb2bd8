"""Who is next and how much of a prompt a step computes, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, strategies as st

from fastvl_lab.catalogue import Schedule
from fastvl_lab.schedule.policy import Policy, gives_way, pieces


@dataclass(frozen=True, kw_only=True)
class One:
    n_prompt: int = 0
    since: float = 0.0
    n_left: int = 0
    number_admitted: int | None = None


def test_the_toggles_are_the_policy() -> None:
    assert Policy.of(Schedule()) == Policy(max_batch=8, budget=None, order="fifo")
    chosen = Schedule(batching="continuous", max_batch=32, prefill="chunked", budget=128, order="shortest_first")
    assert Policy.of(chosen) == Policy(max_batch=32, budget=128, order="shortest_first")
    packs = {
        vision: Policy.of(Schedule(batching="continuous", vision=vision)).packs_images for vision in ("inline", "ahead", "batched")
    }
    assert packs == {"inline": False, "ahead": False, "batched": True}


def test_who_came_first_or_has_the_shortest_prompt_is_next_and_nobody_waits_for_ever() -> None:
    long, short = One(n_prompt=5_000, since=0.0), One(n_prompt=100, since=1.0)
    assert Policy(max_batch=8, budget=None, order="fifo").next([long, short], now=2.0) is long
    by_length = Policy(max_batch=8, budget=None, order="shortest_first")
    assert by_length.next([long, short], now=2.0) is short
    # Others as short keep coming; the long one's waiting outweighs them in the end.
    assert by_length.next([long, One(n_prompt=100, since=9.9)], now=10.0) is long


def test_who_was_admitted_last_gives_way_and_comes_back_before_anybody_new() -> None:
    first, second, third = (One(number_admitted=number, n_prompt=1_000, since=9.0) for number in range(3))
    new = One(n_prompt=1, since=0.0)
    under_way, waiting = [second, first, third], [new]
    while under_way:
        under_way.remove(one := gives_way(under_way))
        waiting.append(one)
    assert waiting == [new, third, second, first]
    for order in ("fifo", "shortest_first"):
        policy, left, back = Policy(max_batch=8, budget=None, order=order), list(waiting), []
        while left:
            left.remove(one := policy.next(left, now=10.0))
            back.append(one)
        assert [one.number_admitted for one in back] == [0, 1, 2, None]


def test_a_budget_counts_decode_rows_and_leaves_a_prompt_one_token_at_least() -> None:
    chunked = Policy(max_batch=8, budget=10, order="fifo")
    assert [chunked.left(*counts) for counts in ((0, 0), (4, 0), (4, 6), (10, 0), (25, 0), (25, 1))] == [10, 6, 0, 1, 1, 0]
    assert Policy(max_batch=8, budget=None, order="fifo").left(8, 10_000) is None


def test_whole_prompts_where_there_is_no_limit() -> None:
    waiting = [One(n_left=300), One(n_left=7)]
    assert pieces(waiting, None) == [(waiting[0], 300), (waiting[1], 7)]


@given(st.lists(st.integers(1, 50), max_size=6), st.integers(0, 60))
def test_pieces_fill_a_step_in_order(lefts: list[int], left: int) -> None:
    waiting = [One(n_left=n) for n in lefts]
    found = pieces(waiting, left)
    assert sum(n for _, n in found) == min(left, sum(lefts))
    assert [one for one, _ in found] == waiting[: len(found)]
    assert all(n == one.n_left for one, n in found[:-1])  # only the last is cut
