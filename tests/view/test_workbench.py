"""The workbench without a browser: setting a control in a cell is a click, and what comes of it is honest."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvl_lab import Recipe, RecipeError, Run, recipe, workbench
from fastvl_lab.recipe import Option, toggles
from fastvl_lab.view.workbench import Workbench

pytest.importorskip("ipywidgets")


@pytest.fixture
def bench() -> Iterator[Workbench]:
    made = workbench("tiny-qwen3-vl", "coffee", image_size=(112, 84), max_new_tokens=6, repeats=1, device="cpu")
    assert made.wait(60)
    yield made
    made.stop()


def test_a_click_runs_the_recipe_against_transformers(bench: Workbench) -> None:
    assert bench.recipe == Recipe.fastest("cpu")
    bench.controls["vit.attention"].value = "per_window"
    assert bench.wait(60)
    first, second = bench.history
    assert (first.recipe, second.recipe) == (Recipe.fastest("cpu"), first.recipe.replace("vit.attention", "per_window"))
    assert second.comparison is not None
    assert second.comparison.parity("recipe")
    assert "parity ✓" in bench._summary.value
    assert [row["parity"] for row in bench.rows()] == [True, True]
    assert len(bench._waterfall.data) >= 4  # host and unaccounted of two engines, and the run before
    assert bench._waterfall.data[0].name == "the run before"
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
    record, trace = bench.export(tmp_path)
    assert Run.from_record(json.loads(record.read_text())).tokens == bench.history[0].shown.tokens
    assert json.loads(trace.read_text())["traceEvents"]


def test_an_option_added_to_the_catalogue_is_found_by_panel_docs_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    more = Option(value="tomorrow", does="what nobody does yet; the lab's own", needs=("no_such_package",))

    def with_one_more() -> tuple[recipe.Toggle, ...]:
        return tuple(dataclasses.replace(t, options=(*t.options, more)) if t.path == "vit.attention" else t for t in toggles())

    monkeypatch.setattr("fastvl_lab.view.workbench.controls.toggles", with_one_more)
    monkeypatch.setattr("fastvl_lab.recipe.toggles", with_one_more)
    bench = workbench("tiny-qwen3-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=0, device="cpu")
    assert bench.wait(60)
    assert "needs the package no_such_package" in bench.controls["vit.attention"].buttons["tomorrow"].tooltip
    assert "what nobody does yet" in recipe.catalogue_markdown()
    with pytest.raises(RecipeError, match="'tomorrow'"):
        bench.controls["vit.attention"].value = "yesterday"
