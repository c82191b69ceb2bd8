"""The panel's own figures: the run before as a ghost, and a run under way."""

from __future__ import annotations

import dataclasses

import pytest

from fastvl_lab import Lab, Request, Run, photo
from fastvl_lab.trace import Span, Trace
from fastvl_lab.view.workbench.figures import so_far, with_ghost


@pytest.fixture(scope="module")
def runs(labs: dict[str, Lab]) -> list[Run]:
    request = Request(images=[photo("astronaut", (168, 140))], prompt="What?", max_new_tokens=3, ignore_eos=True)
    return [labs["tiny-qwen2.5-vl"].run(request, engine) for engine in ("transformers", "fastest")]


def _on_two_lanes(run: Run) -> Run:
    """The same run as if a device had done each stage while the host did."""
    spans = tuple(
        Span(name=s.name, lane=lane, depth=0, start_ns=s.start_ns, end_ns=s.end_ns)
        for s in run.trace.within_ttft()
        for lane in ("host", "device")
    )
    trace = Trace(spans=spans, first_chunk_ns=run.trace.first_chunk_ns, end_ns=run.trace.end_ns)
    return dataclasses.replace(run, trace=trace)


def test_a_ghost_lies_behind_the_lane_that_it_is_of(runs: list[Run]) -> None:
    before, run = (_on_two_lanes(run) for run in runs)
    ghost, *bars = with_ghost(None, run, before).data
    lanes = {lane.legendgroup: lane for lane in bars}
    spans = [span for lane in ("host", "device") for span in before.trace.within_ttft(lane) if span.name in run.trace.stages()]
    assert list(ghost.x) == [span.duration_ns / 1e6 for span in spans]
    for span, low, height in zip(spans, ghost.offset, ghost.width, strict=True):
        bar = lanes[span.lane]
        assert low < bar.offset
        assert bar.offset + bar.width <= low + height
    # A run with one lane is held against the host of the other alone.
    ghost, *bars = with_ghost(None, runs[1], before).data
    assert len(ghost.x) == len(spans) / 2
    assert set(ghost.offset) == {-ghost.width[0] / 2}


def test_pointing_at_a_bar_tells_its_own_length(runs: list[Run]) -> None:
    """Of a bar that does not begin at zero, plotly's own %{x} is where it ends."""
    for figure in (with_ghost(runs[0], runs[1], runs[0]), so_far(runs[1].trace.within_ttft())):
        assert any(start > 0 for trace in figure.data for start in trace.base)
        for trace in figure.data:
            assert "%{x" not in trace.hovertemplate
            assert [data[0] for data in trace.customdata] == list(trace.x)
