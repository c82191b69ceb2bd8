"""The workbench as a person uses it in JupyterLab and in Voila: flip toggles, stop, drop a picture, reload, and see it."""

from __future__ import annotations

import base64
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

IDLE = """() => {
  const session = window.jupyterapp?.shell.currentWidget?.sessionContext?.session;
  return session?.kernel?.connectionStatus === "connected" && session.kernel.status === "idle";
}"""
ONE_CALL = """
import fastvl_lab as fl
bench = fl.workbench("tiny-qwen2.5-vl", "coffee", image_size=(224, 168), max_new_tokens=12, repeats=2, device="cpu")
bench
"""
ANOTHER = "print('six times seven is', 6 * 7)"
BUSY = "bench.ask(max_new_tokens=4000)\nprint('in time:', bench.wait(40))"
# What there is of a view to see: in the kernel as it was made, and on the page as it is drawn.
MADE = """
import json

from fastvl_lab.view.workbench.views import views

def made(figure):
    figure = json.loads(figure.to_json())
    layout, bars = figure["layout"], [trace for trace in figure["data"] if trace["type"] == "bar"]
    axes = sorted(name for name in layout if name[:5] in ("xaxis", "yaxis"))
    return {
        "annotations": [note["text"] for note in layout.get("annotations", [])],
        "shapes": [[shape["x0"], shape.get("xref", "x")] for shape in layout.get("shapes", [])],
        "axes": {name: layout[name].get("title", {}).get("text", "") for name in axes},
        "rows": [list(trace["y"]) for trace in bars],
        "traces": [trace["type"] for trace in figure["data"]],
        "bars": sum(length != 0 for trace in bars for length in trace["x"]),
    }

def made_of(name):
    bench.look(name)
    assert bench.wait(60)
    if name != "waterfall":
        return made(bench.figure)
    shown, runs = bench.widget.shown, [bench.result().reference, bench.result().shown]
    drawn = {"solid": runs[1], "rival": runs[0]}
    return {
        "stages": sorted({bar[0] for run in ("recipe", "rival", "before") for bar in (shown[run] or {"bars": []})["bars"]}),
        "bars": {look: len(run.trace.within_ttft()) + len(run.trace.gaps()) for look, run in drawn.items()},
        "longest": [round(max(s.duration_ns for s in run.trace.within_ttft()) / run.trace.first_chunk_ns, 2) for run in runs[1:]],
        "headline": shown["headline"],
    }

print(json.dumps({name: made_of(name) for name in views() if name not in ("operations", "load")}))  # which have tests of their own
"""
DRAWN = """() => {
  const { _fullLayout: layout, _fullData: data, layout: given } = document.querySelector(".fl-bench .js-plotly-plot") ?? {};
  if (layout === undefined) return {};
  const axes = Object.keys(layout).filter((name) => /^[xy]axis\\d*$/.test(name)).sort();
  return {
    annotations: (layout.annotations ?? []).map((note) => note.text),
    shapes: (layout.shapes ?? []).map((shape) => [shape.x0, shape.xref]),
    axes: Object.fromEntries(axes.map((name) => [name, given[name]?.title?.text ?? ""])),
    rows: data.filter((trace) => trace.type === "bar").map((trace) => [...trace.y]),
    traces: data.map((trace) => trace.type),
    bars: document.querySelectorAll(".fl-bench .barlayer .point path").length,
    notes: document.querySelectorAll(".fl-bench .annotation-text").length,
    lines: document.querySelectorAll(".fl-bench .shapelayer path").length,
  };
}"""
DRAWN_WATERFALL = """() => {
  const chart = document.querySelector(".fl-bench .fl-chart");
  if (!chart || chart.hidden) return {};
  const count = (look) => chart.querySelectorAll(`rect.fl-${look}`).length;
  const [left, ttft] = ["line.fl-ttft-line"].flatMap((line) => [112, Number(chart.querySelector(line).getAttribute("x1"))]);
  const widths = [...chart.querySelectorAll("rect.fl-solid")].map((bar) => Number(bar.getAttribute("width")));
  return {
    stages: [...chart.querySelectorAll(".fl-stage")].map((row) => row.dataset.stage).sort(),
    bars: { solid: count("solid"), rival: count("rival") },
    longest: [Math.round((100 * Math.max(...widths)) / (ttft - left)) / 100],
    headline: document.querySelector(".fl-bench .fl-big").textContent,
  };
}"""
FLIPS = {
    "preprocessor.patchify": "torch",
    "vit.attention": "grouped",
    "attention.prefill": "sdpa",
    "cache.kv": "static",
    "capture.shapes": "multiples_of_64",
    "streaming.steps_per_round": "2",
}
VIEWS = ("ViT blocks", "decoder layers", "toggle by toggle", "share of the floor", "tokens over time", "memory", "waterfall")
KERNEL = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


class Panel:
    """The panel on a page, by what a person looks for."""

    def __init__(self, page: Any) -> None:
        self.page, self.box = page, page.locator(".fl-bench").first

    def button(self, name: str) -> Any:
        return self.box.locator(".fl-actions").get_by_role("button", name=name, exact=True)

    def option(self, path: str, value: str) -> Any:
        return self.box.locator(f"[data-path='{path}']").get_by_role("radio", name=value, exact=True)

    def view(self, name: str) -> Any:
        return self.box.get_by_role("tab", name=name, exact=True)

    def until(self, script: str, arg: Any = None, seconds: float = 60) -> None:
        self.page.wait_for_function(script, arg=arg, timeout=seconds * 1000)

    def state(self, name: str, seconds: float = 60) -> None:
        self.until("(name) => document.querySelector('.fl-bench').dataset.state === name", name, seconds)

    def rows(self, number: int) -> None:
        self.until("(rows) => document.querySelectorAll('.fl-history tbody tr').length === rows", number)

    def measured(self, number: int) -> None:
        """Until that many results are there, and nothing runs."""
        self.rows(number)
        self.state("idle")

    def says(self, of: str, text: str, seconds: float = 30) -> None:
        """Until a part of the page has the text."""
        self.until("([of, text]) => document.querySelector(`.fl-bench .${of}`).textContent.includes(text)", [of, text], seconds)

    def shows(self, made: dict[str, Any], name: str) -> None:
        """The page has what the kernel made: no less, and nothing of a view before."""
        waterfall = name == "waterfall"
        expected = made if waterfall else made | {"notes": len(made["annotations"]), "lines": len(made["shapes"])}
        deadline = time.monotonic() + 20
        while (drawn := self.page.evaluate(DRAWN_WATERFALL if waterfall else DRAWN)) != expected:
            assert time.monotonic() < deadline, {
                key: (drawn.get(key), expected[key]) for key in expected if drawn.get(key) != expected[key]
            }
            self.page.wait_for_timeout(20)
        assert self.view(name).get_attribute("aria-selected") == "true"

    def shows_each_after_each(self, made: dict[str, dict[str, Any]]) -> None:
        """Every view has what the kernel made of it, whichever was seen before. The kernel looked at each, at the last one last."""
        assert set(made) == set(VIEWS)
        at = list(made)[-1]
        self.shows(made[at], at)
        for one, other in itertools.combinations(VIEWS, 2):  # from each to each, and back
            for name in (one, other, one):
                if name != at:
                    self.view(name).click()
                    self.shows(made[name], name)
                    assert self.box.locator(".fl-table td").count() > 2, name
                    at = name
        self.view("waterfall").click()
        self.shows(made["waterfall"], "waterfall")

    def tells_of_every_stage(self) -> None:
        """Pointing at a row tells how long its stage took, the thinnest too."""
        for row in self.box.locator(".fl-stage").all():
            number = row.locator(".fl-number").text_content()
            row.hover()
            tip = self.box.locator(".fl-tip").inner_text()
            assert tip.startswith(str(row.get_attribute("data-stage")))
            assert number == "–" or number.split(" · ")[0] in tip.splitlines()[0]

    def is_dark(self, dark: bool) -> None:
        """Paper and ink, of the page and of what is drawn."""
        script = """(dark) => {
          const [paper, ink] = dark ? ["rgb(17, 20, 24)", "#e8e8e8"] : ["rgb(255, 255, 255)", "#222222"];
          const page = getComputedStyle(document.querySelector(".fl-bench")).backgroundColor;
          return page === paper && document.querySelector(".fl-stage .fl-number").getAttribute("fill") === ink;
        }"""
        self.until(script, dark, 20)

    def fits(self) -> None:
        """Nothing is wider than its room, and the drawing fills it."""
        script = """() => {
          const [drawn, room] = [".fl-chart svg", ".fl-seen"].map((of) => document.querySelector(`.fl-bench ${of}`).clientWidth);
          const root = document.querySelector(".fl-bench");
          return drawn <= room && drawn > 0.9 * room && root.scrollWidth <= root.clientWidth;
        }"""
        self.until(script, seconds=10)

    def fill(self, field: str, text: str) -> None:
        entry = self.box.get_by_label(field, exact=True)
        entry.fill(text)
        entry.press("Enter")

    def type_other(self, field: str, placeholder: str, text: str) -> Any:
        """What is not in a list, key by key, as a person does."""
        self.box.get_by_label(field, exact=True).select_option(label=f"{placeholder}…")
        entry = self.box.get_by_placeholder(placeholder, exact=True)
        entry.press_sequentially(text)
        return entry

    def give(self, *paths: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.box.get_by_role("button", name="choose files").click()
        chooser.value.set_files(paths)

    def drop(self, name: str, data: bytes) -> None:
        script = """([text, name]) => {
          const files = new DataTransfer();
          files.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name, { type: "image/jpeg" }));
          document.querySelector(".fl-chart").dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
        }"""
        self.page.evaluate(script, [base64.b64encode(data).decode(), name])


def start_cell(page: Any, number: int) -> None:
    page.locator(".jp-CodeCell").nth(number).locator(".cm-content").click()
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")  # not its promise, which waits for the end


def ended_cell(page: Any, number: int, seconds: float) -> str:
    """Its printed output, once it has ended."""
    ended = "(cell) => /\\[\\d+\\]/.test(document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')[cell].textContent)"
    page.wait_for_function(ended, arg=number, timeout=seconds * 1000)
    output = page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea-output")
    output.last.wait_for(timeout=10_000)
    return str(output.last.inner_text()).strip()


def run_cell(page: Any, number: int, seconds: float = 60) -> str:
    start_cell(page, number)
    return ended_cell(page, number, seconds)


@pytest.fixture
def errors(page: Any) -> list[str]:
    """What the page reports as an error, but for JupyterLab's own, whose splash fails where one theme follows another at once, and
    for an icon font that is fetched from a network that is not there.
    """
    found: list[str] = []

    def thrown(error: Any) -> None:
        frames = [line for line in (error.stack or "").splitlines() if line.strip().startswith("at ")]
        if not frames or not all("/static/lab/jlab_core" in frame for frame in frames):
            found.append(error.stack or str(error))

    page.on("pageerror", thrown)

    def noted(message: Any) -> None:
        if message.type == "error" and not re.search(r"fontawesome|Failed to load resource", message.text, re.IGNORECASE):
            found.append(message.text)

    page.on("console", noted)
    return found


def opened(jupyterlab: Any, page: Any, *sources: str) -> Panel:
    """A notebook of these cells, the first of which has run, and its panel once it has its first answer."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), jupyterlab.root / "bench.ipynb")
    page.goto(jupyterlab.url("bench.ipynb"))
    page.wait_for_function(IDLE, timeout=60_000)
    run_cell(page, 0)
    panel = Panel(page)
    panel.box.wait_for(timeout=60_000)
    panel.measured(1)
    return panel


def test_the_panel_in_jupyterlab(jupyterlab: Any, page: Any, errors: list[str], tmp_path: Path) -> None:
    page.set_viewport_size({"width": 1500, "height": 1700})
    panel = opened(jupyterlab, page, ONE_CALL, MADE)
    assert panel.box.locator(".fl-static").count() == 0
    assert not page.locator(".fl-static").first.is_visible()  # what stands in where no kernel lives
    panel.option("vit.attention", "grouped").click()
    panel.measured(2)
    panel.button("undo").click()
    panel.measured(3)
    more = panel.box.locator("[data-path='vit.attention'] + .fl-more")
    more.click()
    greyed = panel.option("vit.attention", "varlen")
    assert greyed.get_attribute("aria-disabled") == "true"
    greyed.hover()
    assert "cannot run here: it needs a CUDA device" in panel.box.locator(".fl-tip").inner_text()

    made = json.loads(run_cell(page, 1, seconds=120))  # every view, and what each must be measured for
    panel.shows_each_after_each(made)
    panel.tells_of_every_stage()
    panel.box.locator(".fl-stage[data-stage='vit']").click()
    panel.shows(made["ViT blocks"], "ViT blocks")
    panel.box.locator(".fl-crumbs").get_by_role("button", name="waterfall").click()
    panel.shows(made["waterfall"], "waterfall")

    panel.fits()
    page.screenshot(path=tmp_path / "light.png")
    for theme in ("Dark", "Light"):
        change = "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme: `JupyterLab ${theme}` })"
        page.evaluate(change, theme)
        panel.is_dark(theme == "Dark")
    panel.button("dark").click()
    panel.is_dark(True)
    page.screenshot(path=tmp_path / "dark.png")
    panel.box.get_by_text("copy the recipe").click()
    assert 'fl.Recipe.parse("' in panel.box.locator(".fl-copies pre").first.inner_text()
    assert errors == []


@pytest.mark.alone
def test_a_click_is_answered_and_a_run_stopped_at_once(jupyterlab: Any, page: Any, errors: list[str]) -> None:
    panel = opened(jupyterlab, page, ONE_CALL, ANOTHER, BUSY)
    waits = []
    for number, (path, value) in enumerate(FLIPS.items(), start=2):
        option, started = panel.option(path, value), time.monotonic()
        option.click()
        assert option.get_attribute("aria-checked") == "true"  # at once
        panel.rows(number)
        waits.append(time.monotonic() - started)
        panel.state("idle")
        panel.says("fl-history", f"{path}={value}")
    print(f"from a click to its waterfall, run and all: median {statistics.median(waits):.2f} s, longest {max(waits):.2f} s")
    assert statistics.median(waits) < 1.5
    assert panel.box.locator(".fl-history tbody tr").first.locator("td").nth(1).inner_text() == str(len(FLIPS) + 1)  # newest first
    assert panel.box.locator(".fl-before").count() > 0

    panel.fill("tokens", "4000")
    panel.state("running")
    # Another cell is answered while the run goes on, and a click while a cell waits for it.
    assert run_cell(page, 1, seconds=5) == "six times seven is 42"
    panel.state("running")
    started = time.monotonic()
    panel.button("stop").click()
    panel.state("stopped", seconds=5)
    assert time.monotonic() - started < 2
    start_cell(page, 2)
    panel.state("running")
    panel.says("fl-answer", "\\", 20)
    assert "*" in page.locator(".jp-CodeCell").nth(2).locator(".jp-InputPrompt").inner_text()
    started = time.monotonic()
    panel.button("stop").click()
    panel.state("stopped", seconds=5)
    assert time.monotonic() - started < 1.5
    assert ended_cell(page, 2, seconds=5) == "in time: True"
    panel.fill("tokens", "12")
    panel.measured(len(FLIPS) + 2)
    assert errors == []


def test_the_question_is_what_the_fields_say(jupyterlab: Any, page: Any, errors: list[str], picture: bytes, tmp_path: Path) -> None:
    panel = opened(jupyterlab, page, ONE_CALL)
    broken, whole = tmp_path / "broken.jpg", tmp_path / "whole.jpg"
    broken.write_bytes(b"no picture")
    whole.write_bytes(picture)
    panel.give(broken)
    panel.says("fl-message", "'broken.jpg' is not an image of a supported type")
    assert panel.box.get_by_label("pictures", exact=True).input_value() == "coffee"  # the field is put back
    panel.give(whole)
    panel.measured(2)
    assert not panel.box.locator(".fl-message").is_visible()
    panel.says("fl-heading", "whole.jpg as it is")
    panel.says("fl-heading", "image 168×140")
    panel.box.get_by_label("size", exact=True).select_option("within 448×448")
    panel.measured(3)
    panel.says("fl-heading", "image 448×373")
    panel.type_other("size", "W×H", "300x100").press("Enter")
    panel.measured(4)
    panel.says("fl-heading", "whole.jpg resized to 300×100")
    panel.box.get_by_label("pictures", exact=True).select_option("coffee")
    panel.measured(5)
    panel.says("fl-heading", "coffee as it is")  # a size given exactly was the other picture's
    panel.drop("dropped.jpg", picture)
    panel.measured(6)
    panel.says("fl-heading", "dropped.jpg as it is")
    assert panel.box.locator(".fl-before").count() == 0
    panel.says("fl-no-before", "not held against #5: it was asked something else")
    entry = panel.type_other("checkpoint", "a folder or hub id", "no/such-model")
    panel.state("idle")
    assert panel.box.locator(".fl-message").is_hidden()  # what is being typed is nobody's name yet
    entry.press("Enter")
    panel.says("fl-message", "no/such-model")
    assert panel.box.get_by_label("checkpoint", exact=True).input_value() == "tiny-qwen2.5-vl"
    assert errors == []


# Every headline that is seen from now on: its text, and whether it is a number of before, a count, or one that counts.
WATCH = """() => {
  window.seen = [];
  const big = document.querySelector(".fl-bench .fl-big");
  const note = () => window.seen.push([big.textContent, big.classList.contains("fl-stale"), !!big.closest(".fl-counting")]);
  new MutationObserver(note).observe(big, { childList: true, characterData: true, attributes: true, subtree: true });
}"""
PANELS = "import threading\nprint(sum(thread.name == 'fastvl-workbench' for thread in threading.enumerate()))"


def test_what_goes_on_is_seen_and_what_was_measured_is_said(jupyterlab: Any, page: Any, errors: list[str]) -> None:
    panel = opened(jupyterlab, page, ONE_CALL, PANELS)

    # A look at a view while it measures ends no measurement, and a cold run is no headline.
    page.evaluate(WATCH)
    before = panel.box.locator(".fl-big").inner_text()
    panel.option("capture.shapes", "multiples_of_64").click()
    panel.view("ViT blocks").click()
    panel.measured(2)
    panel.until("() => document.querySelectorAll('.fl-bench .barlayer .point').length > 0")
    assert "✓ same tokens" in panel.box.locator(".fl-history tbody tr").first.inner_text()
    after = panel.box.locator(".fl-big").inner_text()
    assert {text for text, stale, counts in page.evaluate("window.seen") if not stale and not counts} <= {before, after}
    panel.view("waterfall").click()

    # Parity on other pixels says so, and by how much these move the logits; too few rounds give no ratio.
    panel.option("preprocessor.resize", "torch").click()
    panel.measured(3)
    panel.says("fl-pills", "on this recipe's pixels")
    panel.says("fl-pills", "too few rounds to compare with Transformers")

    # A drag takes a part of the time, and no row away.
    stages = panel.box.locator(".fl-stage").count()
    box = panel.box.locator(".fl-chart svg").bounding_box()
    page.mouse.move(box["x"] + 140, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 220, box["y"] + 160)
    page.mouse.up()
    whole = panel.box.get_by_role("button", name="whole axis")
    whole.wait_for(timeout=5_000)
    assert panel.box.locator(".fl-stage").count() == stages
    whole.click()
    assert whole.count() == 0

    # A long run grows on the page while it runs.
    page.evaluate(WATCH)
    panel.fill("repeats", "0")
    panel.measured(4)
    panel.type_other("size", "W×H", "1800x1400").press("Enter")
    panel.until("() => document.querySelector('.fl-bench').classList.contains('fl-counting')", seconds=60)
    widths = "() => [...document.querySelectorAll('.fl-chart .fl-solid')].map((bar) => Number(bar.getAttribute('width')))"
    first = page.evaluate(widths)
    panel.until("(count) => document.querySelectorAll('.fl-chart .fl-solid').length !== count", len(first))
    panel.measured(5)
    counted = [text for text, _, counts in page.evaluate("window.seen") if counts]
    assert len(counted) > 5
    panel.says("fl-heading", "image 1800×1400")

    # The cell again closes the panel before.
    run_cell(page, 0)
    page.wait_for_function("() => document.querySelectorAll('.fl-bench').length === 1", timeout=30_000)
    panel.measured(1)
    assert run_cell(page, 1) == "1"
    assert errors == []


def test_the_panel_is_used_by_keyboard_alone(jupyterlab: Any, page: Any, errors: list[str]) -> None:
    panel = opened(jupyterlab, page, ONE_CALL)
    page.mouse.move(1, 1)  # it points at nothing that is drawn anew below it
    cells = page.locator(".jp-CodeCell").count()
    panel.option("vit.patch_embed", "conv3d").focus()
    page.keyboard.press("d")
    page.keyboard.press("d")  # deletes a cell of the notebook, where the notebook hears it
    page.keyboard.press("ArrowRight")
    panel.measured(2)
    panel.says("fl-history", "vit.patch_embed=linear")
    assert page.evaluate("document.activeElement.textContent") == "linear"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.parentElement.dataset.path") == "vit.padding"
    page.keyboard.press("u")
    panel.measured(3)
    page.keyboard.press("f")
    panel.measured(4)
    page.keyboard.press("7")
    panel.until("() => document.querySelector('.fl-bench [role=tab][data-view=memory]').getAttribute('aria-selected') === 'true'")
    panel.until("() => document.querySelector('.fl-bench .fl-chart').hidden")
    page.keyboard.press("1")
    panel.until("() => !document.querySelector('.fl-bench .fl-chart').hidden")
    page.keyboard.press("?")
    assert panel.box.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert panel.box.get_by_role("dialog").count() == 0
    panel.box.locator(".fl-stage[tabindex='0']").focus()
    for _ in range(20):
        if page.evaluate("document.activeElement.dataset.stage") == "vit":
            break
        page.keyboard.press("ArrowDown")
    assert "of TTFT" in panel.box.locator(".fl-tip").inner_text()
    page.keyboard.press("Enter")
    panel.says("fl-crumbs", "ViT blocks")
    assert page.locator(".jp-CodeCell").count() == cells
    assert errors == []


def test_the_answer_to_a_click_is_seen_without_scrolling(jupyterlab: Any, page: Any) -> None:
    """JupyterLab as it opens, at 1280x800 and 900 pixels wide: the headline, the toggles and the waterfall are in the window."""
    panel = opened(jupyterlab, page, ONE_CALL)
    panel.box.scroll_into_view_if_needed()
    for width in (1280, 900):
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("() => document.querySelector('.fl-bench').scrollIntoView()")
        panel.fits()
        for part in (".fl-big", ".fl-pills", ".fl-learnt", ".fl-toggles [role=radio]"):
            box = panel.box.locator(part).first.bounding_box()
            assert box["y"] + box["height"] <= 800, (width, part)
            assert box["x"] + box["width"] <= width, (width, part)
        if width == 1280:
            chart = panel.box.locator(".fl-chart svg").bounding_box()
            assert chart["y"] + chart["height"] <= 800


def test_many_requests_are_sent_from_the_load_view(jupyterlab: Any, page: Any, errors: list[str], tmp_path: Path) -> None:
    panel = opened(jupyterlab, page, ONE_CALL)
    panel.view("load").click()
    panel.says("fl-plot", "say how many requests arrive, and press load")
    box = page.locator(".fl-toggles").bounding_box()
    batching = panel.option("schedule.batching", "continuous")
    at = batching.bounding_box()
    assert box["y"] <= at["y"] <= box["y"] + box["height"]  # its toggles are what is seen
    batching.click()
    panel.measured(2)
    load = panel.box.get_by_role("button", name="load", exact=True)
    panel.box.get_by_label("how requests arrive").select_option("4 at once")
    panel.box.get_by_label("held against").select_option("the run before")
    panel.fill("requests", "200")  # and Enter
    panel.says("fl-progress", " of 200 · ")  # several end in one step
    assert load.is_disabled()
    panel.box.get_by_role("button", name="stop the load").click()
    panel.state("stopped", seconds=5)
    panel.fill("requests", "6")
    panel.until("() => document.querySelectorAll('.fl-plot .js-plotly-plot .main-svg').length > 10")
    panel.state("idle")
    assert panel.box.locator(".fl-said p").count() == 3
    panel.says("fl-said", "this recipe makes ")
    assert panel.box.locator(".fl-load th").all_inner_texts() == ["ms (95% CI)", "of", "p50", "p90", "p99"]
    queued = panel.box.locator(".fl-plot .barlayer .trace").first.locator(".point path").last
    queued.hover(force=True)
    panel.until("() => /queued.*step.*request/s.test(document.querySelector('.fl-plot .hoverlayer').textContent)")
    panel.button("dark").click()
    panel.until("() => document.querySelector('.fl-plot .main-svg').style.background === 'rgb(17, 20, 24)'")
    page.screenshot(path=tmp_path / "load.png")
    panel.view("waterfall").click()
    panel.until("() => document.querySelector('.fl-load').hidden && !document.querySelector('.fl-bench .fl-chart').hidden")
    assert errors == []


def test_a_newcomer_sees_flips_and_reads_what_it_saved(jupyterlab: Any, page: Any) -> None:
    """Open, run all, and without scrolling: both engines, the suggested toggle, and the sentence that says what it saved."""
    panel = opened(jupyterlab, page, ONE_CALL.replace("repeats=2", "repeats=6"))
    assert panel.box.locator(".fl-rival").count() > 5
    assert panel.box.locator(".fl-solid").count() > 5
    suggested = panel.box.locator(".fl-try")
    suggested.wait_for(timeout=60_000)
    said = panel.box.locator(".fl-advice").inner_text()
    path, value = re.search(r"([a-z_]+\.[a-z_]+)=(\w+)", said).groups()  # type: ignore[union-attr]
    suggested.click()
    panel.measured(2)
    assert panel.option(path, value).get_attribute("aria-checked") == "true"
    panel.until("(change) => document.querySelector('.fl-learnt').textContent.includes(change)", f"{path}={value}")
    learnt = panel.box.locator(".fl-learnt").inner_text()
    assert re.search(r"saves|costs|no saving shown|too busy to say", learnt)
    assert "that Transformers takes" in learnt


@pytest.mark.parametrize("flips", [2, pytest.param(len(FLIPS), marks=pytest.mark.nightly)])
def test_the_panel_as_a_page_of_its_own(
    page_of_its_own: Callable[..., str],
    in_kernel: Callable[..., str],
    page: Any,
    errors: list[str],
    picture: bytes,
    tmp_path: Path,
    flips: int,
) -> None:
    (tmp_path / "photo.jpg").write_bytes(picture)  # a path is meant from where the command is given
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    url = page_of_its_own("--image=photo.jpg", "--max-new-tokens=12", "--repeats=2", "--device=cpu")
    page.goto(url, wait_until="commit", timeout=90_000)
    panel = Panel(page)
    panel.box.wait_for(timeout=90_000)
    panel.measured(1)
    for number, (path, value) in enumerate([*FLIPS.items()][:flips], start=2):
        panel.option(path, value).click()
        panel.rows(number)
    panel.state("idle")
    panel.fits()
    page.screenshot(path=tmp_path / "voila.png")
    if flips == len(FLIPS):
        (kernel,) = tmp_path.glob("voila_*/kernel-*.json")
        panel.shows_each_after_each(json.loads(in_kernel(kernel, f"bench = Out[1]\n{MADE}", seconds=180)))
    panel.fill("tokens", "4000")
    panel.state("running")
    panel.button("stop").click()
    panel.state("stopped", seconds=5)
    panel.button("dark").click()
    panel.is_dark(True)
    page.screenshot(path=tmp_path / "voila-dark.png")
    panel.box.get_by_role("button", name="export all").click()
    panel.says("fl-status", "written: ", 180)  # a picture of every result
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []  # nothing of a network
    assert list(tmp_path.glob("fastvl_lab-*/workbench.html"))
    assert errors == []


def test_results_outlive_the_server_and_a_link_opens_one(
    page_of_its_own: Callable[..., str], page: Any, errors: list[str], tmp_path: Path
) -> None:
    def opened_at(url: str) -> Panel:
        page.goto(url, wait_until="commit", timeout=90_000)
        panel = Panel(page)
        panel.box.wait_for(timeout=90_000)
        return panel

    options = ("--image=coffee", "--image-size", "224", "168", "--max-new-tokens=6", "--repeats=1", "--device=cpu", "--folder=kept")
    panel = opened_at(page_of_its_own(*options))
    panel.measured(1)
    assert panel.box.locator(".fl-earlier").is_hidden()
    panel.option("attention.prefill", "sdpa").click()
    panel.measured(2)
    panel.box.get_by_label("note on 2").fill("the good one")
    page.keyboard.press("Tab")
    panel.until("() => document.querySelector('.fl-history input[value=\"the good one\"]') !== null")
    headline = panel.box.locator(".fl-big").inner_text()
    page.evaluate("() => { navigator.clipboard.writeText = (text) => { window.copied = text; }; }")
    panel.box.get_by_role("button", name="copy link").click()
    panel.says("fl-status", "link copied")
    query = page.evaluate("window.copied").partition("?")[2]

    # Another server, and another kernel: it runs nothing, and shows what was kept.
    panel = opened_at(f"{page_of_its_own(*options)}?{query}")
    panel.state("idle")
    panel.says("fl-of-earlier", "of an earlier session, ")
    assert panel.box.locator(".fl-big").inner_text() == headline
    assert panel.box.locator(".fl-solid").count() > 5
    assert panel.option("attention.prefill", "sdpa").get_attribute("aria-checked") == "true"
    assert panel.box.locator(".fl-history tbody tr").count() == 0
    panel.box.locator(".fl-earlier summary").click()
    rows = panel.box.locator(".fl-earlier tbody tr")
    assert rows.count() == 2
    assert rows.first.get_by_label("note on").input_value() == "the good one"
    assert headline in rows.first.inner_text()

    panel.button("baseline").click()
    panel.measured(1)
    panel.says("fl-heading", "#1 · ")
    assert panel.box.locator(".fl-message").is_hidden()
    assert panel.box.locator(".fl-elsewhere").count() == 0  # the same machine, versions and weights
    rows.first.click(modifiers=["Shift"])
    panel.until("() => document.querySelectorAll('.fl-before').length > 5")
    assert page.evaluate("getSelection().isCollapsed")
    page.screenshot(path=tmp_path / "earlier.png", full_page=True)
    panel.box.get_by_role("button", name="forget them").click()
    panel.until("() => document.querySelector('.fl-earlier').hidden")
    assert len(list((tmp_path / "kept").glob("*.json.gz"))) == 1
    assert errors == []


def test_a_reload_a_second_tab_and_a_restart(jupyterlab: Any, page: Any, errors: list[str]) -> None:
    """Two pages show the same panel, and a click in either is seen in both; a new kernel begins anew."""

    def shown(panel: Panel) -> list[str]:
        return [panel.box.locator(f".fl-{part}").inner_text() for part in ("big", "spread", "learnt")]

    panel = opened(jupyterlab, page, ONE_CALL)
    panel.option("vit.attention", "grouped").click()
    panel.measured(2)
    panel.says("fl-learnt", "floor", 60)  # which is measured in the background, while somebody looks on
    before = shown(panel)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")

    page.reload()
    page.wait_for_function(IDLE, timeout=60_000)
    panel.box.wait_for(timeout=60_000)
    panel.measured(2)
    assert shown(panel) == before
    panel.button("undo").click()  # the kernel is the same, and so is what it remembers
    panel.measured(3)

    other = Panel(page.context.new_page())
    other.page.goto(jupyterlab.url("bench.ipynb"))
    other.page.wait_for_function(IDLE, timeout=60_000)
    other.box.wait_for(timeout=60_000)
    other.measured(3)
    assert shown(other) == shown(panel)
    other.option("vit.patch_embed", "linear").click()
    for each in (other, panel):
        each.measured(4)
    other.page.close()

    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_function(IDLE, timeout=60_000)
    assert errors == []
    page.reload()  # the kernel knows of no panel any more: what was saved stands in
    page.wait_for_function(IDLE, timeout=60_000)
    static = page.locator(".fl-static")
    static.wait_for(timeout=20_000)
    assert "prefill" in static.inner_text()
    page.wait_for_function(IDLE, timeout=60_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    panel.measured(1)
    assert all("widget model not found" in error for error in errors)  # JupyterLab's own word for the panel of before
