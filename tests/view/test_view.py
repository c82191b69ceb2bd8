"""Figures say what the traces say."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import pytest

from fastvl_lab import Lab, Request, Run, compare, view
from fastvl_lab.trace import Span, Trace
from fastvl_lab.view import style


@pytest.fixture(scope="module")
def runs(labs: dict[str, Lab]) -> list[Run]:
    from fastvl_lab import photo

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
        files = {stage: data[1] for bars in figure.data for stage, data in zip(bars.y, bars.customdata, strict=True)}
    assert files["vit"] == "fastvl_lab/vit/"  # the lean run's, drawn last
    assert view.waterfall(runs[:1]).data[0].customdata[0][1] == "inside transformers"
    texts = " ".join(annotation.text for annotation in figure.layout.annotations)
    for run in runs:
        assert f"{run.engine}: TTFT" in texts
        assert run.subtitle() in texts


def test_runs_share_one_axis(runs: list[Run]) -> None:
    layout = view.waterfall(runs).layout
    assert layout.xaxis.range == layout.xaxis2.range
    assert layout.xaxis.range[0] == 0
    assert layout.xaxis.range[1] > max(run.ttft for run in runs) * 1e3
    assert layout.xaxis.matches == "x2"


def test_the_device_lane_differs_by_pattern_and_place(runs: list[Run]) -> None:
    spans = tuple(
        Span(name=s.name, lane=lane, depth=0, start_ns=s.start_ns, end_ns=s.end_ns)
        for s in runs[0].trace.within_ttft()
        for lane in ("host", "device")
    )
    trace = Trace(spans=spans, first_chunk_ns=runs[0].trace.first_chunk_ns, end_ns=runs[0].trace.end_ns)
    figure = view.waterfall([dataclasses.replace(runs[0], trace=trace)])
    lanes = {bars.legendgroup: bars for bars in figure.data}
    assert lanes["device"].marker.pattern.shape == style.DEVICE_PATTERN
    assert lanes["host"].marker.pattern.shape is None
    assert lanes["host"].offset + lanes["host"].width <= lanes["device"].offset
    assert any("· device" in annotation.text for annotation in figure.layout.annotations)


def test_hostile_names_do_not_become_markup(runs: list[Run]) -> None:
    run = dataclasses.replace(runs[0], engine="<img src=x>", checkpoint="a<b>&")
    texts = [annotation.text for annotation in view.waterfall([run]).layout.annotations]
    assert not any("<img" in text for text in texts)
    assert "<img" not in run._html()


def test_tables_stand_beside_the_charts(labs: dict[str, Lab], runs: list[Run], picture: bytes) -> None:
    frame = view.stage_frame(runs)
    assert list(frame.columns) == ["stage", "transformers", "fastest"]
    assert list(frame.stage)[-2:] == ["unaccounted", "TTFT"]
    assert list(view.stage_frame([runs[0], runs[0]]).columns) == ["stage", "transformers", "transformers (2)"]
    values = [float(x) for x in frame.fastest]
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.01)

    request = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    comparison = compare(labs["tiny-qwen2.5-vl"], request, {"transformers": "transformers", "fastest": "fastest"}, repeats=5)
    rows = [{"checkpoint": "c", "image": "i", **row} for row in comparison.summary()]
    table = view.summary_frame(rows)
    assert list(table["tokens equal"]) == ["yes", "yes, on its pixels"]
    assert table["speed-up (95% CI)"][0] == "reference"
    assert table["speed-up (95% CI)"][1].count("×") == 1
    red = view.summary_frame([{**rows[1], "tokens_equal": False, "speedup": None}])
    assert red["tokens equal"][0] == "NO"
    assert red["speed-up (95% CI)"][0] == "–"

    chart = view.ttft_against_visual_tokens(rows)
    assert [(list(line.x), list(line.y)) for line in chart.data] == [([r["visual_tokens"]], [r["ttft_ms"]]) for r in rows]
    assert len({line.marker.symbol for line in chart.data}) == 2  # told apart by more than colour


def test_the_layer_table_has_everything_inside_the_stages_once(labs: dict[str, Lab], picture: bytes) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    request = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    frame = view.layer_frame(lab.run(request, "fastest", trace="layers"))
    config = lab.checkpoint.config
    blocks = [f"vit.block.{i}" for i in range(config.vision_config.depth)]
    layers = [f"language.layer.{i}" for i in range(config.text_config.num_hidden_layers)]
    assert list(frame["block or layer"]) == ["vit.positions", *blocks, *layers]


def test_the_catalogue_table_has_every_option() -> None:
    from fastvl_lab import toggles

    frame = view.catalogue_frame()
    assert len(frame) == sum(len(toggle.options) for toggle in toggles())
    shown = view.show(frame).data
    assert all(html.escape(option.does, quote=False) in shown for toggle in toggles() for option in toggle.options)  # in full


def test_the_readme_shows_figures_that_stand_beside_their_records(repository: Path) -> None:
    figures = sorted((repository / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert f"figures/{figure.name}" in (repository / "README.md").read_text()
        records = json.loads(figure.with_suffix(".json").read_text())
        assert view.waterfall([Run.from_record(record) for record in records]).data
