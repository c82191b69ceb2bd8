"""The report: nothing wrong gets a time, nothing that fails costs the others theirs, and what is left out is named."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvl_lab import DeviceError, Lab, Recipe
from fastvl_lab.cache.slotted import SlottedKv
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import GraphStore, Recording
from fastvl_lab.checkpoint import tiny
from fastvl_lab.decoder import eager, sdpa
from fastvl_lab.decoder.layers import KvCache
from fastvl_lab.measure import parity, recipes, report
from fastvl_lab.measure.floors import Ceilings
from fastvl_lab.measure.parity import StageCheck
from fastvl_lab.measure.quiet import Use, Watch
from fastvl_lab.measure.report import Case, Deadline, capture_row, pays_after
from fastvl_lab.measure.samples import median_interval
from fastvl_lab.measure.tables import text

TASKS = ("request", "decoder", "tower")
CEILINGS = Ceilings(matmul=1e11, copied=1e10, uploaded=None)  # what a device can do is measured in test_floors
SMALL: dict[str, dict[str, Any]] = {
    "request": {"checkpoints": tiny.NAMES[:1], "sizes": ((56, 56),), "sides": (56,)},
    "decoder": {"lengths": (40,), "steps": 3},
    "tower": {"sizes": ((168, 140),)},
}
FEW = {
    "request": ("transformers", "baseline", "fastest", "vit", "cache: paged", "capture: one graph"),
    "decoder": ("transformers", "baseline", "lean", "kv=paged"),
}

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def small(quick_lab: Callable[..., Lab]) -> Iterator[None]:
    """Small inputs and models, and ceilings that are not measured each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "Lab", quick_lab)
        patch.setattr(Ceilings, "measure", classmethod(lambda cls, device, dtype: CEILINGS))
        patch.setattr(report, "TINY", {task: settings | SMALL[task] for task, settings in report.TINY.items()})
        yield


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every engine."""
    request, decoder = recipes.of_a_request, recipes.of_the_decoder
    monkeypatch.setattr(recipes, "of_a_request", lambda *on: {label: request(*on)[label] for label in FEW["request"]})
    monkeypatch.setattr(recipes, "of_the_decoder", lambda *on: {label: decoder(*on)[label] for label in FEW["decoder"]})


def _run(folder: Path, task: str, *arguments: str, red: bool = False) -> tuple[Rows, str]:
    """The rows that the command wrote, and what it printed; red: it must say that a check failed."""
    out, printed = folder / "rows.json", io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="1") if red else contextlib.nullcontext():
        report.main(["--task", task, "--tiny", "--repeats", "2", "--out", str(out), *arguments])
    return json.loads(out.read_text(), parse_constant=pytest.fail), printed.getvalue()


def _is_time(key: str) -> bool:
    return key == "ms" or key.endswith(("_ms", "_per_second"))


# Of every task


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Rows, str]]:
    """Rows and text of each task; of a few engines where there are many."""
    with pytest.MonkeyPatch.context() as patch:
        request = recipes.of_a_request
        patch.setattr(recipes, "of_a_request", lambda *on: {label: request(*on)[label] for label in FEW["request"]})
        return {task: _run(tmp_path_factory.mktemp(task), task) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_report_checks_before_it_times_and_writes_what_it_prints(told: dict[str, tuple[Rows, str]], task: str) -> None:
    rows, printed = told[task]
    measured = [row for row in rows if row["recipe"] and row.get("part") != "decode"]
    assert {row["checkpoint"] for row in measured} == set(report.TINY[task]["checkpoints"])
    for row in measured:
        if row["parity"] is None:
            assert "cannot run here" in row["error"]
            assert not any(map(_is_time, row))
            continue
        assert row["parity"], row
        assert row["error"] < 1e-4
        shown = [row[key] for key in ("ms", "prefill_ms", "decode_ms", "ttft_ms") if key in row]
        assert shown
        assert all(f"  {ms:.3f}  " in printed for ms in shown)


@pytest.mark.parametrize("task", TASKS)
def test_what_fails_its_check_is_red_and_has_no_time(tmp_path: Path, task: str, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("no room")

    def blind_to_the_newest_key(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        keys, values = cache.read(layer, 0)
        return eager._attend(q, keys[:-1], values[:-1], None)

    monkeypatch.setattr(sdpa, "decode", blind_to_the_newest_key)
    monkeypatch.setattr(SlottedKv, "read", no_room)
    found = {"lean": StageCheck(error=1.0), "fastest": StageCheck(error="RuntimeError: no room")}
    monkeypatch.setattr(report, "check_tower", lambda lab, task, all_of: {k: found.get(k, StageCheck(error=0.0)) for k in all_of})
    wrong, failing = {"request": ("", "cache: paged"), "decoder": ("lean", "kv=paged"), "tower": ("lean", "fastest")}[task]
    rows, printed = _run(tmp_path, task, *(["--part", "main"] if task == "request" else []), red=True)
    assert {row["recipe"] for row in rows if row["parity"] is False} >= {wrong, failing} - {""}
    for label, why in ((wrong, "parity failed: error "), (failing, "failed: RuntimeError: no room")):
        lines = [line.strip() for line in printed.splitlines() if label and line.strip().startswith(f"{label} ")]
        assert all(why in line and line.endswith("; not timed") for line in lines)
        assert len(lines) == (len(report.TINY[task]["checkpoints"]) if label else 0)
    assert not any(_is_time(key) for row in rows if row["parity"] is False for key in row if key != "cold_ttft_ms")
    assert any(_is_time(key) for row in rows if row["recipe"] in ("transformers", "stock") for key in row)


@pytest.mark.parametrize("task", TASKS)
def test_the_report_needs_a_gpu_unless_it_is_tiny(task: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.*; on a CPU there is --tiny"):
        report.main(["--task", task])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "nowhere/rows.json"], "there is no folder nowhere"),
        (["--task", "tower", "--minutes", "1"], "--minutes is of --task request, and the task is tower"),
        (["--task", "decoder", "--part", "main"], "--part is of --task request"),
        (["--task", "vision"], "invalid choice: 'vision'"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
    ],
)
def test_senseless_arguments_are_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main(["--tiny", *arguments])
    assert says in capsys.readouterr().err


def test_rows_are_handed_on_after_each_length(few: None) -> None:
    seen: list[int] = []
    settings = {"checkpoints": tiny.NAMES[:1], "lengths": (5, 9), "steps": 1, "device": "cpu", "dtype": "float32"}
    rows = report.report("decoder", **settings, repeats=1, without="paged", on_rows=lambda rows: seen.append(len(rows)))  # type: ignore[arg-type]
    assert seen == [3, 6]
    assert [row["length"] for row in rows] == [5] * 3 + [9] * 3


def test_a_checkpoint_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []

    def load(name: str, **settings: Any) -> Lab:
        gc.collect()
        assert [model() for model in models] == [None] * len(models)
        lab = Lab(name, **settings)
        models.append(weakref.ref(lab.checkpoint.model))
        return lab

    monkeypatch.setattr(report, "Lab", load)
    settings = report.TINY["request"] | {"checkpoints": tiny.NAMES}
    report.report("request", **settings, repeats=1, part="sizes", without="graph")
    assert len(models) == 2


def test_the_command_needs_torch_transformers_and_triton_alone(forked: Callable[..., str], tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        "import sys, fastvl_lab.measure.report; print([m for m in ('plotly', 'pandas', 'skimage') if m in sys.modules])"
    )
    assert forked(code).strip() == "[]"


# Of one stage


def test_a_towers_share_is_that_of_its_floor(told: dict[str, tuple[Rows, str]]) -> None:
    rows, _ = told["tower"]
    for row in rows:
        assert row["floor_ms"] / row["ms"] == pytest.approx(row["share"])
    assert {"stock", "lean", "attention=grouped", "positions=cached", "rope=halves", "fastest"} <= {row["recipe"] for row in rows}


def test_a_stage_that_was_always_disturbed_says_so_and_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Use(seconds=1.0, cores=2, others=1.5, disturbed=True)
    monkeypatch.setattr(Watch, "measured", lambda self, work: [(work(), busy)])
    rows, printed = _run(tmp_path, "tower", "--checkpoint", tiny.NAMES[0])
    assert all(row["parity"] and row["error"].startswith("the machine was busy: others used 1.5 of 2 cores") for row in rows)
    assert not any(map(_is_time, {key for row in rows for key in row}))
    assert "nan" not in printed


def test_a_decoders_rows_have_both_steps_and_their_floors(told: dict[str, tuple[Rows, str]]) -> None:
    rows, _ = told["decoder"]
    for row in rows:
        for step in ("prefill", "decode"):
            assert row[f"{step}_floor_ms"] / row[f"{step}_ms"] == pytest.approx(row[f"{step}_share"])
            assert row[f"{step}_ratio_low"] is None  # of two rounds there is no interval
        assert row["tokens_per_second"] * row["decode_ms"] == pytest.approx(1000)
    options = {"baseline", "lean", "prefill=eager", "projections=fused", "rope=rolled", "kv=static", "last of each", "fastest"}
    of_one = {row["recipe"]: row for row in rows if row["checkpoint"] == tiny.NAMES[0]}
    assert options <= set(of_one)
    assert of_one["fastest"]["settings"] == str(Recipe.fastest())
    assert of_one["last_layer=last_token"]["prefill_floor_ms"] < of_one["lean"]["prefill_floor_ms"]  # less is to be done
    assert of_one["transformers"]["prefill_ratio"] == of_one["transformers"]["decode_ratio"] == 1


# Of whole requests


def test_the_request_has_32_tokens_of_text(lab: Lab) -> None:
    run = lab.run(Case.of("main", 112, 84, {}).request, "transformers", trace="off")
    assert run.n_prompt - run.visual_tokens == 32
    assert len(run.tokens) == 1


def test_rows_of_requests_are_what_their_part_says(told: dict[str, tuple[Rows, str]]) -> None:
    rows, printed = told["request"]
    parts = ("ceilings", "floors", "main", "sizes", "decode", "kernels")
    of = {part: [row for row in rows if row["part"] == part] for part in parts}
    assert sum(map(len, of.values())) == len(rows)
    assert not of["kernels"]  # which a CPU has not
    (floors,) = of["floors"]
    assert floors["patches_floor_ms"] == pytest.approx(floors["floor_ms"]["vit"] + floors["floor_ms"]["prefill"])
    assert floors["prompt_tokens"] == floors["visual_tokens"] + 32
    by_label = {row["recipe"]: row for row in of["main"]}
    assert tuple(by_label) == FEW["request"]
    assert "cannot run here: it needs a CUDA device" in by_label.pop("capture: one graph")["error"]
    for row in by_label.values():
        assert 0 < row["patches_ms"] < row["ttft_ms"]
        assert row["rounds"] == 2
        assert sum(row["host_ms"].values()) + row["unaccounted_ms"] == pytest.approx(row["ttft_ms"], rel=0.2)
        assert row["floor_share"] == pytest.approx(floors["patches_floor_ms"] / row["patches_ms"])
        assert row["device_ms"] == {}
        assert row["idle_share"] is row["peak_mb"] is row["ratio_low"] is None  # no GPU; of two rounds there is no interval
    assert by_label["transformers"]["ratio"] == by_label["transformers"]["patches_ratio"] == 1
    assert by_label["fastest"]["settings"] == str(Recipe.fastest())
    assert {row["recipe"]: row["parity"] for row in of["sizes"]} == {
        "transformers": True,
        "eager": True,
        "per-stage graphs": None,
        "single graph": None,
    }
    steps = {row["recipe"]: row for row in of["decode"]}
    assert steps["baseline"]["same_steps"] == ["baseline", "vit"]
    assert set(steps) == {"transformers", "baseline", "fastest", "cache: paged"}
    for row in of["decode"]:
        assert row["tokens_per_second"] * row["tpot_ms"] == pytest.approx(1000)
        assert row["ceiling"] == floors["tokens_per_second"]
    assert "capture: one graph" in printed.partition("not timed")[2]


def test_each_part_and_checkpoint_can_be_had_alone(tmp_path: Path, few: None) -> None:
    rows, _ = _run(tmp_path, "request", "--part", "main", "--without", "cache, vit, baseline, fastest")
    assert {row["part"] for row in rows} == {"ceilings", "floors", "main", "decode"}
    sizes = ["--part", "sizes", "--checkpoint", tiny.NAMES[1], "--without", "graph", "--recipe", "baseline"]
    rows, _ = _run(tmp_path, "request", *sizes)
    assert {row["checkpoint"] for row in rows} == {tiny.NAMES[1]}
    assert {row["recipe"]: row["settings"] for row in rows if row["part"] == "sizes"} == {
        "transformers": "transformers",
        "eager": "baseline",
    }


def test_what_there_is_no_time_for_is_named_and_no_failure(tmp_path: Path, few: None) -> None:
    rows, printed = _run(tmp_path, "request", "--minutes", "0")
    left_out = [row for row in rows if row["part"] in ("main", "sizes") and "cannot run" not in row["error"]]
    assert len(left_out) == 5 + 2
    for row in left_out:
        assert row["error"] == "skipped: no time left of the 0 minutes"
        assert row["recipe"] in printed.partition("skipped: no time left")[2]
    assert not any("ttft_ms" in row or "tpot_ms" in row for row in rows)


def test_what_was_right_but_not_timed_says_both(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "rounds", lambda *of, **more: 0)
    rows, _ = _run(tmp_path, "request", "--part", "main")
    right = [row for row in rows if row["part"] == "main" and row["recipe"] in ("transformers", "vit")]
    assert all(row["error"].startswith("within its budget of errors; skipped") and "ttft_ms" not in row for row in right)


@pytest.mark.parametrize("wrong", ["a step", "a choice"])
def test_an_engine_that_is_right_up_to_its_first_token_alone_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Its forced steps show the one, its own token the other."""
    compared = {"transformers": "transformers", "ours": Recipe.parse("fastest, attention.last_layer=all_tokens")}
    monkeypatch.setattr(recipes, "of_a_request", lambda *on: compared)
    if wrong == "a step":
        monkeypatch.setattr(sdpa, "decode", lambda q, cache, layer: eager.decode(q, cache, layer) * 1.01)
    else:
        monkeypatch.setattr("fastvl_lab.schedule.in_flight.InFlight.choose", lambda self, step: step.logits.argmin(keepdim=True))
    rows, printed = _run(tmp_path, "request", "--part", "main", red=True)
    assert [row["recipe"] for row in rows if "ttft_ms" in row or "tpot_ms" in row] == ["transformers"] * 2
    assert ("parity failed: error" if wrong == "a step" else "failed: its tokens differ from those of transformers") in printed


def test_each_engine_is_checked_once(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    by_logits = parity._by_logits

    def counted(found: Any, oracles: Any, engine: Any, steps: int) -> Any:
        asked.append(f"{engine} {steps}")
        return by_logits(found, oracles, engine, steps)

    monkeypatch.setattr(parity, "_by_logits", counted)
    rows, _ = _run(tmp_path, "request", "--part", "main")
    assert len(asked) == len(set(asked)) == sum(row["parity"] is True for row in rows if row["part"] == "main")


def test_without_a_truth_nothing_is_timed(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise DeviceError("out of memory")

    monkeypatch.setattr(parity, "truth_along", too_large)
    rows = [row for row in report.report("request", **report.TINY["request"], part="sizes") if row["part"] == "sizes"]
    assert [(row["recipe"], row["parity"]) for row in rows][:2] == [("transformers", False), ("eager", False)]
    assert rows[1]["error"] == "nothing to hold it against: out of memory"
    assert "nothing to hold it against" in text(rows)


class _Replayed:
    """Records on a CPU: a replay runs the program again, into the same outputs."""

    n_bytes = 0

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]], room: int) -> Recording:
        outputs = tuple(output.clone() for output in program())
        self.n_bytes += 1_000_000

        def replay() -> None:
            for output, made in zip(outputs, program(), strict=True):
                output.copy_(made)

        return Recording(replay=replay, outputs=outputs)

    def forget(self) -> None:
        self.n_bytes = 0


def test_graphs_are_captured_for_each_size_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "check", lambda recipe, target: None)
    monkeypatch.setattr(report, "Lab", Lab)  # loaded with the graphs that are played
    store = GraphStore(_Replayed(), max_bytes=2**30, max_graphs=100)
    monkeypatch.setattr("fastvl_lab.lab._graph_store", lambda device, max_bytes: store)
    seen: list[int] = []
    settings = report.TINY["request"] | {"sides": (56, 112)}
    rows = report.report("request", **settings, part="sizes", repeats=2, on_rows=lambda rows: seen.append(len(rows)))
    assert seen == [3, 7, 11]  # ceilings and floors, then a size at a time
    captured = [row for row in rows if row.get("captures")]
    assert [(row["image"], row["recipe"], [c["stage"] for c in row["captures"]]) for row in captured] == [
        (image, way, stages)
        for image in ("56x56", "112x112")
        for way, stages in (("per-stage graphs", ["vit", "prefill"]), ("single graph", ["first_token"]))
    ]
    for row in captured:
        assert row["parity"]
        assert row["rounds"] == 2  # all of them warm
        assert row["capture_mb"] >= len(row["captures"])
        assert row["break_even"] is None  # of two rounds nothing is shown
        assert f"  {row['capture_s']:.3f}  {row['capture_mb']:.3f}  " in " ".join(text(rows).split()).replace(" ", "  ")


def test_rounds_are_as_many_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    deadline = Deadline.after(1)
    assert deadline.rounds(20, 5, 1.0, warm_up=2) == 20
    assert deadline.rounds(20, 5, 4.0, warm_up=2) == 13
    assert deadline.rounds(20, 5, 10.0, warm_up=2) == 0
    assert median_interval([1.0] * report._LEAST_ROUNDS).low == 1.0
    clock[0] = 60.0
    assert deadline.passed
    assert deadline.skipped() == "skipped: no time left of the 1 minutes"


def test_what_an_earlier_size_paid_for_is_said_to_be_so() -> None:
    vit, decode = (Capture(stage=stage, how="graph", shape="", seconds=2.0, n_bytes=3_000_000) for stage in ("vit", "decode"))
    row = capture_row([vit], [vit, decode])
    assert (row["captured_before"], row["capture_s"], row["capture_mb"]) == (False, 2.0, 3.0)
    assert [capture["stage"] for capture in row["captures"]] == ["vit"]
    assert capture_row([], [vit, decode]) == row | {"captured_before": True}
    assert capture_row([], [])["captured_before"] is False


def test_captures_pay_only_where_they_are_shown_to_save_anything() -> None:
    captured = capture_row(
        [Capture(stage=stage, how="graph", shape="", seconds=1.5, n_bytes=0) for stage in ("vit", "prefill")], []
    )
    eager_row = {"ttft_ms": 31.25, "ttft_low_ms": 29.0, "ttft_high_ms": 32.0}
    faster = {"ttft_ms": 15.625, "ttft_low_ms": 15.0, "ttft_high_ms": 21.0} | captured
    assert pays_after(faster, eager_row) == 192  # 3 s, 15.625 ms at a time
    assert pays_after(faster | {"ttft_high_ms": 29.5}, eager_row) is None
    assert pays_after(faster | {"ttft_high_ms": float("nan")}, eager_row) is None
    assert pays_after(faster | {"captures": []}, eager_row) is None
    assert pays_after(faster, {"error": "failed"}) is None
