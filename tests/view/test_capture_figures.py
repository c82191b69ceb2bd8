"""What the capture notebook draws says what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from fastvl_lab import Lab, Request, Run, view
from fastvl_lab.capture.execute import Capture
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.profile import Operation, Profile
from fastvl_lab.measure.samples import Interval, RunSample


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
    assert titles == ["eager: 3 on the host, 40% between them", "&lt;compiled&gt;: 1 on the host, 25% between them"]
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


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab], picture: bytes) -> Run:
    return labs["tiny-qwen2.5-vl"].run(Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True), "fastest")


def _taking(run: Run, seconds: float) -> Run:
    return dataclasses.replace(run, kind="warm", trace=dataclasses.replace(run.trace, first_chunk_ns=round(seconds * 1e9)))


def _comparison(run: Run, rounds: int, **seconds: float) -> Comparison:
    samples = [RunSample(engine=e, round=n, run=_taking(run, t)) for n in range(rounds) for e, t in seconds.items()]
    checks = {engine: Parity(oracle="transformers", holds=True) for engine in seconds}
    return Comparison(samples=tuple(samples), reference="eager", checks=checks, failures={})


def test_captures_have_paid_where_a_gain_is_shown_and_never_elsewhere(run: Run) -> None:
    made = {"compile": [Capture(stage="vit", how="compile", shape="", seconds=8.95, n_bytes=0)]}
    points = {
        "small": _comparison(run, 6, eager=0.3, compile=0.2),
        "large": _comparison(run, 6, eager=0.3, compile=0.4),
        "unsure": _comparison(run, 2, eager=0.3, compile=0.2),  # too few rounds for an interval
    }
    frame = view.break_even_frame(points, made)
    assert list(frame["have paid after"]) == ["90 requests", "never: no gain is shown", "never: no gain is shown"]
    assert list(frame["times as fast as eager (95% CI)"]) == ["1.50× [1.50, 1.50]", "0.75× [0.75, 0.75]", "1.50×"]
    assert set(frame["captures cost s"]) == {"8.9"}
    assert not view.gains(None)
    assert not view.gains(Interval(1.2, 0.9, 1.5))


def test_a_runs_captures_are_listed_and_a_run_without_any_has_no_line(run: Run) -> None:
    capture = Capture(stage="vit", how="graph", shape="patches 64x588", seconds=0.5, n_bytes=3_000_000)
    frame = view.capture_frame({"eager": run, "graphs": dataclasses.replace(run, captures=(capture,))})
    assert list(frame["executed"]) == ["graphs"]
    assert list(frame["MB held"]) == ["3.0"]
    assert list(view.capture_frame({"eager": run}).columns) == list(frame.columns)


def test_padding_is_a_line_a_way_and_a_panel_a_stage() -> None:
    padding = {"by 64": {16: {"vit": 0.75, "prefill": 0.2}, 64: {"vit": 0.0, "prefill": 0.1}}, "none": {16: {}, 64: {}}}
    figure = view.padding_by_size(padding, {"by 64": 1, "none": 2})
    drawn = {(line.name, line.xaxis): (list(line.x), list(line.y)) for line in figure.data}
    assert drawn["by 64: 1 programs", "x"] == ([16, 64], [0.75, 0.0])
    assert drawn["by 64: 1 programs", "x2"] == ([16, 64], [0.2, 0.1])
    assert drawn["none: 2 programs", "x"] == ([16, 64], [0.0, 0.0])
