"""What became slower between two records, what did not, and what cannot be compared; the exit status says which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvl_lab import Comparison, RequestError, SweepSettings, regressions
from fastvl_lab.measure.compare import Attribution
from fastvl_lab.measure.regressions import main
from fastvl_lab.measure.sweep import LoadedPoint, SweepResult, SweptPoint
from fastvl_lab.measure.under_load import UnderLoad

Of = Callable[..., Comparison]


def _rounds(seed: int, *, n: int = 20, **stages: float) -> list[dict[str, float]]:
    """Stages of these ms, each with noise of 2%."""
    noise = np.random.default_rng(seed)
    return [{name: ms * float(np.exp(noise.normal(0, 0.02))) for name, ms in stages.items()} for _ in range(n)]


@pytest.fixture(scope="module")
def before(comparison_of: Of) -> Comparison:
    return comparison_of({"stock": _rounds(1, vit=60, prefill=40), "ours": _rounds(2, vit=30, prefill=20)})


def _slow(comparison_of: Of, vit: float = 30, **more: Any) -> Comparison:
    return comparison_of({"stock": _rounds(3, vit=60, prefill=40), "ours": _rounds(4, vit=vit, prefill=20)}, **more)


def test_a_slow_down_above_the_bound_is_named_with_its_stage(before: Comparison, comparison_of: Of) -> None:
    found = regressions(before, _slow(comparison_of, vit=36))
    assert found.status == 1
    (change,) = found.slower
    assert (change.engine, change.stage) == ("ours", "vit")
    assert change.ratio is not None
    assert change.ratio.low < 56 / 50 < change.ratio.high
    assert next(iter(change.stages)) == "vit"
    assert change.stages["vit"].median == pytest.approx(6, abs=0.6)
    assert found.findings()[0].startswith("c · no image · ours is slower: 1.1")
    assert found.findings()[0].endswith(" of its TTFT before, most of it in vit")
    assert regressions(before, _slow(comparison_of, vit=36), bound=1.2).status == 0


def test_a_speed_up_and_noise_are_no_regression(before: Comparison, comparison_of: Of) -> None:
    assert regressions(before, before).status == 0
    found = regressions(before, _slow(comparison_of, vit=24))
    assert found.status == 0
    assert found.changes[1].stage == "vit", "where it is faster"
    assert found.findings() == ["nothing is shown to be more than 1.05 times as slow as before"]
    one_percent = regressions(before, _slow(comparison_of, vit=31))
    assert not one_percent.slower, "shown or not, it is within the bound"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"processor": "6502"}, "the processor was Z80, and is 6502: they are not compared"),
        ({"device": "NVIDIA H200"}, "the device was CPU (2 threads), and is NVIDIA H200"),
        ({"dtype": "bfloat16"}, "the dtype was float32"),
        ({"power_limit": "400 W"}, "the power limit was not known, and is 400 W"),
    ],
)
def test_another_machine_or_card_is_not_compared(before: Comparison, comparison_of: Of, where: dict[str, str], why: str) -> None:
    found = regressions(before, _slow(comparison_of, vit=60, **where))
    assert found.status == 2
    assert not found.changes
    assert found.findings()[0].startswith(why)
    assert regressions(before, dataclasses.replace(before, environment={})).status == 2


def test_what_is_missing_wrong_or_too_little_is_not_compared(before: Comparison, comparison_of: Of) -> None:
    without = regressions(before, comparison_of({"stock": _rounds(3, vit=60, prefill=40), "new": _rounds(5, vit=1)}))
    assert without.status == 2
    assert without.changes[1].why == "it was not measured again"
    assert "c · no image · new is new, and is held against nothing" in without.notes
    wrong = regressions(before, _slow(comparison_of, vit=36, wrong=["ours"]))
    assert (wrong.status, wrong.slower) == (2, ())
    assert wrong.changes[1].why == "planted (after), so its time is not compared"
    few = comparison_of({name: _rounds(6, n=2, vit=90) for name in ("stock", "ours")})
    assert regressions(few, few).changes[0].why == "2 runs before and 2 after are too few for an interval"
    failed = dataclasses.replace(_slow(comparison_of), samples=before.samples[:20], failures={"ours": "no room"})
    assert regressions(before, failed).changes[1].why == "it failed: no room (after), so its time is not compared"
    slow_too = regressions(before, _slow(comparison_of, vit=60, wrong=["stock"]))
    assert slow_too.status == 1, "what is slower comes before what is unknown"


def _with(found: Comparison, **own: Any) -> Comparison:
    """The same, of whose runs some fields are others."""
    samples = [dataclasses.replace(sample, run=dataclasses.replace(sample.run, **own)) for sample in found.samples]
    return dataclasses.replace(found, samples=tuple(samples))


def test_runs_of_another_prompt_or_kind_are_not_compared(before: Comparison, comparison_of: Of) -> None:
    after = _slow(comparison_of, vit=60)
    longer = regressions(_with(before, n_prompt=300), _with(after, n_prompt=900))
    assert (longer.status, longer.slower) == (2, ())
    assert longer.changes[1].why == "its prompt had 300 tokens, and has 900, so its time is not compared"
    assert regressions(_with(before, n_prompt=0), _with(after, n_prompt=900)).status == 1, "0: an endpoint did not count"
    hits = regressions(_with(before, kind="unknown"), after)
    assert (hits.status, hits.slower) == (2, ())
    assert hits.changes[1].why == "its runs were unknown, and are warm, so its time is not compared"


def test_other_versions_are_compared_and_named(before: Comparison, comparison_of: Of) -> None:
    found = regressions(before, _slow(comparison_of, torch="2.12", date="2027-01-01"))
    assert (found.status, found.notes) == (0, ("torch was 2.11, and is 2.12",))


def test_it_is_a_table_and_rows(before: Comparison, comparison_of: Of) -> None:
    found = regressions(before, _slow(comparison_of, vit=36))
    table = found.frame()
    assert list(table["slower than 1.05"]) == ["no", "YES"]
    assert list(table["most of it in"]) == ["–", "vit"]
    rows = json.loads(json.dumps(found.rows(), allow_nan=False))
    assert [row["slower"] for row in rows] == [False, True]
    assert rows[1]["ratio_low"] > 1.05
    assert "times as long as before:" in repr(found)


def _point(comparison: Comparison, size: tuple[int, int]) -> SweptPoint:
    return SweptPoint(checkpoint="c", size=size, comparison=comparison)


@pytest.fixture(scope="module")
def swept(before: Comparison, sweep_settings: Callable[..., SweepSettings]) -> Callable[[Sequence[Comparison]], SweepResult]:
    """A sweep of these comparisons, a size each."""

    def made(comparisons: Sequence[Comparison]) -> SweepResult:
        points = tuple(_point(each, (28 * number, 28)) for number, each in enumerate(comparisons, start=1))
        return SweepResult(settings=sweep_settings(), environment=dict(before.environment), points=points, errors=())

    return made


def test_sweeps_are_compared_point_by_point(before: Comparison, comparison_of: Of, swept: Callable[..., SweepResult]) -> None:
    found = regressions(swept([before, before]), swept([before, _slow(comparison_of, vit=36)]))
    assert [(change.image, change in found.slower) for change in found.changes] == [
        ("28×28", False),
        ("28×28", False),
        ("56×28", False),
        ("56×28", True),
    ]
    way = Attribution(comparison=before, steps=before.engines)
    assert regressions(way, before).status == 0


def test_from_the_command_line(
    before: Comparison, comparison_of: Of, tmp_path: Path, capsys: Any, swept: Callable[..., SweepResult]
) -> None:
    base, slow = before.save(tmp_path / "base"), _slow(comparison_of, vit=36).save(tmp_path / "slow")
    assert main([str(base), str(base)]) == 0
    assert main([str(base), str(slow)]) == 1
    assert "ours is slower: 1.1" in capsys.readouterr().out
    assert main([str(base), str(slow), "--bound", "1.5"]) == 0
    other = _slow(comparison_of, processor="6502").save(tmp_path / "other")
    assert main([str(base), str(other)]) == 2
    assert main([str(tmp_path / "none"), str(slow)]) == 2
    assert main([str(base)]) == 2
    assert "a Comparison does not say what was asked" in capsys.readouterr().err
    assert main([str(base), str(slow), "--bound", "0.5"]) == 2
    swept([before]).save(tmp_path / "run" / "record")
    assert main([str(tmp_path / "run"), str(tmp_path / "run")]) == 0, "the folder of a sweep will do"


def test_without_a_second_record_the_sweep_is_measured_again(
    before: Comparison,
    comparison_of: Of,
    swept: Callable[..., SweepResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    made, asked = swept([before]), list[SweepSettings]()
    settings = dataclasses.replace(made.settings, output_dir=str(tmp_path / "run"), repeats=7)
    dataclasses.replace(made, settings=settings).save(tmp_path / "run" / "record")

    def again(settings: SweepSettings) -> SweepResult:
        asked.append(settings)
        return swept([_slow(comparison_of, vit=36)])

    monkeypatch.setattr("fastvl_lab.measure.regressions.sweep", again)
    assert main([str(tmp_path / "run"), "--bound", "0.5"]) == 2
    assert not asked, "what is wrong is said before hours of measuring"
    assert main([str(tmp_path / "run")]) == 1
    assert asked == [dataclasses.replace(settings, output_dir="")]
    assert main([str(tmp_path / "run"), str(tmp_path / "head"), "--bound", "1.2"]) == 0
    assert len(asked) == 2
    assert regressions(made, tmp_path / "head").status == 1, "it was kept"
    assert main([str(tmp_path / "run"), str(tmp_path / "head")]) == 1
    assert len(asked) == 2
    assert "most of it in vit" in capsys.readouterr().out


def test_what_has_no_engines_side_by_side_is_refused(before: Comparison) -> None:
    with pytest.raises(RequestError, match="a Run is not compared; the choices are Comparison, Attribution, SweepResult"):
        regressions(before.samples[0].run, before)
    with pytest.raises(RequestError, match="bound is 0"):
        regressions(before, before, bound=0)
    with pytest.raises(RequestError, match="is no record that can be read"):
        regressions("no/such", before)


def test_loads_of_a_sweep_are_named_as_not_compared(before: Comparison, swept: Callable[..., SweepResult]) -> None:
    found = UnderLoad(comparison=before, rounds=(), failures={})
    point = LoadedPoint(checkpoint="c", size=(28, 28), load="2 at once, 3 requests", found=found)
    both = dataclasses.replace(swept([before]), loaded=(point,))
    assert regressions(both, both).notes == ("c · 28×28 · 2 at once, 3 requests: what is under a load is not compared",)
    of_a_grid = dataclasses.replace(both, points=(), loaded=(dataclasses.replace(point, environment={"host": "one"}),))
    with pytest.raises(RequestError, match="a grid's points were measured in many places"):
        regressions(of_a_grid, of_a_grid)


def test_what_was_measured_again_is_told_also_where_it_cannot_be_kept(
    before: Comparison, swept: Callable[..., SweepResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    swept([before]).save(tmp_path / "base")
    (tmp_path / "file").touch()
    error = {"checkpoint": "gone", "image": "", "engine": "", "error": "there is none"}
    monkeypatch.setattr("fastvl_lab.measure.regressions.sweep", lambda _: dataclasses.replace(swept([before]), errors=(error,)))
    assert main([str(tmp_path / "base"), str(tmp_path / "file" / "head")]) == 2
    said = capsys.readouterr()
    assert "nothing is shown to be more than 1.05 times as slow" in said.out
    assert "failed: gone: there is none" in said.err
    assert "cannot be written" in said.err
