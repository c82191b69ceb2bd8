"""The workbench without a browser: setting a control in a cell is a click, and what comes of it is honest."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastvl_lab import Recipe, RecipeError, Run, SweepSettings, recipe, sweep, view, workbench
from fastvl_lab.recipe import Option, toggles
from fastvl_lab.view.workbench import Workbench
from fastvl_lab.view.workbench.figures import so_far
from fastvl_lab.view.workbench.session import BEFORE, RECIPE, STOCK
from fastvl_lab.view.workbench.views import views
from fastvl_lab.vit import attention
from fastvl_lab.vit.attention import Prepared, SegmentAttention

pytest.importorskip("ipywidgets")
pytestmark = pytest.mark.alone


@pytest.fixture
def bench() -> Iterator[Workbench]:
    made = workbench("tiny-qwen3-vl", "coffee", image_size=(112, 84), max_new_tokens=6, repeats=1, device="cpu")
    assert made.wait(60)
    yield made
    made.close()


def test_a_click_runs_the_recipe_against_transformers(bench: Workbench) -> None:
    assert bench.recipe == Recipe.fastest("cpu")
    bench.controls["vit.attention"].value = "per_window"
    assert bench.wait(60)
    first, second = bench.history
    assert (first.recipe, second.recipe) == (Recipe.fastest("cpu"), first.recipe.replace("vit.attention", "per_window"))
    assert second.comparison is not None
    assert second.comparison.engines == (STOCK, BEFORE, RECIPE)  # all of them side by side
    assert second.comparison.parity(RECIPE)
    assert "parity ✓" in bench._summary.value
    assert [row["parity"] for row in bench.rows()] == [True, True]
    assert len(bench._figure.data) >= 4  # host and unaccounted of two engines, and the run before
    assert bench._figure.data[0].name == "the run before"
    bench.undo()
    assert bench.wait(60)
    assert bench.recipe == Recipe.fastest("cpu")


def test_every_toggle_has_its_control_and_greyed_options_say_why(bench: Workbench) -> None:
    assert list(bench.controls) == [toggle.path for toggle in toggles()]
    for toggle in toggles():
        for option in toggle.options:
            button = bench.controls[toggle.path].buttons[option.value]
            reason = option.unavailable(bench.device)
            assert button.disabled == (reason is not None)
            assert (reason or option.does) in button.tooltip
            assert button.description.startswith("≈") == (not option.exact)
    with pytest.raises(RecipeError, match="cannot run here: it needs a CUDA device"):
        bench.controls["vit.attention"].value = "triton"
    with pytest.raises(RecipeError, match="the choices are 'per_window'"):
        bench.controls["vit.attention"].value = "quick"


def test_a_choice_brings_along_what_it_cannot_do_without(bench: Workbench) -> None:
    bench.controls["cache.prefix_reuse"].value = "on"
    assert bench.recipe.cache.kv == "paged"
    assert bench.controls["cache.kv"].value == "paged"
    assert bench.controls["cache.kv"].buttons["paged"].icon == "arrow-right"
    assert bench.wait(60)


def test_an_error_is_said_and_the_panel_lives_on(bench: Workbench) -> None:
    bench.ask(picture=b"no picture")
    assert bench.wait(60)
    assert "not an image of a supported type" in bench._status.value
    bench.ask(picture="rocket")
    assert bench.wait(60)
    assert "idle" in bench._status.value
    assert len(bench.history) == 2


def test_a_panel_that_could_not_run_says_why_when_asked_for_its_result() -> None:
    bench = workbench("no-such-checkpoint", "coffee", repeats=0, device="cpu")
    assert bench.wait(60)
    with pytest.raises(RecipeError, match=r"there is no result: .*no-such-checkpoint"):
        bench.result()
    bench.close()


def test_a_long_run_is_stopped_and_a_newer_wish_takes_its_place(bench: Workbench) -> None:
    bench.ask(max_new_tokens=20_000)
    deadline = time.monotonic() + 20
    while "running" not in bench._status.value:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = time.monotonic()
    bench.stop()
    assert bench.wait(10)
    assert time.monotonic() - started < 2
    assert "stopped" in bench._status.value
    bench.run()
    bench.ask(max_new_tokens=4)
    assert bench.wait(60)
    assert len(bench.history[-1].run.tokens) == 4


def test_the_recipe_is_copied_and_the_history_written(bench: Workbench, tmp_path: Path) -> None:
    text = bench.code().split('"')[1]
    assert Recipe.parse(text, "cpu") == bench.recipe
    record, trace, page, *pictures = bench.export(tmp_path / "new")
    assert Run.from_record(json.loads(record.read_text())).tokens == bench.history[0].shown.tokens
    assert json.loads(trace.read_text())["traceEvents"]
    text = page.read_text()
    assert "parity ✓" in text
    assert "plotly.js v" in text  # the page needs no network
    assert not re.search(r"<script[^>]+src=", text)
    for drawn in ("waterfall", "tokens over time", "memory"):
        assert f"<h3>{drawn}</h3>" in text
    assert "<h3>toggle by toggle</h3>" not in text  # not measured, so not claimed
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("view", list(views()))
def test_every_view_measures_what_it_lacks_and_shows_a_figure_and_a_table(bench: Workbench, view: str) -> None:
    bench._looks.value = view  # as a click does
    assert bench.wait(90)
    assert "idle" in bench._status.value
    assert not bench._views[view].lacks(bench.history[-1])
    assert bench._figure.data
    assert "<td>" in bench._table.value
    if view == "toggle by toggle":
        found = bench.history[-1].attribution
        assert found is not None
        assert set(bench._figure.data[0].y) == {"transformers", *found.steps, "in the end"}
    with pytest.raises(RecipeError, match="no view 'x'; the choices are waterfall, "):
        bench.look("x")


def test_any_two_of_the_history_are_held_against_each_other(bench: Workbench) -> None:
    for value in ("eager", "sdpa"):
        bench.controls["attention.prefill"].value = value
        assert bench.wait(60)
    first, second, third = bench.history
    bench.look(number=1, against=3)
    ghost = bench._figure.data[0]
    assert ghost.name == "the run before"
    assert list(ghost.x) == [span.duration_ns / 1e6 for span in third.shown.trace.within_ttft()]
    bench._pick.value, bench._pick_against.value = 2, 1
    bench._measure_picked()
    assert bench.wait(60)
    fourth = bench.history[-1]
    assert (fourth.recipe, fourth.before) == (second.recipe, first.recipe)
    assert fourth.comparison is not None
    assert fourth.comparison.engines == (STOCK, BEFORE, RECIPE)
    with pytest.raises(RecipeError, match="there is no result 9: the history has 1 to 4"):
        bench.look(number=9)


def test_stages_are_told_as_they_end(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.view.workbench.panel._BETWEEN_TEXTS", 0.0)
    monkeypatch.setattr("fastvl_lab.view.workbench.panel._BETWEEN_STAGES", 0.0)
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        "fastvl_lab.view.workbench.panel.so_far", lambda stages: drawn.append([s.name for s in stages]) or so_far(stages)
    )
    bench.run()
    assert bench.wait(60)
    assert drawn
    assert all(len(later) == len(earlier) + 1 for earlier, later in itertools.pairwise(drawn))
    assert drawn[-1] == [span.name for span in bench.history[-1].run.trace.within_ttft()][: len(drawn[-1])]


def test_an_option_is_a_line_of_the_catalogue_and_a_function_of_its_slot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Added here while everything runs: panel, sweep, README table and error text find it, and a click runs it."""
    calls: list[int] = []

    def written_out(_: torch.dtype) -> SegmentAttention:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Prepared) -> torch.Tensor:
            calls.append(1)
            segments = [x.split(prepared.fixed, dim=1) for x in (q * q.shape[-1] ** -0.5, k, v)]
            outputs = [(q @ k.mT).softmax(-1) @ v for q, k, v in zip(*segments, strict=True)]
            return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

        return SegmentAttention(prepare=attention.per_window(torch.float32).prepare, attend=attend)

    line = Option(value="written_out", does="scores, softmax and sum a window at a time; nobody does so yet")
    catalogue = tuple(dataclasses.replace(t, options=(*t.options, line)) if t.path == "vit.attention" else t for t in toggles())
    monkeypatch.setattr(attention, "written_out", written_out, raising=False)
    for module in ("fastvl_lab.recipe", "fastvl_lab.view.workbench.controls", "fastvl_lab.view.tables"):
        monkeypatch.setattr(f"{module}.toggles", lambda: catalogue)

    bench = workbench("tiny-qwen3-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=1, device="cpu")
    assert bench.wait(60)
    assert "nobody does so yet" in bench.controls["vit.attention"].buttons["written_out"].tooltip
    assert not calls
    bench.controls["vit.attention"].buttons["written_out"].click()
    assert bench.wait(60)
    assert calls
    assert bench.result().recipe.vit.attention == "written_out"
    assert bench.result().parity
    bench.close()

    settings = SweepSettings(
        checkpoints=["tiny-qwen3-vl"],
        recipes=["transformers", "fastest, vit.attention=written_out"],
        image="coffee",
        image_sizes=[[56, 56]],
        prompt="What is this?",
        max_new_tokens=2,
        repeats=1,
        warm_up=1,
        device="cpu",
        dtype="",
        seed=0,
        output_dir="",
    )
    rows = sweep(settings, progress=False).summary()
    assert {row["engine"]: row["tokens_equal"] for row in rows} == dict.fromkeys(settings.recipes, True)
    assert "| `written_out` | yes | scores, softmax and sum a window at a time; nobody does so yet |" in recipe.catalogue_markdown()
    assert "written_out" in set(view.catalogue_frame()["option"])
    with pytest.raises(RecipeError, match=r"the choices are 'per_window', .*, 'written_out'"):
        bench.controls["vit.attention"].value = "yesterday"
