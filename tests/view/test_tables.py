"""Tables say what was measured."""

from __future__ import annotations

import dataclasses
import html

import pytest

from fastvl_lab import Lab, Recipe, Request, Run, audit, compare, toggles, view
from fastvl_lab.capture.execute import Capture
from fastvl_lab.measure.audit import audit_reported
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.samples import Interval, RunSample


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab], picture: bytes) -> Run:
    return labs["tiny-qwen2.5-vl"].run(Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True), "fastest")


def test_what_a_row_does_not_have_is_a_dash_and_no_rows_still_have_columns() -> None:
    columns = {"n": str, "half": lambda n: n / 2 if n % 2 == 0 else None}
    frame = view.frame([1, 2], columns)
    assert [list(row) for row in frame.values] == [["1", "–"], ["2", 1.0]]
    assert list(view.frame([], columns).columns) == ["n", "half"]


def test_numbers_that_were_reported_stand_beside_their_audits() -> None:
    rows = [
        {"engine": "one", "model": "Qwen3-VL-4B-Instruct", "ttft": 4.1, "tokens_per_second": 666.0},
        {"engine": "two", "model": "Qwen2.5-VL-3B-Instruct", "ttft": 0.06, "tokens_per_second": 86.0},
    ]
    audits = audit_reported(rows, "RTX A6000")
    frame = view.reported_frame(rows, audits)
    assert list(frame["audit"]) == [audits[0].findings[0].severity, "clear"]
    assert frame["arithmetic"][0] == audits[0].findings[0].arithmetic
    bars = view.reported_rates(rows, audits, "RTX A6000").data[0]
    assert list(bars.text) == ["666 tokens/s, impossible", "86 tokens/s"]
    assert list(bars.marker.pattern.shape) == ["x", ""]


def test_a_setting_stands_beside_its_tokens_and_its_audit(run: Run) -> None:
    other = dataclasses.replace(run, tokens=(0, 0))
    frame = view.streaming_frame({"a": run, "b": other}, run, {"a": audit(run), "b": audit(other)})
    assert list(frame["same tokens"]) == ["yes", "NO"]
    assert list(frame["chunks"]) == [len(run.chunks)] * 2
    said = [finding.named for finding in audit(run).findings if finding.severity != "note"]
    assert frame["audit"][0] == (", ".join(said) or "clear")


def test_tables_stand_beside_the_charts(labs: dict[str, Lab], picture: bytes) -> None:
    short = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    runs = [labs["tiny-qwen2.5-vl"].run(short, engine) for engine in ("transformers", "fastest")]
    frame = view.stage_frame(runs)
    assert list(frame.columns) == ["stage", "transformers, ms", "fastest, ms", "fastest against transformers"]
    assert list(frame.stage)[-2:] == ["unaccounted", "TTFT"]
    assert list(view.stage_frame([runs[0], runs[0]]).columns) == [
        "stage",
        "transformers, ms",
        "transformers (2), ms",
        "transformers (2) against transformers",
    ]
    stock, ours = (run.trace.stages()["vit"] / 1e6 for run in runs)
    told = f"{ours - stock:+.3f} ms ({ours / stock:.0%})".replace("-", "−")
    assert frame.set_index("stage")["fastest against transformers"]["vit"] == told
    values = [float(x) for x in frame["fastest, ms"]]
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
    blocks = ["vit.patch_embed", *(f"vit.block.{i}" for i in range(config.vision_config.depth))]
    layers = [f"language.layer.{i}" for i in range(config.text_config.num_hidden_layers)]
    assert list(frame["block or layer"]) == ["vit.positions", *blocks, *layers]


def test_an_engine_is_what_its_recipe_chooses_beyond_the_baseline(run: Run) -> None:
    runs = [dataclasses.replace(run, engine="stock", recipe=None), run, dataclasses.replace(run, recipe=Recipe.baseline())]
    what = list(view.made_of_frame(runs)["what it is"])
    assert what[0] == "as it is"
    assert "vit.tower=lean, " in what[1]
    assert what[2] == "the baseline: every toggle at its first option"


def test_a_shown_table_has_its_text_on_the_left() -> None:
    shown = view.show(view.frame(["a"], {"<b>": str})).data
    assert "text-align: left" in shown
    assert 'class="dataframe fl-frame"' in shown
    assert "&lt;b&gt;" in shown


def test_a_token_that_takes_microseconds_takes_no_nothing(run: Run) -> None:
    rows = [row for n in (0.5, 0.1) for row in _comparison(run, 6, eager=n).summary()]
    assert list(view.summary_frame([rows[0] | {"tpot_ms": tpot} for tpot in (0.00412, 12.345, None)])["TPOT ms"]) == [
        "0.00412",
        "12.35",
        "–",
    ]


def test_the_catalogue_table_has_every_option() -> None:
    frame = view.catalogue_frame()
    assert len(frame) == sum(len(toggle.options) for toggle in toggles())
    shown = view.show(frame).data
    assert all(html.escape(option.does, quote=False) in shown for toggle in toggles() for option in toggle.options)  # in full


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
    assert list(frame["made for"]) == ["64 patches"]
    for shape, said in (
        (
            "hidden 1280x64, positions 3x1280, kv.slot_of 1x2048, visual_index 99",
            "1,280 prompt tokens, 2,048 keys, 99 visual tokens",
        ),
        ("patches 64x588, plan.order 64, plan.cos 64x16", "64 patches"),
        ("x 3", "x 3"),
    ):
        other = dataclasses.replace(run, captures=(dataclasses.replace(capture, shape=shape),))
        assert list(view.capture_frame({"x": other})["made for"]) == [said]
    assert list(view.capture_frame({"eager": run}).columns) == list(frame.columns)
