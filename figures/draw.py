"""Draw the pictures of README and docs: figures from the records beside them, and the workbench as a page that is looked at.

    python figures/draw.py [--measure]

With --measure the records are made first. Needs the extras "notebooks" and "dev", and a `chromium` on the PATH.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Error as PlaywrightError, sync_playwright

import fastvl_lab as fl
from fastvl_lab import Run, view
from fastvl_lab.view.gpu_report import ttft_by_engine

FOLDER = Path(__file__).parent
CHECKPOINT = "tiny-qwen2.5-vl"


def measure() -> None:
    """The median of ten warm runs an engine, interleaved, on a 1280x960 photograph."""
    lab = fl.Lab(CHECKPOINT)
    request = fl.Request(
        images=[fl.photo("coffee", (1280, 960))], prompt="What is in this picture?", max_new_tokens=8, ignore_eos=True
    )
    comparison = fl.compare(lab, request, {name: name for name in ("transformers", "baseline", "fastest")}, repeats=10)
    records = [comparison.representative(engine).to_record() for engine in comparison.engines]
    (FOLDER / "waterfall.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def look_at_the_workbench() -> None:
    """The panel as a page of its own after two clicks, as a browser shows it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--no-browser", f"--checkpoint={CHECKPOINT}", "--image-size", "640", "480"]
    kept = TemporaryDirectory()  # no results of earlier sessions
    server = subprocess.Popen([sys.executable, "-m", "fastvl_lab.view.workbench", f"--folder={kept.name}", *options])
    with kept, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1010}, device_scale_factor=1.5)
            _open(page, f"http://127.0.0.1:{port}/")
            for number, (path, option) in enumerate((("vit.patch_embed", "linear"), ("attention.prefill", "sdpa")), start=2):
                page.locator(f"[data-path='{path}']").get_by_role("radio", name=option, exact=True).click()
                _settled(page, number)
            page.mouse.move(700, 980)
            page.screenshot(path=FOLDER / "workbench.png")
            page.get_by_role("button", name="dark").click()
            page.locator(".fl-stage[data-stage='vit']").hover()
            page.screenshot(path=FOLDER / "workbench-dark.png")
        finally:
            browser.close()
            server.terminate()
            server.wait(20)


def _open(page: Any, url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            page.goto(url, timeout=90_000)
            break
        except PlaywrightError:  # the server is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    _settled(page, 1)


def _settled(page: Any, rows: int) -> None:
    """Until so many runs are in the history, and nothing runs."""
    page.wait_for_function("(n) => document.querySelectorAll('.fl-history tbody tr').length === n", arg=rows, timeout=90_000)
    page.wait_for_function("() => document.querySelector('.fl-bench').dataset.state === 'idle'", timeout=90_000)


def draw() -> None:
    runs = [Run.from_record(record) for record in json.loads((FOLDER / "waterfall.json").read_text(encoding="utf-8"))]
    view.waterfall(runs).write_image(FOLDER / "waterfall.png", width=1100, scale=1.5)
    draw_the_gpu()


def draw_the_gpu() -> None:
    """Of the report's rows, the engines that docs/gpu.md names."""
    rows = json.loads((FOLDER / "h200.json").read_text(encoding="utf-8"))
    shown = ("transformers", "baseline", "fastest", "capture: graphs", "all: triton", "all: triton, graphs")
    rows = [row for row in rows if row.get("recipe") in (*shown, None)]
    figure = ttft_by_engine(rows, "random:Qwen/Qwen2.5-VL-3B-Instruct")
    figure.write_image(FOLDER / "h200.png", width=1100, scale=1.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the engines again on this machine")
    if parser.parse_args().measure:
        measure()
    draw()
    look_at_the_workbench()
