"""The workbench as a person uses it in JupyterLab and in Voila: flip toggles, stop, upload, reload, and see what was asked for."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.alone

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
FLIPS = ("numpy", "per_window", "eager", "paged", "multiples_of_64", "16")  # an option of each slot
VIEWS = ("ViT blocks", "decoder layers", "toggle by toggle", "share of the floor", "tokens over time", "memory", "waterfall")
KERNEL = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


class Panel:
    """The panel on a page, by what a person looks for."""

    def __init__(self, page: Any) -> None:
        self.page, self.box = page, page.locator(".fl-bench").first

    def button(self, name: str, among: Any = None) -> Any:
        return (among or self.box).get_by_role("button", name=name, exact=True).first

    def state(self, name: str, seconds: float = 60) -> None:
        """Until the badge says so; what a running request has done by now may follow a comma."""
        script = "(name) => document.querySelector('.fl-status .fl-badge')?.textContent.split(',')[0] === name"
        self.page.wait_for_function(script, arg=name, timeout=seconds * 1000)

    def rows(self, number: int) -> None:
        script = "(rows) => document.querySelectorAll('.fl-history tbody tr').length === rows"
        self.page.wait_for_function(script, arg=number, timeout=60_000)

    def column(self, name: str) -> list[str]:
        table = self.box.locator(".fl-history table")
        names = [cell.inner_text() for cell in table.locator("thead th").all()]
        return [row.locator("td").nth(names.index(name)).inner_text() for row in table.locator("tbody tr").all()]

    def bars(self) -> str:
        """The waterfall as it is drawn."""
        return str(self.box.locator(".cartesianlayer").first.inner_html())

    def redrawn(self, before: str) -> None:
        """Until the figure is another one."""
        script = "(before) => document.querySelector('.fl-bench .cartesianlayer')?.innerHTML !== before"
        self.page.wait_for_function(script, arg=before, timeout=60_000)

    def fits(self) -> None:
        """The figure is as wide as its room, and not wider."""
        script = """() => {
          const [figure, room] = [".fl-bench .main-svg", ".fl-bench .fl-seen"].map((of) => document.querySelector(of));
          const [drawn, free] = [figure, room].map((box) => box.getBoundingClientRect().width);
          return free > 500 && drawn <= free && drawn > 0.9 * free;
        }"""
        self.page.wait_for_function(script, timeout=10_000)

    def is_dark(self, dark: bool) -> None:
        """Page, paper and ink, all of them."""
        script = """(dark) => {
          const [paper, ink] = dark ? ["rgb(17, 20, 24)", "rgb(232, 232, 232)"] : ["rgb(255, 255, 255)", "rgb(34, 34, 34)"];
          const drawn = getComputedStyle(document.querySelector(".fl-bench .main-svg")).backgroundColor;
          const written = [...document.querySelectorAll(".fl-bench .ytick text")].map((label) => label.style.fill);
          const page = document.querySelector(".fl-bench").classList.contains("fl-dark");
          return page === dark && drawn === paper && written.length > 0 && written.every((fill) => fill === ink);
        }"""
        self.page.wait_for_function(script, arg=dark, timeout=20_000)

    def follows_the_theme(self) -> None:
        """JupyterLab's own, there and back."""
        for theme in ("Dark", "Light"):
            change = "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme: `JupyterLab ${theme}` })"
            self.page.evaluate(change, theme)
            self.is_dark(theme == "Dark")

    def darken(self) -> None:
        self.button("dark").click()
        self.is_dark(True)

    def ask_for_tokens(self, number: int) -> None:
        tokens = self.box.locator("input[type=number]").first
        tokens.fill(str(number))
        tokens.press("Enter")

    def upload(self, path: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.box.locator("button.widget-upload").click()
        chooser.value.set_files(path)


@pytest.fixture
def errors(page: Any) -> list[str]:
    """What the page reports to its console as an error, but for an icon font that is fetched from a network that is not there."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))

    def noted(message: Any) -> None:
        if message.type == "error" and not re.search(r"fontawesome|Failed to load resource", message.text, re.IGNORECASE):
            found.append(message.text)

    page.on("console", noted)
    return found


def test_the_panel_in_jupyterlab(jupyterlab: Any, page: Any, errors: list[str], picture: bytes, tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (ONE_CALL, ANOTHER)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), jupyterlab.root / "bench.ipynb")
    page.set_viewport_size({"width": 1500, "height": 1700})
    page.goto(jupyterlab.url("bench.ipynb"))
    page.wait_for_function(IDLE, timeout=60_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    panel = Panel(page)
    panel.box.wait_for(timeout=60_000)
    panel.state("idle")
    page.wait_for_selector(".fl-bench .js-plotly-plot .barlayer", state="attached", timeout=20_000)
    assert "TTFT" in panel.box.locator(".fl-big").first.inner_text()

    beyond = []
    for number, option in enumerate(FLIPS, start=2):
        button = panel.button(option, panel.box.locator(".fl-slotbox").nth(number - 2))
        before, started = panel.bars(), time.monotonic()
        button.click()
        panel.rows(number)
        panel.redrawn(before)
        waited = time.monotonic() - started
        beyond.append(waited - float(panel.column("first_run_ms")[-1]) / 1e3)
        assert "mod-primary" in (button.get_attribute("class") or "")
        panel.state("idle")
    print(f"from a click to its waterfall, beyond the run: median {statistics.median(beyond):.2f} s, longest {max(beyond):.2f} s")
    assert statistics.median(beyond) < 1.5
    assert set(panel.column("parity")) == {"True"}

    panel.button("undo").click()
    panel.rows(len(FLIPS) + 2)
    panel.state("idle")
    greyed = panel.button("varlen")
    assert greyed.is_disabled()
    assert "it needs a CUDA device" in (greyed.get_attribute("title") or "")

    for name in VIEWS:
        before = panel.bars()
        panel.button(name).click()
        panel.redrawn(before)
        panel.state("idle")
        assert panel.box.locator(".fl-table td").count() > 2, name

    _refuse_and_take(panel, picture, tmp_path, len(FLIPS) + 3)

    panel.ask_for_tokens(4000)
    panel.state("running")
    # Another cell is answered while the run goes on.
    other = page.locator(".jp-CodeCell").nth(1)
    prompt = other.locator(".jp-InputPrompt").inner_text()
    other.locator(".cm-content").click()
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-cell')")
    page.wait_for_function(
        "(was) => /\\d/.test(document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')[1].textContent.replace(was, ''))",
        arg=prompt,
        timeout=5_000,
    )
    assert other.locator(".jp-OutputArea-output").inner_text().strip() == "six times seven is 42"
    assert panel.box.locator(".fl-status .fl-badge").first.inner_text().startswith("running")
    started = time.monotonic()
    panel.button("stop").click()
    panel.state("stopped", seconds=5)
    assert time.monotonic() - started < 2

    panel.ask_for_tokens(12)
    panel.rows(len(FLIPS) + 4)
    panel.state("idle")
    panel.fits()
    page.screenshot(path=tmp_path / "light.png")
    panel.follows_the_theme()
    panel.darken()
    page.screenshot(path=tmp_path / "dark.png")
    panel.box.get_by_text("copy recipe").first.click()
    assert 'fl.Recipe.parse("' in panel.box.locator("textarea").first.input_value()
    assert errors == []


def test_the_panel_as_a_page_of_its_own(
    page_of_its_own: Callable[..., str], page: Any, errors: list[str], picture: bytes, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(picture)  # a path is meant from where the command is given
    page.goto(page_of_its_own("--image=photo.jpg", "--max-new-tokens=12", "--repeats=2", "--device=cpu"))
    panel = Panel(page)
    panel.box.wait_for(timeout=90_000)
    panel.state("idle")
    page.wait_for_selector(".fl-bench .js-plotly-plot .barlayer", state="attached", timeout=20_000)
    for number, option in enumerate(FLIPS, start=2):
        before = panel.bars()
        panel.button(option, panel.box.locator(".fl-slotbox").nth(number - 2)).click()
        panel.rows(number)
        panel.redrawn(before)
    panel.state("idle")
    panel.fits()
    page.screenshot(path=tmp_path / "voila.png")
    _refuse_and_take(panel, picture, tmp_path, len(FLIPS) + 2)
    panel.ask_for_tokens(4000)
    panel.state("running")
    panel.button("stop").click()
    panel.state("stopped", seconds=5)
    panel.darken()
    page.screenshot(path=tmp_path / "voila-dark.png")
    panel.box.get_by_text("copy recipe").first.click()
    assert 'fl.Recipe.parse("' in panel.box.locator("textarea").first.input_value()
    panel.box.get_by_text("history", exact=True).first.click()
    panel.button("export").click()
    panel.state("written")
    assert list(tmp_path.glob("fastvl_lab-*/workbench.html"))
    assert errors == []


def _refuse_and_take(panel: Panel, picture: bytes, folder: Path, rows: int) -> None:
    """A broken file is refused in a sentence, and the next one is asked about."""
    broken, whole = folder / "broken.jpg", folder / "whole.jpg"
    broken.write_bytes(b"no picture")
    whole.write_bytes(picture)
    panel.upload(broken)
    panel.page.wait_for_function(
        "() => document.querySelector('.fl-status').textContent.includes('not an image of a supported type')", timeout=30_000
    )
    panel.upload(whole)
    panel.rows(rows)
    panel.state("idle")


def test_a_reload_a_second_tab_and_a_restart(jupyterlab: Any, page: Any, errors: list[str]) -> None:
    """Two pages show the same panel, and a click in either is seen in both; a new kernel begins anew."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ONE_CALL)], metadata=KERNEL)
    nbformat.write(notebook, jupyterlab.root / "bench.ipynb")
    panel = Panel(page)

    def shown(panel: Panel) -> list[str]:
        drawn = "() => document.querySelector('.fl-bench .infolayer')?.textContent.includes('this recipe: warm')"
        panel.page.wait_for_function(drawn, timeout=20_000)
        return [text for text in panel.box.locator(".infolayer .annotation-text").all_text_contents() if "TTFT" in text]

    def run_all() -> None:
        page.wait_for_function(IDLE, timeout=60_000)
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        panel.box.wait_for(timeout=60_000)
        panel.rows(1)
        panel.state("idle")

    page.goto(jupyterlab.url("bench.ipynb"))
    run_all()
    panel.button("per_window").click()
    panel.rows(2)
    panel.state("idle")
    before = shown(panel)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(1000)

    page.reload()
    page.wait_for_function(IDLE, timeout=60_000)
    panel.box.wait_for(timeout=60_000)
    panel.rows(2)
    assert shown(panel) == before
    assert before
    panel.button("undo").click()  # the kernel is the same, and so is what it remembers
    panel.rows(3)
    panel.state("idle")

    other = Panel(page.context.new_page())
    other.page.goto(jupyterlab.url("bench.ipynb"))
    other.page.wait_for_function(IDLE, timeout=60_000)
    other.box.wait_for(timeout=60_000)
    other.rows(3)
    assert shown(other) == shown(panel)
    other.button("conv3d").click()
    for each in (other, panel):
        each.rows(4)
        each.state("idle")
    other.page.close()

    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    run_all()
    assert errors == []
