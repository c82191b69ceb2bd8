"""Tuning on models: what is planted is found and named, what was learnt is kept and read, and nothing slower is ever returned."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastvl_lab as fl
from fastvl_lab import (
    FastvlError,
    Goodput,
    Lab,
    Recipe,
    RecipeError,
    Request,
    RequestCancelledError,
    RequestError,
    Sampling,
    Tuned,
    learnt,
    tune,
    view,
)
from fastvl_lab.measure.journal import Journalled
from fastvl_lab.measure.load import Load, load
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.samples import gains
from fastvl_lab.measure.search import COST, CastOutError, Progress
from fastvl_lab.measure.tune import _Bench, _key, costs, main, read_goal
from fastvl_lab.vit import operations

ROPE = {"only": ["vit.rope"], "quiet": None, "progress": False}


@pytest.fixture
def request_(picture: bytes) -> Request:
    return Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True)


@pytest.fixture
def lab(shallow_labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    """One with a cache of its own and nothing bound, so that what is planted is bound, and bound nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return shallow_labs["tiny-qwen2.5-vl"].apart()


Plant = Callable[[str, Callable[..., Any]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Put a step in the place of one of the tower's; it is given the step and what that takes."""

    def planted(name: str, step: Callable[..., Any]) -> None:
        right = getattr(operations, name)
        monkeypatch.setattr(operations, name, lambda *given: step(right, *given))

    return planted


def _scaled(right: Callable[..., Any], *given: Any) -> Any:
    q, k, v = right(*given)
    return q * 1.5, k, v


def _crashing(_: Callable[..., Any], *given: Any) -> Any:
    raise RuntimeError("planted")


def _hanging(_: Callable[..., Any], *given: Any) -> Any:
    while True:
        time.sleep(0.01)


def _slow(right: Callable[..., Any], *given: Any) -> Any:
    time.sleep(0.05)
    return right(*given)


@pytest.mark.parametrize(
    ("step", "why"),
    [(_scaled, "parity: its "), (_crashing, "it failed: RuntimeError: planted"), (_hanging, "it did not end within 8 s")],
)
def test_a_wrong_a_crashing_and_a_hanging_option_is_cast_out_and_named(
    lab: Lab, request_: Request, plant: Plant, step: Callable[..., Any], why: str
) -> None:
    plant("_rotate", step)
    found = tune(lab, request_, 30, limit=8 if step is _hanging else None, **ROPE)
    assert [one.label for one in found.cast_out if one.recipe] == ["vit.rope=eager"]
    assert found.cast_out[0].why.startswith(why)
    assert found.recipe == found.start == Recipe.fastest("cpu")
    assert any(line.startswith("vit.rope=eager was cast out") for line in found.findings())
    assert lab.run(request_, "fastest").tokens == lab.run(request_, "transformers").tokens, "the lab serves as before"


def test_an_option_after_which_the_device_is_lost_ends_the_search_and_alone_is_to_blame(
    lab: Lab, request_: Request, plant: Plant
) -> None:
    """Whatever CUDA is asked in the process after an illegal access fails, and is right."""
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    asked: list[str] = []

    def breaks(_: Callable[..., Any], *given: Any) -> Any:
        asked.append("eager")
        raise lost

    def fails_then(right: Callable[..., Any], *given: Any) -> Any:
        if asked:
            raise lost
        return right(*given)

    plant("_rotate", breaks)
    plant("_rotate_halves", fails_then)
    found = tune(lab, request_, 30, only=["vit.rope", "vit.norms"], seed=1)
    assert [one.label for one in found.cast_out if one.recipe] == ["vit.rope=eager"]
    assert found.ended.endswith("nothing more can be timed in this process")
    assert found.recipe == found.start


def test_an_option_whose_runs_differ_is_unstable(lab: Lab, request_: Request, plant: Plant) -> None:
    calls = iter(range(10**6))

    def changing(right: Callable[..., Any], *given: Any) -> Any:
        q, k, v = right(*given)
        return q * (1 + next(calls) % 97), k, v

    plant("_rotate", changing)
    found = tune(lab, request_, 30, **ROPE)
    assert [one.label for one in found.cast_out if one.recipe] == ["vit.rope=eager"]


def test_a_slow_option_is_not_chosen(lab: Lab, request_: Request, plant: Plant) -> None:
    plant("_rotate", _slow)
    found = tune(lab, request_, 30, **ROPE)
    assert [(tried.label, tried.verdict) for tried in found.tried] == [("vit.rope=eager", "slower")]
    assert (found.recipe, tuple(found.ratio), found.kept) == (found.start, (1, 1, 1), None)
    assert not (learnt.Site.of(lab.checkpoint).path).exists(), "what stays as it was is not kept"


def test_what_is_faster_is_chosen_confirmed_kept_and_read(
    lab: Lab, request_: Request, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is made slow; what was learnt is the lab's "fastest" from then on, for these versions alone."""
    plant("_rotate_halves", _slow)
    before = lab.fastest
    found = tune(lab, request_, 60, **ROPE)
    assert found.recipe == before.replace("vit.rope", "eager")
    assert found.confirmed
    assert found.ratio.low > 1
    assert found.over == "fastest (measured on another machine)"
    assert found.kept == learnt.Site.of(lab.checkpoint).path
    assert found.recipe.origin.startswith(f"tuned here on {time.strftime('%Y-%m-%d')} for ttft: ")

    assert lab.fastest == lab.engine("fastest").recipe == lab.recipe("fastest") == found.recipe
    assert lab.fastest.origin == found.recipe.origin
    assert lab.recipe("fastest, vit.norms=eager") == found.recipe.replace("vit.norms", "eager")
    assert lab.run(request_, found.recipe).engine == "fastest"
    assert lab.run(request_, Recipe.fastest("cpu")).engine == "fastest, vit.rope=halves", "a text that the lab reads back"
    assert Recipe.parse("fastest") == before, "without a lab it is the guess"

    again = tune(lab, request_, 30, **ROPE)
    assert again.over.startswith("fastest (tuned here on")
    assert again.recipe == found.recipe

    monkeypatch.setattr(learnt, "versions", lambda: learnt_versions | {"torch": "99.0"})
    old = learnt.fastest(lab.checkpoint)
    assert old == before
    assert "measured on another machine; what was tuned here on" in old.origin
    assert "and here is 99.0" in old.origin


learnt_versions = learnt.versions()


def test_a_damaged_a_foreign_and_an_approximate_record_are_ignored_with_a_word(lab: Lab) -> None:
    site = learnt.Site.of(lab.checkpoint)
    recipe = Recipe.baseline().replace("vit.tower", "lean")
    record = dataclasses.replace(_record(site, recipe), versions=learnt.versions())
    path = record.write()
    assert learnt.Record.read(path) == dataclasses.replace(record, workload=[{"images": [[1, 2]]}], parity=["yes"])
    assert learnt.fastest(lab.checkpoint) == recipe
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left aside"
    whole = json.loads(path.read_text())

    def ignored(text: str, why: str) -> None:
        path.write_text(text)
        with pytest.warns(UserWarning, match=why):
            assert learnt.fastest(lab.checkpoint) == Recipe.fastest("cpu")

    ignored(path.read_text()[:100], "is ignored: JSONDecodeError")
    ignored("[]", "its schema is not 1")
    ignored(json.dumps({**whole, "schema": 2}), "its schema is not 1")
    ignored(json.dumps({key: value for key, value in whole.items() if key != "recipe"}), "it is incomplete")
    ignored(json.dumps({**whole, "goal": "ttft"}), "it is incomplete")
    ignored(json.dumps({**whole, "site": {**whole["site"], "processor": "Z80"}}), "its processor is 'Z80', and here it is")
    ignored(json.dumps({**whole, "recipe": {"vit": {"rope": "no_more"}}}), "the choices are")
    on_cuda = {"preprocessor": {"upload": "pinned"}}
    ignored(json.dumps({**whole, "recipe": on_cuda}), "it needs a CUDA device")
    approximate = Recipe.baseline().choose("preprocessor.resize", "device").to_dict()
    ignored(json.dumps({**whole, "recipe": approximate}), "its recipe is not exact")


def test_a_cache_that_cannot_be_read_costs_no_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 300}")
    with pytest.warns(UserWarning, match="is ignored: OSError: .*File name too long"):
        assert learnt.fastest(lab.checkpoint) == Recipe.fastest("cpu")


def test_sites_differ_by_dtype_geometry_and_threads(labs: dict[str, Lab], shallow_labs: dict[str, Lab]) -> None:
    checkpoint = labs["tiny-qwen3-vl"].checkpoint
    site = learnt.Site.of(checkpoint)
    others = [learnt.Site.of(shallow_labs["tiny-qwen3-vl"].checkpoint), learnt.Site.of(labs["tiny-qwen2.5-vl"].checkpoint)]
    others += [dataclasses.replace(site, **{name: other}) for name, other in (("dtype", "bfloat16"), ("threads", site.threads + 1))]
    assert len({site.path, *(other.path for other in others)}) == 5


def test_an_origin_is_no_part_of_a_recipe() -> None:
    guess = Recipe.fastest("cuda")
    assert guess.origin == "a guess for cuda"
    assert guess == dataclasses.replace(guess, origin="")
    assert hash(guess) == hash(dataclasses.replace(guess, origin=""))
    assert "origin" not in guess.to_dict()
    assert "origin" not in repr(guess)
    assert Recipe.parse("fastest", "cpu").origin == "measured on another machine"
    assert Recipe.parse("fastest, vit.rope=eager").origin == Recipe.baseline().origin == ""


@pytest.fixture(scope="module")
def short(labs: dict[str, Lab], picture: bytes) -> Tuned:
    """A whole search, cut off by its time."""
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=2, ignore_eos=True)
    return tune(labs["tiny-qwen2.5-vl"], request, 12, quiet=None, progress=False, keep=False)


def test_a_short_tune_never_returns_what_is_not_shown_to_be_faster(short: Tuned) -> None:
    assert short.start == Recipe.fastest("cpu")
    assert short.recipe == short.start or (short.confirmed and gains(short.ratio))
    assert all(checked.holds for checked in short.checks)
    assert short.tried
    assert short.recipe.exact
    assert short.kept is None
    reasons = {one.label: one.why for one in short.cast_out}
    assert "CUDA" in reasons["vit.attention=varlen"]
    assert "approximate" in reasons["preprocessor.decode=draft"]
    assert "many requests" in reasons["schedule.batching"]
    assert "comes again" in reasons["cache.image_reuse"]
    assert "after the first token" in reasons["attention.decode"]
    assert "nothing in this family" in reasons["vit.interpolation=fused"] or "CUDA" in reasons["vit.interpolation=fused"]


def test_it_shows_itself_as_text_a_table_and_bars(short: Tuned) -> None:
    assert repr(short).startswith("Tuned: baseline, ")
    frame = short.frame()
    assert list(frame["tried"]) == [*(tried.label for tried in short.tried), *(one.label for one in short.cast_out)]
    bundle = short._repr_mimebundle_()
    assert "<table" in bundle["text/html"]
    assert bundle["text/plain"] == repr(short)
    (bars,) = short.figure().data
    timed = [tried for tried in short.tried if tried.ratio is not None]
    assert list(bars.x) == pytest.approx([(tried.ratio.median - 1) * 100 for tried in timed if tried.ratio])
    assert view.tuned_bars(short).layout.yaxis.categoryarray[0].startswith("1. ")
    named = ", ".join(f"vit.toggle_{number}=off" for number in range(9))
    long = view.tuned_bars(dataclasses.replace(short, tried=(dataclasses.replace(timed[0], label=named),)))
    assert len(long.data[0].y[0]) < 50, "a recipe that changes much leaves its bar no room"
    assert long.data[0].customdata[0][3] == named
    record = json.loads(json.dumps(short.to_record(), allow_nan=False))
    assert len(record["rows"]) == len(frame)
    assert Recipe.from_dict(record["recipe"]) == short.recipe


def test_a_mix_of_requests_and_goals(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    short = dataclasses.replace(request, prompt="Hi.")
    mix = [(request, 3), (short, 1)]
    goal = {"ttft": 1, "tpot": 3}
    found = tune(lab, mix, 30, goal=goal, only=["streaming.steps_per_round"], quiet=None, progress=False, keep=False)
    assert [one["weight"] for one in found.workload] == [0.75, 0.25]
    assert found.goal == goal
    assert len(found.checks) == 2
    assert {tried.label for tried in found.tried} <= {"streaming.steps_per_round=2", "streaming.steps_per_round=16"}
    assert len(found.tried) + sum(one.recipe is not None for one in found.cast_out) == 2


def test_a_cost_is_what_its_parts_weigh() -> None:
    made = costs([(1.0, 0.1), (3.0, 0.3)], [0.75, 0.25], {"ttft": 1.0, "tpot": 10.0})
    assert made == pytest.approx({"ttft": 1.5, "tpot": 0.15, COST: 3.0})
    assert costs([(2.0, None)], [1.0], {"ttft": 2.0}) == {"ttft": 2.0, COST: 4.0}
    with pytest.raises(CastOutError, match="no TPOT"):
        costs([(2.0, None)], [1.0], {"tpot": 2.0})


# Goodput.

TOGETHER: dict[str, Any] = {"only": ["schedule.batching"], "quiet": None, "progress": False}
ALL_COUNT = Goodput(concurrency=2, n=3, end_to_end=600)

Loads = list[tuple[str, Sequence[Request], dict[str, Any]]]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Every load that a tune draws: who shares steps in it, what is sent, and how. Those of continuous batching last a quarter."""
    sent: Loads = []

    def timed(lab: Lab, requests: Sequence[Request], recipe: Recipe, **how: Any) -> Load:
        sent.append((recipe.schedule.batching, requests, how))
        made = load(lab, requests, recipe, **how)
        return dataclasses.replace(made, seconds=1.0 if recipe.schedule.batching == "one_at_a_time" else 0.25)

    monkeypatch.setattr("fastvl_lab.measure.tune.load", timed)
    return sent


def test_what_has_more_goodput_is_kept_beside_what_is_fastest_for_one(lab: Lab, request_: Request, loads: Loads) -> None:
    fastest = lab.fastest
    found = tune(lab, request_, 60, goal=ALL_COUNT, **TOGETHER)
    assert found.recipe == fastest.choose("schedule.batching", "continuous")
    assert found.recipe.cache.kv == "paged"
    assert (tuple(found.ratio), found.confirmed) == ((4.0, 4.0, 4.0), True)
    assert found.load == ALL_COUNT
    assert found.samples[0].cost in (1 / 3, 1 / 12)
    said = "the goodput of fastest (measured on another machine) with 2 at once, 3 requests, time to the last token within 600 s"
    assert said in found.findings()[0]
    assert all(checked.holds for checked in found.checks)

    first, last = loads[0][1], loads[-24:]  # of the last meeting
    assert first == [request_] * 3, "parity is of the request as it is"
    rounds = [last[number : number + 2] for number in range(0, 24, 2)]
    assert all({one[0], other[0]} == {"one_at_a_time", "continuous"} and one[1:] == other[1:] for one, other in rounds)
    pictures = [bytes(request.image_inputs[0].data) for (_, requests, _), _ in rounds for request in requests]
    assert len(set(pictures)) == 12 * 3
    assert [how["seed"] for (_, _, how), _ in rounds] == list(range(13, 25)), "after those of the races"

    assert found.kept is not None
    assert found.kept.name == f"{learnt.Site.of(lab.checkpoint).path.stem}-goodput.json"
    assert lab.fastest == learnt.fastest(lab.checkpoint) == fastest, "what is fastest for one request is another thing"
    assert learnt.best_under_load(lab.checkpoint) == found.recipe
    again = tune(lab, request_, 60, goal=ALL_COUNT, **TOGETHER)
    assert again.over.startswith("the best under load (tuned here on ")
    assert (again.recipe, again.confirmed) == (found.recipe, False)
    assert "nothing was shown to have more goodput than the best under load" in again.findings()[0]

    found.kept.replace(learnt.Site.of(lab.checkpoint).path)
    with pytest.warns(UserWarning, match="is ignored: ValueError: its goal is goodput"):
        assert learnt.fastest(lab.checkpoint) == fastest


def test_over_none_any_goodput_is_without_bound_and_is_kept_and_drawn_so(
    lab: Lab, request_: Request, loads: Loads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def of(made: Load, **_: float) -> float:
        return 0.0 if made.seconds == 1.0 else 2.0

    monkeypatch.setattr(Load, "goodput", of)
    found = tune(lab, request_, 60, goal=ALL_COUNT, **TOGETHER)
    assert "inf× (95% CI inf to inf) the goodput of fastest" in found.findings()[0]
    opened = fl.open(found.save(tmp_path / "kept"))
    assert (opened.ratio, opened.samples, opened.findings()) == (found.ratio, found.samples, found.findings())
    json.dumps(found.to_record(), allow_nan=False)
    assert list(opened.figure().data[0].x) == [-100.0], "a bar that has no end is not drawn, and the way back is"
    assert "times the goodput of the best so far (95% CI)" in opened.frame()
    assert found.kept is not None
    assert learnt.Record.read(found.kept).ratio == (math.inf,) * 3

    monkeypatch.setattr(Load, "goodput", lambda *_, **__: 0.0)
    none = tune(lab, request_, 60, goal=ALL_COUNT, keep=False, **TOGETHER)
    assert none.recipe == none.start
    assert "no request of any load kept the limits: nothing can be told apart by them" in none.findings()


def test_what_fails_or_errs_beside_others_alone_is_cast_out(
    lab: Lab, request_: Request, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def cast_out(change: Callable[[Load], Load]) -> str:
        def changed(lab: Lab, requests: Sequence[Request], recipe: Recipe, **how: Any) -> Load:
            made = load(lab, requests, recipe, **how)
            return change(made) if recipe.schedule.batching == "continuous" else made

        monkeypatch.setattr("fastvl_lab.measure.tune.load", changed)
        found = tune(lab, request_, 60, goal=ALL_COUNT, keep=False, **TOGETHER)
        assert found.recipe == found.start
        (one,) = [one for one in found.cast_out if one.recipe is not None]
        assert one.label.startswith("schedule.batching=continuous")
        ended.append(found.ended)
        return one.why

    def wrong(made: Load) -> Load:
        first, *rest = made.finished
        return dataclasses.replace(made, runs=(dataclasses.replace(first, tokens=(0, *first.tokens[1:])), *rest))

    assert cast_out(wrong).startswith("parity under load: its tokens differ from those of transformers")
    assert cast_out(lambda made: dataclasses.replace(made, failures={1: "no room"})) == "it failed: under load, no room"
    assert not ended[-1].endswith(over := "nothing more can be timed in this process")
    lost = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert cast_out(lambda made: dataclasses.replace(made, failures={1: lost})) == f"it failed: under load, {lost}"
    assert ended[-1].endswith(over)


def test_a_load_that_is_stopped_takes_nothing_out_and_is_gone_on_with(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, sent = threading.Event(), list[Recipe]()

    def stopped(lab: Lab, requests: Sequence[Request], recipe: Recipe, **how: Any) -> Load:
        sent.append(recipe)
        ended = stop.set if len(sent) == 5 else lambda: None
        return load(lab, requests, recipe, **how, on_run=lambda *_: ended())

    monkeypatch.setattr("fastvl_lab.measure.tune.load", stopped)
    asked: dict[str, Any] = {"goal": Goodput(rate=200, n=3, ttft=600), **TOGETHER}
    found = tune(lab, request_, 60, stop=stop, **asked)
    assert (found.ended, found.kept, len(sent)) == ("it was stopped", None, 5)
    assert not [one for one in found.cast_out if one.recipe is not None]
    assert "it went on with an earlier search that was cut off, and its 2 samples" in tune(lab, request_, 60, **asked).notes


def test_a_goal_of_goodput_searches_the_schedule_from_continuous_batching_on(lab: Lab, request_: Request, loads: Loads) -> None:
    """Each of a mix comes as often as it weighs."""
    tried: list[Progress] = []
    stop = threading.Event()

    def on_progress(now: Progress) -> None:
        tried.append(now)
        if now.phase == "whole recipes" and now.trying == "continuous, images ahead":
            stop.set()

    mix = [(request_, 1), (dataclasses.replace(request_, max_new_tokens=2), 2)]
    goal = Goodput(concurrency=2, n=12, ttft=600, seed=3)
    found = tune(lab, mix, 600, goal=goal, quiet=None, keep=False, stop=stop, on_progress=on_progress)
    assert [now.trying for now in tried] == [
        "fastest",
        "continuous",
        "continuous, in pieces",
        "continuous, in pieces and by blocks",
        "continuous, images ahead",
    ]
    fallen = {one.label for one in found.cast_out if one.recipe is None}
    assert not any(label.startswith("schedule.") for label in fallen)
    assert "attention.decode" not in fallen
    lengths = [request.max_new_tokens for request in loads[0][1]]
    assert lengths == [request.max_new_tokens for request in loads[1][1]]
    assert 5 <= lengths.count(2) <= 11


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("goodput,concurrency=8,ttft=0.5", Goodput(concurrency=8, ttft=0.5)),
        ("goodput, rate=2.5, n=64, seed=1, tpot=5e-2, end_to_end=3", Goodput(rate=2.5, n=64, seed=1, tpot=0.05, end_to_end=3)),
        ("ttft=1, tpot=32", {"ttft": 1.0, "tpot": 32.0}),
        ("tpot", "tpot"),
    ],
)
def test_a_goal_can_be_written_as_text(text: str, goal: Any) -> None:
    assert read_goal(text) == goal


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Goodput(ttft=1), "nothing says when requests arrive"),
        (lambda: Goodput(concurrency=8), "nothing limits what counts as goodput; give at least one of ttft, tpot, end_to_end"),
        (lambda: Goodput(concurrency=8, tpot=0), "tpot is 0; it must be a number of seconds above 0"),
        (lambda: Goodput(concurrency=8, ttft="x"), "ttft is 'x'; it must be"),  # type: ignore[arg-type]
        (lambda: read_goal("goodput"), "'goodput' is no goal; write ttft, tpot, ttft=1,tpot=32, or goodput,concurrency=8"),
        (lambda: read_goal("goodput,concurrency=8,latency=1"), "behind goodput, the choices are concurrency, rate, n, seed, ttft"),
        (lambda: read_goal("goodput,concurrency=x,ttft=1"), "is no goal; write"),
        (lambda: read_goal("goodput,concurrency=1.5,ttft=1"), "concurrency is 1.5; it must be a whole number"),
    ],
)
def test_a_goal_of_goodput_that_cannot_be_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(FastvlError, match=why):
        make()


def test_without_an_image_nothing_of_the_tower_is_tried(lab: Lab) -> None:
    request = Request(prompt="Hello.", max_new_tokens=1)
    found = tune(lab, request, 20, only=["vit.rope", "preprocessor.decode"], quiet=None, progress=False)
    assert {one.label: one.why for one in found.cast_out} == dict.fromkeys(
        ["preprocessor.decode", "vit.rope"], "the workload has no image"
    )
    assert not found.tried


def test_stopping_gives_the_best_so_far(lab: Lab, request_: Request) -> None:
    stop, seen = threading.Event(), list[Progress]()

    def on_progress(now: Progress) -> None:
        seen.append(now)
        if len(seen) == 3:
            stop.set()

    found = tune(lab, request_, 600, quiet=None, stop=stop, on_progress=on_progress)
    assert len(seen) == 3
    assert (found.ended, found.confirmed, found.kept) == ("it was stopped", False, None)
    with pytest.raises(RequestCancelledError):
        tune(lab, request_, 60, quiet=None, stop=stop, progress=False)


def test_a_tune_that_was_stopped_goes_on_and_one_that_is_over_leaves_nothing(lab: Lab, request_: Request) -> None:
    stop, seen = threading.Event(), list[Progress]()
    unfinished = learnt.folder() / "unfinished"

    def on_progress(now: Progress) -> None:
        seen.append(now)
        if len(seen) == 3:
            stop.set()

    only: dict[str, Any] = {"only": ["vit.rope", "vit.norms"], "quiet": None}
    first = tune(lab, request_, 30, stop=stop, on_progress=on_progress, **only)
    assert first.ended == "it was stopped"
    (journal,) = unfinished.iterdir()
    kept = [line for line in journal.read_text().splitlines() if '"asked": "measure"' in line]
    assert kept
    second = tune(lab.apart(), request_, 30, progress=False, **only)
    assert second.notes[0] == f"it went on with an earlier search that was cut off, and its {len(kept)} samples"
    assert len(second.tried) >= len(first.tried)
    assert second.tried[0].ratio == first.tried[0].ratio, "its first race was run in the first"
    assert all(checked.holds for checked in second.checks)
    assert list(unfinished.iterdir()) == []


def test_a_tune_that_was_killed_before_it_knew_its_order_goes_on(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    only: dict[str, Any] = {"only": ["vit.rope"], "quiet": None, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(_Bench, "order", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(lab, request_, 10, **only)
    assert tune(lab, request_, 10, **only).notes[0].startswith("it went on with an earlier search")


def test_what_an_earlier_process_found_and_fails_in_this_one_is_not_gone_on_with(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise CastOutError("planted")

    asked: dict[str, Any] = {"only": ["vit.rope"], "quiet": None, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(Journalled, "finish", lambda _: None)  # it was killed before it was over
        tune(lab, request_, 20, **asked)
    (unfinished,) = (learnt.folder() / "unfinished").iterdir()
    monkeypatch.setattr("fastvl_lab.measure.tune._Bench.know", fails)
    with pytest.raises(RecipeError, match="what an earlier process found does not pass in this one: planted"):
        tune(lab, request_, 20, **asked)
    assert not unfinished.exists()


def test_another_workload_is_another_tune(lab: Lab, request_: Request, picture: bytes) -> None:
    starts = {"fastest": lab.fastest}

    def key(request: Request, seed: int = 0, only: Sequence[str] = ()) -> str:
        return json.dumps(_key(lab, [(request, 1.0)], {"ttft": 1.0}, starts=starts, seconds=30, seed=seed, only=only))

    asked: dict[str, Any] = {"prompt": "What is this?", "max_new_tokens": 3, "ignore_eos": True}
    others = [dataclasses.replace(request_, prompt="And this?"), dataclasses.replace(request_, max_new_tokens=4)]
    others += [Request(images=[image], **asked) for image in _two_pictures(picture)]
    others += [Request(images=[np.zeros((*sides, 3), np.uint8)], **asked) for sides in ((56, 84), (84, 56))]
    others += [dataclasses.replace(request_, sampling=Sampling(stop=["."]))]
    others += [Request(prompt="What is this?", max_new_tokens=3, raw=raw) for raw in (False, True)]
    found = [key(request) for request in (request_, *others)] + [key(request_, seed=1), key(request_, only=["vit"])]
    assert len(set(found)) == len(found)
    assert key(dataclasses.replace(request_)) == found[0]


def _two_pictures(picture: bytes) -> list[Any]:
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    return [pixels, Image.fromarray(255 - pixels)]


KILLED = """
import sys, fastvl_lab as fl
lab = fl.Lab("tiny-qwen2.5-vl", device="cpu")
request = fl.Request(images=[fl.photo("astronaut", (168, 140))], prompt="What?", max_new_tokens=1, ignore_eos=True)
print(fl.tune(lab, request, 25, only=["vit.rope", "vit.norms", "cache.kv"], quiet=None, progress=False).notes, flush=True)
"""


@pytest.mark.nightly
def test_a_process_that_is_killed_at_any_moment_is_gone_on_with(tmp_path: Path) -> None:
    """Killed 20 times, each a moment after it has begun or gone on; then it ends, and leaves nothing unfinished."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    chance, answers, began_by, most = random.Random(0), 0, 0, 0
    unfinished = tmp_path / "fastvl_lab" / "tuned" / "unfinished"

    def files() -> list[Path]:
        return list(unfinished.glob("*.jsonl"))

    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", KILLED], env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not any(file.stat().st_ino != began_by for file in files()):
                time.sleep(0.02)  # until it has begun the file anew
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        if not files():  # it had ended
            answers = began_by = 0
            continue
        (file,) = files()
        began_by = file.stat().st_ino
        assert file.read_bytes().count(b"\n") >= answers, "what was written stays"
        answers = file.read_bytes().count(b"\n")
        most = max(most, answers)
    assert most > 3
    had_ended = not files()
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert had_ended or "it went on with an earlier search" in done.stdout
    assert files() == []


def test_a_shipped_record_comes_after_the_machines_own_and_before_the_guess(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = learnt.Site.of(lab.checkpoint)
    monkeypatch.setattr(learnt, "SHIPPED", tmp_path / "shipped")
    assert learnt.fastest(lab.checkpoint).origin == "measured on another machine"

    def ship(name: str, recipe: Recipe, **elsewhere: Any) -> None:
        record = _record(dataclasses.replace(site, **elsewhere), recipe)
        (tmp_path / "shipped").mkdir(exist_ok=True)
        record.write().replace(tmp_path / "shipped" / f"{name}.json")

    lean = Recipe.baseline().replace("vit.tower", "lean")
    ship("a", Recipe.baseline(), geometry="other")
    ship("b", Recipe.baseline(), processor="Z80")
    ship("c", Recipe.baseline(), dtype="bfloat16")
    assert learnt.fastest(lab.checkpoint).origin == "measured on another machine", "of another geometry, processor, dtype"
    dataclasses.replace(_record(site, lean), goal={"goodput": 1.0}).write().replace(tmp_path / "shipped" / "of_many.json")
    assert learnt.fastest(lab.checkpoint).origin == "measured on another machine", "of many requests at once"
    ship("d", lean.replace("preprocessor.upload", "pinned"))
    assert learnt.fastest(lab.checkpoint) == Recipe.fastest("cpu"), "it cannot run here"
    ship("e", lean)
    found = learnt.fastest(lab.checkpoint)
    assert found == lean
    assert found.origin.startswith("shipped: tuned on another CPU on 2026-01-02 for ttft: 1.50×")
    assert "torch 99" in found.origin
    own = Recipe.baseline().replace("cache.kv", "static")
    dataclasses.replace(_record(site, own), versions=learnt.versions()).write()
    assert learnt.fastest(lab.checkpoint) == own


def test_a_card_of_the_same_name_is_alike_whatever_the_host() -> None:
    here = learnt.Site(device="NVIDIA H200", processor="x", threads=8, geometry="g", dtype="bfloat16")
    assert here.alike(dataclasses.replace(here, processor="y", threads=2))
    assert not here.alike(dataclasses.replace(here, device="NVIDIA H100"))


def test_what_is_shipped_can_be_read_and_is_packaged() -> None:
    for path in learnt.SHIPPED.glob("*.json"):
        assert learnt.Record.read(path).ratio[1] > 1, path


def _record(site: learnt.Site, recipe: Recipe) -> learnt.Record:
    return learnt.Record(
        site=site,
        versions={"torch": "99"},
        checkpoint="x",
        recipe=recipe,
        over=Recipe.baseline(),
        ratio=(1.5, 1.4, 1.6),
        goal={"ttft": 1.0},
        workload=({"images": [[1, 2]]},),
        parity=("yes",),
        date="2026-01-02",
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"workload": "x"}, "workload is str; give a Request"),
        ({"workload": []}, "give a Request, or a list"),
        ({"workload": [(Request(prompt="x"), 0)]}, "a weight is a number above 0"),
        ({"seconds": 0}, "seconds is 0"),
        ({"goal": "speed"}, "the choices are ttft, tpot"),
        ({"goal": {"ttft": -1}}, "the choices are ttft, tpot"),
        ({"goal": "goodput"}, "above 0, or a fastvl_lab.Goodput"),
        ({"goal": Goodput(concurrency=2, tpot=1)}, "max_new_tokens is 1"),
        ({"goal": Goodput(rate=0.5, ttft=1), "seconds": 48}, "32 requests at 0.5 a second come for 62 s, and a load may take 2 s"),
        ({"goal": "tpot"}, "max_new_tokens is 1"),
        ({"only": ["vit.colour"]}, "only is"),
        ({"only": "vit"}, "only is"),
        ({"only": None}, "only is None; give a list"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(lab: Lab, wrong: dict[str, Any], why: str) -> None:
    given = {"workload": Request(prompt="x", max_new_tokens=1), "seconds": 1, "progress": False, **wrong}
    with pytest.raises(RequestError, match=why):
        tune(lab, **given)


def test_where_not_even_the_baseline_passes_nothing_is_returned(
    lab: Lab, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvl_lab.measure.tune.check", lambda *_: Parity(oracle="transformers", holds=False, why="planted"))
    with pytest.raises(RecipeError, match=r"no recipe passes here: fastest: parity: planted; .*baseline: parity: planted"):
        tune(lab, request_, 20, **ROPE)


def test_the_command_line_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: dict[str, Any] = {}

    def fake(lab: Lab, workload: Any, seconds: float, **more: Any) -> Any:
        asked.update(more, workload=workload, seconds=seconds)
        return tune(lab, workload, 3, **more, only=["vit.rope"], quiet=None)

    monkeypatch.setattr("fastvl_lab.measure.tune.tune", fake)
    out = tmp_path / "out.json"
    sizes = ["--image-size", "112x84", "56x56", "--max-new-tokens", "2", "--goal", "ttft=1,tpot=2"]
    main(["--checkpoint", "tiny-qwen3-vl", "--device", "cpu", *sizes, "--seconds", "7", "--no-keep", "--out", str(out)])
    assert (asked["seconds"], asked["goal"], asked["keep"]) == (7, {"ttft": 1, "tpot": 2}, False)
    assert [weight for _, weight in asked["workload"]] == [1, 1]
    written = json.loads(out.read_text())
    assert [one["images"] for one in written["workload"]] == [[[112, 84]], [[56, 56]]]
    said = capsys.readouterr().out
    assert "1.00×  start: fastest" in said
    assert "Tuned: baseline" in said
    with pytest.raises(SystemExit, match="max_new_tokens is 1"):
        main(["--checkpoint", "tiny-qwen3-vl", "--device", "cpu", "--max-new-tokens", "1", "--goal", "tpot"])
    with pytest.raises(SystemExit):
        main(["--checkpoint", "tiny-qwen3-vl", "--image-size", "448"])


def test_an_interrupted_command_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(lab: Lab, workload: Any, seconds: float, *, on_progress: Callable[[Progress], object], **more: Any) -> Any:
        def tell(now: Progress) -> None:
            on_progress(now)
            if now.phase != "start":
                os.kill(os.getpid(), signal.SIGINT)

        return tune(lab, workload, seconds, **more, only=["vit.rope"], quiet=None, on_progress=tell)

    monkeypatch.setattr("fastvl_lab.measure.tune.tune", interrupted)
    before = signal.getsignal(signal.SIGINT)
    main(["--checkpoint", "tiny-qwen3-vl", "--device", "cpu", "--image-size", "56x56", "--max-new-tokens", "2", "--no-keep"])
    assert "it was stopped, after " in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before


def test_it_is_public() -> None:
    assert fl.tune is tune
    assert torch.get_num_threads() == learnt.Site.of(fl.Lab("tiny-qwen3-vl", device="cpu").checkpoint).threads
