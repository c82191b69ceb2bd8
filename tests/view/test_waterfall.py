"""The waterfall says what the trace says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastvl_lab import Lab, Request, Run, photo, view
from fastvl_lab.trace import Span, Trace
from fastvl_lab.view import gpu_report, style
from fastvl_lab.view.report import run_html


@pytest.fixture(scope="module")
def runs(labs: dict[str, Lab]) -> list[Run]:
    request = Request(images=[photo("astronaut", (168, 140))], prompt="What?", max_new_tokens=3, ignore_eos=True)
    return [labs["tiny-qwen2.5-vl"].run(request, engine) for engine in ("transformers", "fastest")]


def _bars(figure: object, panel: int) -> list[tuple[str, str, float, float]]:
    """(lane, stage, start, length) of every bar of a panel."""
    axis = "x" if panel == 1 else f"x{panel}"
    return [
        (bars.legendgroup, stage, start, length)
        for bars in figure.data  # type: ignore[attr-defined]
        if bars.xaxis == axis
        for stage, start, length in zip(bars.y, bars.base, bars.x, strict=True)
    ]


def test_every_bar_is_a_span_and_every_span_a_bar(runs: list[Run]) -> None:
    figure = view.waterfall(runs)
    for panel, run in enumerate(runs, start=1):
        bars = _bars(figure, panel)
        drawn = [(stage, start, length) for lane, stage, start, length in bars if lane == "host"]
        assert drawn == [(s.name, s.start_ns / 1e6, s.duration_ns / 1e6) for s in run.trace.within_ttft()]
        gaps = [(start, length) for lane, _, start, length in bars if lane == "unaccounted"]
        assert gaps == [(a / 1e6, (b - a) / 1e6) for a, b in run.trace.gaps()]
        assert sum(length for *_, length in bars) == pytest.approx(run.ttft * 1e3, rel=1e-6)
        files = {stage: data[3] for bars in figure.data for stage, data in zip(bars.y, bars.customdata, strict=True)}
    assert files["vit"] == "fastvl_lab/vit/"  # the lean run's, drawn last
    assert view.waterfall(runs[:1]).data[0].customdata[0][3] == "inside transformers"
    texts = " ".join(annotation.text for annotation in figure.layout.annotations)
    for run in runs:
        assert f"{run.engine}: {run.kind} TTFT" in texts
        assert run.subtitle() in texts


def test_runs_share_one_axis(runs: list[Run]) -> None:
    layout = view.waterfall(runs).layout
    assert layout.xaxis.range == layout.xaxis2.range
    assert layout.xaxis.range[0] == 0
    assert layout.xaxis.range[1] > max(run.ttft for run in runs) * 1e3
    assert layout.xaxis.matches == "x2"


def _on_two_lanes(run: Run) -> Run:
    """The same run as if a device had done each stage while the host did."""
    spans = tuple(
        Span(name=s.name, lane=lane, depth=0, start_ns=s.start_ns, end_ns=s.end_ns)
        for s in run.trace.within_ttft()
        for lane in ("host", "device")
    )
    trace = Trace(spans=spans, first_chunk_ns=run.trace.first_chunk_ns, end_ns=run.trace.end_ns)
    return dataclasses.replace(run, trace=trace)


def test_the_device_lane_differs_by_pattern_and_place(runs: list[Run]) -> None:
    figure = view.waterfall([_on_two_lanes(runs[0])])
    lanes = {bars.legendgroup: bars for bars in figure.data}
    assert lanes["device"].marker.pattern.shape == style.DEVICE_PATTERN
    assert lanes["host"].marker.pattern.shape is None
    assert lanes["host"].offset + lanes["host"].width <= lanes["device"].offset
    assert any("· device" in annotation.text for annotation in figure.layout.annotations)


def test_what_a_second_thread_did_is_drawn_below_and_is_no_part_of_ttft(labs: dict[str, Lab]) -> None:
    request = Request(images=[photo("astronaut", (168, 140))] * 2, prompt="What?", max_new_tokens=3, ignore_eos=True)
    run = labs["tiny-qwen2.5-vl"].run(request, "fastest, schedule.overlap=on")
    figure = view.waterfall([run])
    bars = _bars(figure, 1)
    for lane in ("host", "beside"):
        spans = run.trace.within_ttft(lane)  # type: ignore[arg-type]
        drawn = [(stage, start, length) for of, stage, start, length in bars if of == lane]
        assert drawn == [(s.name, s.start_ns / 1e6, s.duration_ns / 1e6) for s in spans]
    assert sum(length for lane, *_, length in bars if lane != "beside") == pytest.approx(run.ttft * 1e3, rel=1e-6)
    lanes = {bars.legendgroup: bars for bars in figure.data}
    assert lanes["beside"].marker.pattern.shape == style.BESIDE_PATTERN
    assert lanes["host"].offset + lanes["host"].width <= lanes["beside"].offset
    rows = list(figure.layout.yaxis.categoryarray or figure.layout.yaxis.ticktext)
    assert {"preprocess", "await_image", "unaccounted"} <= set(rows)
    notes = [annotation.text for annotation in figure.layout.annotations]
    assert sum("beside others" in note for note in notes) == 1, "preprocess, which the first thread never does"
    (line,) = [line for line in repr(run).splitlines() if line.startswith("beside, on another thread:")]
    assert "decode_image" in line
    assert "preprocess" in line


def test_stages_with_names_of_their_own_are_drawn_and_tabled(runs: list[Run]) -> None:
    """What an endpoint lets us see of a run is not what our own stages are called."""
    spans = [
        Span(name="encode", lane="host", depth=0, start_ns=0, end_ns=1_000_000),
        Span(name="wait", lane="host", depth=0, start_ns=1_000_000, end_ns=2_000_000),
    ]
    trace = Trace(spans=tuple(spans), first_chunk_ns=2_000_000, end_ns=2_000_000)
    run = dataclasses.replace(runs[0], engine="http://host:1/v1", trace=trace)
    table = view.stage_frame([run])
    assert list(table["stage"]) == ["encode", "wait", "unaccounted", "TTFT"]
    assert list(table[f"{run.engine}, ms"]) == ["1.000", "1.000", "0.000", "2.000"]
    bars = view.waterfall([run]).data[0]
    assert list(bars.y) == ["encode", "wait"]
    assert {data[3] for data in bars.customdata} == {"inside http://host:1/v1"}


def test_what_is_too_short_for_its_digits_is_there_and_long_times_are_in_seconds(runs: list[Run]) -> None:
    spans = (
        Span(name="tokenize", lane="host", depth=0, start_ns=0, end_ns=300_000),
        Span(name="vit", lane="host", depth=0, start_ns=300_000, end_ns=1_500_000_000),
    )
    run = dataclasses.replace(runs[0], trace=Trace(spans=spans, first_chunk_ns=1_500_000_000, end_ns=1_500_000_000))
    texts = [note.text for note in view.waterfall([run]).layout.annotations]
    assert texts[:2] == ["0.30 ms · &lt;0.1%", "1.50 s · 100.0%"]


def test_every_panel_of_a_long_column_has_its_numbers(runs: list[Run]) -> None:
    layout = view.waterfall(runs).layout
    assert [axis.showticklabels for axis in (layout.xaxis, layout.xaxis2)] == [True, True]


def test_hostile_names_do_not_become_markup(runs: list[Run]) -> None:
    run = dataclasses.replace(runs[0], engine="<img src=x>", checkpoint="a<b>&")
    texts = [annotation.text for annotation in view.waterfall([run]).layout.annotations]
    assert not any("<img" in text for text in texts)
    assert "<img" not in run_html(run)


def test_the_readme_shows_figures_that_stand_beside_their_records(repository: Path) -> None:
    figures = sorted((repository / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert f"figures/{figure.name}" in (repository / "README.md").read_text()
        if figure.stem.startswith("workbench"):  # a look at the panel, which has no record
            continue
        records = json.loads(figure.with_suffix(".json").read_text())
        if "trace" in records[0]:
            assert view.waterfall([Run.from_record(record) for record in records]).data
        else:  # rows of a report on a GPU
            assert gpu_report.ttft_by_engine(records, "random:Qwen/Qwen2.5-VL-3B-Instruct").data
