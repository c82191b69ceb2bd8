"""The report for a GPU: nothing wrong gets a time, nothing that fails costs the others theirs, and what is left out is named."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvl_lab import DeviceError, Lab, Recipe, pipeline, toggles
from fastvl_lab.attention import eager, sdpa
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import GraphStore, Recording
from fastvl_lab.checkpoint import tiny
from fastvl_lab.language.decoder import KvCache
from fastvl_lab.language.rope import MRope
from fastvl_lab.measure import gpu_engines, gpu_report, gpu_rows
from fastvl_lab.measure.gpu_engines import cannot_run, engines, modes, same_steps
from fastvl_lab.measure.gpu_rows import Deadline, by_kernel, capture_row, device_idle, pays_after, since_upload
from fastvl_lab.measure.gpu_tables import text
from fastvl_lab.measure.parity import Truth, forced_tokens, truth_along, within_budget
from fastvl_lab.trace import Span, Trace

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = 3
SETTINGS: dict[str, Any] = gpu_report.TINY | {"checkpoints": tiny.NAMES[:1], "sizes": ((56, 56),), "sides": (56,)}

Rows = list[dict[str, Any]]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "TINY", SETTINGS)
    kept = ("transformers", "baseline", "fastest", "vit", "cache: paged", "capture: one graph")
    monkeypatch.setattr(gpu_report, "engines", lambda *on: {label: engines(*on)[label] for label in kept})


@pytest.fixture
def truth(lab: Lab) -> Truth:
    request = gpu_report.Point.of("main", 112, 84, {}).request
    return truth_along(lab, request, "transformers", forced_tokens(lab, STEPS))


def _run(tmp_path: Path, *arguments: str) -> Rows:
    gpu_report.main(["--tiny", "--repeats", "2", "--out", str(tmp_path / "rows.json"), *arguments])
    return _rows(tmp_path)


def _rows(tmp_path: Path) -> Rows:
    rows: Rows = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail)
    return rows


def _within(lab: Lab, truth: Truth, recipe: str) -> bool:
    error = truth.error(lab.apart().logits_along(truth.request, recipe, truth.tokens))  # bound anew, to what is there now
    return "ours" in within_budget({"stock": truth.own_error, "ours": error}, "stock", lab.dtype)


# What is compared


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_engine_is_another_and_is_what_its_label_says(device: torch.device) -> None:
    """What a GPU would be given is known without one."""
    compared, fastest = engines(device, torch.bfloat16), Recipe.fastest(device)
    assert len(set(compared.values())) == len(compared)
    assert [compared[label] for label in ("transformers", "baseline", "fastest")] == ["transformers", Recipe.baseline(), fastest]
    for slot in ("preprocessor", "vit", "attention", "cache"):
        alone = compared[slot]
        assert isinstance(alone, Recipe)
        assert getattr(alone, slot) == getattr(fastest, slot)
        needed = {path for toggle in toggles() if toggle.slot == slot for path, _ in alone.option(toggle).required()}
        assert {path for path in alone.changes() if not path.startswith(slot)} <= needed
    for label, engine in compared.items():
        assert isinstance(engine, str) or engine.exact
        if label.startswith("all: "):
            assert isinstance(engine, Recipe)
            name = label.removeprefix("all: ").partition(",")[0]
            assert str(engine.attention.prefill) in (name, f"sdpa_{name}")
            assert (engine.capture.first_token == "single_graph") == label.endswith(("one graph", "2 a round", "patchify"))
            assert (engine.capture.prefill == "graph") == label.endswith(", graphs")


def test_every_exact_choice_that_only_cuda_has_is_met_there() -> None:
    compared = [engine for engine in engines(CUDA, torch.bfloat16).values() if isinstance(engine, Recipe)]
    for toggle in toggles():
        for option in toggle.options:
            if option.exact and option.needs.device == "cuda":
                assert option.value in {engine.value(toggle.path) for engine in compared}, (toggle.path, option.value)


def test_an_engine_that_cannot_run_here_says_what_it_lacks() -> None:
    reasons = {label: cannot_run(engine, CPU, torch.bfloat16) for label, engine in engines(CPU, torch.bfloat16).items()}
    assert str(reasons["capture: graphs"]).startswith(
        "capture.vit=graph cannot run here: it needs a CUDA device, and the lab runs on cpu; the choices here are 'eager'"
    )
    assert reasons["transformers"] is reasons["baseline"] is reasons["fastest"] is None


def test_varlen_attention_is_not_tried_in_float32() -> None:
    varlen = Recipe.parse("fastest, attention.prefill=varlen", CUDA)
    assert "it needs the model in bfloat16 or float16" in str(cannot_run(varlen, CUDA, torch.float32))
    assert cannot_run(varlen, CUDA, torch.bfloat16) is None


def test_ways_to_execute_differ_in_nothing_else() -> None:
    ways = modes(Recipe.parse("fastest, capture.decode=compile"))
    assert list(ways) == list(gpu_engines.MODES)
    for way, recipe in ways.items():
        assert {path.partition(".")[0] for path in recipe.changes().keys() ^ ways["eager"].changes().keys()} <= {"capture"}
        assert (recipe == ways["eager"]) == (way == "eager")
        assert recipe.capture.decode == "eager"


def test_steps_are_the_same_where_only_what_comes_before_them_differs() -> None:
    some: dict[str, Any] = {"stock": "transformers", "a": Recipe.parse("fastest"), "b": Recipe.baseline()}
    some |= {"c": Recipe.parse("fastest, vit.positions=recomputed, attention.last_layer=all_tokens, attention.prefill=eager")}
    for toggle in toggles():
        if toggle.slot == "cache" or toggle.path in ("attention.decode", "attention.norms", "streaming.gate"):
            last = toggle.options[-1 if toggle.path != "attention.norms" else 1].value
            some[toggle.path] = some["a"].choose(toggle.path, last)
    same = same_steps(some)
    assert same.pop("c") == "a"
    assert all(label == first for label, first in same.items())


# Parity


def test_the_request_has_32_tokens_of_text(lab: Lab) -> None:
    run = lab.run(gpu_report.Point.of("main", 112, 84, {}).request, "transformers", trace="off")
    assert run.n_prompt - run.visual_tokens == 32
    assert len(run.tokens) == 1


def test_the_truth_is_stock_generate_in_a_wider_dtype_whatever_its_own_tokens(lab: Lab, truth: Truth) -> None:
    run = lab.run(truth.request, "transformers")
    assert truth.logits.dtype == torch.float64
    assert truth.logits.shape == (1 + STEPS, lab.checkpoint.config.text_config.vocab_size)
    assert (truth.logits[0] - run.logits).abs().max() < 1e-4
    assert truth.tokens != run.tokens[:STEPS]
    kept: list[torch.Tensor] = []

    def prefer(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        """`generate` step by step, made to go on with the truth's tokens."""
        kept.append(logits[0, -1].clone())
        forced = torch.full_like(logits, -torch.inf)
        forced[..., truth.tokens[min(len(kept), STEPS) - 1]] = 0.0
        return forced

    handle = lab.checkpoint.model.lm_head.register_forward_hook(prefer)
    try:
        request = dataclasses.replace(truth.request, max_new_tokens=1 + STEPS, ignore_eos=True)
        assert lab.run(request, "transformers").tokens[:STEPS] == truth.tokens
    finally:
        handle.remove()
    assert (truth.logits - torch.stack(kept)).abs().max() < 1e-4


def test_every_engine_goes_on_with_the_forced_tokens(lab: Lab, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.parse("fastest, preprocessor.resize=pillow")  # the truth's pixels
    right = lab.logits_along(truth.request, recipe, truth.tokens)
    assert truth.error(right) < 1e-5
    monkeypatch.setattr(pipeline, "greedy", lambda logits, decoder: torch.zeros(1, dtype=torch.int64))  # its own are ignored
    assert torch.equal(lab.logits_along(truth.request, recipe, truth.tokens), right)
    in_rounds = lab.logits_along(truth.request, recipe.replace("streaming.steps_per_round", 16), truth.tokens)
    assert in_rounds.shape == right.shape
    assert truth.error(in_rounds) < 1e-5


def test_an_engine_that_is_wrong_in_one_step_is_not_within_the_budget(
    lab: Lab, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _within(lab, truth, "baseline")
    assert _within(lab, truth, "baseline, attention.decode=sdpa")

    def blind(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        keys, values = cache.read(layer, 0)
        return eager._attend(q, keys[:-1], values[:-1], None)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", blind)
        assert not _within(lab, truth, "baseline, attention.decode=sdpa")

    halves = MRope.halves
    with monkeypatch.context() as patch:  # right for text, whose three axes agree
        patch.setattr(MRope, "halves", lambda rope, positions: halves(rope, positions[:1]))
        assert not _within(lab, truth, "baseline, attention.rope=rolled")

    def not_a_number(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        last = cache.segments.lengths[0] == lab_length + STEPS
        return eager.decode(q, cache, layer) * (float("nan") if last else 1.0)

    lab_length = lab.run(truth.request).n_prompt
    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", not_a_number)
        assert not _within(lab, truth, "baseline, attention.decode=sdpa")


# What is read from runs


def _trace(*spans: tuple[str, str, int, int], first_chunk: int) -> Trace:
    made = [Span(name=name, lane=lane, depth=0, start_ns=start, end_ns=end) for name, lane, start, end in spans]  # type: ignore[arg-type]
    return Trace(spans=tuple(made), first_chunk_ns=first_chunk, end_ns=first_chunk)


def test_idle_is_what_no_stage_of_the_device_covers_from_its_first_to_the_first_token() -> None:
    on_host = [("decode_image", "host", 0, 10), ("upload", "host", 10, 14), ("vit", "host", 15, 18)]
    on_device = [("decode_image", "device", 0, 10), ("upload", "device", 11, 15), ("vit", "device", 17, 30)]
    on_device += [("prefill", "device", 29, 50), ("emit", "device", 52, 60), ("decode", "device", 70, 80)]
    trace = _trace(*on_host, *on_device, first_chunk=61)
    assert device_idle(trace) == (17 - 15) + (61 - 50)
    assert since_upload(trace) == 61 - 14
    assert device_idle(_trace(*on_host, first_chunk=61)) is None


def test_rounds_are_as_many_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(gpu_rows.time, "monotonic", lambda: clock[0])
    deadline = Deadline.after(1)
    assert deadline.rounds(20, 5, 1.0, warm_up=2) == 20
    assert deadline.rounds(20, 5, 4.0, warm_up=2) == 13
    assert deadline.rounds(20, 5, 10.0, warm_up=2) == 0
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
    captures = [vars(Capture(stage=stage, how="graph", shape="", seconds=1.5, n_bytes=0)) for stage in ("vit", "prefill")]
    eager_row = {"ttft_ms": 31.25, "ttft_low_ms": 29.0, "ttft_high_ms": 32.0}
    faster = {"ttft_ms": 15.625, "ttft_low_ms": 15.0, "ttft_high_ms": 21.0, "captures": captures}
    assert pays_after(faster, eager_row) == 192  # 3 s, 15.625 ms at a time
    assert pays_after(faster | {"ttft_high_ms": 29.5}, eager_row) is None
    assert pays_after(faster | {"ttft_high_ms": float("nan")}, eager_row) is None
    assert pays_after(faster | {"captures": []}, eager_row) is None
    assert pays_after(faster, {"error": "failed"}) is None


def test_kernels_are_summed_by_name_and_their_time_is_counted_once() -> None:
    ran = [("gemm", 0.0, 3000.0), ("copy", 2000.0, 4000.0), ("gemm", 5000.0, 6000.0), ("norm", 6000.0, 6500.0)]
    found = by_kernel(ran)
    assert found["kernels_ms"] == 5.5  # two at once count once, and waiting does not
    assert found["longest"] == [
        {"name": "gemm", "times": 2, "ms": 4.0},
        {"name": "copy", "times": 1, "ms": 2.0},
        {"name": "norm", "times": 1, "ms": 0.5},
    ]
    assert len(by_kernel([(str(n), n, n + 1) for n in range(100)])["longest"]) == 12
    assert by_kernel([]) == {"kernels_ms": None, "longest": []}


# The report


def test_the_report_checks_before_it_times_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few: None
) -> None:
    rows, printed = _run(tmp_path), capsys.readouterr().out
    of = {
        part: [row for row in rows if row["part"] == part] for part in ("ceilings", "floors", "main", "sizes", "decode", "kernels")
    }
    assert sum(map(len, of.values())) == len(rows)
    assert not of["kernels"]  # which a CPU has not
    (floors,) = of["floors"]
    assert floors["patches_floor_ms"] == pytest.approx(floors["floor_ms"]["vit"] + floors["floor_ms"]["prefill"])
    assert floors["prompt_tokens"] == floors["visual_tokens"] + 32
    by_label = {row["recipe"]: row for row in of["main"]}
    assert list(by_label) == ["transformers", "baseline", "fastest", "vit", "cache: paged", "capture: one graph"]
    for label, row in by_label.items():
        if label == "capture: one graph":
            assert "cannot run here: it needs a CUDA device" in row["error"]
            assert row["parity"] is None
            assert not [key for key in row if key.endswith("_ms")]
            continue
        assert row["parity"]
        assert row["error"] < 1e-4
        assert 0 < row["patches_ms"] < row["ttft_ms"]
        assert row["rounds"] == 2
        assert sum(row["host_ms"].values()) + row["unaccounted_ms"] == pytest.approx(row["ttft_ms"], rel=0.2)
        assert row["floor_share"] == pytest.approx(floors["patches_floor_ms"] / row["patches_ms"])
        assert f"{row['ttft_ms']:.2f} ms" in printed
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
    assert {row["part"] for row in _run(tmp_path, "--part", "main")} == {"ceilings", "floors", "main", "decode"}
    rows = _run(tmp_path, "--part", "sizes", "--checkpoint", tiny.NAMES[1], "--without", "graph", "--recipe", "baseline")
    assert {row["checkpoint"] for row in rows} == {tiny.NAMES[1]}
    assert {row["recipe"]: row["settings"] for row in rows if row["part"] == "sizes"} == {
        "transformers": "transformers",
        "eager": "baseline",
    }


def test_what_there_is_no_time_for_is_named_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], few: None) -> None:
    rows, printed = _run(tmp_path, "--minutes", "0"), capsys.readouterr().out
    left_out = [row for row in rows if row["part"] in ("main", "sizes") and "cannot run" not in row["error"]]
    assert len(left_out) == 5 + 2
    for row in left_out:
        assert row["error"] == "skipped: no time left of the 0 minutes"
        assert row["recipe"] in printed.partition("skipped: no time left")[2]
    assert not any("ttft_ms" in row or "tpot_ms" in row for row in rows)


def test_what_was_right_but_not_timed_says_both(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "rounds", lambda *of, **more: 0)
    rows = [row for row in _run(tmp_path) if row["part"] == "main" and row["recipe"] in ("transformers", "vit")]
    assert all(row["error"].startswith("within its budget of errors; skipped") and "ttft_ms" not in row for row in rows)


def test_what_fails_its_parity_is_red_and_has_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(sdpa, "decode", lambda q, cache, layer: eager.decode(q, cache, layer) * 1.01)
    monkeypatch.setattr("fastvl_lab.cache.slotted.SlottedKv.read", no_room)
    with pytest.raises(SystemExit, match="1"):
        _run(tmp_path, "--part", "main")
    rows, printed = {row["recipe"]: row for row in _rows(tmp_path) if row["part"] == "main"}, capsys.readouterr().out
    assert rows["cache: paged"]["error"] == "RuntimeError: no room"
    assert "failed: RuntimeError: no room; not timed" in printed
    assert [label for label, row in rows.items() if "ttft_ms" in row] == ["transformers", "baseline", "vit"]

    monkeypatch.undo()
    monkeypatch.setattr(gpu_report, "TINY", SETTINGS)
    monkeypatch.setattr(gpu_report, "engines", lambda *on: {"transformers": "transformers", "ours": Recipe.parse("fastest")})
    monkeypatch.setattr(sdpa, "decode", lambda q, cache, layer: eager.decode(q, cache, layer) * 1.01)
    with pytest.raises(SystemExit, match="1"):
        _run(tmp_path, "--part", "main")
    assert [row["recipe"] for row in _rows(tmp_path) if "ttft_ms" in row or "tpot_ms" in row] == ["transformers"] * 2
    assert "parity failed: error" in capsys.readouterr().out


def test_without_a_truth_nothing_is_timed(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise DeviceError("out of memory")

    monkeypatch.setattr(gpu_report, "truth_along", too_large)
    rows = [row for row in gpu_report.report(**SETTINGS) if row["part"] == "sizes"]
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
    store = GraphStore(_Replayed(), max_bytes=2**30, max_graphs=100)
    monkeypatch.setattr("fastvl_lab.lab._graph_store", lambda device, max_bytes: store)
    seen: list[int] = []
    settings = SETTINGS | {"sides": (56, 112)}
    rows = gpu_report.report(**settings, part="sizes", repeats=2, on_rows=lambda rows: seen.append(len(rows)))
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
    assert "captured in" in text(rows)


def test_a_checkpoint_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []

    def load(name: str, **settings: Any) -> Lab:
        gc.collect()
        assert [model() for model in models] == [None] * len(models)
        lab = Lab(name, **settings)
        models.append(weakref.ref(lab.checkpoint.model))
        return lab

    monkeypatch.setattr(gpu_report, "Lab", load)
    kept = ("transformers", "fastest")
    monkeypatch.setattr(gpu_report, "engines", lambda *on: {label: engines(*on)[label] for label in kept})
    gpu_report.report(**SETTINGS | {"checkpoints": tiny.NAMES}, repeats=1)
    assert len(models) == 2


def test_the_command_needs_torch_transformers_and_triton_alone() -> None:
    code = "import sys, fastvl_lab.measure.gpu_report; print([m for m in ('plotly', 'pandas', 'skimage') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_report_needs_a_gpu_unless_it_is_tiny() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.*; on a CPU there is --tiny"):
        gpu_report.main([])
