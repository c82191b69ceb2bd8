"""Shares of what choices take off: exact where the cost is known, in interleaved rounds where it is measured."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise, permutations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

import fastvl_lab as fl
from fastvl_lab import Comparison, Lab, Recipe, Request, RequestError, Shares, view
from fastvl_lab.measure.shares import (
    Some,
    along,
    every,
    interactions,
    sampled_orders,
    sampled_shapley,
    shapley,
)

A, B, C, D = "abcd"


def _known(some: Some) -> float:
    """A alone takes off 10, B 4, C 1, D nothing; A and B overlap by 3; C and D take off 6 more together."""
    taken = sum({A: 10.0, B: 4.0, C: 1.0, D: 0.0}[one] for one in some)
    return 100 - taken + 3 * ({A, B} <= some) - 6 * ({C, D} <= some)


def test_shares_of_a_known_cost_are_exact() -> None:
    found = shapley("abcd", _known)
    assert found == pytest.approx({A: 10 - 1.5, B: 4 - 1.5, C: 1 + 3, D: 3})
    assert sum(found.values()) == pytest.approx(_known(frozenset()) - _known(frozenset("abcd")))
    assert interactions("abcd", _known) == pytest.approx({(A, B): -3, (A, C): 0, (A, D): 0, (B, C): 0, (B, D): 0, (C, D): 6})


def test_shares_of_any_cost_are_the_mean_over_all_orders() -> None:
    """By its definition, order by order, on a cost without any structure."""
    for n in (1, 3, 5):
        choices = [f"c{number}" for number in range(n)]
        costs = dict(zip(every(choices), np.random.default_rng(n).normal(size=2**n), strict=True))
        taken: dict[str, list[float]] = {one: [] for one in choices}
        for order in permutations(choices):
            way = along(order)
            for one, before, after in zip(order, way, way[1:], strict=False):
                taken[one].append(costs[before] - costs[after])
        assert shapley(choices, costs.__getitem__) == pytest.approx({one: mean(each) for one, each in taken.items()})


def test_sampled_shares_add_up_and_lie_within_their_error() -> None:
    choices = [f"c{number}" for number in range(10)]
    worth = dict(zip(choices, np.random.default_rng(0).uniform(0, 5, 10).tolist(), strict=True))

    def cost(some: Some) -> float:
        together = sum(1.0 for one, other in pairwise(choices) if {one, other} <= some)
        return 100 - sum(worth[one] for one in some) - together**1.5 + 2 * ({"c0", "c5", "c9"} <= some)

    true, within = shapley(choices, cost), []
    for seed in range(20):
        orders = sampled_orders(choices, 15, seed)
        assert len(orders) == 16
        assert all(sorted(order) == choices and order[::-1] in orders for order in orders)
        found = sampled_shapley(orders, cost)
        whole = cost(frozenset()) - cost(frozenset(choices))
        assert sum(share for share, _ in found.values()) == pytest.approx(whole)
        within += [abs(share - true[one]) <= 2.365 * error for one, (share, error) in found.items()]  # Student's t of 7 at 95%
    assert mean(within) > 0.9
    assert math.isnan(sampled_shapley(sampled_orders("ab", 2, 0), _known)["a"][1]), "one pair of orders has no error"


def _measured(
    comparison_of: Callable[..., Comparison], cost: Callable[[Some], float], choices: str, orders: int = 0, **more: Any
) -> Shares:
    """Of known costs with noise, and a machine that drifts by 30% over the rounds."""
    sampled = sampled_orders(choices, orders, 0) if orders else ()
    wanted = {some for order in sampled for some in along(order)} if orders else set(every(choices))
    wanted |= {frozenset(choices) - {one} for one in choices} | {frozenset([one]) for one in choices}
    engines = {some: "+".join(sorted(some)) or "start" for some in sorted(wanted, key=sorted)}
    noise = np.random.default_rng(0)
    times = {
        label: [{"vit": cost(some) * (1 + 0.3 * n / 12) * float(np.exp(noise.normal(0, 0.002)))} for n in range(12)]
        for some, label in engines.items()
    }
    return Shares(comparison=comparison_of(times, **more), choices=tuple(choices), engines=engines, orders=sampled)


def test_measured_shares_are_found_and_add_up(comparison_of: Callable[..., Comparison]) -> None:
    found = _measured(comparison_of, _known, "abcd")
    shares = found.shares()
    assert found.saved is not None
    assert sum(share.median for share in shares.values()) == pytest.approx(found.saved)
    for one, true in {A: 8.5, B: 2.5, C: 4, D: 3}.items():
        assert shares[one].low - 0.1 <= true * 1.15 <= shares[one].high + 0.1, "of a machine that is 15% slower on average"
    pairs = found.interactions()
    assert pairs[C, D].low > 0
    assert pairs[A, B].high < 0
    alone, left = found.alone(D), found.left_out(D)
    assert alone is not None
    assert left is not None
    assert abs(alone.median) < 0.5
    assert left.median == pytest.approx(6 * 1.15, rel=0.15), "it counts beside C alone"
    assert any("c and d take off 6" in line and "more together" in line for line in found.findings())
    assert any("a and b take off 3" in line and "they overlap" in line for line in found.findings())
    assert found.errors() == {}


def test_sampled_measured_shares_have_an_error_of_their_own(comparison_of: Callable[..., Comparison]) -> None:
    found = _measured(comparison_of, _known, "abcd", orders=8)
    assert found.saved is not None
    assert sum(share.median for share in found.shares().values()) == pytest.approx(found.saved)
    assert set(found.errors()) == set("abcd")
    assert found.interactions() == {}
    assert "by the choice of orders" in found.findings()[1]
    assert "± ms by the choice of orders" in found.frame()


def test_no_share_is_told_beside_a_red_parity_check(comparison_of: Callable[..., Comparison]) -> None:
    found = _measured(comparison_of, _known, "abc", wrong=["a+b"])
    assert (found.saved, found.shares(), found.interactions()) == (None, {}, {})
    assert found.findings()[0] == "no share is told: a+b fails parity"
    assert list(found.frame()["its share ms (95% CI)"]) == ["–"] * 3
    assert view.share_bars(found).data


def test_too_few_rounds_have_no_interval(comparison_of: Callable[..., Comparison]) -> None:
    found = _measured(comparison_of, _known, "ab")
    few = dataclasses.replace(found.comparison, samples=tuple(s for s in found.comparison.samples if s.round < 5))
    shares = dataclasses.replace(found, comparison=few).shares()
    assert shares[A].median > shares[B].median > 0
    assert math.isnan(shares[A].low)


def test_it_is_drawn_and_kept(comparison_of: Callable[..., Comparison], tmp_path: Path) -> None:
    found = _measured(comparison_of, _known, "abcd")
    figure = found.figure()
    assert [trace.name for trace in figure.data] == ["alone", "its share", "left out of all"]
    shares = found.shares()
    assert list(figure.data[1].x) == [shares[one].median for one in "abcd"]
    table = view.interaction_frame(found)
    assert list(table["choices"][:2]) == ["c and d", "a and b"]
    rows = json.loads(json.dumps(found.rows(), allow_nan=False))
    assert [row["choice"] for row in rows] == list("abcd")
    again = fl.open(found.save(tmp_path / "shares"))
    assert again.shares() == shares
    assert again.findings() == found.findings()
    assert again.rows() == found.rows()


@pytest.fixture(scope="module")
def asked(picture: bytes) -> Request:
    return Request(images=[picture], prompt="What?", max_new_tokens=1, ignore_eos=True)


def test_choices_of_a_recipe_are_told_apart_on_a_model(labs: dict[str, Lab], asked: Request) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    recipe = Recipe.parse("baseline, vit.tower=lean, vit.rope=halves, attention.prefill=sdpa")
    found = fl.shares(lab, asked, recipe, only=["vit"], of="toggles", repeats=6)
    assert found.choices == ("vit.tower=lean", "vit.rope=halves")
    engines = {label: found.comparison.runs(label, "cold")[0].recipe for label in found.comparison.engines}
    assert engines[found.start] == Recipe.parse("baseline, attention.prefill=sdpa"), "what is not told apart is made beforehand"
    assert engines[found.end] == recipe
    assert found.notes == ("vit.rope=halves brings vit.tower=lean with it, and is worth both",)
    assert len(engines) == 3, "rope alone is both, and is measured once"
    assert found.saved is not None
    assert sum(share.median for share in found.shares().values()) == pytest.approx(found.saved)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"recipe": "baseline"}, "the recipe changes nothing beyond the start"),
        ({"recipe": "fastest", "only": ["vit.colour"]}, "only is"),
        ({"recipe": "baseline, vit.tower=lean", "only": ["cache"]}, "the recipe changes nothing of these"),
        ({"recipe": "fastest", "of": "letters"}, "of is 'letters'; the choices are slots, toggles"),
        ({"recipe": "fastest", "orders": 1}, "orders is 1"),
    ],
)
def test_what_makes_no_sense_is_refused(labs: dict[str, Lab], asked: Request, wrong: Mapping[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        fl.shares(labs["tiny-qwen3-vl"], asked, **wrong)


@pytest.mark.nightly
def test_all_slots_of_the_fastest_recipe_add_up(labs: dict[str, Lab], asked: Request) -> None:
    found = fl.shares(labs["tiny-qwen3-vl"], asked, "fastest", repeats=6)
    assert set(found.choices) <= {"preprocessor", "vit", "attention", "cache", "capture", "streaming"}
    assert found.saved is not None
    assert sum(share.median for share in found.shares().values()) == pytest.approx(found.saved)


@pytest.mark.nightly
def test_many_toggles_are_sampled(labs: dict[str, Lab], asked: Request) -> None:
    found = fl.shares(labs["tiny-qwen3-vl"], asked, "fastest", of="toggles", repeats=2, orders=4)
    assert len(found.choices) > 8
    assert len(found.orders) == 4
    assert found.saved is not None
    assert sum(share.median for share in found.shares().values()) == pytest.approx(found.saved)
