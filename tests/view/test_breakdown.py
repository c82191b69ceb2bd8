"""Floors and memory are drawn as they were measured."""

from __future__ import annotations

import pytest

from fastvl_lab import Lab, Request, Run, view


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab], picture: bytes) -> Run:
    return labs["tiny-qwen2.5-vl"].run(Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True), "fastest")


def test_a_floor_is_a_line_across_the_bars_of_its_stage(run: Run) -> None:
    stages = run.trace.stages()
    assert run.tpot is not None
    floors = {"vit": stages["vit"] / 2e9, "prefill": stages["prefill"] / 4e9, "decode": run.tpot / 10}
    figure = view.floor_bars({"ours": run}, floors)
    assert list(figure.data[0].y) == ["vit", "prefill", "a decode step"]
    assert list(figure.data[0].x) == pytest.approx([stages["vit"] / 1e6, stages["prefill"] / 1e6, run.tpot * 1e3])
    assert [line.x0 for line in figure.layout.shapes] == pytest.approx([floor * 1e3 for floor in floors.values()])
    assert [text.rpartition("floor ")[2] for text in figure.data[0].text] == ["50%", "25%", "10%"]
    assert [row.rpartition("is ")[2] for row in view.floor_frame({"ours": run}, floors)["ours: ms"]] == [
        "50% of it)",
        "25% of it)",
        "10% of it)",
    ]


def test_a_stage_that_did_not_run_has_no_bar(run: Run) -> None:
    assert list(view.floor_bars({"ours": run}, {"vit": 1e-3, "first_token": 1e-3}).data[0].y) == ["vit"]


def test_memory_is_drawn_by_what_holds_it(labs: dict[str, Lab], run: Run) -> None:
    held = labs["tiny-qwen2.5-vl"].memory.held()
    assert sum(held.values()) == labs["tiny-qwen2.5-vl"].memory.n_bytes > 0
    figure = view.memory_bars({"nothing": 0, **held})
    assert dict(zip(figure.data[0].y, figure.data[0].x, strict=True)) == {n: b / 1e6 for n, b in held.items() if b}
    assert list(view.memory_frame(held)["held by"]) == list(held)
