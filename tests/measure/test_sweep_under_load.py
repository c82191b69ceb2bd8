"""Engines under the same load: what is sent to whom, what is kept, and what is compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pandas
import pytest

import fastvl_lab as fl
from fastvl_lab import Lab, Request, RequestError, SweepSettings
from fastvl_lab.measure import under_load as module
from fastvl_lab.measure.load import MEASURES, load
from fastvl_lab.measure.sweep import LoadedPoint, SweepResult, sweep
from fastvl_lab.measure.under_load import Arrivals, LoadRound, UnderLoad, requests_of, under_load
from fastvl_lab.view import loaded_frame, report_html

TOGETHER = "fastest, cache.kv=paged, schedule.batching=continuous"


@pytest.fixture(scope="module")
def found(labs: dict[str, Lab], picture: bytes) -> tuple[UnderLoad, list[tuple[str, dict[str, Any]]], int]:
    """Two engines under a load of three, what was sent with which arrivals, and how often `on_run` was called."""
    sent: list[tuple[str, dict[str, Any]]] = []
    ran: list[None] = []

    def watched(lab: Lab, requests: Any, engine: Any, **given: Any) -> Any:
        sent.append((engine, {"requests": requests, **given}))
        return load(lab, requests, engine, **given)

    request = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", watched)
        made = under_load(
            labs["tiny-qwen3-vl"],
            request,
            {"transformers": "transformers", "ours": TOGETHER},
            Arrivals(concurrency=2, n=3, seed=5),
            repeats=2,
            warm_up=1,
            quiet=None,
            on_run=lambda: ran.append(None),
        )
    return made, sent, len(ran)


def test_every_engine_has_the_same_load_in_each_round_and_no_two_rounds_share_a_picture(found: tuple[UnderLoad, Any, int]) -> None:
    made, sent, ran = found
    assert made.failures == {}
    assert [(one.engine, one.round) for one in made.rounds] == [(e, n) for e in ("transformers", "ours") for n in (0, 1)]
    assert len(sent) == 2 * 3  # a round of warm-up, two that count
    assert ran == requests_of(2, Arrivals(concurrency=2, n=3), repeats=2, warm_up=1) == 2 * (1 + 3 * 3)
    rounds = [sent[number : number + 2] for number in (0, 2, 4)]
    for number, (one, other) in enumerate(rounds):
        assert {one[0], other[0]} == {"transformers", TOGETHER}
        assert one[1]["requests"] == other[1]["requests"]
        assert one[1]["seed"] == other[1]["seed"] == 5 + number
    pictures = [bytes(request.image_inputs[0].data) for one, _ in rounds for request in one[1]["requests"]]
    assert len(set(pictures)) == 9


def test_rows_have_throughput_over_rounds_and_percentiles_over_requests(found: tuple[UnderLoad, Any, int]) -> None:
    made, _, _ = found
    for row in made.summary():
        mine = made.of(row["engine"])
        assert (row["requests"], row["failed"], row["rounds"], row["disturbed_rounds"]) == (6, 0, 2, 0)
        assert row["parity"] is True
        times = sorted(1e3 * value for one in mine for value in one.values["ttft"])
        assert row["ttft_p50_ms"] == row["ttft_ms"] == pytest.approx((times[2] + times[3]) / 2)
        assert times[4] <= row["ttft_p99_ms"] <= times[5]
        assert row["tokens_per_second"] == pytest.approx(sum(12 / 2 / one.seconds for one in mine) / 2)
        assert row["tokens_per_second_low"] is None  # of two rounds
    assert UnderLoad.from_record(json.loads(json.dumps(made.to_record()))).summary() == made.summary()
    (sentence,) = made.findings()
    assert re.match(r"ours makes [\d.]+× \(too few rounds for an interval\) the tokens a second of transformers; ", sentence)
    assert re.search(r"; its TTFT p50 is [\d.]+× \(too few rounds for an interval\) as long: no difference is shown$", sentence)


def _round(engine: str, number: int, seconds: float, disturbed: bool | None) -> LoadRound:
    values = {of: [seconds / 4] * 4 for of in MEASURES}
    return LoadRound(
        engine=engine, round=number, values=values, requests=4, failed=0, tokens=8, seconds=seconds, disturbed=disturbed
    )


def test_disturbed_loads_are_counted_and_are_in_no_number(found: tuple[UnderLoad, Any, int]) -> None:
    taken = {0: 1.0, 1: 9.0}
    rounds = [_round(engine, n, seconds, n == 1) for engine in ("transformers", "ours") for n, seconds in taken.items()]
    made = dataclasses.replace(found[0], rounds=tuple(rounds))
    assert [row["tokens_per_second"] for row in made.summary()] == [8.0, 8.0]
    assert [row["disturbed_rounds"] for row in made.summary()] == [1, 1]
    assert made.findings()[-1] == "others disturbed 2 of 4 loads, which are in no number"
    all_of_them = dataclasses.replace(made, rounds=tuple(dataclasses.replace(one, disturbed=True) for one in rounds))
    assert [row["ttft_p50_ms"] for row in all_of_them.summary()] == [None, None]
    assert all_of_them.findings()[0] == "ours has no undisturbed load to compare with transformers"


@pytest.mark.parametrize(("times", "says"), [(1.5, "longer"), (1 / 1.5, "shorter"), (1.0, "no difference is shown")])
def test_rounds_are_paired(found: tuple[UnderLoad, Any, int], times: float, says: str) -> None:
    """A machine that takes four times as long for the later half of the rounds is in both: ratios of pairs do not see it."""
    taken = [4.0 ** (n >= 4) * (1 + n / 100) for n in range(8)]
    rounds = [_round("transformers", n, seconds, None) for n, seconds in enumerate(taken)]
    rounds += [_round("ours", n, seconds * times * (1.01 if n % 2 else 0.99), None) for n, seconds in enumerate(taken)]
    made = dataclasses.replace(found[0], rounds=tuple(rounds))
    (sentence,) = made.findings()
    low, high = 0.99 * times, 1.01 * times
    assert f"makes {1 / times:.2f}× (95% CI {1 / high:.2f} to {1 / low:.2f}) the tokens a second of transformers" in sentence
    assert sentence.endswith(f"its TTFT p50 is {times:.2f}× (95% CI {low:.2f} to {high:.2f}) as long: {says}")


def test_an_engine_that_fails_parity_is_compared_with_nothing(found: tuple[UnderLoad, Any, int]) -> None:
    made = found[0]
    checks = dict(made.comparison.checks)
    checks["ours"] = dataclasses.replace(checks["ours"], holds=False, why="its tokens differ")
    broken = dataclasses.replace(made, comparison=dataclasses.replace(made.comparison, checks=checks))
    assert broken.findings()[0].startswith("ours is not compared with transformers: ")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"concurency": 2}, "loads has the key 'concurency'; the choices are concurrency, rate, n, seed"),
        ({"n": 4}, "nothing says when requests arrive; give one of concurrency, rate"),
        ({"concurrency": 2, "rate": 1.0}, "concurrency and rate say when requests arrive"),
        ({"rate": float("nan")}, "rate is nan; it must be a finite number"),
        ({"rate": "fast"}, "rate is 'fast'; it must be a finite number"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 2, "n": 1.5}, "n is 1.5"),
        ({"rate": 1, "seed": -1}, "seed is -1"),
        (8, "loads has 8; each is none, or a mapping with concurrency or rate, and n, seed"),
    ],
)
def test_what_is_no_load_is_one_sentence(given: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SweepSettings(checkpoints=["tiny-qwen3-vl"], recipes=["baseline"], loads=[given])


def test_one_load_twice_is_refused_however_it_is_spelled() -> None:
    with pytest.raises(RequestError, match="loads names one twice"):
        SweepSettings(checkpoints=["tiny-qwen3-vl"], recipes=["baseline"], loads=[{"rate": 2}, {"rate": 2.0, "n": 32}])
    with pytest.raises(RequestError, match="loads names one twice"):
        SweepSettings(checkpoints=["tiny-qwen3-vl"], recipes=["baseline"], loads=["none", None])


def test_a_sweep_keeps_and_shows_its_loads_beside_its_points(found: tuple[UnderLoad, Any, int], tmp_path: Path) -> None:
    settings = SweepSettings(checkpoints=["tiny-qwen3-vl"], recipes=["baseline"], output_dir=str(tmp_path))
    point = LoadedPoint(checkpoint="tiny-qwen3-vl", size=(56, 56), load="2 at once, 3 requests", found=found[0])
    result = SweepResult(settings=settings, environment={}, points=(), errors=(), loaded=(point,))
    opened = fl.open(result.save(tmp_path / "kept"))
    assert opened.load_rows() == result.load_rows()
    assert opened.findings() == result.findings()
    assert result.published()["loads"][1]["load"] == "2 at once, 3 requests"
    frame = loaded_frame(result.load_rows())
    assert list(frame["load"]) == ["2 at once, 3 requests"] * 2
    assert "<h2>Under load</h2>" in report_html(result)


def test_a_sweep_measures_each_size_alone_and_under_each_load(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.measure.sweep.Lab", lambda name, **_: labs[name])
    settings = SweepSettings(
        checkpoints=["tiny-qwen3-vl"],
        recipes=["baseline"],
        image_sizes=[[56, 56]],
        loads=["none", {"rate": 50, "n": 2}],
        max_new_tokens=2,
        repeats=1,
        quiet=0,
    )
    result = fl.sweep(settings, progress=False)
    assert result.errors == ()
    assert [point.label for point in result.points] == ["tiny-qwen3-vl · 56×56"]
    assert [point.label for point in result.loaded] == ["tiny-qwen3-vl · 56×56 · 50 a second, 2 requests"]


def test_a_sweep_that_dies_keeps_the_loads_that_it_measured(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastvl_lab.measure.sweep.Lab", lambda name, **_: labs[name])
    settings = SweepSettings(
        checkpoints=["tiny-qwen3-vl"],
        recipes=["baseline"],
        image_sizes=[[56, 56]],
        loads=[{"concurrency": 2, "n": 3}, {"concurrency": 1, "n": 3}],
        max_new_tokens=2,
        repeats=2,
        quiet=0,
        output_dir=str(tmp_path),
    )
    (tmp_path / "results.parquet").write_text("of another sweep")
    ran = itertools.count(1)

    def dies() -> None:
        if next(ran) > requests_of(1, Arrivals(concurrency=2, n=3), repeats=2, warm_up=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(settings, progress=False, on_run=dies)
    kept = pandas.read_parquet(tmp_path / "loads.parquet")
    assert list(zip(kept["load"], kept["engine"], kept["round"], strict=True)) == [
        ("2 at once, 3 requests", "baseline", n) for n in (0, 1)
    ]
    assert all(len(times) == 3 and min(times) > 0 for times in kept["ttft_s"])
    assert not (tmp_path / "results.parquet").exists()  # no request alone was measured


def test_a_sweep_that_was_kept_before_there_were_loads_has_none() -> None:
    settings = SweepSettings(checkpoints=["tiny-qwen3-vl"], recipes=["baseline"])
    older = {name: value for name, value in dataclasses.asdict(settings).items() if name != "loads"}
    assert SweepSettings.kept(older) == settings
