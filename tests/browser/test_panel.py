"""The workbench as a person uses it in JupyterLab: flip toggles, stop, upload, and see what was asked for."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import nbformat

IDLE = """() => {
  const session = window.jupyterapp?.shell.currentWidget?.sessionContext?.session;
  return session?.kernel?.connectionStatus === "connected" && session.kernel.status === "idle";
}"""
ONE_CALL = """
import fastvl_lab as fl
bench = fl.workbench("tiny-qwen2.5-vl", "coffee", image_size=(224, 168), max_new_tokens=12, repeats=2, device="cpu")
bench
"""
FLIPS = ("numpy", "per_window", "eager", "paged", "multiples_of_64", "16")  # an option of each slot


def test_toggles_are_flipped_and_the_waterfall_moves(jupyterlab: Any, page: Any, picture: bytes, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    kernel = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ONE_CALL)], metadata=kernel)
    nbformat.write(notebook, jupyterlab.root / "bench.ipynb")
    page.set_viewport_size({"width": 1500, "height": 1700})
    page.goto(jupyterlab.url("bench.ipynb"))
    page.wait_for_function(IDLE, timeout=60_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    bench = page.locator(".fl-bench").first
    bench.wait_for(timeout=60_000)
    status, summary = bench.locator(".fl-badge").first, bench.locator(".fl-big").first

    def settled() -> str:
        page.wait_for_function("() => document.querySelector('.fl-status .fl-badge')?.textContent === 'idle'", timeout=60_000)
        return str(summary.inner_text())

    seen, waits = settled(), []
    assert "TTFT" in seen
    page.wait_for_selector(".fl-bench .js-plotly-plot .barlayer", state="attached", timeout=20_000)
    for number, option in enumerate(FLIPS, start=2):
        button = bench.locator(".fl-slotbox").nth(number - 2).get_by_role("button", name=option, exact=True).first
        started = time.monotonic()
        button.click()
        page.wait_for_function(
            "(rows) => document.querySelectorAll('.fl-history tbody tr').length >= rows", arg=number, timeout=60_000
        )
        waits.append(time.monotonic() - started)
        assert "mod-primary" in (button.get_attribute("class") or "")
        settled()
    assert statistics.median(waits) < 5  # from a click to its first result, the run included
    assert bench.locator(".fl-history tbody tr").count() == len(FLIPS) + 1

    bench.get_by_role("button", name="undo", exact=True).click()
    page.wait_for_function("(n) => document.querySelectorAll('.fl-history tbody tr').length === n", arg=len(FLIPS) + 2)
    settled()
    greyed = bench.get_by_role("button", name="varlen", exact=True).first
    assert greyed.is_disabled()
    assert "it needs a CUDA device" in (greyed.get_attribute("title") or "")

    broken, whole = tmp_path / "broken.jpg", tmp_path / "whole.jpg"
    broken.write_bytes(b"no picture")
    whole.write_bytes(picture)
    for path, says in ((broken, "not an image of a supported type"), (whole, "idle")):
        with page.expect_file_chooser() as chooser:
            bench.locator("button.widget-upload").click()
        chooser.value.set_files(path)
        page.wait_for_function(
            "(says) => document.querySelector('.fl-status').textContent.includes(says)", arg=says, timeout=30_000
        )
    page.wait_for_function("(n) => document.querySelectorAll('.fl-history tbody tr').length === n", arg=len(FLIPS) + 3)
    settled()

    tokens = bench.locator("input[type=number]").first
    tokens.fill("4000")
    tokens.press("Enter")
    page.wait_for_function("() => document.querySelector('.fl-status .fl-badge')?.textContent === 'running'", timeout=20_000)
    bench.get_by_role("button", name="stop", exact=True).click()
    page.wait_for_function("() => document.querySelector('.fl-status .fl-badge')?.textContent === 'stopped'", timeout=5_000)

    page.screenshot(path=tmp_path / "light.png")
    bench.get_by_role("button", name="dark", exact=True).click()
    page.wait_for_function("() => document.querySelector('.fl-bench').classList.contains('fl-dark')")
    page.wait_for_function(
        "() => document.querySelector('.fl-bench .main-svg').style.background.includes('17, 20, 24')", timeout=20_000
    )
    page.screenshot(path=tmp_path / "dark.png")
    bench.get_by_text("copy recipe").first.click()
    assert 'fl.Recipe.parse("' in bench.locator("textarea").first.input_value()
    assert status.inner_text()
    assert errors == []
