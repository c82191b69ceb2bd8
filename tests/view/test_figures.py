"""Figures of what is compared say what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from fastvl_lab import Lab, Recipe, Request, Run, view
from fastvl_lab.measure.compare import converse
from fastvl_lab.measure.floors import Cost
from fastvl_lab.measure.samples import Samples, StageSample


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

    stacked = view.step_bars(_rounds(stock=(0.2, 0.004), ours=(0.1, 0.001)), "")
    assert [trace.error_x.array for trace in stacked.data] == [None, (0, 0)]  # six alike, at the end of the bar
    few = view.step_bars(rounds.only(lambda sample: sample.round < 5), "")
    assert [note.text for note in few.layout.annotations[:2]] == ["204.0 ms", "101.0 ms"]
    assert few.data[1].error_x.array == (0, 0)  # no interval, no arms

    lines = view.steps_against_length({64: _rounds(stock=(0.4, 0.008), ours=(0.3, 0.001)), 8: rounds}, titles)
    drawn = {(line.name, line.xaxis): (list(line.x), list(line.y)) for line in lines.data}
    assert drawn["stock", "x"] == ([8, 64], [200, 400])
    assert drawn["ours", "x2"] == ([8, 64], [1, 1])
    assert [line.showlegend for line in lines.data] == [True, True, False, False]
    assert lines.layout.yaxis2.type == "log"
    near = view.steps_against_length({8: _rounds(stock=(0.2, 0.004), ours=(0.1, 0.003))}, titles).layout
    assert (near.yaxis2.type, near.yaxis2.rangemode) == (None, "tozero")  # one tick of a logarithm says nothing

    many = {1.0: _rounds(**{name: (speed, 0.0) for name, speed in zip("abcde", (1.0, 0.4, 0.1, 0.2, 0.3), strict=True)})}
    sizes = view.cost_against_size(many, x_title="", y_title="")
    assert [trace.opacity for trace in sizes.data] == [1, 0.3, 1, 1, 1]

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


def test_padding_is_a_line_a_way_and_a_panel_a_stage() -> None:
    padding = {"by 64": {16: {"vit": 0.75, "prefill": 0.2}, 64: {"vit": 0.0, "prefill": 0.1}}, "none": {16: {}, 64: {}}}
    figure = view.padding_by_size(padding, {"by 64": 1, "none": 2})
    drawn = {(line.name, line.xaxis): (list(line.x), list(line.y)) for line in figure.data}
    assert drawn["by 64: 1 program", "x"] == ([16, 64], [0.75, 0.0])
    assert drawn["by 64: 1 program", "x2"] == ([16, 64], [0.2, 0.1])
    assert drawn["none: 2 programs", "x"] == ([16, 64], [0.0, 0.0])
