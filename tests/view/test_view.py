"""Figures say what the traces say."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest

from fastvl_lab import Lab, Recipe, Request, Run, compare, view
from fastvl_lab.measure.compare import converse
from fastvl_lab.measure.floors import Cost
from fastvl_lab.measure.profile import Operation, Profile
from fastvl_lab.measure.samples import Samples, StageSample
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
        files = {stage: data[3] for bars in figure.data for stage, data in zip(bars.y, bars.customdata, strict=True)}
    assert files["vit"] == "fastvl_lab/vit/"  # the lean run's, drawn last
    assert view.waterfall(runs[:1]).data[0].customdata[0][3] == "inside transformers"
    texts = " ".join(annotation.text for annotation in figure.layout.annotations)
    for run in runs:
        assert f"{run.engine}: {run.kind} TTFT" in texts
        assert run.subtitle() in texts


def _told(bars: object) -> list[str]:
    """What pointing at each bar of a trace says, as the page fills its template in."""
    return [
        re.sub(
            r"%\{customdata\[(\d)\](?::(\.\df))?\}",
            lambda field, data=data: format(data[int(field[1])], field[2] or ""),  # type: ignore[misc]
            bars.hovertemplate.replace("%{y}", row),  # type: ignore[attr-defined]
        )
        for row, data in zip(bars.y, bars.customdata, strict=True)  # type: ignore[attr-defined]
    ]


def test_pointing_at_a_bar_tells_its_own_length(labs: dict[str, Lab], runs: list[Run], picture: bytes) -> None:
    """Of a bar that does not begin at zero, plotly's own %{x} is where it ends."""
    request = Request(images=[picture], prompt="What?", max_new_tokens=6, ignore_eos=True)
    layers, rounds = (
        labs["tiny-qwen3-vl"].run(request, engine, trace=trace)
        for engine, trace in (("fastest", "layers"), ("fastest, streaming.steps_per_round=2", "stages"))
    )
    operation = Operation(name="mul", lane="host", stage="vit", start_us=1500.0, end_us=1504.25)
    stage = Operation(name="vit", lane="host", stage="vit", start_us=500.0, end_us=2000.0)
    figures = {
        "waterfall": view.waterfall(runs),
        "blocks": view.block_waterfall([layers]),
        "launches": view.launches_and_steps({"rounds": rounds}),
        "operations": view.operation_timeline({"eager": Profile(stages=(stage,), operations=(operation,))}),
    }
    for name, figure in figures.items():
        bars = [trace for trace in figure.data if trace.type == "bar"]
        assert any(start > 0 for trace in bars for start in trace.base), name
        for trace in bars:
            assert "%{x" not in trace.hovertemplate, name
            for told, start, length in zip(_told(trace), trace.base, trace.x, strict=True):
                decimals = 4 if name == "operations" else 3
                span = f"{length:.{decimals}f} ms, from {start:.{decimals}f} to {start + length:.{decimals}f} ms"
                assert span in told, name
    assert _told(figures["operations"].data[0]) == ["mul: 0.0043 ms, from 1.0000 to 1.0043 ms<extra>vit</extra>"]


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
    assert list(table[run.engine]) == ["1.000", "1.000", "0.000", "2.000"]
    bars = view.waterfall([run]).data[0]
    assert list(bars.y) == ["encode", "wait"]
    assert {data[3] for data in bars.customdata} == {"inside http://host:1/v1"}


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
    comparison = compare(labs["tiny-qwen2.5-vl"], request, {"transformers": "transformers", "fastest": "fastest"}, repeats=6)
    rows = [{"checkpoint": "c", "image": "i", **row} for row in comparison.summary()]
    table = view.summary_frame(rows)
    assert list(table["parity"]) == ["yes", "yes, on its pixels"]
    assert table["speed-up (95% CI)"][0] == "reference"
    assert table["speed-up (95% CI)"][1].count("×") == 1
    red = view.summary_frame([{**rows[1], "parity_says": "NO", "speedup": None}])
    assert red["parity"][0] == "NO"
    assert red["speed-up (95% CI)"][0] == "–"

    unsaid = view.summary_frame([{**rows[1], "warm_runs": 0, "unknown_runs": 6}, rows[0]])
    assert list(unsaid["warm runs"]) == ["6 (reuse unknown)", 6]
    marked = view.ttft_against_visual_tokens([rows[0], {**rows[1], "unknown_runs": 6}])
    assert [line.name for line in marked.data] == ["transformers", "fastest (reuse unknown)"]

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


def test_a_stage_is_opened_layer_by_layer(labs: dict[str, Lab], picture: bytes) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    request = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    runs = [lab.run(request, engine, trace="layers") for engine in ("transformers", "fastest")]
    layers = [f"language.layer.{i}" for i in range(lab.checkpoint.config.text_config.num_hidden_layers)]
    for stage, number in (("prefill", 0), ("decode", 0), ("decode", -1)):
        figure = view.block_waterfall(runs, stage, number)
        for run, bars in zip(runs, figure.data, strict=True):
            whole = [span for span in run.trace.spans if span.name == stage][number]
            assert list(bars.y) == [stage, *layers]
            assert bars.x[0] == whole.duration_ns / 1e6
            ends = [start + length for start, length in zip(bars.base, bars.x, strict=True)]
            assert 0 < bars.base[1] < ends[-1] <= ends[0]
        assert figure.layout.xaxis.title.text == f"ms since {stage} began"


def _rounds(**medians: tuple[float, float]) -> Samples[StageSample]:
    """Seconds of prefill and decode of some variants, the same in six rounds."""
    timings = [
        StageSample(engine=label, round=number, steps={"prefill": prefill, "decode": decode})
        for label, (prefill, decode) in medians.items()
        for number in range(6)
    ]
    return Samples(samples=tuple(timings))


def test_steps_have_columns_panels_and_lines_of_their_own() -> None:
    titles = {"prefill": "prefill of <8> tokens", "decode": "one step"}
    rounds = _rounds(stock=(0.2, 0.004), ours=(0.1, 0.001))
    frame = view.step_frame(rounds, "stock")
    assert list(frame["prefill ms"]) == ["200.00", "100.00"]
    assert list(frame["decode, times as fast as stock (95% CI)"]) == ["reference", "4.00× [4.00, 4.00]"]

    bars = view.step_panels(rounds, titles)
    assert [dict(zip(panel.y, panel.x, strict=True)) for panel in bars.data] == [
        {"ours": 100, "stock": 200},
        {"ours": 1, "stock": 4},
    ]
    assert bars.layout.annotations[0].text == "prefill of &lt;8&gt; tokens"

    lines = view.steps_against_length({64: _rounds(stock=(0.4, 0.008), ours=(0.3, 0.001)), 8: rounds}, titles)
    drawn = {(line.name, line.xaxis): (list(line.x), list(line.y)) for line in lines.data}
    assert drawn["stock", "x"] == ([8, 64], [200, 400])
    assert drawn["ours", "x2"] == ([8, 64], [1, 1])
    assert [line.showlegend for line in lines.data] == [True, True, False, False]
    assert lines.layout.yaxis2.type == "log"

    costs = {"ours": Cost(fixed=0, per_patch=1e-3, per_pair=0)}
    parts = view.cost_parts({8: rounds, 64: rounds}, costs, steps=["prefill"], unit="tokens", y_title="prefill, ms")
    assert list(parts.data[-1].y) == [100, 100]
    assert parts.layout.xaxis.title.text == "tokens"
    assert "tokens" in parts.data[-1].hovertemplate


def test_bytes_of_every_cache_and_of_those_that_grow_on_a_scale_of_their_own() -> None:
    held = {"concat": [2**20, 2**21], "static": [2**24, 2**24], "paged": [2**21, 2**21 + 2**19]}
    figure = view.bytes_over_steps(held, 100)
    drawn = [(line.name, line.xaxis, list(line.y)) for line in figure.data]
    assert drawn == [
        ("concat", "x", [1, 2]),
        ("static", "x", [16, 16]),
        ("paged", "x", [2, 2.5]),
        ("concat", "x2", [1, 2]),
        ("paged", "x2", [2, 2.5]),
    ]
    assert len({line.line.dash for line in figure.data[:3]}) == 3  # told apart by more than colour
    assert len(view.bytes_over_steps({"static": [1, 1]}, 100).data) == 1  # what never changes is not magnified


def test_a_chat_is_drawn_turn_by_turn(labs: dict[str, Lab], picture: bytes) -> None:
    paged = Recipe.parse("fastest, cache.kv=paged")
    engines = {"off": paged, "<on>": paged.replace("cache.prefix_reuse", "on")}
    chat = converse(labs["tiny-qwen3-vl"], picture, ["What?", "Why?"], engines, max_new_tokens=4, repeats=1)
    figure = view.turn_bars(chat)
    assert [bars.name for bars in figure.data[:-1]] == ["off", "&lt;on&gt;"]
    for engine, bars in zip(engines, figure.data, strict=False):
        assert list(bars.y) == [chat.ttft(engine, turn).median * 1e3 for turn in range(2)]
    assert [list(bars.marker.pattern.shape) for bars in figure.data[:-1]] == [["", ""], ["", "/"]]
    assert figure.data[-1].name.startswith("hatched")
    assert figure.data[1].customdata[1] == ["cache hit", chat.found("<on>", 1)[0], 0]

    frame = view.turn_frame(chat, "off")
    assert list(frame["kind"]) == ["warm", "warm", "warm", "cache hit"]
    assert list(frame["tokens equal"]) == ["yes"] * 4
    assert list(frame["times as fast as off (95% CI)"])[::2] == ["reference"] * 2
    tokens = tuple(
        dataclasses.replace(t, run=dataclasses.replace(t.run, tokens=())) if t.engine == "<on>" else t for t in chat.samples
    )
    red = view.turn_frame(dataclasses.replace(chat, samples=tokens), "off")
    assert list(red["tokens equal"]) == ["yes", "NO"] * 2
    assert list(red["times as fast as off (95% CI)"])[1::2] == ["–"] * 2


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
        if figure.stem == "workbench":  # a look at the panel, which has no record
            continue
        records = json.loads(figure.with_suffix(".json").read_text())
        assert view.waterfall([Run.from_record(record) for record in records]).data
