"""What a person sees: a notebook run in JupyterLab, and the report opened from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

from fastvl_lab import SweepSettings, sweep
from fastvl_lab.view import gpu_report, grid_report, report

REPOSITORY = Path(__file__).parents[2]

IDLE = """() => {
  const session = window.jupyterapp?.shell.currentWidget?.sessionContext?.session;
  return session?.kernel?.connectionStatus === "connected" && session.kernel.status === "idle";
}"""
FINISHED = """(cells) => document.querySelectorAll(".jp-CodeCell").length >= cells &&
  [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].every((prompt) => /\\[\\d+\\]/.test(prompt.textContent))"""


def _run_all(page: Any, jupyterlab: Any, name: str) -> int:
    """Open and run a notebook of the repository with a small picture and one round; the number of its code cells."""
    notebook = nbformat.read(REPOSITORY / "notebooks" / name, 4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = parameters.source.replace("list = []", "list = [168, 140]").replace("repeats: int = 6", "repeats: int = 1")
    assert "[168, 140]" in parameters.source
    nbformat.write(notebook, jupyterlab.root / name)

    page.goto(jupyterlab.url(name))
    page.wait_for_function(IDLE, timeout=60_000)
    # Every cell is drawn, also below the fold, so that its output can be looked at.
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.notebookConfig.windowingMode = 'none'")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    return len([cell for cell in notebook.cells if cell.cell_type == "code"])


def test_the_workbench_runs_in_jupyterlab_and_shows_its_waterfalls(
    jupyterlab: Any, page: Any, barriers: Callable[..., list[str]]
) -> None:
    _run_all(page, jupyterlab, "workbench.ipynb")
    # A figure is there before the first answer is; a click before that would end the run under way.
    page.wait_for_function("() => document.querySelectorAll('.fl-history tbody tr').length === 1", timeout=120_000)
    panel = page.locator(".fl-bench")
    assert 0 <= panel.bounding_box()["y"] < 400  # who has pressed Run All looks at it
    panel.locator("[data-path='vit.attention']").get_by_role("radio", name="grouped", exact=True).click()
    page.wait_for_function("() => document.querySelectorAll('.fl-history tbody tr').length === 2", timeout=120_000)

    assert barriers(".fl-bench") == []  # the rest of the page is JupyterLab's

    cells = _run_all(page, jupyterlab, "workbench_from_cells.ipynb")
    page.wait_for_function(FINISHED, arg=cells - 2, timeout=120_000)
    outputs = page.locator(".jp-OutputArea-output")
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    page.wait_for_selector(".jp-OutputArea-output.js-plotly-plot .barlayer", state="attached", timeout=20_000)
    text = " ".join(outputs.all_inner_texts())
    assert "TTFT" in text
    assert "of its TTFT in" in text  # what was learnt
    assert page.locator(".fl-bench .js-plotly-plot").count() == 1  # toggle by toggle
    for plot in page.locator(".jp-OutputArea-output.js-plotly-plot").all():
        assert plot.bounding_box()["height"] > 300  # drawn in full, not collapsed to its legend
    assert page.get_by_text("Share chart").count() == 0


def test_the_report_opens_from_disk_without_a_network(
    page: Any, tmp_path: Path, barriers: Callable[..., list[str]], sweep_settings: Callable[..., SweepSettings]
) -> None:
    settings = sweep_settings(image_sizes=[[168, 140], [2100, 10]], output_dir=str(tmp_path))
    sweep(settings, progress=False).write()
    asked, failures = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .barlayer")
    assert failures == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.locator(".js-plotly-plot").count() == 3  # TTFT against size, waterfalls, a dot a run
    assert page.locator("table").count() == 4  # engines, summary, stages, settings
    assert "aspect ratio" in page.locator("ul.error").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert barriers() == []


def test_the_page_of_a_gpu_report_has_no_serious_barrier(page: Any, tmp_path: Path, barriers: Callable[..., list[str]]) -> None:
    rows = json.loads((REPOSITORY / "figures" / "h200.json").read_text(encoding="utf-8"))
    (tmp_path / "gpu.html").write_text(gpu_report.report_html(rows), encoding="utf-8")
    page.goto((tmp_path / "gpu.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .barlayer")
    assert barriers() == []


def test_a_grid_of_500_cells_opens_in_three_seconds_and_its_filters_and_export_work(
    page: Any, tmp_path: Path, barriers: Callable[..., list[str]]
) -> None:
    hosts, engines = [("one", "A100"), ("two", "A100"), ("three", "H100")], [f"recipe {number}" for number in range(20)]
    rows = [
        {
            "checkpoint": f"checkpoint {cell % 5}",
            "image": f"{64 * (cell // 5)}×64",
            "engine": engine,
            **dict(zip(("host", "card"), hosts[cell % 3], strict=True)),
            "visual_tokens": 2 * (cell // 5),
            **dict(zip(("ttft_ms", "ttft_low_ms", "ttft_high_ms"), (10.0 + cell, 9.0 + cell, 12.0 + cell), strict=True)),
        }
        for cell in range(500)
        for engine in engines
    ]
    (tmp_path / "grid.html").write_text(report.page("a grid", [grid_report.explorer_html(rows)]), encoding="utf-8")
    asked, failures = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    took = []
    for _ in range(3):  # a pause of the machine hides its speed once
        page.goto((tmp_path / "grid.html").as_uri())
        page.wait_for_selector("#grid-figure .scatterlayer")
        took.append(page.evaluate("performance.now()"))
    print(f"{took} ms")
    assert failures == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.locator("#grid-figure .xtitle, #grid-figure .x2title").count() == 2  # a panel a kind of card
    assert page.locator("#grid-count").inner_text() == "2000 of 10000 rows; the table has the first 1000, the export has all"
    page.get_by_label("host").select_option("three")
    page.get_by_label("recipe").select_option("recipe 3")
    page.get_by_label("checkpoint").select_option("checkpoint 2")
    mine = [row for row in rows if (row["host"], row["engine"], row["checkpoint"]) == ("three", "recipe 3", "checkpoint 2")]
    assert page.locator("#grid-count").inner_text() == f"{len(mine)} of 10000 rows"
    assert page.locator("#grid-table tbody tr").count() == len(mine)
    with page.expect_download() as told:
        page.get_by_role("button", name="Export").click()
    lines = Path(told.value.path()).read_text().splitlines()
    assert len(lines) == 1 + len(mine)
    assert lines[1].startswith("checkpoint 2,")
    assert barriers() == []
    assert min(took) < 3000
