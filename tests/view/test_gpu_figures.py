"""The GPU report's figures say what its rows say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastvl_lab.measure.tables import text
from fastvl_lab.view import gpu_report, style
from fastvl_lab.view.__main__ import main
from fastvl_lab.view.gpu_report import decode_speed, ttft_by_engine, ttft_by_size

Rows = list[dict[str, Any]]

_ENGINES = ("transformers", "<b>ours</b>", "one graph")


def _row(part: str, image: str, label: str, **more: Any) -> dict[str, Any]:
    place = {"part": part, "image": image, "recipe": label, "checkpoint": "a<b>", "device": "GPU & co", "dtype": "bfloat16"}
    return place | {"parity": True, "error": 0.01, "settings": label} | more


def _first_token(part: str, image: str, label: str, device: dict[str, float], scale: float, **more: Any) -> dict[str, Any]:
    """A row whose host spends 5 ms before the patches are there, and then waits for the device."""
    on_device = {stage: ms * scale for stage, ms in device.items()}
    host = {"decode_image": 3.0, "preprocess": 1.0, "upload": 1.0, **dict.fromkeys(on_device, 0.1), "emit": 0.5}
    times = {"ttft_ms": 7.0 + sum(on_device.values()), "patches_ms": 2.0 + sum(on_device.values()), "floor_ms": 3.0 * scale}
    row = times | {"host_ms": host, "device_ms": on_device | {"upload": 0.25, "emit": 9.0}, "unaccounted_ms": 0.0}
    row |= {"floor_share": 0.5, "idle_share": 0.1, "captures": [], "captured_before": False, "peak_mb": None}
    row |= {f"{name}{end}": 1.0 for name in ("ratio", "patches_ratio") for end in ("", "_low", "_high")}
    return _row(part, image, label, **row | more)


@pytest.fixture
def rows() -> Rows:
    """As a GPU's would be."""
    by_stage, at_once = {"vit": 2.0, "prefill": 4.0, "sample": 0.5}, {"first_token": 5.0}
    made = []
    for scale, image in enumerate(("448x448", "1280x960"), start=1):
        made += [_first_token("main", image, label, by_stage, scale) for label in _ENGINES[:2]]
        made.append(_first_token("main", image, "one graph", at_once, scale))
        made.append(_row("main", image, "wrong", parity=False, error=0.5))
        made.append(_row("main", image, "elsewhere", parity=None, error="vit.norms=fused cannot run here: it needs a GPU"))
        for number, label in enumerate(_ENGINES[:2], start=1):
            speed = {"tokens_per_second": 100.0 * number, "tpot_ms": 10 / number, "ceiling": 400.0, "share": number / 4}
            made.append(_row("decode", image, label, new_tokens=64, same_steps=[label, "other"], **speed))
    for side in (224, 448):
        made.append(_first_token("sizes", f"{side}x{side}", "eager", by_stage, side / 224))
        captures = [{"stage": "first_token", "how": "graph", "seconds": 2.0}]
        more = {"captures": captures, "capture_s": 2.0, "capture_mb": 64.0, "break_even": 41}
        made.append(_first_token("sizes", f"{side}x{side}", "single graph", at_once, side / 224, **more))
    tuned = {
        "kernel": "some_kernel",
        "tuned_for": {"dtype": "bfloat16", "head_dim": "80"},
        "launch": {"block_k": 64, "num_warps": 8},
    }
    longest = [{"name": "k" * 200, "times": 32, "ms": 4.125}]
    made.append(_row("kernels", "448x448", "one graph", of="main", kernels_ms=6.25, longest=longest, parity=None, error=None))
    return [*made, _row("launches", "", "", parity=None, error=None, **tuned)]


def _of(figure: Any, name: str, axis: str = "x") -> Any:
    return next(trace for trace in figure.data if trace.name == name and (trace.xaxis or "x") == axis)


def test_a_bar_is_as_long_as_ttft_and_the_device_counts_where_it_works(rows: Rows) -> None:
    figure = ttft_by_engine(rows, "a<b>")
    for axis, image in (("x", "448x448"), ("x2", "1280x960")):
        bars = [trace for trace in figure.data if trace.type == "bar" and (trace.xaxis or "x") == axis]
        for label in _ENGINES:
            row = next(r for r in rows if (r["part"], r["image"], r["recipe"]) == ("main", image, label))
            name = label.replace("<", "&lt;").replace(">", "&gt;")
            parts = {bar.name: bar.x[bar.y.index(name)] for bar in bars}
            assert sum(parts.values()) == pytest.approx(row["ttft_ms"])
            assert parts["decode_image"] == 3.0
            assert parts["upload"] == 0.25
            assert parts["emit"] == 0.5  # the host's: the device has nothing to do in it
            assert parts["vit"] == row["device_ms"].get("vit", 0.0)
            assert parts["first_token"] == row["device_ms"].get("first_token", 0.0)
            ends = _of(figure, "the end, at the floor", axis)
            assert ends.x[ends.y.index(name)] == 5.0 + row["floor_ms"]
    assert not any("wrong" in trace.y or "elsewhere" in trace.y for trace in figure.data)  # what has no time has no bar
    shared = {(bar.marker.color, bar.marker.pattern.shape) for bar in figure.data if bar.type == "bar"}
    assert len(shared) == len({bar.name for bar in figure.data if bar.type == "bar"})  # stages of a colour differ by pattern
    assert figure.layout.title.text == "TTFT by stage: a&lt;b&gt;, GPU &amp; co bfloat16"


@pytest.mark.parametrize(("patches", "key"), [(True, "patches_ms"), (False, "ttft_ms")])
def test_a_line_has_the_times_of_every_size(rows: Rows, patches: bool, key: str) -> None:
    figure = ttft_by_size(rows, patches=patches)
    for way in ("eager", "single graph"):
        mine = [row for row in rows if row["part"] == "sizes" and row["recipe"] == way]
        assert list(_of(figure, way).x) == [224, 448]
        assert list(_of(figure, way).y) == [row[key] for row in mine]
    floor = _of(figure, "floor, from patches")
    assert (list(floor.x), list(floor.y), floor.line.dash) == ([224, 448], [3.0, 6.0], "dot")
    assert len({line.marker.symbol for line in figure.data if "markers" in line.mode}) == 2


def test_decode_stands_against_its_ceiling(rows: Rows) -> None:
    figure = decode_speed(rows, "a<b>")
    assert [list(panel.x) for panel in figure.data] == [[100.0, 200.0]] * 2
    assert figure.data[0].customdata[0] == "transformers, other"
    assert list(figure.layout.yaxis.categoryarray) == ["transformers", "&lt;b&gt;ours&lt;/b&gt;"]  # from the top down
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert [line.x0 for line in figure.layout.shapes] == [400.0] * 2
    assert figure.layout.xaxis.range[1] > 400
    assert "100 · 25%" in [note.text for note in figure.layout.annotations]


def test_without_times_a_figure_is_empty_and_says_so(rows: Rows) -> None:
    red: Sequence[dict[str, Any]] = [row for row in rows if not row["parity"]]
    for figure in (ttft_by_engine(red, "a<b>"), ttft_by_size(red), decode_speed(red, "a<b>")):
        assert not figure.data
        assert figure.layout.title.text.endswith("nothing was timed")


def test_the_command_draws_a_page_from_the_records(
    rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(rows))
    main([str(tmp_path / "gpu.json")])
    printed, page = capsys.readouterr().out, (tmp_path / "gpu.html").read_text()
    assert printed == f"{text(rows)}\n\nreport: {tmp_path / 'gpu.html'}\n"
    (single,) = [line.split() for line in printed.splitlines() if line.startswith("  single graph") and "64.000" in line][:1]
    assert single[-5:] == ["2.000", "64.000", "no", "41", "1.0e-02"]  # s, MB, for an earlier size, requests until it pays, error
    with pytest.raises(SystemExit, match="is neither the folder of a sweep"):
        main([str(tmp_path)])
    for other in (b"{}", b'["row"]', b"\xff\xd8"):
        (tmp_path / "other").write_bytes(other)
        with pytest.raises(SystemExit, match="other has no rows of a GPU report"):
            main([str(tmp_path / "other")])
    assert "parity failed: error 5.0e-01; not timed" in printed
    assert f"longest: name {'k' * 100}…, times 32, ms 4.125" in printed
    assert "some_kernel\n        tuned_for: dtype bfloat16, head_dim 80\n        launch: block_k 64, num_warps 8" in printed
    assert "elsewhere" in printed.partition("it needs a GPU")[2]
    assert page.count('class="plotly-graph-div"') == 4
    assert "GPU report</title>" in page
    assert str(style.CONFIG["displaylogo"]).lower() in page

    monkeypatch.setattr(gpu_report, "page", lambda title, body: "".join(body))
    assert "plotly-graph-div" not in gpu_report.report_html([row for row in rows if not row["parity"]])


def test_rows_of_one_stage_have_tables_and_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them was off by what is no number, which its file has as null."""
    stage = {"checkpoint": "a", "device": "GPU", "dtype": "bfloat16", "image": "168x140"}
    rows = [stage | {"recipe": "stock", "parity": True, "error": 0.01, "ms": 2.0, "ratio": 1.0, "floor_ms": 1.0, "share": 0.5}]
    rows.append(stage | {"recipe": "lean", "parity": False, "error": None})
    (tmp_path / "tower.json").write_text(json.dumps(rows))
    main([str(tmp_path / "tower.json")])
    printed = capsys.readouterr().out
    assert "tower of a, 168x140; GPU bfloat16" in printed
    assert "parity failed: error nan; not timed" in printed
    assert "plotly-graph-div" not in (tmp_path / "tower.html").read_text()
