"""What an audit calls impossible, suspect or clear: the reported numbers, streams drawn by hand, and runs of our own."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvl_lab import Audit, CheckpointError, Chunk, FastvlError, Lab, Request, Run, Trace, audit, load
from fastvl_lab.account import Account, Part
from fastvl_lab.checkpoint.random_weights import published
from fastvl_lab.checkpoint.shape import without_weights
from fastvl_lab.measure.audit import FOR_A_P95, FOR_AN_INTERVAL, Finding, Severity
from fastvl_lab.measure.floors import decode_bytes, prefill_flops, vit_flops
from fastvl_lab.measure.hardware import HARDWARE, find_hardware
from fastvl_lab.measure.load import Load
from fastvl_lab.request import Grid
from fastvl_lab.trace import Span

# LMDeploy issue 4114: engine, model, TTFT in seconds, tokens a second; one RTX A6000.
REPORTED = (
    ("PyTorch backend", "Qwen3-VL-4B-Instruct", 4.147556, 665.927719),
    ("PyTorch backend", "Qwen2.5-VL-3B-Instruct", 1.761191, 624.012348),
    ("TurboMind", "Qwen2.5-VL-3B-Instruct", 0.165004, 90.837745),
    ("vLLM", "Qwen2.5-VL-3B-Instruct", 0.063613, 85.994672),
    ("vLLM", "Qwen3-VL-4B-Instruct", 0.083626, 59.783212),
)
HELD = "fastest, streaming.steps_per_round=16, streaming.gate=round, streaming.positions=host_sync"


def _found(audited: Audit) -> dict[str, Severity]:
    return {finding.verdict: finding.severity for finding in audited.findings}


def _finding(audited: Audit, verdict: str) -> Finding:
    return next(finding for finding in audited.findings if finding.verdict == verdict)


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab], picture: bytes) -> Run:
    """A warm run of 40 tokens."""
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=40, ignore_eos=True)
    labs["tiny-qwen3-vl"].run(request, "fastest")
    return labs["tiny-qwen3-vl"].run(request, "fastest")


@pytest.fixture
def drawn(run: Run) -> Callable[..., Run]:
    """The run with another clock: stages and decode steps as (start, end) and chunks as (time, tokens), in milliseconds."""

    def draw(
        ttft: float,
        *,
        stages: list[tuple[float, float]] | None = None,
        chunks: list[tuple[float, int]] | None = None,
        **changes: object,
    ) -> Run:
        chunks = chunks or [(ttft + 10 * n, 1) for n in range(40)]
        steps = [(time - 10, time) for time, _ in chunks[1:]]
        named = [*(("vit", at) for at in stages or [(0, ttft)]), *(("decode", at) for at in steps)]
        spans = tuple(
            Span(name=name, lane="host", depth=0, start_ns=round(start * 1e6), end_ns=round(end * 1e6))
            for name, (start, end) in named
        )
        trace = Trace(spans=spans, first_chunk_ns=round(ttft * 1e6), end_ns=round(chunks[-1][0] * 1e6))
        made = tuple(Chunk(text="x" * n, tokens=(1,) * n, time=time / 1e3) for time, n in chunks)
        return dataclasses.replace(run, **{"trace": trace, "chunks": made, "kind": "warm", **changes})

    return draw


@pytest.mark.parametrize(("engine", "model", "ttft", "rate"), REPORTED)
def test_of_the_reported_rows_those_of_the_pytorch_backend_are_impossible(
    engine: str, model: str, ttft: float, rate: float
) -> None:
    audited = audit(ttft=ttft, tokens_per_second=rate, model=f"Qwen/{model}", hardware="RTX A6000")
    if engine != "PyTorch backend":
        assert audited.ok
        assert [cleared.verdict for cleared in audited.cleared] == ["decode_faster_than_memory"]
        return
    assert not audited.ok
    finding = _finding(audited, "decode_faster_than_memory")
    assert finding.severity == "impossible"
    assert "made before the first chunk left" in finding.sentence
    assert "LMDeploy 0.9.0 to 0.11.1" in finding.sentence
    assert "prefill_interval=1 or 2" in finding.sentence


def test_the_arithmetic_is_shown() -> None:
    (finding,) = audit(ttft=1.761, tokens_per_second=624, model="qwen2.5-vl-3b-instruct", hardware="A6000").findings
    assert finding.arithmetic == (
        "768 GB/s (RTX A6000) / 6.17 GB of weights a token (bfloat16) = 124 tokens/s at most; 624 is 5.0 times that; "
        "up to 219 tokens can be made within the TTFT of 1.761 s"
    )


def test_the_limit_follows_the_dtype_and_the_bandwidth() -> None:
    known = {"tokens_per_second": 100, "model": "Qwen2.5-VL-3B-Instruct"}
    assert audit(**known, hardware="RTX A6000").ok
    assert not audit(**known, hardware="RTX A6000", dtype="float32").ok
    assert not audit(**known, hardware="RTX A6000", memory_bandwidth=300e9).ok
    assert audit(**known, memory_bandwidth=768e9).ok
    assert not audit(**known, memory_bandwidth=384e9).ok


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_a_shape_without_weights_costs_what_the_model_costs(labs: dict[str, Lab], name: str) -> None:
    ours, shape = labs[name].checkpoint, without_weights(name, "float32")
    assert all(parameter.is_meta for parameter in shape.model.parameters())
    assert decode_bytes(shape, 5) == decode_bytes(ours, 5)
    assert prefill_flops(shape, 9) == prefill_flops(ours, 9)
    assert vit_flops(shape, [Grid(1, 8, 12)]) == vit_flops(ours, [Grid(1, 8, 12)])


def test_every_published_model_has_the_size_its_name_says() -> None:
    for name in published():
        billions = float(name.rpartition("-VL-")[2].partition("B-")[0])
        assert decode_bytes(without_weights(name, "bfloat16"), 0) / 2e9 == pytest.approx(billions, rel=0.2)


def test_a_small_model_is_not_held_against_memory_as_caches_hold_it() -> None:
    audited = audit(ttft=1.0, total=1.1, output_tokens=500, model="tiny-qwen3-vl", hardware="A6000")
    assert "decode_faster_than_memory: needs weights that no cache holds" in audited.text
    assert "decode_faster_than_memory" not in _found(audited)


def test_ttft_that_is_the_whole_answer() -> None:
    assert _found(audit(ttft=1.76, total=1.80, output_tokens=128)) == {"ttft_is_the_answer": "suspect"}
    assert _found(audit(ttft=1.76, tokens_per_second=5000, output_tokens=128)) == {"ttft_is_the_answer": "suspect"}
    assert audit(ttft=0.2, total=1.80, output_tokens=128).ok
    assert audit(ttft=0.2, tokens_per_second=80, output_tokens=128).ok
    with pytest.raises(FastvlError, match="more than 8 output tokens; there are 4"):
        audit(ttft=1.76, total=1.80, output_tokens=4)


def test_a_long_prompt_before_a_short_answer_is_cleared_by_a_rate_that_memory_allows() -> None:
    known = {"ttft": 5.0, "total": 5.2, "output_tokens": 20}
    assert _found(audit(**known)) == {"ttft_is_the_answer": "suspect"}
    assert audit(**known, model="Qwen2.5-VL-3B-Instruct", hardware="A6000").ok
    assert "ttft_is_the_answer" in _found(audit(**known | {"total": 5.02}, model="Qwen2.5-VL-3B-Instruct", hardware="A6000"))


def test_a_rate_is_that_of_the_time_after_the_first_chunk() -> None:
    known = {"ttft": 1.0, "output_tokens": 101, "model": "Qwen2.5-VL-3B-Instruct", "hardware": "A6000"}
    assert audit(**known, total=2.0).ok  # 100 a second
    assert _found(audit(**known, total=1.5)) == {"decode_faster_than_memory": "impossible"}


@pytest.mark.parametrize(
    "chunks",
    [
        [(0.95, 1), (1.0, 127)],
        [(1.0, 128)],
        [(0.1, 1), *((0.1 + 0.16 * n, 16) for n in range(1, 9))],
        [(0.1 + 0.16 * (n // 16) + 1e-5 * (n % 16), 1) for n in range(128)],  # a chunk a token, sixteen at a time
    ],
    ids=["two", "one", "rounds", "rhythm"],
)
def test_tokens_that_were_held_back(chunks: list[tuple[float, int]]) -> None:
    audited = audit(chunks=chunks)
    assert _finding(audited, "bursts").severity == "suspect"
    assert "LMDeploy" in _finding(audited, "bursts").sentence
    assert ("ttft_is_the_answer" in _found(audited)) == (len(chunks) < 3)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0.1 + 0.01 * n, 1) for n in range(128)],
        [(0.1 + 0.01 * n, 2 if n % 9 == 4 else 1) for n in range(128)],
        [(0.1 + 0.01 * n, 4 if n % 30 == 4 else 1) for n in range(128)],
        [(0.1 + 0.01 * n + (50.0 if n > 60 else 0.0), 1) for n in range(128)],
        [(0.1 + 0.01 * n + 0.004 * (n % 2), 1) for n in range(128)],
    ],
    ids=["even", "characters of two tokens", "characters of four tokens", "a stall", "uneven"],
)
def test_a_plain_stream_is_clear(chunks: list[tuple[float, int]]) -> None:
    audited = audit(chunks=chunks)
    assert audited.findings == ()
    assert "bursts" in [cleared.verdict for cleared in audited.cleared]


def test_a_stream_of_pairs_is_noted_and_no_fault() -> None:
    audited = audit(chunks=[(0.1 + 0.02 * n, 2) for n in range(64)])
    assert _found(audited) == {"bursts": "note"}
    assert audited.ok


def test_how_bursts_are_counted() -> None:
    audited = audit(chunks=[(0.5, 1), (0.6, 15), (0.7, 16), (1.4, 16)])
    shown = _finding(audited, "bursts").arithmetic
    assert shown == "48 tokens in 4 chunks, median 15.5 and at most 16 a chunk; the longest gap is 700.0 ms, 7.0 times the median"


def test_ttft_that_the_work_cannot_fit_into() -> None:
    known = {"image": (1024, 1024), "model": "Qwen2.5-VL-3B-Instruct", "hardware": "RTX A6000"}
    shape = without_weights("Qwen/Qwen2.5-VL-3B-Instruct", "bfloat16")
    least = (
        vit_flops(shape, [Grid(1, 74, 74)], frames=1).total + prefill_flops(shape, 37 * 37, last_token_alone=True).total
    ) / find_hardware("RTX A6000").peak_flops
    assert _found(audit(ttft=0.9999 * least, **known)) == {"faster_than_compute": "impossible"}
    assert audit(ttft=1.0001 * least, **known).ok
    assert "1369 visual tokens" in audit(ttft=1.0001 * least, **known).text
    assert _found(audit(ttft=1.0001 * least, **known, peak_flops=100e12)) == {"faster_than_compute": "impossible"}


def test_a_run_of_our_own_is_clear(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=40, ignore_eos=True)
    for engine in ("baseline", "fastest", "transformers"):
        lab.run(request, engine)
        audited = audit(lab.run(request, engine))
        assert audited.ok, audited
        assert {"ttft_is_the_answer", "bursts", "stages_do_not_add_up"} <= {c.verdict for c in audited.cleared}


def test_stalls_of_a_busy_machine_are_no_bursts(lab: Lab, picture: bytes) -> None:
    """Every chunk follows its own step, though a few long stalls make the mean gap many times the usual one."""
    run = lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=48, ignore_eos=True), "baseline")

    def later(seconds: float) -> float:
        return seconds + sum(30.0 for stall in (8, 24, 40) if seconds > run.chunks[stall].time)

    def moved(span: Span) -> Span:
        start, end = (round(later(ns / 1e9) * 1e9) for ns in (span.start_ns, span.end_ns))
        return dataclasses.replace(span, start_ns=start, end_ns=end)

    chunks = tuple(dataclasses.replace(chunk, time=later(chunk.time)) for chunk in run.chunks)
    trace = dataclasses.replace(run.trace, spans=tuple(map(moved, run.trace.spans)), end_ns=run.trace.end_ns + 90 * 10**9)
    stalled = audit(dataclasses.replace(run, chunks=chunks, trace=trace))
    assert "bursts" not in _found(stalled), stalled
    assert "bursts" in _found(audit(chunks=[(chunk.time, 1) for chunk in chunks]))  # no trace says that each had its step


def test_a_run_whose_tokens_are_held_names_the_toggles_and_the_cure(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=64, ignore_eos=True)
    lab.run(request, HELD)
    audited = audit(lab.run(request, HELD))
    assert {"ttft_is_the_answer", "bursts"} <= set(_found(audited))
    for verdict in ("ttft_is_the_answer", "bursts"):
        sentence = _finding(audited, verdict).sentence
        assert "streaming.gate=round until a round of 16 steps is launched" in sentence
        assert "positions=host_sync keeps the launches in lockstep with the device" in sentence
        assert "the cure is streaming.gate=open" in sentence
        assert "LMDeploy" not in sentence


def test_a_cache_hit_is_called_one(labs: dict[str, Lab], picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=20, ignore_eos=True)
    recipe = "fastest, cache.kv=paged, cache.prefix_reuse=on"
    labs["tiny-qwen3-vl"].run(request, recipe)
    audited = audit(labs["tiny-qwen3-vl"].run(request, recipe))
    assert _found(audited)["faster_than_compute"] == "note"
    assert "cache hit" in _finding(audited, "faster_than_compute").sentence
    assert audited.ok


def test_a_run_knows_its_model_its_dtype_and_its_device(drawn: Callable[..., Run]) -> None:
    known = {"checkpoint": "Qwen/Qwen2.5-VL-3B-Instruct", "dtype": "bfloat16", "device": "NVIDIA RTX A6000"}
    fast = [(1000 + 2 * n, 1) for n in range(40)]
    audited = audit(drawn(1000, chunks=fast, stages=[(0, 1000)], **known))
    assert _found(audited)["decode_faster_than_memory"] == "impossible"
    assert audit(drawn(1000, **known)).ok
    assert _found(audit(drawn(1, **known)))["faster_than_compute"] == "impossible"
    unknown = drawn(1000, **{**known, "device": "CPU (8 threads)"})
    assert "needs hardware or memory_bandwidth" in audit(unknown).text
    assert not audit(unknown, memory_bandwidth=100e9).ok  # 100 tokens a second
    assert audit(unknown, hardware="H100 SXM").ok


def test_a_long_prefill_before_a_short_answer_is_not_the_answer(drawn: Callable[..., Run]) -> None:
    short = [(5000 + 10 * n, 1) for n in range(20)]
    assert audit(drawn(5000, chunks=short)).ok  # the trace shows that the steps came after
    held = [(5000 + 0.1 * n, 1) for n in range(20)]
    assert _found(audit(drawn(5000, chunks=held)))["ttft_is_the_answer"] == "suspect"
    untraced = dataclasses.replace(drawn(5000, chunks=short), trace=Trace(spans=(), first_chunk_ns=5 * 10**9, end_ns=6 * 10**9))
    assert _found(audit(untraced))["ttft_is_the_answer"] == "suspect"
    assert audit(dataclasses.replace(untraced, kind="cold")).ok  # which may have been compiling


def test_stages_that_do_not_add_up(drawn: Callable[..., Run]) -> None:
    assert "stages_do_not_add_up" not in _found(audit(drawn(100, stages=[(0, 50), (50, 95)])))
    overlapping = audit(drawn(100, stages=[(0, 50), (45, 100)]))
    assert _finding(overlapping, "stages_do_not_add_up").severity == "suspect"
    assert _finding(overlapping, "stages_do_not_add_up").arithmetic == (
        "stages 105.0 ms + unaccounted 0.0 ms = 105.0 ms; TTFT 100.0 ms"
    )
    assert "stages_do_not_add_up" not in _found(audit(drawn(100, stages=[(0, 50), (49.5, 100)])))
    assert _found(audit(drawn(100, stages=[(0, 70)])))["stages_do_not_add_up"] == "note"


def test_kinds_that_are_mixed_are_named(drawn: Callable[..., Run]) -> None:
    runs = [drawn(100 + number) for number in range(FOR_A_P95)]
    assert audit(runs).findings == ()
    runs[0], runs[7] = drawn(900, kind="cold"), drawn(20, kind="cache_hit")
    finding = _finding(audit(runs), "cold_among_warm")
    assert finding.severity == "suspect"
    assert "most runs are warm and some are not (run numbers of cold: 0, cache_hit: 7)" in finding.sentence
    assert finding.arithmetic == "median TTFT of 1 cold 900.0 ms, 18 warm 110.5 ms, 1 cache_hit 20.0 ms"


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (1, "one warm run"),
        (FOR_AN_INTERVAL - 1, "too few runs for an interval of their median"),
        (FOR_AN_INTERVAL, "too few for a p95"),
        (FOR_A_P95 - 1, "too few for a p95"),
    ],
)
def test_samples_that_are_too_few_are_noted(drawn: Callable[..., Run], n: int, said: str) -> None:
    audited = audit([drawn(100)] * n)
    assert audited.ok
    assert said in _finding(audited, "too_few_samples").sentence


def test_the_numbers_of_samples_are_the_least_that_will_do() -> None:
    assert 2 * 0.5**FOR_AN_INTERVAL < 0.05 < 2 * 0.5 ** (FOR_AN_INTERVAL - 1)
    assert 0.05 * FOR_A_P95 >= 1 > 0.05 * (FOR_A_P95 - 1)


def test_several_runs_tell_a_verdict_once_with_the_runs_that_have_it(drawn: Callable[..., Run]) -> None:
    runs = [drawn(100, stages=[(0, 60), (40, 100)]) if number in (2, 3) else drawn(100) for number in range(20)]
    audited = audit(runs)
    assert _found(audited) == {"stages_do_not_add_up": "suspect"}
    assert "in 2 of 20 runs, first in run 2" in audited.findings[0].sentence
    assert "stages_do_not_add_up" not in [cleared.verdict for cleared in audited.cleared]


def test_a_load_makes_no_more_tokens_than_memory_allows_all_its_requests(drawn: Callable[..., Run]) -> None:
    """Two requests in turn under way for 1 s each, of 40 tokens: 80 tokens in 2 s, of one request at a time."""
    known = {"checkpoint": "Qwen/Qwen2.5-VL-3B-Instruct", "dtype": "bfloat16", "device": "NVIDIA RTX A6000"}
    run = drawn(610, chunks=[(610 + 10 * n, 1) for n in range(40)], **known)

    def of(seconds: float, runs: list[Run | None]) -> Load:
        failures = {number: "no room" for number, run in enumerate(runs) if run is None}
        return Load(
            engine="x", begun=(0.0,) * len(runs), runs=tuple(runs), failures=failures, steps=(), seconds=seconds, concurrency=2
        )

    with pytest.raises(FastvlError, match="no request of the load was answered, so it has no numbers"):
        audit(of(2.0, [None, None]))
    audited = audit(of(2.0, [run, run, None]))
    assert audited.ok
    assert "124 steps/s at most, times 1 requests under way = 124 tokens/s; 40 is 32% of that" in audited.text
    # A queue is no time in which tokens are made: without it each had 320 ms for its 40 tokens, which takes 322 ms.
    spans = (Span(name="queued", lane="host", depth=0, start_ns=0, end_ns=680_000_000),)
    waited = dataclasses.replace(run, trace=dataclasses.replace(run.trace, spans=spans, first_chunk_ns=690_000_000))
    assert _found(audit(of(2.0, [waited, waited])))["load_faster_than_memory"] == "impossible"
    assert (
        "load_faster_than_memory: needs hardware or memory_bandwidth"
        in audit(of(2.0, [dataclasses.replace(run, device="CPU (8 threads)")])).text
    )


def test_tokens_a_second_of_several_at_once_as_users_write_them() -> None:
    known = {"model": "Qwen2.5-VL-3B-Instruct", "hardware": "RTX A6000"}
    assert not audit(tokens_per_second=624, **known).ok
    assert audit(tokens_per_second=624, concurrency=8, **known).ok
    assert _found(audit(tokens_per_second=1_100, concurrency=8, **known)) == {"load_faster_than_memory": "impossible"}
    audited = audit(tokens_per_second=1_100, concurrency=8, **known)
    assert _finding(audited, "load_faster_than_memory").arithmetic == (
        "768 GB/s (RTX A6000) / 6.17 GB of weights a step (bfloat16) = 124 steps/s at most, times 8 requests under way = "
        "995 tokens/s; 1100 is 1.1 times that"
    )
    # The rate of one of them is that of its own tokens and times, and never the rate of all.
    of_one = {"ttft": 1.0, "output_tokens": 101, "concurrency": 8, "tokens_per_second": 624, **known}
    assert audit(**of_one, total=2.0).ok
    assert _found(audit(**of_one, total=1.5)) == {"decode_faster_than_memory": "impossible"}
    assert "decode_faster_than_memory: needs tokens_per_second of one request alone" in audit(**of_one).text


def test_a_ttft_is_no_shorter_than_the_wait_in_its_queue(drawn: Callable[..., Run]) -> None:
    finding = _finding(audit(ttft=0.08, queued=0.25), "ttft_shorter_than_queue")
    assert finding.severity == "impossible"
    assert finding.arithmetic == "250.0 ms in the queue; TTFT is 80.0 ms"
    assert "its clock began after the request had come" in finding.sentence
    assert audit(ttft=0.25, queued=0.25).ok
    queue = Span(name="queued", lane="host", depth=0, start_ns=0, end_ns=99_000_000)
    run = drawn(100, stages=[(99, 100)])
    run = dataclasses.replace(run, trace=dataclasses.replace(run.trace, spans=(queue, *run.trace.spans)))
    assert "ttft_shorter_than_queue" in [one.verdict for one in audit(run).cleared]
    late = dataclasses.replace(run, trace=dataclasses.replace(run.trace, first_chunk_ns=98_000_000))
    assert _found(audit(late))["ttft_shorter_than_queue"] == "impossible"
    account = Account(source="a server", parts=(Part(name="queue", seconds=0.09),), ttft=0.05)
    assert _found(audit(dataclasses.replace(drawn(100), account=account)))["ttft_shorter_than_queue"] == "impossible"
    scheduled = dataclasses.replace(account, begins="scheduled")
    assert "ttft_shorter_than_queue" not in _found(audit(dataclasses.replace(drawn(100), account=scheduled)))


def test_a_wait_in_the_queue_is_no_held_answer(drawn: Callable[..., Run]) -> None:
    """Of 10.5 s the queue has 10: the first of 40 tokens comes after 0.1 s of its own."""
    assert "ttft_is_the_answer" in _found(audit(ttft=10.1, total=10.5, output_tokens=40))
    assert audit(ttft=10.1, total=10.5, output_tokens=40, queued=10.0).ok
    assert (
        "ttft_is_the_answer: needs a trace, or the time in the queue"
        in audit(
            ttft=10.1,
            total=10.5,
            output_tokens=40,
            concurrency=8,
            tokens_per_second=1,
            memory_bandwidth=1e12,
            model="Qwen2.5-VL-3B-Instruct",
        ).text
    )


def test_a_load_of_our_own_is_clear(labs: dict[str, Lab]) -> None:
    request = Request(prompt="Hi", max_new_tokens=12, ignore_eos=True)
    made = load(labs["tiny-qwen3-vl"], request, "fastest, cache.kv=paged, schedule.batching=continuous", concurrency=3, n=6)
    audited = audit(made)
    assert audited.ok, audited
    assert "ttft_shorter_than_queue" in [one.verdict for one in audited.cleared]
    assert audit(Load.from_record(json.loads(json.dumps(made.to_record())))).text == audited.text


def test_an_audit_shows_itself(drawn: Callable[..., Run]) -> None:
    audited = audit(drawn(100, stages=[(0, 60), (40, 100)]))
    assert str(audited) == repr(audited) == audited.text
    severities = [finding.severity for finding in audited.findings]
    assert severities == ["suspect", "note"]
    for finding in audited.findings:
        assert finding.sentence in audited.text
        assert html.escape(finding.arithmetic) in audited._repr_html_()
    record = json.loads(json.dumps(audited.to_record()))
    assert record["ok"] is False
    assert [finding["verdict"] for finding in record["findings"]] == list(_found(audited))
    hostile = audit(dataclasses.replace(drawn(100), device="<script>"), memory_bandwidth=1e9)
    assert "<script>" not in hostile._repr_html_()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "decode_faster_than_memory needs tokens_per_second, model, hardware or memory_bandwidth"),
        ({"ttft": 1.0}, "ttft_is_the_answer needs total, output_tokens"),
        ({"tokens_per_second": 600, "model": "Qwen2.5-VL-3B-Instruct"}, "needs hardware or memory_bandwidth"),
        ({"tokens_per_second": 600, "hardware": "A6000"}, "decode_faster_than_memory needs model"),
        ({"ttft": 1.0, "model": "Qwen2.5-VL-9B"}, "model 'Qwen2.5-VL-9B' is unknown; the choices are Qwen/Qwen2.5-VL-3B-Instruct"),
        (
            {"ttft": 1.0, "hardware": "RTX 9090"},
            r"hardware 'RTX 9090' is unknown; the choices are RTX A6000.*, or give memory_bandwidth",
        ),
        ({"ttft": 1.0, "dtype": "int4", "model": "Qwen2.5-VL-3B-Instruct"}, "dtype is 'int4'; the choices are"),
        ({"ttft": -1.0}, "ttft is -1.0; it must be a finite number above 0"),
        ({"ttft": "fast"}, "ttft is 'fast'"),
        ({"total": float("nan")}, "total is nan"),
        ({"ttft": 2.0, "total": 1.0}, "the first chunk cannot come after the last"),
        ({"output_tokens": 2.5}, "output_tokens is 2.5; it must be a whole number"),
        ({"ttft": 1.0, "image": (10, 10)}, "image is given without model"),
        ({"ttft": 1.0, "image": (10, 0), "model": "Qwen2.5-VL-3B-Instruct"}, r"image is \(10, 0\)"),
        ({"ttft": 1.0, "image": 10, "model": "Qwen2.5-VL-3B-Instruct"}, "image is 10"),
        ({"chunks": [(1.0, 5)], "ttft": 1.0}, "chunks bring their own ttft"),
        ({"chunks": []}, "chunks must have times"),
        ({"chunks": [(2.0, 1), (1.0, 1)]}, "chunks must have times above 0 in order"),
        ({"chunks": [(1.0, 1), (float("nan"), 3), (2.0, 9)]}, "chunks must have times above 0 in order"),
        ({"chunks": [1.0, 2.0]}, "chunks must be"),
        ({"chunks": 3}, "chunks must be"),
        ({"run": []}, "give a run, or a list of at least one"),
        ({"run": 3}, "give a run, or a list"),
        ({"run": "warm"}, "give a run, or a list"),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(given: dict, said: str) -> None:
    with pytest.raises(FastvlError, match=said):
        audit(**given)


@pytest.mark.parametrize(
    "config", ["{}", "{nope", '{"model_type": "qwen2_5_vl"}', '{"model_type": "qwen2_5_vl", "vision_config": {"depth": "x"}}']
)
def test_a_folder_that_is_no_whole_checkpoint_is_one_sentence(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"checkpoint '{tmp_path}' cannot be loaded: ") as raised:
        audit(ttft=1.0, tokens_per_second=10.0, model=str(tmp_path), memory_bandwidth=1e12)
    assert "\n" not in str(raised.value)


def test_runs_of_several_engines_are_no_samples_of_one(drawn: Callable[..., Run]) -> None:
    with pytest.raises(FastvlError, match="not samples of one engine"):
        audit([drawn(100), drawn(100, engine="transformers")])
    with pytest.raises(FastvlError, match="a run brings its own ttft, model"):
        audit(drawn(100), ttft=1.0, model="Qwen2.5-VL-3B-Instruct")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("a6000", "RTX A6000"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("H100 SXM5", "H100 SXM"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("A100 40 GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("5090", "RTX 5090"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_gpu_is_known_by_its_names(name: str, meant: str) -> None:
    assert find_hardware(name).name == meant


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("H100", "H100 SXM, H100 PCIe, H100 NVL"),
        ("A100", "A100 40GB, A100 80GB PCIe, A100 80GB SXM"),
        ("A100 80GB", "A100 80GB PCIe, A100 80GB SXM"),
        ("RTX", "RTX A6000, RTX 3090, RTX 4090, RTX 5090"),
    ],
)
def test_a_name_of_several_gpus_is_refused_with_the_choices(name: str, choices: str) -> None:
    with pytest.raises(FastvlError, match=f"hardware {name!r} may be several; the choices are {choices}$"):
        find_hardware(name)


@pytest.mark.parametrize(
    "name", ["", "NVIDIA", "RTX 4090 Laptop GPU", "RTX 3090 Ti", "CPU (2 threads)", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_a_gpu_that_is_not_in_the_table_is_refused(name: str) -> None:
    with pytest.raises(FastvlError, match="is unknown; the choices are"):
        find_hardware(name)


def test_every_gpu_answers_to_all_its_names() -> None:
    for known in HARDWARE:
        assert all(find_hardware(f"NVIDIA {name}") is known for name in (known.name, *known.also))
        assert 50 < known.peak_flops / known.memory_bandwidth < 500  # operations a byte, in every generation of tensor cores
