"""The workbench without a browser: setting a control in a cell is a click, and what comes of it is honest."""

from __future__ import annotations

import html
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import scan_cache_dir

from fastvl_lab import Recipe, RecipeError, Run, SweepSettings, photo, sweep, view, workbench
from fastvl_lab.catalogue import Option, Target, catalogue_markdown, toggles
from fastvl_lab.view.workbench import Workbench, asking
from fastvl_lab.view.workbench.figures import so_far
from fastvl_lab.view.workbench.session import BEFORE, RECIPE, STOCK
from fastvl_lab.view.workbench.views import views
from fastvl_lab.vit import attention
from fastvl_lab.vit.attention import Prepared, SegmentAttention

pytest.importorskip("ipywidgets")


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
    assert len(bench.figure.data) >= 4  # host and unaccounted of two engines, and the run before
    assert bench.figure.data[0].name == "the run before"
    bench.undo()
    assert bench.wait(60)
    assert bench.recipe == Recipe.fastest("cpu")


def test_every_toggle_has_its_control_and_greyed_options_say_why(bench: Workbench) -> None:
    assert list(bench.controls) == [toggle.path for toggle in toggles()]
    for toggle in toggles():
        for option in toggle.options:
            button = bench.controls[toggle.path].buttons[option.value]
            reason = option.needs.unmet(Target(device=bench.device, dtype=torch.float32))
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


def _asked(bench: Workbench) -> dict[str, object]:
    """What the fields say."""
    fields = bench._asking
    return {
        "checkpoint": fields._checkpoint.value,
        "picture": fields._picture.value,
        "size": fields._size.value,
        "exact": fields._exact.value,
        "max_pixels": fields._pixels.value,
        "prompt": fields._prompt.value,
        "tokens": fields._tokens.value,
    }


def test_a_picture_is_measured_as_it_is_unless_a_size_is_chosen(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "wide.jpg").write_bytes(photo("cat", (300, 100)))
    bench = workbench("tiny-qwen3-vl", "coffee", max_new_tokens=2, repeats=0, device="cpu")
    fields = bench._asking
    file = {"name": "mine.jpg", "type": "image/jpeg", "size": len(picture), "content": memoryview(picture)}
    file |= {"last_modified": datetime.now(UTC)}
    steps: list[tuple[Callable[[], object], str, tuple[int, int]]] = [
        (lambda: None, "coffee as it is", (600, 400)),
        (lambda: setattr(fields._pixels, "value", "70000"), "coffee as it is, max_pixels 70000", (600, 400)),
        (lambda: setattr(fields._pixels, "value", ""), "coffee as it is", (600, 400)),
        (lambda: setattr(fields._upload, "value", (file,)), "mine.jpg as it is", (168, 140)),
        (lambda: setattr(fields._size, "value", "within 448×448"), "mine.jpg within 448×448", (448, 373)),
        (lambda: setattr(fields._path, "value", str(tmp_path / "wide.jpg")), "wide.jpg within 448×448", (448, 149)),
        (lambda: setattr(fields._exact, "value", "64x128"), "wide.jpg resized to 64×128", (64, 128)),
        (lambda: setattr(fields._picture, "value", "mine.jpg"), "mine.jpg as it is", (168, 140)),  # the exact size was the other's
        (lambda: bench.ask(size=(90, 90), within=True), "mine.jpg within 90×90", (90, 75)),
    ]
    for step, about, (width, height) in steps:
        step()
        assert bench.wait(60), about
        run = bench.result().run
        assert (run.shapes[0].width, run.shapes[0].height) == (width, height), about
        assert f"{about} · image {width}×{height} → " in bench._summary.value.replace(str(tmp_path) + "/", "")
        assert fields._upload.value == ()  # the same file can be given again
        if "max_pixels" in about:
            assert run.shapes[0].resized_width * run.shapes[0].resized_height <= 70_000
    assert len(bench.history) == len(steps)  # fields that are set to what is asked ask for nothing
    assert _asked(bench)["size"] == "within 90×90"
    bench.close()


@pytest.mark.parametrize(
    ("field", "text", "says"),
    [
        ("_exact", "large", "size is 'large'; write width and height in pixels"),
        ("_exact", "640", "size is '640'; write width and height in pixels"),
        ("_pixels", "-5", "max_pixels is '-5'; write a whole number"),
        ("_pixels", "1e6", "max_pixels is '1e6'; write a whole number"),
        ("_size", "exactly W×H", "no size is given"),
    ],
)
def test_a_field_that_cannot_be_read_says_so_and_asks_for_nothing(bench: Workbench, field: str, text: str, says: str) -> None:
    bench.ask(size=None)
    assert bench.wait(60)
    getattr(bench._asking, field).value = text
    assert says in html.unescape(bench._status.value)
    assert len(bench.history) == 2


def test_what_a_cell_asks_for_and_looks_at_is_what_the_panel_shows(bench: Workbench) -> None:
    bench.ask(picture="rocket", prompt="Why?", max_new_tokens=2, size=(64, 48))
    assert bench.wait(60)
    expected = {"checkpoint": "tiny-qwen3-vl", "picture": "rocket", "size": "exactly W×H", "exact": "64×48"}
    assert _asked(bench) == expected | {"max_pixels": "", "prompt": "Why?", "tokens": 2}
    for name in ("memory", "tokens over time", "waterfall"):
        bench.look(name, number=1, against=2)
        assert bench.wait(60)
        assert (bench._looks.value, bench._pick.value, bench._pick_against.value) == (name, 1, 2)
    bench.ask(checkpoint="tiny-qwen2.5-vl")
    assert bench.wait(60)
    assert bench.history[-1].run.checkpoint == _asked(bench)["checkpoint"] == "tiny-qwen2.5-vl"
    assert len(bench.history) == 3


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
    monkeypatch.setattr(asking, "scan_cache_dir", partial(scan_cache_dir, tmp_path))
    names = asking.known_checkpoints()
    assert names[:2] == ["tiny-qwen2.5-vl", "tiny-qwen3-vl"]
    assert "random:Qwen/Qwen3-VL-4B-Instruct" in names
    assert [name for name in names if "/" in name and ":" not in name] == ["Qwen/Qwen3-VL-4B-Instruct", "me/tuned"]
    monkeypatch.setattr(asking, "scan_cache_dir", partial(scan_cache_dir, tmp_path / "none"))
    assert all(":" in name or "/" not in name for name in asking.known_checkpoints())


def test_a_checkpoint_or_path_counts_once_it_is_whole(bench: Workbench) -> None:
    for field in (bench._asking._other_checkpoint, bench._asking._path, bench._asking._prompt, bench._asking._exact):
        assert field.continuous_update is False
    bench._asking._other_checkpoint.value = "tiny-qwen2.5-vl"
    assert bench.wait(60)
    assert bench.history[-1].run.checkpoint == "tiny-qwen2.5-vl"
    assert _asked(bench)["checkpoint"] == "tiny-qwen2.5-vl"
    assert bench._asking._other_checkpoint.value == ""


def test_every_figure_is_shown_whole(bench: Workbench) -> None:
    """The page is given what the kernel made, and nothing is left of the figure before."""
    for name in ("memory", "waterfall", "tokens over time", "ViT blocks", "waterfall"):
        bench.look(name)
        assert bench.wait(60)
        shown = json.loads(bench._plot.figure)
        drawn, _ = bench._views[name].draw(bench.result(), None)
        assert [trace["type"] for trace in shown["data"]] == [trace.type for trace in drawn.data]
        assert len(shown["layout"].get("annotations", [])) == len(drawn.layout.annotations)
        assert set(shown["layout"]) == {*json.loads(drawn.to_json())["layout"], "uirevision"}


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


@pytest.mark.alone
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
    assert bench.figure.data
    assert "<td>" in bench._table.value
    if view == "toggle by toggle":
        found = bench.history[-1].attribution
        assert found is not None
        assert set(bench.figure.data[0].y) == {"transformers", *found.steps, "in the end"}
    with pytest.raises(RecipeError, match="no view 'x'; the choices are waterfall, "):
        bench.look("x")


def test_any_two_of_the_history_are_held_against_each_other(bench: Workbench) -> None:
    for value in ("eager", "sdpa"):
        bench.controls["attention.prefill"].value = value
        assert bench.wait(60)
    first, second, third = bench.history
    bench.look(number=1, against=3)
    ghost = bench.figure.data[0]
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


def test_an_option_is_a_line_of_the_catalogue_and_a_function_of_its_slot(
    monkeypatch: pytest.MonkeyPatch, add_option: Callable[[str, Option], None]
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
    assert "| `written_out` | yes | scores, softmax and sum a window at a time; nobody does so yet |" in catalogue_markdown()
    assert "written_out" in set(view.catalogue_frame()["option"])
    with pytest.raises(RecipeError, match=r"the choices are 'per_window', .*, 'written_out'"):
        bench.controls["vit.attention"].value = "yesterday"
