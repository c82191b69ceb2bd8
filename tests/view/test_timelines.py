"""Blocks, launches and operations are drawn where they happened."""

from __future__ import annotations

import re

import pytest

from fastvl_lab import Lab, Request, Run, photo, view
from fastvl_lab.measure.profile import Operation, Profile


@pytest.fixture(scope="module")
def runs(labs: dict[str, Lab]) -> list[Run]:
    request = Request(images=[photo("astronaut", (168, 140))], prompt="What?", max_new_tokens=3, ignore_eos=True)
    return [labs["tiny-qwen2.5-vl"].run(request, engine) for engine in ("transformers", "fastest")]


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


def _operations(*lengths: float, lane: str = "host") -> Profile:
    """Operations of so many ms each, with a gap of one before and after each."""
    made, at = [], 1000.0
    for length in lengths:
        made.append(Operation(name="aten::<mul>", lane=lane, stage="decode", start_us=at, end_us=at + 1e3 * length))  # type: ignore[arg-type]
        at += 1e3 * length + 1000
    stage = Operation(name="decode", lane="host", stage="decode", start_us=0, end_us=at)
    return Profile(stages=(stage,), operations=tuple(made))


def test_an_operation_is_a_bar_and_what_lies_between_is_said() -> None:
    ways = {"eager": _operations(1, 2, 3), "<compiled>": _operations(6)}
    figure = view.operation_timeline(ways)
    assert [list(bars.x) for bars in figure.data] == [[1, 2, 3], [6]]
    assert [list(bars.base) for bars in figure.data] == [[1, 3, 6], [1]]
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [
        "eager: 3 operations on the host, 40% of the time between them",
        "&lt;compiled&gt;: 1 operations on the host, 25% of the time between them",
    ]
    frame = view.operation_frame(ways)
    assert list(frame["host operations"]) == ["3", "1"]
    assert list(frame["host: between them"]) == ["40%", "25%"]


def test_the_devices_lane_is_drawn_below_the_hosts_and_hatched() -> None:
    host, device = _operations(1), _operations(2, lane="device")
    both = Profile(stages=host.stages, operations=host.operations + device.operations)
    bars = view.operation_timeline({"eager": both, "cpu": host}).data
    assert [list(bar.y) for bar in bars] == [["host"], ["device"], ["host"], []]
    assert bars[0].marker.pattern.shape is None
    assert bars[1].marker.pattern.shape
    assert list(view.operation_frame({"eager": both, "cpu": host})["device operations"]) == ["1", "–"]
