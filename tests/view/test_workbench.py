"""The workbench without a browser: setting a control in a cell is a click, and what its page is told is honest."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import scan_cache_dir

from fastvl_lab import Recipe, RecipeError, RequestError, Run, SweepSettings, photo, sweep, view, workbench
from fastvl_lab.catalogue import Option, Target, catalogue_markdown, toggles
from fastvl_lab.measure.quiet import Use
from fastvl_lab.measure.recipes import STOCK, stages_of
from fastvl_lab.measure.samples import Interval, RunSample
from fastvl_lab.view.workbench import Workbench, reading, showing
from fastvl_lab.view.workbench.messages import from_json, to_json
from fastvl_lab.view.workbench.session import BEFORE, RECIPE, Advice, Question, Result, Served
from fastvl_lab.view.workbench.views import views
from fastvl_lab.vit import attention
from fastvl_lab.vit.attention import Prepared, SegmentAttention

pytest.importorskip("anywidget")
pytestmark = pytest.mark.usefixtures("quick_panels")


def opened() -> Workbench:
    made = workbench("tiny-qwen3-vl", "coffee", image_size=(112, 84), max_new_tokens=6, repeats=1, device="cpu")
    assert made.wait(60)
    return made


@pytest.fixture
def bench() -> Iterator[Workbench]:
    made = opened()
    yield made
    made.close()


@pytest.fixture(scope="module")
def looked_at(quick_panels: None) -> Iterator[Workbench]:
    """One panel for the tests that choose nothing in it."""
    made = opened()
    yield made
    made.close()


def clicked(bench: Workbench, kind: str, buffers: tuple[bytes, ...] = (), **fields: Any) -> None:
    """What the page says where somebody clicks or types."""
    bench.widget._handle_custom_msg({"kind": kind, **fields}, [memoryview(data) for data in buffers])


def pills(bench: Workbench) -> list[str]:
    return [pill["text"] for pill in bench.widget.shown["pills"]]


def test_a_click_runs_the_recipe_against_transformers(bench: Workbench) -> None:
    assert bench.recipe == Recipe.baseline()  # so that there is something to win
    clicked(bench, "Choose", path="vit.attention", value="grouped")
    assert bench.wait(60)
    first, second = bench.history
    assert (first.recipe, second.recipe) == (Recipe.baseline(), Recipe.baseline().choose("vit.attention", "grouped"))
    assert second.comparison is not None
    assert second.comparison.engines == (STOCK, BEFORE, RECIPE)  # all of them side by side
    assert second.comparison.parity(RECIPE)
    assert "✓ same tokens as Transformers" in pills(bench)
    assert [row["parity"] for row in bench.rows()] == [True, True]
    shown = bench.widget.shown
    assert (shown["rival"]["label"], shown["recipe"]["label"]) == (STOCK, RECIPE)
    assert shown["before"]["label"].startswith("#1 (")
    assert bench.figure.data
    bench.undo()
    assert bench.wait(60)
    assert bench.recipe == Recipe.baseline()


def test_the_page_is_told_every_bar_and_the_headline_is_that_of_the_bars(looked_at: Workbench) -> None:
    looked_at.look("waterfall")
    assert looked_at.wait(60)
    shown, run = looked_at.widget.shown, looked_at.result().shown
    for lane in ("host", "device"):
        spans = [[s.name, lane, s.start_ns / 1e6, s.duration_ns / 1e6] for s in run.trace.within_ttft(lane)]  # type: ignore[arg-type]
        assert [bar for bar in shown["recipe"]["bars"] if bar[1] == lane] == spans
    gaps = [bar for bar in shown["recipe"]["bars"] if bar[1] == "unaccounted"]
    assert len(gaps) == len(run.trace.gaps())
    assert sum(shown["recipe"]["host"].values()) == pytest.approx(run.ttft * 1e3)
    assert shown["headline"] == showing.milliseconds(run.ttft * 1e3)
    assert shown["recipe"]["files"]["vit"] == "fastvl_lab/vit/"


def test_every_toggle_has_its_control_and_greyed_options_say_why(looked_at: Workbench) -> None:
    assert list(looked_at.controls) == [toggle.path for toggle in toggles()]
    described = {toggle["path"]: toggle for toggle in looked_at.widget.choices["toggles"]}
    for toggle in toggles():
        for option, said in zip(toggle.options, described[toggle.path]["options"], strict=True):
            reason = option.needs.unmet(Target(device=looked_at.device, dtype=torch.float32))
            assert said == {"value": option.value, "does": option.does, "exact": option.exact, "unmet": reason}
            assert looked_at.controls[toggle.path].unmet.get(option.value) == reason
    with pytest.raises(RecipeError, match="cannot run here: it needs a CUDA device"):
        looked_at.controls["vit.attention"].value = "triton"
    clicked(looked_at, "Choose", path="vit.attention", value="triton")
    assert "cannot run here: it needs a CUDA device" in looked_at.widget.live["error"]
    with pytest.raises(RecipeError, match="the choices are 'per_window'"):
        looked_at.controls["vit.attention"].value = "quick"


def test_a_choice_brings_along_what_it_cannot_do_without(bench: Workbench) -> None:
    bench.controls["cache.prefix_reuse"].value = "on"
    assert bench.recipe.cache.kv == "paged"
    assert bench.controls["cache.kv"].value == bench.widget.chosen["values"]["cache.kv"] == "paged"
    assert "cache.kv" in bench.widget.chosen["moved"]
    assert bench.wait(60)


def asked(bench: Workbench) -> dict[str, Any]:
    """What the fields say."""
    return {name: value for name, value in bench.widget.asked.items() if name not in ("previews", "repeats", "rival")}


def test_pictures_are_measured_as_they_are_unless_a_size_is_chosen(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "wide.jpg").write_bytes(photo("cat", (300, 100)))
    bench = workbench("tiny-qwen3-vl", "coffee", max_new_tokens=2, repeats=0, device="cpu")
    fill = partial(clicked, bench, "Fill")
    steps: list[tuple[Callable[[], object], str, tuple[int, int]]] = [
        (lambda: None, "coffee as it is", (600, 400)),
        (lambda: fill(field="max_pixels", text="70000"), "coffee as it is, max_pixels 70000", (600, 400)),
        (lambda: fill(field="max_pixels", text=""), "coffee as it is", (600, 400)),
        (lambda: clicked(bench, "Take", (picture,), names=["mine.jpg"]), "mine.jpg as it is", (168, 140)),
        (lambda: fill(field="size", text="within 448×448"), "mine.jpg within 448×448", (448, 373)),
        (lambda: fill(field="pictures", text=str(tmp_path / "wide.jpg")), "wide.jpg within 448×448", (448, 149)),
        (lambda: fill(field="size", text="64x128"), "wide.jpg resized to 64×128", (64, 128)),
        (lambda: fill(field="pictures", text="mine.jpg"), "mine.jpg as it is", (168, 140)),  # the exact size was the other's
        (lambda: bench.ask(size=(90, 90), within=True), "mine.jpg within 90×90", (90, 75)),
    ]
    for step, about, (width, height) in steps:
        step()
        assert bench.wait(60), about
        run = bench.result().run
        assert (run.shapes[0].width, run.shapes[0].height) == (width, height), about
        assert f" · {about} · “" in bench.widget.shown["heading"].replace(str(tmp_path) + "/", "")
        assert f"image {width}×{height} → " in bench.widget.shown["detail"]
        if "max_pixels" in about:
            assert run.shapes[0].resized_width * run.shapes[0].resized_height <= 70_000
    assert len(bench.history) == len(steps)
    fill(field="size", text="within 90×90")  # what is asked already asks for nothing
    assert bench.wait(60)
    assert len(bench.history) == len(steps)
    clicked(bench, "Take", (picture, picture), names=["a.jpg", "b.jpg"], add=True)
    assert bench.wait(60)
    assert asked(bench)["pictures"] == ["mine.jpg", "a.jpg", "b.jpg"]
    assert len(bench.result().run.shapes) == len(bench.widget.asked["previews"]) == 3
    bench.close()


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("size", "large", "size is 'large'; write width and height in pixels"),
        ("size", "640", "size is '640'; write width and height in pixels"),
        ("size", "within 0x5", "size is 'within 0x5'; write width and height in pixels"),
        ("max_pixels", "-5", "max_pixels is '-5'; write a whole number"),
        ("max_pixels", "1e6", "max_pixels is '1e6'; write a whole number"),
        ("max_pixels", "9" * 5000, "write a whole number"),
        ("tokens", "0", "tokens is '0'; write a whole number of at least 1"),
        ("tokens", "9" * 5000, "write a whole number of at least 1"),
        ("rival", "quick", "the choices are baseline, fastest"),
    ],
)
def test_a_field_that_cannot_be_read_says_so_and_asks_for_nothing(looked_at: Workbench, field: str, text: str, says: str) -> None:
    before = looked_at.widget.asked
    clicked(looked_at, "Fill", field=field, text=text)
    assert says in looked_at.widget.live["error"]
    assert looked_at.widget.asked == before  # the field is put back
    assert looked_at.wait(60)
    assert len(looked_at.history) == 1


def test_a_result_is_deleted_and_the_others_keep_their_numbers(bench: Workbench) -> None:
    clicked(bench, "Delete", number=1)
    assert bench.widget.live["error"] == "result 1 is the only one; run something else first"
    for path, value in (("vit.tower", "lean"), ("vit.patch_embed", "linear")):
        bench.choose(path, value)
        assert bench.wait(60)
    bench.mark(2, note="the middle one")
    bench.look(number=2)
    clicked(bench, "Delete", number=2)
    assert [row["number"] for row in bench.widget.history] == [1, 3]
    assert bench.widget.history[-1]["changed"] == "vit.tower=lean, vit.patch_embed=linear"  # of what is before it now
    assert bench.widget.shown["number"] == 3  # the newest, where the deleted one was looked at
    with pytest.raises(RecipeError, match="there is no result 2: the history has 1 to 3, and 2 was deleted"):
        bench.look(number=2)
    bench.run()
    assert bench.wait(60)
    assert [result.number for result in bench.history] == [1, 3, 4]
    assert bench.result(3).comparison is not None
    assert bench.result() is bench.history[-1]
    bench.delete(0)  # the newest
    assert [row["number"] for row in bench.widget.history] == [result.number for result in bench.history] == [1, 3]
    assert [path.name.split("-")[-1] for path in sorted(bench._folder.glob(f"{bench._name}*"))] == ["001.json.gz", "003.json.gz"]
    with pytest.raises(RequestError, match="result 3 is of this session: delete it"):
        bench.forget(3)
    assert bench._path(3).exists()


def test_a_result_that_is_deleted_while_it_is_measured_ends_the_measuring(bench: Workbench) -> None:
    bench.ask(max_new_tokens=64)
    end = time.monotonic() + 30
    while len(bench.history) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    bench.delete(2)
    assert bench.wait(60)
    assert [result.number for result in bench.history] == [1]
    assert bench.widget.shown["number"] == 1
    assert bench.widget.live["error"] == ""


def test_what_a_cell_asks_for_and_looks_at_is_what_the_panel_shows(bench: Workbench) -> None:
    bench.ask(picture="rocket", prompt="Why?", max_new_tokens=2, size=(64, 48))
    assert bench.wait(60)
    expected = {"checkpoint": "tiny-qwen3-vl", "pictures": ["rocket"], "size": "64×48", "max_pixels": "", "prompt": "Why?"}
    assert asked(bench) == expected | {"tokens": 2}
    for name in ("memory", "tokens over time", "waterfall"):
        bench.look(name, number=1, against=2)
        assert bench.wait(60)
        assert [bench.widget.shown[field] for field in ("view", "number", "against")] == [name, 1, 2]
    assert bench.widget.asked["previews"]
    bench.ask(checkpoint="tiny-qwen2.5-vl", pictures=())
    assert bench.wait(60)
    assert bench.widget.asked["previews"] == []  # not those of the question before
    bench.ask(picture="rocket")
    assert bench.wait(60)
    assert bench.history[-1].run.checkpoint == asked(bench)["checkpoint"] == "tiny-qwen2.5-vl"
    assert len(bench.history) == 4


def test_checkpoints_are_chosen_from_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(name: str, model_type: str, *files: str) -> None:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1")
        for file in files:
            (snapshot / file).write_text(json.dumps({"model_type": model_type}) if file == "config.json" else "x")

    cached("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", "config.json", "model.safetensors")
    cached("me/tuned", "qwen2_5_vl", "config.json", "model-00001-of-00002.safetensors")
    cached("meta/other", "llama", "config.json", "model.safetensors")
    cached("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", "config.json")  # no weights
    monkeypatch.setattr(reading, "scan_cache_dir", partial(scan_cache_dir, tmp_path))
    names = reading.known_checkpoints()
    assert names[:2] == ["tiny-qwen2.5-vl", "tiny-qwen3-vl"]
    assert "random:Qwen/Qwen3-VL-4B-Instruct" in names
    assert [name for name in names if "/" in name and ":" not in name] == ["Qwen/Qwen3-VL-4B-Instruct", "me/tuned"]
    monkeypatch.setattr(reading, "scan_cache_dir", partial(scan_cache_dir, tmp_path / "none"))
    assert all(":" in name or "/" not in name for name in reading.known_checkpoints())


def test_the_run_before_is_outlined_where_it_was_asked_the_same(bench: Workbench) -> None:
    bench.ask(prompt="Why?")
    assert bench.wait(60)
    assert bench.widget.shown["before"] is None
    assert "not held against #1: it was asked something else (prompt “Describe this picture.”)" in bench.widget.shown["no_before"]
    for value in ("sdpa", "eager"):
        bench.controls["attention.prefill"].value = value
        assert bench.wait(60)
    bench.look(number=4, against=2)
    second, third = bench.history[1:3]
    shown = bench.widget.shown
    bars = [[s.name, "host", s.start_ns / 1e6, s.duration_ns / 1e6] for s in second.shown.trace.within_ttft()]
    assert [bar for bar in shown["before"]["bars"] if bar[1] == "host"] == bars
    assert shown["before"]["label"] == "#2 (the same recipe), measured at another time"
    clicked(bench, "Measure", number=3, against=2)
    assert bench.wait(60)
    fifth = bench.history[-1]
    assert (fifth.recipe, fifth.before) == (third.recipe, second.recipe)
    assert fifth.comparison is not None
    assert fifth.comparison.engines == (STOCK, BEFORE, RECIPE)
    assert bench.widget.shown["before"]["label"].startswith("#4 (")  # the newest of that recipe
    with pytest.raises(RecipeError, match="there is no result 9: the history has 1 to 5"):
        bench.look(number=9)


def test_fastest_is_the_labs_once_there_is_a_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Recipe.baseline().choose("attention.prefill", "sdpa")
    monkeypatch.setattr("fastvl_lab.lab.learnt.fastest", lambda _: tuned)
    made = partial(workbench, "tiny-qwen3-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=0, device="cpu")
    bench = made(recipe="fastest, vit.tower=lean")
    assert bench.recipe.preprocessor.patchify == "torch"  # the hand-chosen guess, while nothing is loaded
    assert bench.wait(60)
    assert bench.recipe == bench.result().recipe == tuned.replace("vit.tower", "lean")
    assert bench.widget.chosen["values"]["preprocessor.patchify"] == "numpy"
    bench.close()
    pressed = made()
    pressed.use("fastest")
    assert pressed.wait(60)
    assert pressed.recipe == pressed.result().recipe == tuned
    pressed.undo()
    assert pressed.wait(60)
    assert pressed.recipe == pressed.result().recipe == Recipe.baseline()
    pressed.close()
    linked = made(recipe="fastest", query="recipe=baseline")
    assert linked.wait(60)
    assert linked.result().recipe == Recipe.baseline()
    linked.close()


def test_a_cold_run_is_no_headline(looked_at: Workbench) -> None:
    result = looked_at.result()
    first = dataclasses.replace(result, comparison=None)
    pending = showing.shown(first, None, view="waterfall", against=0, pending=True)
    assert first.run.kind == "cold"
    assert (pending.headline, pending.spread) == ("", "measuring…")
    assert pending.cold.startswith("first run ")
    alone = showing.shown(first, None, view="waterfall", against=0, pending=False)
    assert alone.spread == "cold: the first of its shape"


@pytest.mark.parametrize(
    ("ratio", "says", "state"),
    [
        (None, "no warm rounds to compare with it", "plain"),
        (Interval(1.5, float("nan"), float("nan")), "too few rounds to compare with it: 6 are needed", "plain"),
        (Interval(1.92, 1.53, 2.17), "1.92× as fast as it to the first token (1.53–2.17×)", "good"),
        (Interval(0.5, 0.4, 0.8), "0.50× as fast as it to the first token (0.40–0.80×)", "bad"),
        (Interval(1.1, 0.9, 1.3), "no difference from it shown (0.90–1.30×)", "plain"),
    ],
)
def test_no_ratio_is_printed_without_its_interval(ratio: Interval | None, says: str, state: str) -> None:
    assert showing.as_fast(ratio, "it") == (says, state)


def test_parity_is_said_in_three_plain_states(looked_at: Workbench) -> None:
    result = looked_at.result()
    assert result.comparison is not None
    checked = result.comparison.checks[RECIPE]

    def said(**changes: Any) -> str:
        checks = {**result.comparison.checks, RECIPE: dataclasses.replace(checked, **changes)}  # type: ignore[union-attr]
        comparison = dataclasses.replace(result.comparison, checks=checks)  # type: ignore[type-var]
        return showing.pills(dataclasses.replace(result, comparison=comparison))[0].text

    assert said() == "✓ same tokens as Transformers"
    other = (*checked.expected[:3], 1, *checked.expected[4:])
    pixels = "✓ same tokens as Transformers on this recipe's pixels; pixels alone move logits by 0.002, "
    assert said(moved=0.002) == pixels + "no token differs"
    assert said(moved=0.002, expected=other) == pixels + "first other token: 4"
    assert said(holds=False, why="token 3 is another one") == "✗ other tokens: token 3 is another one"


def test_a_busy_machine_is_said_as_such_and_gets_no_ratio(looked_at: Workbench) -> None:
    def ten_times_as_long(run: Run) -> Run:
        return dataclasses.replace(run, trace=dataclasses.replace(run.trace, first_chunk_ns=10 * run.trace.first_chunk_ns))

    result = looked_at.result()
    assert result.comparison is not None
    slow = [
        dataclasses.replace(s, round=number, run=s.run if number else ten_times_as_long(s.run))
        for s in result.comparison.samples
        for number in range(7)
        if s.round == 0
    ]
    busy = dataclasses.replace(result, comparison=dataclasses.replace(result.comparison, samples=tuple(slow)))
    assert any(pill.text == "machine busy: rounds lie ×10 apart, no ratio to Transformers" for pill in showing.pills(busy))
    use = Use(seconds=0.1, cores=2, others=1.3, waited=0.2, disturbed=True)
    warm = [s for s in result.comparison.samples if s.round >= 0]
    disturbed = [dataclasses.replace(s, use=use) for s in warm]
    busy = dataclasses.replace(result, comparison=dataclasses.replace(result.comparison, samples=tuple(disturbed)))
    why = "others used 1.3 of 2 cores, and a thread waited for a core for 20% of the time"
    said = f"machine busy: {why}, in {len(warm)} of {len(warm)} rounds, no ratio to Transformers"
    assert any(pill.text == said for pill in showing.pills(busy))
    shown = showing.shown(busy, None, view="waterfall", against=0, pending=False)
    assert shown.spread == "the machine was busy in every round"
    assert {text for _, text in shown.recipe.rounds} == {why}


def test_the_history_has_no_ratio_of_a_busy_machine(looked_at: Workbench) -> None:
    result = looked_at.result()
    assert result.comparison is not None

    def times_as_long(run: Run, times: int) -> Run:
        return dataclasses.replace(run, trace=dataclasses.replace(run.trace, first_chunk_ns=times * run.trace.first_chunk_ns))

    def measured(longest: int) -> Result:
        """Eight rounds, of which the first is so many times as long."""
        rounds = [
            dataclasses.replace(s, round=number, use=None, run=times_as_long(s.run, 1 if number else longest))
            for s in result.comparison.samples  # type: ignore[union-attr]
            for number in range(8)
            if s.round == 0
        ]
        return dataclasses.replace(result, comparison=dataclasses.replace(result.comparison, samples=tuple(rounds)))

    assert showing.row(measured(1), None, pinned=False, note="").ratio
    assert showing.row(measured(10), None, pinned=False, note="").ratio == ""


def test_a_cache_hit_is_labelled_and_shown() -> None:
    bench = workbench("tiny-qwen3-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=1, device="cpu")
    bench.controls["cache.prefix_reuse"].value = "on"
    assert bench.wait(60)
    bench.run()
    assert bench.wait(60)
    assert bench.result().shown.kind == "cache_hit"
    assert any(re.match(r"cache hit: .* ms, where Transformers computes all of it in .* ms", text) for text in pills(bench))
    bench.close()


def test_the_next_toggle_to_try_is_the_one_that_saves_most(looked_at: Workbench) -> None:
    result = looked_at.result()
    savings = {
        "vit.attention": ("grouped", Interval(3.0, 1.0, 5.0)),
        "attention.prefill": ("sdpa", Interval(9.0, 7.0, 11.0)),
        "vit.rope": ("halves", Interval(20.0, -1.0, 30.0)),
    }
    advice = Advice(question=result.question, recipe=result.recipe, savings=savings)
    say = partial(showing.advised, advice, result, question=result.question, target=looked_at._target, fastest=Recipe.fastest())
    said = say(recipe=result.recipe)
    assert (said.path, said.value) == ("attention.prefill", "sdpa")
    assert said.sentence == "Next best: attention.prefill=sdpa saves about 9.00 ms here (7.0 to 11)."
    later = say(recipe=result.recipe.choose("attention.prefill", "sdpa"))
    assert (later.path, later.value) == ("vit.attention", "grouped")
    assert "measured before the last change" in later.sentence
    unsure = say(recipe=result.recipe.choose("attention.prefill", "sdpa").choose("vit.attention", "grouped"))
    assert unsure.sentence == (
        "No saving is sure on this machine now; vit.rope=halves may save 20.0 ms (-1.0 to 30; measured before the last change)."
    )
    assert set(later.savings) == {"vit.attention", "vit.rope"}
    other = dataclasses.replace(result.question, prompt="Why?")
    assert showing.advised(advice, result, result.recipe, other, looked_at._target, Recipe.fastest()).sentence == ""


def test_more_than_the_bar_to_beat_takes_is_not_left_of_it(looked_at: Workbench) -> None:
    result, said = looked_at.result(), []
    measured = result.comparison
    assert measured is not None
    other = {RECIPE: measured.reference, measured.reference: RECIPE}
    swapped = tuple(dataclasses.replace(one, engine=other.get(one.engine, one.engine)) for one in measured.samples)
    for comparison in (measured, dataclasses.replace(measured, samples=swapped)):
        held = dataclasses.replace(result, comparison=comparison)
        is_less = held.shown.ttft <= comparison.representative(comparison.reference).ttft
        said.append(showing.learnt(held))
        assert (" left of " in said[-1]) == is_less
        assert (", over the " in said[-1]) == (not is_less)
    assert sum(" left of " in one for one in said) == 1


def test_the_first_toggle_to_try_is_named_with_a_stage_that_it_works_in(looked_at: Workbench) -> None:
    result, plain = looked_at.result(), Recipe.baseline()
    warm = dataclasses.replace(result, comparison=None, run=dataclasses.replace(result.shown, kind="warm"))
    named = set()
    for path in ("preprocessor.resize", "vit.attention", "attention.prefill", "streaming.gate"):
        fastest = plain.choose(path, looked_at.controls[path].toggle.values[1])
        said = showing.advised(None, warm, plain, result.question, looked_at._target, fastest)
        assert not said.sentence or said.sentence.split()[0] in stages_of(said.path)
        named.add(said.sentence.partition(" takes")[0])
    assert len(named - {""}) > 1


def test_savings_are_measured_while_somebody_looks_on_and_give_way(bench: Workbench) -> None:
    assert not bench._session.advise  # no page is open
    clicked(bench, "Press", button="open")
    deadline = time.monotonic() + 60
    while "what each toggle would save" not in bench.widget.live["progress"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert bench.wait(0)  # nothing that was asked for
    bench.controls["attention.prefill"].value = "sdpa"
    assert bench.wait(60)
    assert len(bench.history) == 2
    clicked(bench, "Press", button="stop")


def test_an_error_is_said_the_field_put_back_and_the_panel_lives_on(bench: Workbench) -> None:
    for name, data, says in (
        ("text.jpg", b"no picture", "'text.jpg' is not an image of a supported type"),
        ("empty.jpg", b"", "empty.jpg is empty (0 bytes)"),
    ):
        clicked(bench, "Take", (data,), names=[name])
        assert bench.wait(60)
        assert says in bench.widget.live["error"]
        assert asked(bench)["pictures"] == ["coffee"]
    clicked(bench, "Fill", field="checkpoint", text="no/such-model")
    assert bench.wait(60)
    assert "no/such-model" in bench.widget.live["error"]
    assert asked(bench)["checkpoint"] == "tiny-qwen3-vl"
    clicked(bench, "Press", button="plotly")  # what the page asks for by itself takes no error away
    assert "no/such-model" in bench.widget.live["error"]
    bench.ask(picture="rocket")
    assert bench.wait(60)
    assert (bench.widget.live["state"], bench.widget.live["error"]) == ("idle", "")
    assert len(bench.history) == 2


def test_a_closed_panel_says_so_and_nobody_waits_for_it() -> None:
    bench = opened()
    bench.close()
    with pytest.raises(RequestError, match="this workbench is closed"):
        bench.run()
    clicked(bench, "Choose", path="vit.tower", value="lean")
    assert "this workbench is closed" in bench.widget.live["error"]
    assert bench.wait(1)


def test_a_panel_that_could_not_run_says_why_when_asked_for_its_result() -> None:
    bench = workbench("no-such-checkpoint", "coffee", repeats=0, device="cpu")
    assert bench.wait(60)
    with pytest.raises(RecipeError, match=r"there is no result: .*no-such-checkpoint"):
        bench.result()
    bench.close()


@pytest.mark.alone
def test_a_long_run_is_stopped_and_a_newer_wish_takes_its_place(bench: Workbench) -> None:
    bench.ask(max_new_tokens=20_000)
    deadline = time.monotonic() + 20
    while bench.widget.live["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = time.monotonic()
    bench.stop()
    assert bench.widget.live["state"].startswith("stopping")
    assert bench.wait(10)
    assert time.monotonic() - started < 2
    assert bench.widget.live["state"] == "stopped"
    bench.run()
    bench.ask(max_new_tokens=4)
    assert bench.wait(60)
    assert len(bench.history[-1].run.tokens) == 4


def test_a_look_waits_for_its_turn_and_ends_no_measurement(bench: Workbench) -> None:
    bench.controls["attention.prefill"].value = "sdpa"
    bench.look("ViT blocks")
    bench.run()
    bench.look("memory")
    bench.look("share of the floor", number=1)
    assert bench.wait(60)
    assert bench.history[-1].comparison is not None
    assert bench.history[0].floors is not None


def test_what_a_view_needs_is_measured_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    open_up = bench._session._open_up
    monkeypatch.setattr(bench._session, "_open_up", lambda number, *rest: (measured.append(number), open_up(number, *rest))[1])
    bench.ask(max_new_tokens=64)
    end = time.monotonic() + 30
    while len(bench.history) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    for name in ("ViT blocks", "decoder layers", "ViT blocks"):  # all of them before the comparison is over
        bench.look(name)
    assert bench.wait(60)
    assert measured == [2]


def test_a_result_is_measured_beside_what_it_is_held_against(bench: Workbench) -> None:
    clicked(bench, "Measure", number=1, against=0)
    assert bench.widget.live["error"].startswith("there is no other result to measure beside this one")
    for path, value in (("vit.tower", "lean"), ("vit.patch_embed", "linear")):
        bench.choose(path, value)
        assert bench.wait(60)
    bench.measure(3, 1)
    assert bench.wait(60)
    assert bench.widget.shown["before"]["label"].startswith("#1 (")
    clicked(bench, "Measure", number=4, against=0)
    assert bench.wait(60)
    assert bench.result(5).before == bench.result(1).recipe


def test_the_recipe_is_copied_and_the_history_written(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bench.code().split('"')[1]
    assert Recipe.parse(text, "cpu") == bench.recipe
    texts = bench.widget.chosen["texts"]
    scope: dict[str, Any] = {}
    exec("import fastvl_lab as fl\n" + texts["Python"], scope)
    assert scope["recipe"] == bench.recipe
    assert texts["serve"] == 'python -m fastvl_lab.serve --checkpoint tiny-qwen3-vl --recipe "baseline"'
    record, trace, rounds, page, *pictures = bench.export(tmp_path / "new")
    assert Run.from_record(json.loads(record.read_text())).tokens == bench.history[0].shown.tokens
    assert json.loads(trace.read_text())["traceEvents"]
    compared = bench.history[0].comparison
    assert compared is not None
    samples = [RunSample.from_record(sample) for sample in json.loads(rounds.read_text())]
    assert [sample.run.ttft for sample in samples] == [sample.run.ttft for sample in compared.samples]
    text = page.read_text()
    assert "✓ same tokens as Transformers" in text
    assert "plotly.js v" in text  # the page needs no network
    assert not re.search(r"<script[^>]+src=", text)
    for drawn in ("waterfall", "tokens over time", "memory"):
        assert f"<h3>{drawn}</h3>" in text
    assert "<h3>toggle by toggle</h3>" not in text  # not measured, so not claimed
    assert "<th>against the bar to beat</th>" in text
    for raw in ("ttft_ms", "first_run_ms", "<td>None</td>", "<td>NaN</td>", "<td>True</td>"):
        assert raw not in text
    bench.run()
    assert bench.wait(60)
    bench.delete(1)
    said: list[str] = []
    # the thread that passes news on says what it has to with no words of its own
    monkeypatch.setattr(bench, "_say", lambda progress=None: said.append(progress) if progress else None)
    bench.export(tmp_path / "newer")
    assert said == ["writing picture 1 of 1"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("view", list(views()))
def test_every_view_measures_what_it_lacks_and_shows_a_figure_and_a_table(looked_at: Workbench, view: str) -> None:
    clicked(looked_at, "Look", view=view)
    if looked_at.widget.shown["lacks"]:  # what is measured by hand
        assert (view, looked_at.widget.shown["lacks"]) == ("load", "say how many requests arrive, and press load")
        looked_at.load(concurrency=2, n=3)
    assert looked_at.wait(90)
    assert looked_at.widget.live["state"] == "idle"
    assert not looked_at._views[view].lacks(looked_at.history[-1])
    assert looked_at.figure.data
    told = looked_at.widget.figure
    if view == "waterfall":
        assert not told  # its bars are told apart
    else:
        assert told["about"] == f"{view} of 1"
        assert json.loads(told["figure"])["data"]
        assert all(len(row) == len(told["columns"]) for row in told["rows"])
        assert told["rows"]
    if view == "toggle by toggle":
        found = looked_at.history[-1].attribution
        assert found is not None
        assert set(looked_at.figure.data[0].y) == {"transformers", *found.steps, "in the end"}
    with pytest.raises(RecipeError, match="no view 'x'; the choices are waterfall, "):
        looked_at.look("x")


def test_many_requests_are_sent_and_two_policies_stand_side_by_side(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.controls["schedule.batching"].value = "continuous"
    assert bench.wait(60)
    told: list[str] = []
    hear = bench._session._tell
    monkeypatch.setattr(bench._session, "_tell", lambda news: (told.append(news.progress), hear(news)))
    clicked(bench, "Look", view="load")
    others = {other["text"]: other["unmet"] for other in bench.widget.loaded["others"]}
    assert others == {"nothing": None, BEFORE: None, STOCK: None}
    clicked(bench, "Send", at_once="3", rate="", n="4", against=BEFORE)
    assert bench.wait(60)
    assert bench.widget.live["error"] == ""
    loads = bench.result().loads
    assert loads is not None
    before = "the one with schedule.batching=one_at_a_time"
    assert list(loads) == [RECIPE, before]
    for load in loads.values():
        assert (load.concurrency, len(load.finished)) == (3, 4)
        assert [run.tokens for run in load.finished] == [run.tokens for run in loads[RECIPE].finished]
    assert any(len(step.decoded) > 1 for step in loads[RECIPE].steps)
    assert not any(step.decoded for step in loads[before].steps)
    for label in loads:
        assert any(re.fullmatch(rf"{re.escape(label)}: request 2 of 4 · \d+\.\d of about \d+\.\d s", said) for said in told)

    said = bench.widget.loaded
    assert [said[field] for field in ("at_once", "rate", "n", "against")] == ["3", "", "4", BEFORE]
    assert said["said"][0].startswith(f"{RECIPE}: {loads[RECIPE].tokens_per_second:.1f} tokens and ")
    assert said["said"][2].startswith(f"{RECIPE} makes ")
    assert said["rows"][0][:2] == ["TTFT", RECIPE]
    assert json.loads(bench.widget.figure["figure"])["layout"]["title"]["text"] == f"{RECIPE}, 3 at once"
    figures = [json.loads(figure)["layout"] for figure in bench.widget.figure["more"]]
    assert figures[0]["title"]["text"] == f"{before}, 3 at once"
    assert [figure["xaxis"]["title"]["text"] for figure in figures[1:]] == ["TTFT, ms", "TPOT, ms", "time between chunks, ms"]
    assert figures[0]["xaxis"]["range"] == json.loads(bench.widget.figure["figure"])["layout"]["xaxis"]["range"]

    bench.load(rate=50, n=2, against=STOCK)
    assert bench.wait(60)
    loads = bench.result().loads
    assert loads is not None
    assert [(label, load.rate) for label, load in loads.items()] == [(RECIPE, 50), (STOCK, 50)]
    assert "<h3>load</h3>" in bench.page()


def test_a_load_that_cannot_be_says_why(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, says in (
        ({"at_once": "", "rate": "-1"}, "rate is '-1'; write how many requests arrive a second on average, such as 2.5"),
        ({"at_once": "", "rate": "0"}, "rate is '0'"),
        ({"n": "0"}, "requests is '0'; write a whole number of at least 1"),
        ({"against": "yesterday"}, "there is no 'yesterday' to hold the load against; the choices are nothing, "),
        ({"against": BEFORE}, "the load cannot be held against 'the run before': there is none"),
    ):
        clicked(bench, "Send", **({"at_once": "2", "rate": "", "n": "2", "against": "nothing"} | fields))
        assert says in bench.widget.live["error"], fields
    with pytest.raises(RequestError, match="concurrency and rate say when requests arrive"):
        bench.load(concurrency=2, rate=1.0)
    with pytest.raises(RecipeError, match="it has the recipe of #1: there is nothing to hold against it"):
        bench.load(against="baseline")
    with pytest.raises(RecipeError, match="it needs a CUDA device"):
        bench.load(against="baseline, vit.tower=lean, vit.attention=triton")
    monkeypatch.setattr(bench._session, "has_started", lambda _: False)  # as of a bar to beat with a server
    bench.look("load")
    assert bench.widget.loaded["others"][-1]["unmet"].startswith(f"the server of {STOCK} has not been started: run the recipe")
    monkeypatch.setattr(bench, "_target", Target(device=torch.device("cuda"), dtype=torch.float16))
    monkeypatch.setattr(Recipe, "check", lambda *_: (_ for _ in ()).throw(RecipeError("it needs another device")))
    bench.look("load")
    assert bench.widget.loaded["unmet"] == "it needs another device"
    assert bench.history[0].loads is None


def test_a_load_is_stopped_and_nothing_of_it_is_kept(bench: Workbench) -> None:
    bench.load(concurrency=2, n=200)
    deadline = time.monotonic() + 30
    while not (rows := bench.widget.arrived["rows"]):  # a row a request comes while others are served
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert " of 200 · " in bench.widget.live["progress"]
    assert bench.widget.arrived["label"] == RECIPE
    assert [number for number, _ in rows] == list(range(len(rows)))
    clicked(bench, "Press", button="stop")
    assert bench.wait(10)
    assert bench.widget.live["state"] == "stopped"
    assert bench.result().loads is None
    assert bench.widget.shown["view"] == "load"


def test_a_second_panel_has_the_weights_of_the_first_and_the_cell_again_closes_its_own(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = [bench]
    monkeypatch.setattr("fastvl_lab.view.workbench.panel._siblings", lambda: [one for one in panels if not one._closed])
    monkeypatch.setattr("fastvl_lab.view.workbench.panel._this_cell", lambda: "another cell")
    monkeypatch.setattr("fastvl_lab.view.workbench.session.Lab", None)  # nothing is loaded any more
    panels.append(opened())
    first, second = (one._session.lab for one in panels)
    assert first is not None
    assert second is not None
    assert first is not second
    assert first.checkpoint.model is second.checkpoint.model
    panels.append(opened())
    assert [one._closed for one in panels] == [False, True, False]
    assert panels[1]._session.lab is None  # it holds no weights
    panels[-1].close()


def test_the_history_and_the_kernels_memory_end_somewhere(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.view.workbench.kept.MOST", 3)
    bench.mark(1, pinned=True)
    clicked(bench, "Fill", field="repeats", text="0")
    assert bench.wait(60)
    bench.ask(picture=photo("cat", (64, 48)), name="mine.jpg")
    assert bench.wait(60)
    made = [weakref.ref(bench._question.pictures[0])]
    bench.ask(picture="coffee")
    assert bench.wait(60)
    for _ in range(4):
        bench.run()
        assert bench.wait(60)
        made.append(weakref.ref(bench.history[-1]))
    assert [result.number for result in bench.history] == [1, 7, 8]
    assert [row["number"] for row in bench.widget.history] == [1, 7, 8]
    gc.collect()
    assert [one() is None for one in made] == [True, True, True, False, False]  # the picture, and 5 to 8


def test_a_history_holds_no_logits(looked_at: Workbench) -> None:
    looked_at.look("ViT blocks")
    looked_at.load(concurrency=2, n=2)
    assert looked_at.wait(90)
    result = looked_at.result()
    assert result.comparison is not None
    assert result.layers is not None
    assert result.loads is not None
    runs = [result.run, *(sample.run for sample in result.comparison.samples), *result.layers.values()]
    runs += [run for load in result.loads.values() for run in load.finished]
    assert len(runs) > 8
    assert {run.logits.untyped_storage().nbytes() for run in runs} == {0}


def test_pictures_are_read_once_and_again_when_their_file_has_changed(
    tmp_path: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    read: list[Question] = []
    images = Question.images
    monkeypatch.setattr(Question, "images", lambda question: (read.append(question), images(question))[1])
    bench = workbench("tiny-qwen3-vl", str(tmp_path / "a.jpg"), max_new_tokens=2, repeats=0, device="cpu")
    assert bench.wait(60)
    bench.choose("vit.tower", "lean")
    bench.ask(prompt="Why?")
    assert bench.wait(60)
    assert len(read) == 1
    (tmp_path / "a.jpg").write_bytes(photo("cat", (300, 100)))
    bench.run()
    assert bench.wait(60)
    assert len(read) == 2
    assert bench.result().run.shapes[0].width == 300
    bench.close()


def test_requests_of_a_load_that_have_ended_are_told_from_the_first_arrival_on(looked_at: Workbench) -> None:
    trace = looked_at.result().shown.trace
    served = [Served(label="it", number=number, begun=10**9 + number * 10**6, trace=trace) for number in (1, 0)]
    told = to_json(showing.arrived(3, served))
    (first, bars), (second, later) = told["rows"]
    assert (told["result"], told["label"], first, second) == (3, "it", 0, 1)
    assert [name for name, *_ in bars] == [*(span.name for span in trace.within_ttft()), "decode"]
    assert bars[-1][1:] == pytest.approx([trace.first_chunk_ns / 1e6, (trace.end_ns - trace.first_chunk_ns) / 1e6], abs=1e-3)
    assert [after[1] - before[1] for before, after in zip(bars, later, strict=True)] == pytest.approx([1.0] * len(bars), abs=2e-3)


def test_the_history_says_what_changed_and_keeps_pins_and_notes(bench: Workbench) -> None:
    bench.controls["attention.prefill"].value = "sdpa"
    assert bench.wait(60)
    bench.ask(prompt="Why?")
    assert bench.wait(60)
    clicked(bench, "Mark", number=2, pinned=True, note="the good one")
    rows = bench.widget.history
    assert [row["changed"] for row in rows] == ["baseline", "attention.prefill=sdpa", "prompt “Why?”"]
    assert [(row["pinned"], row["note"]) for row in rows] == [(False, ""), (True, "the good one"), (False, "")]
    clicked(bench, "Use", number=1)
    assert bench.wait(60)
    assert bench.recipe == Recipe.baseline()


def test_stages_are_told_as_they_begin_and_end(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    hear = bench._session._tell
    monkeypatch.setattr(bench._session, "_tell", lambda news: (told.append(news), hear(news)))
    bench.run()
    assert bench.wait(60)
    run = bench.history[-1].run
    spans = [s for s in run.trace.within_ttft() if s.end_ns < run.trace.first_chunk_ns]
    assert [news.ended for news in told if news.ended][: len(spans)] == spans
    begun = [news.began for news in told if news.began]
    assert begun[: len(spans)] == [(span.name, span.start_ns) for span in spans]
    assert sum(news.sample is not None for news in told) == 4  # two engines, a warm-up and a round


def test_the_page_says_nothing_that_is_no_wish() -> None:
    for content in ({}, {"kind": "Explode"}, {"kind": "Choose", "path": "vit.rope"}, "run", None):
        with pytest.raises(RequestError, match="which is no wish"):
            from_json(content)
    assert to_json(Interval(1.0, float("nan"), 2.0)) == [1.0, None, 2.0]


def test_text_stands_in_where_no_kernel_lives(looked_at: Workbench) -> None:
    text = looked_at.static()
    assert "tiny-qwen3-vl" in text
    assert "prefill" in text
    assert "█" in text
    assert "<script" not in text


def test_an_option_is_a_line_of_the_catalogue_and_a_function_of_its_slot(
    monkeypatch: pytest.MonkeyPatch, add_option: Callable[[str, Option], None], sweep_settings: Callable[..., SweepSettings]
) -> None:
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
    add_option("vit.attention", line)
    monkeypatch.setitem(attention.OPTIONS, "written_out", written_out)

    bench = workbench("tiny-qwen3-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=1, device="cpu")
    assert bench.wait(60)
    described = next(toggle for toggle in bench.widget.choices["toggles"] if toggle["path"] == "vit.attention")
    assert "nobody does so yet" in described["options"][-1]["does"]
    assert not calls
    clicked(bench, "Choose", path="vit.attention", value="written_out")
    assert bench.wait(60)
    assert calls
    assert bench.result().recipe.vit.attention == "written_out"
    assert bench.result().parity
    bench.close()

    settings = sweep_settings(recipes=["transformers", "fastest, vit.attention=written_out"])
    rows = sweep(settings, progress=False).summary()
    assert {row["engine"]: row["tokens_equal"] for row in rows} == dict.fromkeys(settings.recipes, True)
    assert "| `written_out` | yes | scores, softmax and sum a window at a time; nobody does so yet |" in catalogue_markdown()
    assert "written_out" in set(view.catalogue_frame()["option"])
    with pytest.raises(RecipeError, match=r"the choices are 'per_window', .*, 'written_out'"):
        bench.controls["vit.attention"].value = "yesterday"
