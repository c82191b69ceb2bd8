"""With its images unpacked beside the tower and the prefill, a request makes the tokens that it makes without."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any

import pytest
import torch

from fastvl_lab import ImageError, Lab, Recipe, Request, RequestCancelledError, RequestError, photo
from fastvl_lab.cache.memory import Memory
from fastvl_lab.errors import RecipeError
from fastvl_lab.outcome import Outcome
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.preprocessor import BoundPreprocessor
from fastvl_lab.request import Pixels
from fastvl_lab.schedule.in_flight import InFlight
from fastvl_lab.schedule.loop import unpackers
from fastvl_lab.schedule.overlap import Piece, pieces, worker
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.trace import Trace, Tracer

CPU = torch.device("cpu")
RECIPES = {
    "baseline": Recipe.baseline(),
    "fastest": Recipe.fastest(),
    "fastest, threads": Recipe.fastest().replace({"preprocessor.threads": "all", "cache.kv": "concat"}),
    "fastest, padded": Recipe.fastest().replace({"capture.shapes": "multiples_of_64", "cache.kv": "paged"}),
}
REUSE = Recipe.fastest().replace({"cache.kv": "paged", "cache.prefix_reuse": "on", "cache.image_reuse": "on"})
SIZES = (("astronaut", (56, 84)), ("coffee", (84, 56)), ("astronaut", (112, 56)), ("coffee", (56, 56)))
PICTURES = [photo(name, size) for name, size in SIZES]


def _pipeline(lab: Lab, recipe: Recipe, overlap: str) -> Pipeline:
    checkpoint = dataclasses.replace(lab.checkpoint, session_len=512)
    return Pipeline(checkpoint, recipe.replace("schedule.overlap", overlap), Memory(checkpoint))


def _request(pictures: list[bytes], *, prompt: str = "What are these?", **changes: Any) -> Request:
    return Request(images=pictures, prompt=prompt, max_new_tokens=6, ignore_eos=True, min_pixels=3136, max_pixels=6400, **changes)


def _with_text_around(pictures: list[bytes]) -> Request:
    """Text before, between and behind the images, and two of them with nothing between."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "Look at this:"}]
    for number, picture in enumerate(pictures):
        parts.append({"type": "image", "image": picture})
        if number != 1:
            parts.append({"type": "text", "text": f"That was picture {number + 1}."})
    return Request(
        messages=[
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "And now?"},
        ],
        max_new_tokens=6,
        ignore_eos=True,
        min_pixels=3136,
        max_pixels=6400,
    )


def _run(pipeline: Pipeline, request: Request, stop: threading.Event | None = None) -> tuple[Outcome, Trace]:
    tracer = Tracer(CPU, stop=stop)
    tracer.start()
    outcome = pipeline.run(request, tracer, lambda text, tokens: tracer.delivered())
    return outcome, tracer.finish()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The keys and values of each request that ends, layer by layer, copied."""
    found: list[list[torch.Tensor]] = []
    ends = InFlight.outcome

    def outcome(flight: InFlight) -> Outcome:
        n_layers = flight._bound.checkpoint.config.get_text_config().num_hidden_layers
        found.append([side.clone() for layer in range(n_layers) for side in flight.place.kv.read(layer, 0)])
        return ends(flight)

    monkeypatch.setattr(InFlight, "outcome", outcome)
    return found


class AtOnce(ThreadPoolExecutor):
    """What it is given is done where it is submitted."""

    def submit(self, work: Any, /, *arguments: Any, **more: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments, **more))
        return done


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_are_those_without_and_the_cache_is_equal_up_to_rounding(
    lab: Lab, name: str, kept: list[list[torch.Tensor]]
) -> None:
    """An image alone in the tower and a piece alone in the decoder are products of other shapes, which round otherwise."""
    off, on = (_pipeline(lab, RECIPES[name], overlap) for overlap in ("off", "on"))
    for n, make in (
        (0, _request),
        (1, _request),
        (1, _with_text_around),
        (2, _with_text_around),
        (4, _request),
        (4, _with_text_around),
    ):
        kept.clear()
        request = make(PICTURES[:n])
        (expected, _), (made, trace) = _run(off, request), _run(on, request)
        assert made.tokens == expected.tokens
        torch.testing.assert_close(made.logits, expected.logits, atol=1e-4, rtol=0)
        for mine, without in zip(*kept, strict=True):
            torch.testing.assert_close(mine, without, atol=1e-4, rtol=0)
        prefills = [span for span in trace.spans if (span.name, span.lane, span.depth) == ("prefill", "host", 0)]
        assert len(prefills) == n + 1
        if n == 0:
            assert _equal(*kept), "there is one piece, the whole"


def test_the_thread_changes_when_things_are_done_and_no_bit_of_them(lab: Lab, kept: list[list[torch.Tensor]]) -> None:
    on, request = _pipeline(lab, RECIPES["fastest"], "on"), _with_text_around(PICTURES)
    (beside, trace), _ = _run(on, request), setattr(on, "_beside", AtOnce(1))
    alone, _ = _run(on, request)
    assert {span.name for span in trace.spans if span.lane == "beside"} == {"decode_image", "preprocess"}
    assert torch.equal(beside.logits, alone.logits)
    assert _equal(*kept)


def test_logits_along_forced_tokens_are_those_without(lab: Lab) -> None:
    request, tokens = _request(PICTURES[:2]), torch.tensor([3, 1, 4, 1])
    off, on = (_pipeline(lab, RECIPES["fastest"], overlap).logits_along(request, tokens) for overlap in ("off", "on"))
    torch.testing.assert_close(on, off, atol=1e-4, rtol=0)


def test_what_is_known_is_not_made_again_and_stays_with_the_text_before_it(lab: Lab) -> None:
    """Image reuse, prefix reuse and both, over requests that share images and beginnings."""
    a, b, c, d = PICTURES
    requests = [_request(pictures) for pictures in ([a, b], [c, a, d], [a, b, c], [b, b, a, c], [a, b, c])]
    requests += [_request([a, b, c], prompt="Where?"), _with_text_around([d, a, c])]
    plain = _pipeline(lab, Recipe.fastest(), "off")
    expected = [_run(plain, request)[0].tokens for request in requests]
    towers = {}
    for kind in ("cache.image_reuse", "cache.prefix_reuse", "both"):
        recipe = REUSE if kind == "both" else REUSE.replace({"cache.image_reuse": "off", "cache.prefix_reuse": "off", kind: "on"})
        on = _pipeline(lab, recipe, "on")
        served = [_run(on, request) for request in requests]
        assert [outcome.tokens for outcome, _ in served] == expected, kind
        towers[kind] = [sum(s.name == "vit" and s.lane == "host" and s.depth == 0 for s in trace.spans) for _, trace in served]
        assert on.cache._memory.paged.pool.n_used == 0
    assert towers["cache.image_reuse"] == [2, 2, 0, 0, 0, 0, 0]
    assert towers["cache.prefix_reuse"][4:6] == [0, 0]


def test_an_image_found_in_part_is_made_again_and_its_rest_used(lab: Lab) -> None:
    """The end of a sequence is evicted first, here in the middle of the first of two images."""
    on = _pipeline(lab, REUSE.replace("cache.image_reuse", "off"), "on")
    request = dataclasses.replace(_request([photo("coffee", (224, 168)), PICTURES[0]]), max_pixels=None, max_new_tokens=1)
    first, _ = _run(on, request)
    ((at, length), _) = tokenize(request, on.images.open(request).grids, on.checkpoint).images
    pool, kept = on.cache._memory.paged.pool, at // 16 + 2
    holder = pool.admit([], (pool.n_blocks - kept) * 16)
    pool.extend(holder, (pool.n_blocks - kept) * 16)
    pool.free(holder)
    again, trace = _run(on, request)
    assert at < trace.counts["cache: prefix tokens found"] < at + length
    prefills = [span for span in trace.spans if (span.name, span.lane) == ("prefill", "host")]
    assert len(prefills) == 2, "there is no text before it to compute"
    torch.testing.assert_close(again.logits, first.logits, atol=1e-4, rtol=0)
    assert again.tokens == first.tokens


def test_a_prompt_is_cut_before_each_image_that_is_to_be_made() -> None:
    images = ((5, 10), (17, 4), (21, 6))
    whole = [Piece(None, range(0), 5), Piece(0, range(1), 17), Piece(1, range(1, 2), 21), Piece(2, range(2, 3), 40)]
    assert pieces(images, (0, 1, 2), 0, 40) == whole
    assert pieces((), (), 3, 40) == [Piece(None, range(0), 37)]
    assert pieces(images, (), 0, 40) == [Piece(None, range(3), 40)], "all are known"
    assert pieces(images, (1,), 0, 40) == [Piece(None, range(1), 17), Piece(1, range(1, 3), 40)], "the others are known"
    assert pieces(images, (0, 2), 9, 40) == [Piece(0, range(2), 12), Piece(2, range(2, 3), 31)], "the first begins in the cache"
    assert pieces(images, (1, 2), 17, 40) == [Piece(1, range(1, 2), 4), Piece(2, range(2, 3), 23)], "the cache ends before it"
    for cut in (whole, pieces(images, (0, 2), 9, 40)):
        assert all(a.end < b.end and a.images.stop == b.images.start for a, b in pairwise(cut))


def test_an_image_is_unpacked_inside_the_tower_of_the_one_before(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image i + 1 is held until the tower has begun on image i, and that until image i + 1 is unpacked: in turn both would wait."""
    on, request = _pipeline(lab, RECIPES["fastest"], "on"), _request(PICTURES)
    began, made = [[threading.Event() for _ in PICTURES] for _ in range(2)]
    each, encode, number = BoundPreprocessor.patches_of_each, on.stages.encode, count()

    def in_time(event: threading.Event) -> None:
        assert event.wait(30), "it is not done beside"

    def patches_of_each(*arguments: Any) -> Iterator[torch.Tensor]:
        found = each(*arguments)
        for image in range(len(PICTURES)):
            if image > 0:
                in_time(began[image - 1])
            patches = next(found)
            made[image].set()
            yield patches

    def held(pixels: Pixels, tracer: Tracer) -> Any:
        began[image := next(number)].set()
        if image + 1 < len(made):
            in_time(made[image + 1])
        return encode(pixels, tracer)

    monkeypatch.setattr(BoundPreprocessor, "patches_of_each", patches_of_each)
    monkeypatch.setattr(on.stages, "encode", held)
    _, trace = _run(on, request)
    towers = [span for span in trace.within_ttft() if span.name == "vit"]
    for name in ("decode_image", "preprocess"):
        unpacked = [span for span in trace.within_ttft("beside") if span.name == name]
        assert len(unpacked) == len(towers) == 4
        assert all(t.start_ns < u.start_ns < u.end_ns < t.end_ns for t, u in zip(towers, unpacked[1:], strict=False))
    # The host lane holds what TTFT is made of, once; the first image is awaited there.
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(trace.within_ttft()))
    assert sum(trace.stages().values()) + trace.unaccounted_ns == trace.first_chunk_ns
    assert "preprocess" not in trace.stages()
    tracks = {event["args"]["name"] for event in trace.to_chrome()["traceEvents"] if event["name"] == "thread_name"}
    assert tracks == {"host", "beside"}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_image_is_refused_in_the_same_words_and_its_room_given_back(lab: Lab, broken: int) -> None:
    pictures = list(PICTURES[:3])
    pictures[broken] = pictures[broken][: len(pictures[broken]) // 2]
    refusals = []
    for overlap in ("off", "on"):
        pipeline = _pipeline(lab, REUSE, overlap)
        with pytest.raises(ImageError) as refused:
            _run(pipeline, _request(pictures))
        refusals.append(str(refused.value))
        assert pipeline.cache._memory.paged.pool.n_used == 0
    assert refusals[0] == refusals[1]
    assert f"{broken + 1} of 3" in refusals[0]
    assert _run(pipeline, _request(PICTURES[:3]))[0].tokens, "the next request is served"


def test_what_headers_and_lengths_tell_is_refused_before_any_pixel_is_read(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    on = _pipeline(lab, RECIPES["fastest"], "on")
    monkeypatch.setattr(BoundPreprocessor, "patches_of_each", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(RequestError, match="over session_len, 512"):
        _run(on, dataclasses.replace(_request(PICTURES), max_new_tokens=510))
    with pytest.raises(ImageError, match="2 of 2"):
        _run(on, _request([PICTURES[0], b"no image"]))


@pytest.mark.parametrize("ends_by", ["cancellation", "error"])
def test_a_request_that_ends_early_leaves_nothing_running(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    """It ends in the tower of its first image, while its second is being unpacked: two more are never begun."""
    on, stop, begun = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest"], "on"), threading.Event(), threading.Event()
    preprocess, seen = on.images.preprocess, list[int]()

    def watched(picture: Any, one: Any) -> torch.Tensor:
        seen.append(len(seen))
        if len(seen) == 2:
            begun.set()
            ending.wait(30)
        return preprocess(picture, one)

    def ends(pixels: Pixels, tracer: Tracer) -> Any:
        assert begun.wait(30)
        stop.set() if ends_by == "cancellation" else None
        ending.set()
        if ends_by == "error":
            raise MemoryError("no room")
        return encode(pixels, tracer)

    ending, encode = threading.Event(), on.stages.encode
    on.images = dataclasses.replace(on.images, preprocess=watched)
    monkeypatch.setattr(on.stages, "encode", ends)
    with pytest.raises(RequestCancelledError if ends_by == "cancellation" else MemoryError):
        _run(on, _request(PICTURES), stop)
    assert on._beside is not None
    assert on._beside._work_queue.qsize() == 0
    assert len(seen) == 2, "nothing is unpacked for it any more"
    monkeypatch.undo()
    on.images = dataclasses.replace(on.images, preprocess=preprocess)
    assert (
        _run(on, _request(PICTURES))[0].tokens
        == _run(_pipeline(labs["tiny-qwen2.5-vl"], Recipe.fastest(), "off"), _request(PICTURES))[0].tokens
    )


def test_threads_that_unpack_for_a_card_have_it_as_their_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches patchify there, and each thread's own is at first the first."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    card = torch.device("cuda", 1)
    for threads in (worker(card), unpackers(card, 1)):
        with threads:
            assert threads.submit(lambda: current.device).result(10) == card


def test_a_pipeline_that_is_dropped_leaves_no_thread(labs: dict[str, Lab]) -> None:
    before = set(threading.enumerate())
    on = _pipeline(labs["tiny-qwen2.5-vl"], RECIPES["fastest"], "on")
    _run(on, _request(PICTURES[:2]))
    mine = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("fastvl-unpack")]
    assert len(mine) == 1
    del on
    gc.collect()
    mine[0].join(10)
    assert not mine[0].is_alive()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schedule.batching": "continuous", "cache.kv": "paged"}, "needs schedule.batching=one_at_a_time"),
        ({"capture.first_token": "single_graph"}, "needs capture.first_token=per_stage"),
        ({"capture.prefill": "graph"}, "needs capture.prefill=eager or compile"),
    ],
)
def test_what_it_does_not_go_with_is_refused_in_words(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"schedule.overlap=on {reason}"):
        Recipe.parse("fastest, attention.weights=plain").replace({"capture.decode": "eager", **changes, "schedule.overlap": "on"})
