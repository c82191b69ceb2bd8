"""A recipe's way from another, a toggle at a time, and what each takes off."""

from __future__ import annotations

import dataclasses

import pytest

from fastvl_lab import Lab, Recipe, RecipeError, Request, view
from fastvl_lab.measure.compare import Attribution, Comparison, attribute
from fastvl_lab.measure.parity import Parity


@pytest.fixture(scope="module")
def found(labs: dict[str, Lab], picture: bytes) -> Attribution:
    request = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    return attribute(labs["tiny-qwen2.5-vl"], request, Recipe.parse("baseline, vit.tower=lean, attention.prefill=sdpa"), repeats=6)


def test_savings_are_paired_by_round_and_drawn_as_steps(found: Attribution) -> None:
    comparison = found.comparison
    assert isinstance(comparison, Comparison)
    assert set(comparison.engines) == {"transformers", *found.steps}
    assert found.steps[0] == "baseline"
    for before, step in zip(found.steps, found.steps[1:], strict=False):
        saved = found.saved(step)
        assert saved is not None
        pairs = zip(comparison.runs(before), comparison.runs(step), strict=True)
        differences = sorted((earlier.ttft - later.ttft) * 1e3 for earlier, later in pairs)
        assert saved.median == pytest.approx((differences[2] + differences[3]) / 2)
        assert (saved.low, saved.high) == pytest.approx((differences[0], differences[-1]))  # of six

    bars = view.step_down(found).data[0]
    assert list(bars.y) == ["transformers", *found.steps, "in the end"]
    reached = comparison.representative("baseline").ttft * 1e3
    for base, length, step in zip(bars.base[2:-1], bars.x[2:-1], found.steps[1:], strict=True):
        saved = found.saved(step)
        assert saved is not None
        assert [base, base + length] == pytest.approx(sorted((reached, reached - saved.median)))
        reached -= saved.median
    for step, strength in zip(found.steps[1:], bars.marker.opacity[2:-1], strict=True):
        saved = found.saved(step)
        assert saved is not None
        assert (strength == 1) == (saved.low > 0 or saved.high < 0)  # what an interval does not bear out is pale
    assert bars.x[-1] == comparison.representative(found.steps[-1]).ttft * 1e3
    frame = view.attribution_frame(found)
    assert list(frame["step"]) == ["transformers", *found.steps]
    assert set(frame["parity"]) == {"yes"}
    whole = comparison.saving(found.steps[-1], "baseline")
    assert whole is not None
    assert found.rest is not None
    steps = [saved.median for step in found.steps[1:] if (saved := found.saved(step)) is not None]
    assert sum(steps) + found.rest == pytest.approx(whole.median)
    assert found.saved("baseline") is None  # there is no step before it
    with pytest.raises(RecipeError, match=r"step 'vit' is unknown; the steps are 'baseline', 'vit.tower=lean'"):
        found.saved("vit")


def test_a_step_on_other_pixels_says_whose_tokens_it_makes(labs: dict[str, Lab], picture: bytes) -> None:
    request = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    found = attribute(labs["tiny-qwen3-vl"], request, "baseline, preprocessor.resize=torch", repeats=1)
    assert list(view.attribution_frame(found)["parity"]) == ["yes", "yes", "yes, on its pixels"]
    with pytest.raises(RecipeError, match="'transformers' is a peer"):
        attribute(labs["tiny-qwen3-vl"], request, "transformers")


def test_no_saving_is_shown_of_a_step_that_makes_other_tokens(found: Attribution) -> None:
    wrong, after = found.steps[1], found.steps[2]
    red = Parity(oracle="transformers", holds=False, why="its tokens differ from those of transformers")
    checks = {**found.comparison.checks, wrong: red}
    broken = dataclasses.replace(found, comparison=dataclasses.replace(found.comparison, checks=checks))
    assert broken.saved(wrong) is None
    assert broken.saved(after) is None  # what it is held against is the wrong one
    bars = view.step_down(broken).data[0]
    assert "no parity: not compared" in bars.text[bars.y.index(wrong)]
    row = view.attribution_frame(broken).set_index("step").loc[wrong]
    assert (row["saves ms (95% CI)"], row["times as fast as Transformers (95% CI)"], row["parity"]) == ("–", "–", "NO")
