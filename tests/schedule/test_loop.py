"""Under load every request makes the tokens that it makes alone, whatever came and went beside it."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, RequestCancelledError, RequestError, Sampling, photo
from fastvl_lab.cache.blocks import BlockPool
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture.execute import Capture
from fastvl_lab.decoder.sampler import Sampler
from fastvl_lab.outcome import Outcome
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.preprocessor import open_images
from fastvl_lab.request import Pixels, VisionTokens
from fastvl_lab.schedule.in_flight import InFlight
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.loop import Loop, one_at_a_time, unpackers
from fastvl_lab.schedule.policy import Policy
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.trace import Tracer

SEEDS = [pytest.param(range(2), id="few"), pytest.param(range(2, 25), id="many", marks=pytest.mark.nightly)]
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


def _job(
    number: int,
    request: Request,
    ended: dict[int, Any],
    stop: threading.Event | None = None,
    sent: dict[int, list[int]] | None = None,
) -> Job:
    """sent: filled with the tokens that were sent."""

    def deliver(text: str, tokens: tuple[int, ...]) -> None:
        tracer.delivered()
        if sent is not None:
            sent.setdefault(number, []).extend(tokens)

    def end(outcome: Outcome | Exception) -> None:
        assert number not in ended, "a job ends once"
        ended[number] = outcome

    tracer = Tracer(torch.device("cpu"), stop=stop)
    return Job(number=number, request=request, tracer=tracer, deliver=deliver, end=end)


@pytest.fixture(scope="module")
def threads() -> ThreadPoolExecutor:
    return unpackers(torch.device("cpu"))


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", RECIPES)
def test_random_schedules_change_no_token(shallow: Lab, name: str, seeds: range, threads: ThreadPoolExecutor) -> None:
    """Arrivals, lengths, pictures, cancellations, budgets, orders and ways to encode drawn at random.

    Over pools that cannot hold all prompts at once, or all of their answers; of few layers, in each of which that is the same.
    """
    short = 2 * tokenize(Request(prompt="Hi"), (), shallow.checkpoint).n_tokens + 68  # two prompts, and the answer of one
    wide, narrow = (_pipeline(shallow, RECIPES[name], session_len) for session_len in (512, short))
    alike = {"schedule.batching": "one_at_a_time", "cache.image_reuse": "off", "cache.prefix_reuse": "off"}
    plain = {
        pipeline: _pipeline(shallow, RECIPES[name].replace(alike), pipeline.checkpoint.session_len) for pipeline in (wide, narrow)
    }
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
        if policy.budget is not None and not policy.packs_images and RECIPES[name].vit.tower == "lean":
            policy = dataclasses.replace(policy, stops_in_tower=drawn.choice((False, True)))
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


def _pair(lab: Lab) -> tuple[int, list[Request]]:
    """A session, and two requests whose prompts have room in its blocks together, and whose answers have not."""
    request = dataclasses.replace(_shows(0), max_new_tokens=40)
    grids = open_images(request, lab.checkpoint).grids
    return 2 * tokenize(request, grids, lab.checkpoint).n_tokens + 64, [request, request]


@pytest.mark.parametrize("reuse", [False, True])
def test_who_was_admitted_last_gives_way_and_goes_on_where_it_was(lab: Lab, reuse: bool) -> None:
    """Its first text is out when it leaves the caches; what follows comes as if nothing had been."""
    session_len, requests = _pair(lab)
    pipeline = _pipeline(lab, RECIPES["fastest, reuse" if reuse else "fastest, paged"], session_len)
    alone = _alone(pipeline, requests[0])
    pipeline.cache._memory.forget()
    late, ended, sent = Request(prompt="Hi", max_new_tokens=2, ignore_eos=True), dict[int, Any](), dict[int, list[int]]()
    jobs = [_job(number, request, ended, sent=sent) for number, request in enumerate([*requests, late])]
    loop = _serve(pipeline, Policy(max_batch=8, budget=None, order="shortest_first"), ByTurns({0: jobs[:2], 8: jobs[2:]}, {}))
    assert [number for step in loop.steps for number in step.preempted] == [1]
    assert [number for step in loop.steps for number in step.admitted] == [0, 1, 1, 2], "nobody new is before it"
    patches = [n for step in loop.steps for number, n in step.encoded if number == 1]
    assert patches == ([] if reuse else [patches[0]] * 2), "visual tokens come from the tower, or from where they were kept"
    for number in (0, 1):
        assert ended[number].tokens == alone
        assert sent[number] == list(alone), "each token was sent once"
    at = next(n for n, step in enumerate(loop.steps) if step.preempted)
    assert loop.steps[at].decoded == (0,)
    assert loop.steps[at].waiting == 2
    first, second, _ = (job.tracer.finish() for job in jobs)
    assert (first.counts.get("schedule: preempted"), second.counts.get("schedule: preempted")) == (None, 1)
    assert ended[1].reused == reuse, "what it finds of its own when it comes back is no cache hit"
    back = next(step for step in loop.steps[at:] if step.admitted)
    waits = [(start, end) for name, start, end in _on_clock(jobs[1]) if name == "waiting" and end > loop.steps[at].end_ns]
    assert waits[0][0] < loop.steps[at].end_ns < back.start_ns < waits[0][1] < back.end_ns, "until it goes on"
    names = [span.name for span in second.spans]
    assert "queued" not in names[names.index("admit") :]


def test_who_samples_makes_its_own_text_whoever_shares_its_steps_and_when_it_gave_way(lab: Lab) -> None:
    """Its draws go on where they were; beside it are others that sample, one that is greedy, and one that stops."""
    session_len, (greedy, _) = _pair(lab)
    pipeline = _pipeline(lab, RECIPES["fastest, paged"], session_len)
    text, plain = Request(prompt="Hi", max_new_tokens=16, ignore_eos=True), list[str]()
    pipeline.run(text, Tracer(torch.device("cpu"), "off"), lambda piece, _: plain.append(piece))
    requests = [
        dataclasses.replace(greedy, sampling=Sampling(temperature=1.1, seed=1)),
        dataclasses.replace(greedy, sampling=Sampling(temperature=0.9, top_p=0.9, frequency_penalty=0.5, seed=2)),
        greedy,
        dataclasses.replace(text, sampling=Sampling(stop="".join(plain)[5:8])),
        dataclasses.replace(text, sampling=Sampling(repetition_penalty=1.3)),
    ]
    alone, ended = [_alone(pipeline, request) for request in requests], dict[int, Any]()
    assert len({tokens[:8] for tokens in alone}) == 4, "the answers are others, but for that of the stop"
    jobs = {0: [_job(n, request, ended) for n, request in enumerate(requests[:2])]}
    jobs |= {2: [_job(n, request, ended) for n, request in enumerate(requests) if n >= 2]}
    loop = _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo"), ByTurns(jobs, {}))
    assert 1 in [number for step in loop.steps for number in step.preempted], "one that samples gave way"
    assert max(len(step.decoded) for step in loop.steps) > 1
    assert [ended[number].tokens for number in range(5)] == alone
    assert [ended[number].finish_reason for number in range(5)] == ["length", "length", "length", "stop", "length"]


def test_one_request_may_fill_all_blocks(lab: Lab) -> None:
    session_len, requests = _pair(lab)
    pipeline, ended = _pipeline(lab, RECIPES["fastest, paged"], session_len), dict[int, Any]()
    whole = dataclasses.replace(requests[0], max_new_tokens=10_000, fit=True)
    loop = _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo"), ByTurns({0: [_job(0, whole, ended)]}, {}))
    assert ended[0].n_prompt + len(ended[0].tokens) == session_len
    assert not any(step.preempted for step in loop.steps)


def _on_clock(job: Job) -> list[tuple[str, int, int]]:
    """The spans of its trace, from when to when on the host's clock (ns)."""
    since = job.tracer.started_ns
    return [(span.name, since + span.start_ns, since + span.end_ns) for span in job.tracer.finish().spans]


def _calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the images of each call of the tower."""
    calls, encode = list[int](), pipeline.stages.encode

    def counted(pixels: Pixels, tracer: Tracer) -> VisionTokens:
        calls.append(len(pixels.shapes))
        return encode(pixels, tracer)

    monkeypatch.setattr(pipeline.stages, "encode", counted)
    return calls


def _shows(*pictures: int) -> Request:
    images = [PICTURES[number] for number in pictures]
    return Request(images=images, prompt="Hi", max_new_tokens=6, ignore_eos=True, min_pixels=3136, max_pixels=6400)


def test_images_of_requests_that_a_step_admits_share_a_call_of_the_tower(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(lab, RECIPES["fastest, paged"]), dict[int, Any]()
    requests = [_shows(0), _shows(), _shows(2, 1), _shows(1)]
    alone = [_alone(pipeline, request) for request in requests]
    calls = _calls(pipeline, monkeypatch)
    jobs = [_job(number, request, ended) for number, request in enumerate(requests)]
    policy = Policy(max_batch=8, budget=None, order="fifo", packs_images=True)
    loop = _serve(pipeline, policy, ByTurns({0: jobs}, {}))
    assert calls == [4]
    assert loop.steps[0].admitted == (0, 1, 2, 3)
    assert [ended[number].tokens for number in range(4)] == alone
    vit = [(number, s, e) for number in range(4) for name, s, e in _on_clock(jobs[number]) if name == "vit"]
    assert [number for number, _, _ in vit] == [0, 2, 3]
    assert max(start for _, start, _ in vit) < min(end for *_, end in vit), "it is one call"


def test_an_image_that_several_of_them_show_is_made_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(lab, RECIPES["fastest, reuse"]), dict[int, Any]()
    requests = [_shows(0), _shows(0), _shows(1, 0), _shows(2)]
    alone = [_alone(_pipeline(lab, RECIPES["fastest, paged"]), request) for request in requests]
    calls = _calls(pipeline, monkeypatch)
    jobs = [_job(number, request, ended) for number, request in enumerate(requests)]
    _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo", packs_images=True), ByTurns({0: jobs}, {}))
    assert calls == [1, 2]
    assert [ended[number].tokens for number in range(4)] == alone
    assert [job.tracer.finish().counts.get("cache: images found", 0) for job in jobs] == [0, 1, 1, 0]


def test_a_step_with_a_budget_packs_no_more_images_than_it_would_have_admitted(labs: dict[str, Lab]) -> None:
    pipeline, admitted = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), []
    for packs_images in (False, True):
        ended: dict[int, Any] = {}
        jobs = [_job(number, _shows(number), ended) for number in range(3)]
        policy = Policy(max_batch=8, budget=100, order="fifo", packs_images=packs_images)
        loop = _serve(pipeline, policy, ByTurns({0: jobs}, {}))
        admitted.append([list(step.admitted) for step in loop.steps if step.admitted])
    assert admitted[0] == admitted[1] == [[0, 1], [2]]


def test_a_call_of_the_tower_that_fails_ends_those_who_shared_it(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    monkeypatch.setattr(pipeline.stages, "encode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("lost")))
    jobs = [_job(number, request, ended) for number, request in enumerate([_shows(0), _shows(), _shows(1)])]
    _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo", packs_images=True), ByTurns({0: jobs}, {}))
    assert [str(ended[number]) for number in (0, 2)] == ["lost", "lost"]
    assert len(ended[1].tokens) == 6
    assert pipeline.cache._memory.paged.pool.n_used == 0


def test_pieces_of_a_prompt_wait_for_the_decode_steps_between_them(labs: dict[str, Lab]) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    jobs = [_job(0, dataclasses.replace(_shows(), max_new_tokens=30), ended), _job(1, _shows(0), ended)]
    _serve(pipeline, Policy(max_batch=8, budget=20, order="fifo"), ByTurns({0: jobs[:1], 4: jobs[1:]}, {}))
    names = [span.name for span in jobs[1].tracer.finish().spans if span.name in ("prefill", "waiting")]
    pieces = names.count("prefill")
    assert pieces > 2
    assert names[: 2 * pieces - 1] == [("prefill", "waiting")[n % 2] for n in range(2 * pieces - 1)]


def test_answers_under_way_go_on_between_blocks_of_the_tower(lab: Lab) -> None:
    """So nobody waits for a whole image; a budget of less than a block is one block; without images there is nothing to stop."""
    pipeline, ended = _pipeline(lab, RECIPES["fastest, paged"]), dict[int, Any]()
    requests = [dataclasses.replace(_shows(), max_new_tokens=60), _shows(2, 0)]
    alone = [_alone(pipeline, request) for request in requests]
    jobs = [_job(number, request, ended) for number, request in enumerate(requests)]
    policy = Policy(max_batch=8, budget=2, order="fifo", stops_in_tower=True)
    loop = _serve(pipeline, policy, ByTurns({0: jobs[:1], 30: jobs[1:]}, {}))
    assert [ended[number].tokens for number in range(2)] == alone
    in_tower = [step for step in loop.steps if step.encoded]
    n_blocks = len(lab.checkpoint.vision.blocks)
    assert len(in_tower) == n_blocks
    assert all(step.decoded == (0,) for step in in_tower)
    assert not any(step.prefilled for step in in_tower), "a prompt follows its images"
    grids = open_images(requests[1], lab.checkpoint).grids
    assert sum(n for step in in_tower for _, n in step.encoded) == sum(grid.n_patches for grid in grids)
    assert [name for name, _, _ in _on_clock(jobs[1]) if name in ("vit", "waiting")][:4] == ["vit", "vit", "waiting", "vit"]


def test_an_image_that_is_in_the_tower_is_not_sent_there_again(lab: Lab) -> None:
    """Who shows it too waits for it, also where he was admitted while it was on its way."""
    pipeline, ended = _pipeline(lab, RECIPES["fastest, reuse"]), dict[int, Any]()
    jobs = [_job(number, _shows(0), ended) for number in range(2)]
    policy = Policy(max_batch=8, budget=30, order="fifo", stops_in_tower=True)
    loop = _serve(pipeline, policy, ByTurns({0: jobs[:1], 1: jobs[1:]}, {}))
    grids = open_images(_shows(0), lab.checkpoint).grids
    assert sum(n for step in loop.steps for _, n in step.encoded) == grids[0].n_patches
    assert ended[0].tokens == ended[1].tokens


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


def test_a_fault_of_the_loops_own_ends_every_request(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait as well as those under way hear of it at once, and give their blocks back."""
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    jobs = [_job(number, Request(prompt="Hi", max_new_tokens=5, ignore_eos=True), ended) for number in range(3)]
    monkeypatch.setattr(Loop, "_decode", lambda self: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        _serve(pipeline, Policy(max_batch=2, budget=None, order="fifo"), ByTurns({0: jobs}, {}), None)
    assert [str(ended[number]) for number in range(3)] == ["a fault"] * 3
    assert pipeline.cache._memory.paged.pool.n_used == 0


def test_who_comes_late_is_timed_from_a_mark_of_its_own_time(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    jobs = [_job(number, Request(prompt="Hi", max_new_tokens=4, ignore_eos=True), ended) for number in range(3)]
    loop = Loop(pipeline, Policy(max_batch=8, budget=None, order="fifo"), on_step=(steps := list[object]()).append)
    monkeypatch.setattr("fastvl_lab.schedule.loop._ANCHORED", 0.0)
    with torch.inference_mode():
        loop.serve(ByTurns({0: jobs[:1], 1: jobs[1:2], 2: jobs[2:]}, {}))
    marks = [job.tracer._anchor.ns for job in jobs]
    assert marks == sorted(set(marks)), "each has its own where a mark serves for no time"
    assert len(steps) > 3
    assert loop.steps == []


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


def test_a_sampler_that_fails_ends_its_own_request_alone(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    greedy = Request(prompt="Hi", max_new_tokens=6, ignore_eos=True)
    drawing = [dataclasses.replace(greedy, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (1, 2)]
    alone = [_alone(pipeline, request) for request in (greedy, drawing[1])]
    chosen = Sampler.__call__

    def fails_at_its_third(self: Sampler, logits: torch.Tensor) -> torch.Tensor:
        if self._n_made == 2 and self._generator is not None and self._generator.initial_seed() == 1:
            raise RuntimeError("a grammar ended")
        return chosen(self, logits)

    monkeypatch.setattr(Sampler, "__call__", fails_at_its_third)
    inbox = Inbox()
    for number, request in enumerate((greedy, *drawing)):
        inbox.put(_job(number, request, ended))
    inbox.close()
    _serve(pipeline, Policy(max_batch=8, budget=None, order="fifo"), inbox)
    assert isinstance(ended[1], RuntimeError)
    assert [ended[number].tokens for number in (0, 2)] == alone


FIFO = Policy(max_batch=8, budget=None, order="fifo")
HI = Request(prompt="Hi", max_new_tokens=6, ignore_eos=True)


def test_what_the_tower_leaves_of_a_steps_budget_is_the_prompts(lab: Lab) -> None:
    pipeline, ended = _pipeline(lab, RECIPES["fastest, paged"]), dict[int, Any]()
    policy = Policy(max_batch=8, budget=512, order="fifo", stops_in_tower=True)
    first, *_ = _serve(pipeline, policy, ByTurns({0: [_job(0, _shows(2, 0), ended)]}, {})).steps
    assert [number for number, _ in first.encoded] == [0]
    assert first.prefilled == ((0, ended[0].n_prompt),)


def test_what_was_compiled_for_a_request_that_failed_is_no_part_of_another(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, ended = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any]()
    prefill = pipeline.stages.prefill

    def fails_once(*inputs: Any) -> Any:
        monkeypatch.setattr(pipeline.stages, "prefill", prefill)
        pipeline.stages._prefill.fresh.append(Capture(stage="prefill", how="compile", shape="", seconds=1.0, n_bytes=0))
        raise RuntimeError("lost")

    monkeypatch.setattr(pipeline.stages, "prefill", fails_once)
    _serve(pipeline, FIFO, ByTurns({0: [_job(number, HI, ended) for number in range(2)]}, {}))
    assert str(ended[0]) == "lost"
    assert ended[1].captures == ()


@pytest.mark.parametrize("ends", ["served", "given up", "failed"])
def test_who_has_left_holds_nothing_while_others_go_on(lab: Lab, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """Neither the cache of the last step that was shared nor an error's traceback keeps keys, values and embeddings."""
    pipeline, ended, stop = _pipeline(lab, RECIPES["fastest, concat"]), dict[int, Any](), threading.Event()
    held: list[weakref.ref[torch.Tensor]] = []
    prefill = pipeline.stages.prefill

    def watched(hidden: torch.Tensor, prompt: Any, vision: Any, kv: Any, tracer: Tracer) -> torch.Tensor:
        if not held:
            logits = prefill(hidden, prompt, vision, kv, tracer)
            held.extend([weakref.ref(hidden), weakref.ref(kv._sequences[0].keys[0])])
            if ends == "failed":
                raise RuntimeError("lost")
            return logits
        return prefill(hidden, prompt, vision, kv, tracer)

    monkeypatch.setattr(pipeline.stages, "prefill", watched)
    jobs = [_job(0, dataclasses.replace(HI, max_new_tokens=3 if ends == "served" else 40), ended, stop), _job(1, HI, ended)]
    if ends == "failed":  # who is told keeps no error
        jobs[0] = dataclasses.replace(jobs[0], end=lambda error: ended.update({0: str(error)}))
    alive: list[tuple[bool, list[bool]]] = []

    def on_step(_: object) -> None:
        alive.append((0 in ended, [ref() is not None for ref in held]))
        if ends == "given up" and len(alive) == 2:
            stop.set()

    loop = Loop(pipeline, FIFO, on_step=on_step)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            loop.serve(ByTurns({0: jobs}, {}))
    finally:
        gc.enable()
    assert sorted(ended) == [0, 1]
    after = [refs for over, refs in alive if over]
    assert len(after) > 1, "the other goes on"
    assert after[1] == [False, False]


def test_a_job_ends_once_also_where_who_is_told_of_it_fails(labs: dict[str, Lab]) -> None:
    pipeline, ended, told = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any](), list[object]()

    def fails(outcome: Outcome | Exception) -> None:
        told.append(outcome)
        raise ZeroDivisionError("of who asked")

    jobs = [dataclasses.replace(_job(0, dataclasses.replace(HI, max_new_tokens=2), ended), end=fails), _job(1, HI, ended)]
    with pytest.raises(ZeroDivisionError, match="of who asked"):
        _serve(pipeline, FIFO, ByTurns({0: jobs}, {}))
    assert [type(outcome) for outcome in told] == [Outcome]
    assert isinstance(ended[1], ZeroDivisionError), "nobody serves it any more"
    assert pipeline.cache._memory.paged.pool.n_used == 0


def test_who_comes_while_an_image_is_unpacked_does_not_wait_for_it(
    labs: dict[str, Lab], threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, ended, inbox = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any](), Inbox()
    unpacking, go_on, unpack = threading.Event(), threading.Event(), InFlight.unpack

    def held(flight: InFlight) -> None:
        if flight.job.number == 0:
            unpacking.set()
            go_on.wait(10)
        unpack(flight)

    def send() -> None:
        inbox.put(_job(0, _shows(0), ended))
        assert unpacking.wait(30)
        time.sleep(0.1)  # the loop waits for it by now
        job = _job(1, HI, ended)
        inbox.put(dataclasses.replace(job, end=lambda outcome: (job.end(outcome), go_on.set())))
        inbox.close()

    monkeypatch.setattr(InFlight, "unpack", held)
    (sender := threading.Thread(target=send)).start()
    loop = _serve(pipeline, FIFO, inbox, threads)
    sender.join()
    assert [type(ended[number]) for number in range(2)] == [Outcome, Outcome]
    assert [number for step in loop.steps for number in step.admitted] == [1, 0]


def test_no_more_images_wait_unpacked_than_requests_are_under_way_at_most(
    labs: dict[str, Lab], threads: ThreadPoolExecutor
) -> None:
    """Patches of a long queue would fill the device's memory."""
    pipeline, ended, most = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest, paged"]), dict[int, Any](), list[int]()
    requests = [_shows(number % 3) for number in range(12)]
    alone = [_alone(pipeline, request) for request in requests[:3]]
    loop = Loop(pipeline, Policy(max_batch=2, budget=None, order="fifo"), threads)
    inbox = ByTurns({0: [_job(number, request, ended) for number, request in enumerate(requests)]}, {})
    inbox.watch = lambda: most.append(sum(flight.pixels is not None for flight in loop._waiting))
    with torch.inference_mode():
        loop.serve(inbox)
    assert [ended[number].tokens for number in range(12)] == alone * 4
    assert max(most) <= 2


def test_what_is_known_of_an_image_stays_known_while_others_push_it_out(lab: Lab) -> None:
    """Two that a step admits: the first's images take the places of one that the second has found, and of each other."""
    pipeline, ended = _pipeline(lab, RECIPES["fastest, reuse"].replace("cache.prefix_reuse", "off")), dict[int, Any]()
    requests = [_shows(1, 2), _shows(0, 1)]
    alone = [_alone(pipeline, request) for request in requests]
    _alone(pipeline, _shows(0))
    images = pipeline.cache._memory.images
    images.max_bytes = max(kept.n_bytes for kept in images._kept.values())
    while images.n_bytes > images.max_bytes:
        images.n_bytes -= images._kept.popitem(last=False)[1].n_bytes
    assert len(images) == 1, "the second's, which the first does not show"
    loop = _serve(
        pipeline,
        Policy(max_batch=8, budget=None, order="fifo", packs_images=True),
        ByTurns({0: [_job(number, request, ended) for number, request in enumerate(requests)]}, {}),
    )
    assert [ended[number].tokens for number in range(2)] == alone
    assert [len(step.admitted) for step in loop.steps if step.admitted] == [2]


def test_a_fault_of_one_at_a_time_ends_who_waits() -> None:
    ended, inbox = dict[int, Any](), Inbox()
    for number in range(3):
        inbox.put(_job(number, HI, ended))

    def fails(_: object) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        one_at_a_time(lambda _: "made", torch.device("cpu"), inbox, fails, lingers=False)  # type: ignore[arg-type,return-value]
    assert [str(ended[number]) for number in range(3)] == ["made", "a fault", "a fault"]
