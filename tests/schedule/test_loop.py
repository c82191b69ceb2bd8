"""Under load every request makes the tokens that it makes alone, whatever came and went beside it."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, RequestCancelledError, RequestError, photo
from fastvl_lab.cache.blocks import BlockPool
from fastvl_lab.cache.memory import Memory
from fastvl_lab.outcome import Outcome
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.loop import Loop, unpackers
from fastvl_lab.schedule.policy import Policy
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.trace import Tracer

SEEDS = [pytest.param(range(5), id="few"), pytest.param(range(5, 25), id="many", marks=pytest.mark.nightly)]
CONTINUOUS = {"schedule.batching": "continuous"}
RECIPES = {
    "baseline, paged": Recipe.baseline().choose("cache.kv", "paged").replace(CONTINUOUS),
    "fastest, paged": Recipe.fastest().choose("cache.kv", "paged").replace(CONTINUOUS),
    "fastest, concat": Recipe.fastest().choose("cache.kv", "concat").replace(CONTINUOUS),
    "fastest, reuse": Recipe.fastest().choose("cache.prefix_reuse", "on").replace({**CONTINUOUS, "cache.image_reuse": "on"}),
}
PICTURES = [photo(name, size) for name, size in (("astronaut", (56, 56)), ("coffee", (84, 56)), ("cat", (56, 112)))]
TEXTS = ("Hi", "What is this?", "Describe every object in the pictures, one after another, and say where it stands.")


class ByTurns(Inbox):
    """Jobs arrive, and are given up, at numbered looks into it rather than by a clock; `watch` is called at each."""

    def __init__(self, arrivals: dict[int, list[Job]], ends: dict[int, list[threading.Event]]) -> None:
        super().__init__()
        self._arrivals, self._ends, self._look = arrivals, ends, -1
        self.watch: Callable[[], object] = lambda: None

    def take(self, *, wait: bool) -> list[Job]:
        self.watch()
        found: list[Job] = []
        while not found and self._arrivals:
            self._look += 1
            for event in self._ends.pop(self._look, []):
                event.set()
            found = self._arrivals.pop(self._look, [])
            if not wait:
                break
        return found


def _request(drawn: random.Random, texts: Sequence[str], answers: tuple[int, int]) -> Request:
    images = [drawn.choice(PICTURES) for _ in range(drawn.choice((0, 0, 0, 1, 1, 2, 4)))]
    return Request(
        images=images,
        prompt=drawn.choice(texts),
        max_new_tokens=drawn.randint(*answers),
        ignore_eos=True,
        fit=True,
        min_pixels=3136,
        max_pixels=6400,
    )


def _pipeline(lab: Lab, recipe: Recipe, session_len: int = 512) -> Pipeline:
    """Its paged cache has blocks for one session."""
    checkpoint = dataclasses.replace(lab.checkpoint, session_len=session_len)
    return Pipeline(checkpoint, recipe, Memory(checkpoint))


def _serve(pipeline: Pipeline, policy: Policy, inbox: Inbox, threads: ThreadPoolExecutor | None = None) -> Loop:
    loop = Loop(pipeline, policy, threads)
    if isinstance(inbox, ByTurns) and pipeline.recipe.cache.kv == "paged":
        inbox.watch = partial(_check_blocks, loop, pipeline.cache._memory.paged.pool)
    with torch.inference_mode():
        loop.serve(inbox)
    return loop


def _check_blocks(loop: Loop, pool: BlockPool) -> None:
    """What is promised can be had; what a request writes is its own; and each of its blocks knows of it."""
    tables = [flight.place.sequence._table for flight in (*loop._prefilling, *loop._decoding)]
    assert pool.n_available >= 0
    holders = Counter(block for table in tables for block in (*table.blocks, *(table.source or ())[:1]))
    assert pool.n_used == len(holders)
    for table in tables:
        for number, block in enumerate(table.blocks):
            assert pool._references[block] == holders[block], "a block is counted for nobody"
            assert holders[block] == 1 or number < table.reused // pool.block_size, "two write to one block"


def _alone(pipeline: Pipeline, request: Request) -> tuple[int, ...]:
    return pipeline.run(request, Tracer(torch.device("cpu"), "off"), lambda text, tokens: None).tokens


def _job(number: int, request: Request, ended: dict[int, Any], stop: threading.Event | None = None) -> Job:
    def end(outcome: Outcome | Exception) -> None:
        assert number not in ended, "a job ends once"
        ended[number] = outcome

    tracer = Tracer(torch.device("cpu"), stop=stop)
    return Job(number=number, request=request, tracer=tracer, deliver=lambda text, tokens: tracer.delivered(), end=end)


@pytest.fixture(scope="module")
def threads() -> ThreadPoolExecutor:
    return unpackers()


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", RECIPES)
def test_random_schedules_change_no_token(lab: Lab, name: str, seeds: range, threads: ThreadPoolExecutor) -> None:
    """Arrivals, lengths, pictures, cancellations, budgets, orders and ways to encode drawn at random.

    Over pools that cannot hold all prompts at once, or all of their answers.
    """
    short = 2 * tokenize(Request(prompt="Hi"), (), lab.checkpoint).n_tokens + 68  # two prompts, and the answer of one
    wide, narrow = (_pipeline(lab, RECIPES[name], session_len) for session_len in (512, short))
    alike = {"schedule.batching": "one_at_a_time", "cache.image_reuse": "off", "cache.prefix_reuse": "off"}
    plain = {pipeline: _pipeline(lab, RECIPES[name].replace(alike), pipeline.checkpoint.session_len) for pipeline in (wide, narrow)}
    alone: dict[object, tuple[int, ...]] = {}
    n_preempted = 0
    for seed in seeds:
        drawn = random.Random(seed)
        pipeline, *of = ((wide, TEXTS, (1, 12)), (narrow, TEXTS[:1], (24, 48)))[seed % 2]
        requests = [_request(drawn, *of) for _ in range(drawn.randint(2, 9))]
        stops, ended = [threading.Event() for _ in requests], dict[int, Any]()
        arrivals: dict[int, list[Job]] = {}
        for number, request in enumerate(requests):
            arrivals.setdefault(drawn.randint(0, 20), []).append(_job(number, request, ended, stops[number]))
        given_up = [number for number in range(len(requests)) if drawn.random() < 0.15]
        ends: dict[int, list[threading.Event]] = {}
        for number in given_up:
            ends.setdefault(drawn.randint(0, 25), []).append(stops[number])
        policy = Policy(
            max_batch=drawn.choice((1, 2, 4, 8) if pipeline is wide else (4, 8)),
            budget=drawn.choice((None, 7, 40, 200)),
            order=drawn.choice(("fifo", "shortest_first")),
            packs_images=drawn.choice((False, True)),
        )
        loop = _serve(pipeline, policy, ByTurns(arrivals, ends), drawn.choice((None, threads)))
        n_preempted += sum(len(step.preempted) for step in loop.steps)
        assert sorted(ended) == list(range(len(requests))), "every job ends"
        for number, request in enumerate(requests):
            outcome = ended[number]
            if isinstance(outcome, RequestCancelledError):
                assert number in given_up
                continue
            assert isinstance(outcome, Outcome), outcome
            key = (pipeline, request.prompt, request.max_new_tokens, tuple(image.data for image in request.image_inputs))
            if key not in alone:
                alone[key] = _alone(plain[pipeline], request)
            assert outcome.tokens == alone[key], (seed, number, policy)
        if RECIPES[name].cache.kv == "paged":
            pool = pipeline.cache._memory.paged.pool
            assert pool.n_used == 0, "blocks are lost"
            assert pool.n_available == pool.n_blocks, "promises are lost"
    assert (n_preempted > 0) == (RECIPES[name].cache.kv == "paged")


def test_requests_share_steps_and_leave_them_as_they_end(labs: dict[str, Lab]) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    lengths = (9, 3, 6)
    jobs = [_job(n, Request(prompt="Hi", max_new_tokens=most, ignore_eos=True), ended) for n, most in enumerate(lengths)]
    loop = _serve(pipeline, Policy(max_batch=2, budget=None, order="fifo"), ByTurns({0: jobs}, {}), None)
    assert [len(ended[number].tokens) for number in range(3)] == list(lengths)
    # Each token but the first is a decode row; the third joins in the very step after the second has left.
    decoded = [step.decoded for step in loop.steps]
    assert [sum(n in step for step in decoded) for n in range(3)] == [most - 1 for most in lengths]
    assert decoded == [(0, 1)] * 2 + [(0, 2)] * 5 + [(0,)] * 1
    assert [step.waiting for step in loop.steps][:2] == [1, 1]


def test_a_step_computes_no_more_of_prompts_than_its_budget(labs: dict[str, Lab]) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    first = _job(0, Request(prompt="Hi", max_new_tokens=30, ignore_eos=True), ended)
    second = _job(1, Request(images=[PICTURES[0]], prompt=TEXTS[2] * 3, max_new_tokens=2, ignore_eos=True), ended)
    loop = _serve(pipeline, Policy(max_batch=8, budget=20, order="fifo"), ByTurns({0: [first], 4: [second]}, {}), None)
    together = [step for step in loop.steps if any(number == 1 for number, _ in step.prefilled)]
    assert len(together) > 5
    assert all(sum(n for _, n in step.prefilled) + len(step.decoded) <= 20 + 1 for step in together)  # and its own first row
    assert all(0 in step.decoded for step in together), "the answer under way goes on in every step"
    assert sum(n for step in loop.steps for number, n in step.prefilled if number == 1) == ended[1].n_prompt


def test_who_waits_for_whom_is_in_the_trace(labs: dict[str, Lab]) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    requests = [Request(images=[PICTURES[0]], prompt="Hi", max_new_tokens=4, ignore_eos=True) for _ in range(3)]
    jobs = [_job(number, request, ended) for number, request in enumerate(requests)]
    _serve(pipeline, Policy(max_batch=2, budget=None, order="fifo"), ByTurns({0: jobs}, {}), None)
    traces = [job.tracer.finish() for job in jobs]
    # The second is admitted after the first's prompt, the third when one of them has ended.
    queued = [trace.stages()["queued"] for trace in traces]
    assert queued[0] < queued[1] < queued[2]
    for trace in traces:
        assert sum(trace.stages().values()) + trace.unaccounted_ns == trace.first_chunk_ns
        assert trace.unaccounted_ns < trace.first_chunk_ns / 2
    assert any(span.name == "waiting" for span in traces[0].spans), "it waits while the second's prompt is computed"


def test_what_is_wrong_with_one_request_is_no_fault_of_another(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    good = Request(prompt="Hi", max_new_tokens=5, ignore_eos=True)
    requests = [good, Request(prompt="Hi", max_new_tokens=10_000), Request(images=[b"no image"], prompt="Hi"), good]
    jobs = [_job(number, request, ended) for number, request in enumerate(requests)]
    _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo"), ByTurns({0: jobs}, {}), None)
    assert isinstance(ended[1], RequestError)
    assert isinstance(ended[2], RequestError)
    assert ended[0].tokens == ended[3].tokens
    assert len(ended[0].tokens) == 5

    # A decode step that fails ends those that shared it, and gives their blocks back.
    ended.clear()
    monkeypatch.setattr(pipeline.stages, "decode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("lost")))
    _serve(
        pipeline,
        Policy(max_batch=8, budget=None, order="fifo"),
        ByTurns({0: [_job(0, good, ended), _job(1, good, ended)]}, {}),
        None,
    )
    assert [str(ended[number]) for number in (0, 1)] == ["lost", "lost"]
    assert pipeline.cache._memory.paged.pool.n_used == 0


def test_a_loop_waits_for_requests_and_ends_when_no_more_will_come(labs: dict[str, Lab]) -> None:
    pipeline, ended, inbox = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any](), Inbox()
    request = Request(prompt="Hi", max_new_tokens=2, ignore_eos=True)

    def send() -> None:
        for number in range(3):
            time.sleep(0.05)
            inbox.put(_job(number, request, ended))
        inbox.close()

    sender = threading.Thread(target=send)
    sender.start()
    _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo"), inbox, None)
    sender.join()
    assert sorted(ended) == [0, 1, 2]
