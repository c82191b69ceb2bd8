"""Side by side: rounds, pairing, parity before speed, and words that claim no more than the interval bears."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastvl_lab import Comparison, Lab, RecipeError, Request, RequestError, Run, Sampling, compare
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.quiet import Use
from fastvl_lab.measure.samples import RunSample
from fastvl_lab.peer.transformers import TransformersPeer
from fastvl_lab.preprocessor import resize
from fastvl_lab.run import Kind
from fastvl_lab.trace import Span, Trace


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab]) -> Run:
    return labs["tiny-qwen3-vl"].run(Request(prompt="Hello.", max_new_tokens=3, ignore_eos=True))


def _comparison(run: Run, times_ms: dict[str, list[float]], tokens: dict[str, tuple[int, ...]] | None = None) -> Comparison:
    """A comparison with these warm TTFTs, round by round, after a cold round of 1 s."""
    samples = []
    for engine, times in times_ms.items():
        for number, ms in enumerate([1000.0, *times], start=-1):
            span = Span(name="vit", lane="host", depth=0, start_ns=0, end_ns=round(ms * 5e5))
            trace = Trace(spans=(span,), first_chunk_ns=round(ms * 1e6), end_ns=round(ms * 1e6))
            made = dataclasses.replace(
                run,
                engine=engine,
                trace=trace,
                kind="cold" if number < 0 else "warm",
                tokens=(tokens or {}).get(engine, (1, 2, 3)),
            )
            samples.append(RunSample(engine=engine, round=number, run=made))
    reference = next(iter(times_ms))
    expected = (tokens or {}).get(reference, (1, 2, 3))
    checks = {}
    for engine in times_ms:
        same = (tokens or {}).get(engine, (1, 2, 3)) == expected
        why = "" if same else f"its tokens differ from those of {reference}"
        checks[engine] = Parity(oracle=reference, holds=same, expected=expected, why=why)
    return Comparison(samples=tuple(samples), reference=reference, checks=checks, failures={})


def test_engines_run_interleaved_and_cold_runs_are_kept_apart(picture: bytes) -> None:
    lab, seen = Lab("tiny-qwen3-vl", device="cpu"), []
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True)
    engines = {"ours": "fastest", "theirs": "transformers"}
    comparison = compare(lab, request, engines, repeats=4, warm_up=1, seed=3, on_run=seen.append)
    assert sorted(seen) == ["ours"] * 5 + ["theirs"] * 5
    assert all({seen[i], seen[i + 1]} == {"ours", "theirs"} for i in range(0, 10, 2))
    assert comparison.reference == "theirs"  # a peer is the reference wherever it stands
    for row in comparison.summary():
        assert row["warm_runs"] == 4
        assert row["cold_ttft_ms"] > 0
        assert row["tokens_equal"]
    assert [run.engine for run in comparison.runs("ours")] == ["ours"] * 4
    assert all(run.logits.untyped_storage().nbytes() == 0 for run in comparison.runs("ours"))


def test_cache_hits_are_shown_apart_and_compared_with_nothing(picture: bytes) -> None:
    lab = Lab("tiny-qwen3-vl", device="cpu")
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True)
    engines = {"stock": "transformers", "reusing": "fastest, cache.kv=paged, cache.prefix_reuse=on"}
    comparison = compare(lab, request, engines, repeats=3, warm_up=1)
    stock, reusing = comparison.summary()
    assert (reusing["warm_runs"], reusing["hit_runs"], reusing["ttft_ms"], reusing["speedup"]) == (0, 3, None, None)
    assert reusing["tokens_equal"]
    assert reusing["hit_ttft_ms"] < reusing["cold_ttft_ms"]
    assert (stock["hit_runs"], stock["hit_ttft_ms"]) == (0, None)
    assert "3 runs were cache hits, with a TTFT of" in comparison.findings()[1]
    assert comparison.representative("reusing").kind == "cache_hit"


def test_speed_up_is_the_median_of_ratios_paired_by_round(run: Run) -> None:
    comparison = _comparison(run, {"a": [100, 200, 300, 400, 500, 300, 300], "b": [50, 50, 100, 400, 1000, 150, 150]})
    interval = comparison.speedup("b")
    assert interval is not None
    assert interval == (2, 0.5, 4)  # of 2, 4, 3, 1, 0.5, 2, 2
    assert comparison.representative("a").ttft == pytest.approx(0.3)


def test_no_speed_up_beside_a_red_parity_check(run: Run) -> None:
    comparison = _comparison(run, {"a": [100] * 5, "b": [50] * 5}, tokens={"b": (1, 2, 4)})
    assert comparison.speedup("b") is None
    row = comparison.summary()[1]
    assert not row["parity"]
    assert row["speedup"] is None
    assert "its tokens differ from those of a, so its time is not compared" in comparison.findings()[1]
    unsteady = Parity(oracle="a", holds=False, why="its tokens differ from one run to the next")
    comparison = dataclasses.replace(comparison, checks={"a": unsteady, "b": Parity(oracle="a", holds=True)})
    assert "no time is compared with a: its tokens differ from one run to the next" in comparison.findings()[1]
    assert comparison.speedup("b") is None


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([50.0] * 6, "2.00× as fast as a (95% CI 2.00 to 2.00)"),
        ([80, 125, 90, 110, 99, 104], "no difference from a shown (0.99×"),
        ([50.0] * 3, "2.00× as fast as a (too few rounds for an interval)"),
        ([], "no warm rounds to compare with a"),
    ],
)
def test_findings_claim_no_more_than_the_interval_bears(run: Run, times: list[float], says: str) -> None:
    findings = _comparison(run, {"a": [100.0] * 6, "b": times}).findings()
    assert says in findings[1]
    assert findings[0] == "a spends 50% of its TTFT in vit (host)"


def test_runs_of_unknown_kind_that_all_were_disturbed_are_still_of_that_kind(run: Run) -> None:
    comparison, busy = _comparison(run, {"a": [100.0] * 6, "b": [50.0] * 6}), Use(seconds=1.0, cores=2, others=2.0, disturbed=True)

    def unsaid(sample: RunSample) -> RunSample:
        return dataclasses.replace(sample, use=busy, run=dataclasses.replace(sample.run, kind="unknown"))

    samples = tuple(unsaid(s) if s.engine == "b" and s.round >= 0 else s for s in comparison.samples)
    disturbed = dataclasses.replace(comparison, samples=samples)
    assert disturbed.compared("b") == "unknown"
    assert disturbed.disturbed("b")
    assert disturbed.representative("b").kind == "unknown"


def test_runs_of_unknown_kind_count_only_where_none_is_warm(run: Run) -> None:
    """An endpoint that says of some runs that they were hits, and of the others nothing; never are two kinds pooled."""
    comparison = _comparison(run, {"a": [100.0] * 6, "b": [50.0] * 6})

    def told(kinds: list[Kind]) -> Comparison:
        ours = [s for s in comparison.samples if s.engine == "b"]
        changed = [dataclasses.replace(s, run=dataclasses.replace(s.run, kind=k)) for s, k in zip(ours, kinds, strict=True)]
        return dataclasses.replace(comparison, samples=(*(s for s in comparison.samples if s.engine == "a"), *changed))

    unsaid = told(["unknown"] * 7)
    assert unsaid.compared("b") == "unknown"
    assert unsaid.speedup("b") == (2, 2, 2)
    assert unsaid.summary()[1]["ttft_ms"] == pytest.approx(50)
    assert "does not say whether it reused anything of earlier requests, so its runs may be cache hits" in unsaid.findings()[1]
    assert "2.00× as fast as a" in unsaid.findings()[1]
    mixed = told(["unknown", "cache_hit", "unknown", "cache_hit", "unknown", "cache_hit", "cache_hit"]).summary()[1]
    assert (mixed["warm_runs"], mixed["unknown_runs"], mixed["hit_runs"]) == (0, 2, 4)
    warm = told(["unknown", "unknown", "warm", "warm", "unknown", "warm", "warm"])
    assert (warm.compared("b"), warm.summary()[1]["warm_runs"], warm.summary()[1]["unknown_runs"]) == ("warm", 4, 0)
    assert "does not say" not in warm.findings()[1]


@pytest.mark.parametrize(
    ("moved", "tokens", "says"),
    [
        (0.0, None, "on pixels made another way, of which Transformers computes the same logits"),
        (0.0123, None, "on other pixels than a, which move Transformers' logits by up to 0.012"),
        (0.0123, (7, 8, 9), "on other pixels than a, which move Transformers' logits by up to 0.012 and change its answer"),
    ],
)
def test_findings_say_what_other_pixels_change(run: Run, moved: float, tokens: tuple[int, ...] | None, says: str) -> None:
    made = tokens or (1, 2, 3)
    comparison = _comparison(run, {"a": [100.0] * 6, "b": [50.0] * 6}, tokens={"b": made})
    own = Parity(oracle="transformers, preprocessor.resize=torch", holds=True, expected=made, moved=moved)
    comparison = dataclasses.replace(comparison, checks={**comparison.checks, "b": own})
    assert comparison.findings()[1].endswith(f"; 2.00× as fast as a (95% CI 2.00 to 2.00), {says}")


def test_an_engine_that_fails_is_recorded_or_raised(labs: dict[str, Lab]) -> None:
    lab, limit = labs["tiny-qwen3-vl"], labs["tiny-qwen3-vl"].checkpoint.session_len
    request = Request(prompt="Hello.", max_new_tokens=limit)
    with pytest.raises(RequestError, match="together over session_len"):
        compare(lab, request, {"a": "baseline"}, repeats=1)
    comparison = compare(lab, request, {"a": "baseline", "b": "transformers"}, repeats=2, keep_going=True)
    assert set(comparison.failures) == {"a", "b"}
    assert comparison.samples == ()
    with pytest.raises(RequestError, match=r"no engine has run.*together over session_len"):
        comparison.waterfall()
    assert repr(comparison).startswith("Comparison(0 runs: a failed: the prompt has")
    held = {"a": "baseline", "b": "fastest, capture.vit=graph"}
    comparison = compare(lab, Request(prompt="Hello.", max_new_tokens=1), held, repeats=1, keep_going=True)
    assert comparison.engines == ("a",)
    assert comparison.failures["b"].startswith("capture.vit=graph cannot run here: it needs a CUDA device")


def test_senseless_comparisons_are_refused(labs: dict[str, Lab]) -> None:
    lab, request = labs["tiny-qwen3-vl"], Request(prompt="Hello.")
    with pytest.raises(RequestError, match=r"engines is \{\}; give at least one"):
        compare(lab, request, {})
    with pytest.raises(RequestError, match=r"engines is \['baseline'\]; .* as label -> engine"):
        compare(lab, request, ["baseline"])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"repeats is 1.5; it must be a whole number"):
        compare(lab, request, {"a": "baseline"}, repeats=1.5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="warm_up is -1; it must be a whole number of at least 0"):
        compare(lab, request, {"a": "baseline"}, warm_up=-1)
    assert len(compare(lab, request, {"a": "baseline"}, repeats=np.int64(1), warm_up=0).samples) == 1  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="repeats is 0 and warm_up 0"):
        compare(lab, request, {"a": "baseline"}, repeats=0, warm_up=0)
    with pytest.raises(RequestError, match=r"the request is a NoneType; give a fastvl_lab.Request"):
        compare(lab, None, {"a": "baseline"})  # type: ignore[arg-type]
    for text, says in (("nothing", "the choices are baseline"), ("fastest, capture.vit=graph", "it needs a CUDA device")):
        with pytest.raises(RecipeError, match=says):
            compare(lab, request, {"a": text}, repeats=1)


def test_pixels_further_off_than_promised_are_a_red_parity_check(picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens alone would not show it: the oracle sees the same pixels."""
    lab = Lab("tiny-qwen3-vl", device="cpu")
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True, max_pixels=10_000, min_pixels=1)
    good = compare(lab, request, {"stock": "transformers", "ours": "fastest"}, repeats=1)
    assert good.parity("ours")
    assert good.checks["ours"].in_bounds
    moved = good.checks["ours"].moved
    assert moved is not None
    assert 0 < moved < 0.1
    with_torch = resize.with_torch
    monkeypatch.setattr(resize, "with_torch", lambda **k: lambda pixels, shape: with_torch(**k)(pixels.flip(0), shape))
    lab = Lab("tiny-qwen3-vl", device="cpu")
    upside_down = compare(lab, request, {"stock": "transformers", "ours": "fastest"}, repeats=1)
    assert not upside_down.parity("ours")
    assert upside_down.speedup("ours") is None
    assert "its pixels are further from the stock ones than it promises" in upside_down.findings()[1]


def test_a_failing_peer_costs_others_their_parity_and_no_sample(picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(TransformersPeer, "run", fail)
    lab, request = Lab("tiny-qwen3-vl", device="cpu"), Request(images=[picture], prompt="?", max_new_tokens=2, ignore_eos=True)
    engines = {name: name for name in ("transformers", "fastest", "baseline")}
    comparison = compare(lab, request, engines, repeats=1, keep_going=True)
    assert comparison.engines == ("fastest", "baseline")
    assert comparison.reference == "fastest"
    assert not comparison.parity("baseline")
    assert "its parity check failed: RuntimeError: no luck" in comparison.failures["baseline"]
    with pytest.raises(RuntimeError, match="no luck"):
        compare(lab, request, {name: name for name in ("fastest", "baseline")}, repeats=1)


def test_a_check_that_was_made_before_is_not_made_again(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    lab, asked = labs["tiny-qwen3-vl"], []
    request = Request(prompt="Hello.", max_new_tokens=2, ignore_eos=True)
    known = {
        "right": Parity(oracle="transformers", holds=True),
        "red": Parity(oracle="transformers", holds=False, why="seen before"),
    }

    def counted(oracles: object, engine: object, *_: object) -> Parity:
        asked.append(str(engine))
        return Parity(oracle="transformers", holds=True)

    monkeypatch.setattr("fastvl_lab.measure.compare.check", counted)
    engines = {"stock": "transformers", "right": "fastest", "red": "baseline"}
    comparison = compare(lab, request, engines, repeats=1, checks=known)
    assert asked == ["transformers"]
    assert (comparison.checks["right"], comparison.checks["red"]) == (known["right"], known["red"])
    assert comparison.speedup("right") is not None
    assert comparison.speedup("red") is comparison.saving("red", "stock") is None


def test_a_request_that_samples_is_not_compared(labs: dict[str, Lab]) -> None:
    """Before anything has run: its tokens are held to nobody's."""
    for sampling, what in (
        (Sampling(temperature=0.7, seed=1), "draws its tokens"),
        (Sampling(logit_bias={5: 1}), "by changed logits"),
    ):
        with pytest.raises(RequestError, match=what):
            compare(labs["tiny-qwen3-vl"], Request(prompt="Hi", sampling=sampling), {"a": "fastest"}, keep_going=True)
    stopped = Request(prompt="Hi", max_new_tokens=4, sampling=Sampling(stop="no such text"))
    assert compare(labs["tiny-qwen3-vl"], stopped, {"stock": "transformers", "ours": "fastest"}, repeats=1, warm_up=0).parity(
        "ours"
    )
