"""How soon the panel answers, and what hundreds of clicks cost, on a machine that does nothing else: `make benchmark`."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from test_panel import Panel, opened, run_cell, start_cell

pytestmark = pytest.mark.benchmark

CLICKS = 30
OPEN = """
import os, time
import fastvl_lab as fl
bench = fl.workbench("tiny-qwen2.5-vl", "coffee", image_size=(224, 168), max_new_tokens=12, repeats=1, device="cpu")
bench
"""
MANY_PICTURES = """
from fastvl_lab.view.workbench.session import Picture
pictures = [Picture(source=name) for name in ("coffee", "rocket", "astronaut", "cat")] * 6
bench.ask(pictures=tuple(pictures), size=(112, 84), within=True)
print(bench.wait(120))
"""
MANY_RESULTS = """
bench._repeats = 0
while len(bench.history) < 200:
    bench.run()
    assert bench.wait(60)
bench._repeats = 1
bench.run()
print(bench.wait(60))
"""
RUNS = "import json\nprint(json.dumps({result.number: result.run.trace.end_ns / 1e6 for result in bench.history}))"
HELD = "print(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE') / 1e6)"
BUSY = (
    "end = time.monotonic() + 60\nwhile time.monotonic() < end and bench.widget.live['state'] != 'stopped':\n    time.sleep(0.01)"
)
# When a click came, when something was drawn after it, and when the waterfall of that result was; ms of the page's clock.
WATCH = """(number) => {
  const bench = document.querySelector(".fl-bench");
  const answer = window.answer = {};
  const drawn = (name) => requestAnimationFrame(() => setTimeout(() => { answer[name] ??= performance.now() - answer.clicked; }));
  const any = new MutationObserver(() => { if (answer.clicked) { any.disconnect(); drawn("change"); } });
  any.observe(bench, { attributes: true, childList: true, subtree: true, characterData: true });
  const waterfall = new MutationObserver(() => {
    if (!document.querySelector(`.fl-chart svg[aria-label^="waterfall of #${number}:"]`)) return;
    waterfall.disconnect();
    drawn("waterfall");
  });
  waterfall.observe(bench.querySelector(".fl-chart"), { childList: true, subtree: true, attributes: true });
  bench.addEventListener("click", (event) => { answer.clicked = event.timeStamp; }, { capture: true, once: true });
}"""

# When stop was clicked, and when the page said that it had stopped; ms of the page's clock.
WATCH_STOP = """() => {
  const bench = document.querySelector(".fl-bench");
  const answer = window.answer = {};
  bench.addEventListener("click", (event) => { answer.clicked = event.timeStamp; }, { capture: true, once: true });
  const state = new MutationObserver(() => {
    if (bench.dataset.state !== "stopped") return;
    state.disconnect();
    answer.stopped = performance.now() - answer.clicked;
  });
  state.observe(bench, { attributes: true });
}"""


def clicks(panel: Panel, cell: int, first: int) -> tuple[list[float], list[float]]:
    """Ms from each of many clicks to the first change, and to its waterfall less its run; first: the number of the first result."""
    changes, waterfalls = [], {}
    for number in range(first, first + CLICKS):
        value = ("linear", "conv3d")[number % 2]
        option = panel.option("vit.patch_embed", value)
        if option.get_attribute("aria-checked") == "true":
            option = panel.option("vit.patch_embed", "conv3d" if value == "linear" else "linear")
        panel.page.evaluate(WATCH, number)
        option.click()
        panel.until("() => window.answer.waterfall !== undefined")
        answer = panel.page.evaluate("window.answer")
        changes.append(answer["change"])
        waterfalls[number] = answer["waterfall"]
        panel.state("idle")
    runs = json.loads(run_cell(panel.page, cell))
    return changes, [waterfalls[number] - runs[str(number)] for number in waterfalls]


@pytest.mark.parametrize("situation", ["one picture", "24 pictures", "200 results"])
def test_a_click_is_answered_in_time(jupyterlab: Any, page: Any, situation: str) -> None:
    cells = {"one picture": "print(True)", "24 pictures": MANY_PICTURES, "200 results": MANY_RESULTS}
    panel = opened(jupyterlab, page, OPEN, cells[situation], RUNS)
    assert run_cell(page, 1, seconds=300) == "True"
    panel.state("idle")
    number = int(panel.box.locator(".fl-history tbody tr").first.get_attribute("data-number") or 0)
    changes, waterfalls = clicks(panel, 2, number + 1)
    first, beyond = statistics.median(changes), statistics.median(waterfalls)
    print(f"\n{situation}: a change after {first:.0f} ms ({max(changes):.0f} at most), the waterfall {beyond:.0f} ms after the run")
    assert first < 100
    assert beyond < 400


def test_stop_ends_a_run_at_once_also_while_a_cell_runs(jupyterlab: Any, page: Any) -> None:
    panel = opened(jupyterlab, page, OPEN, BUSY)
    waits: dict[bool, list[float]] = {False: [], True: []}
    for number in range(10):
        with_cell = number % 2 == 1
        panel.fill("tokens", str(4000 + number))
        panel.state("running")
        panel.says("fl-answer", "\\", 30)
        page.evaluate(WATCH_STOP)
        if with_cell:
            start_cell(page, 1)
        panel.button("stop").click()
        panel.until("() => window.answer.stopped !== undefined", seconds=10)
        waits[with_cell].append(page.evaluate("window.answer.stopped") / 1e3)
    for with_cell, seconds in waits.items():
        beside = " while a cell ran" if with_cell else ""
        print(f"\nstopped after {statistics.median(seconds):.2f} s{beside}, {max(seconds):.2f} at most")
        assert statistics.median(seconds) < 0.3


def test_300_clicks_leave_the_kernels_memory_as_it_is(jupyterlab: Any, page: Any) -> None:
    panel = opened(jupyterlab, page, OPEN, HELD)
    held = []
    for number in range(2, 302):
        value = ("conv3d", "linear")[number % 2 == 0]
        panel.option("vit.patch_embed", value).click()
        panel.until("(n) => document.querySelector(`.fl-history tr[data-number='${n}']`) !== null", number)
        panel.state("idle")
        if number % 50 == 0:
            held.append(float(run_cell(page, 1)))
    print(f"\nMB after every 50 clicks: {', '.join(f'{mb:.0f}' for mb in held)}")
    assert held[-1] - held[3] < 10  # once the history is as long as it gets
