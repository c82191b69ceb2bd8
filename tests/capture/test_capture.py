"""Slot 5: compiled, padded and recorded stages do what the plain ones do, and what they cost is counted."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, Run, photo
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture.compile_cache import keep_compiled, may_be_damaged, without_cache
from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import Graphs, GraphStore, Recording
from fastvl_lab.capture.shapes import keys_of_a_step, size_of
from fastvl_lab.checkpoint import tiny
from fastvl_lab.decoder.steps import merge
from fastvl_lab.errors import CaptureError, RecipeError, RequestError
from fastvl_lab.inputs import tensors
from fastvl_lab.kernels.decode_attention import decode_share_kernel
from fastvl_lab.measure.compare import break_even
from fastvl_lab.measure.tasks import text_prompt
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.request import Grid, ImageShape, Pixels, Prompt, VisionTokens
from fastvl_lab.trace import Tracer

CPU = torch.device("cpu")
OFF = Tracer(CPU, "off")
SIZES = [(56, 56), (168, 140), (140, 168), (84, 300), (300, 84), (224, 224), (448, 336), (336, 448), (28, 28), (500, 333)]
SIZES += [(112, 112), (640, 480)]
PADDINGS = ("multiples_of_64", "multiples_of_256", "powers_of_two")
QWEN2_5, QWEN3 = tiny.NAMES


def by_night(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


# What does not depend on the family: by night of the other one too.
ONE_FAMILY = pytest.mark.parametrize("shallow", [QWEN2_5, by_night(QWEN3)], indirect=True)


class PlayedRecorder:
    """Records on a CPU: a replay runs the program again on its buffers, and copies its results into the same outputs."""

    def __init__(self) -> None:
        self.n_bytes, self.n_recorded = 0, 0

    def record(self, program: Callable[[], tuple[torch.Tensor, ...]], room: int) -> Recording | None:
        outputs = tuple(output.clone() for output in program())
        n_bytes = sum(output.nbytes for output in outputs)
        if self.n_bytes + n_bytes > room:
            return None
        self.n_bytes += n_bytes
        self.n_recorded += 1

        def replay() -> None:
            for output, made in zip(outputs, program(), strict=True):
                output.copy_(made)

        for output in outputs:
            output.fill_(float("nan") if output.is_floating_point() else -1)  # what is not replayed is not there
        return Recording(replay=replay, outputs=outputs)

    def forget(self) -> None:
        self.n_bytes = 0


@pytest.fixture
def played(shallow: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The checkpoint in a lab of its own, whose CUDA graphs are played on the CPU."""
    monkeypatch.setattr(Recipe, "check", lambda recipe, target: None)
    mine = shallow.apart()
    mine.graphs = GraphStore(PlayedRecorder(), max_bytes=2**30, max_graphs=1000)
    return mine


def _request(size: tuple[int, int] | None, prompt: str = "What is this?", n: int = 6) -> Request:
    return Request(images=[photo("coffee", size)] if size else [], prompt=prompt, max_new_tokens=n, ignore_eos=True)


def _strip(lab: Lab, n_visual: int) -> Pixels:
    """Random patches of a strip of so many visual tokens, and of a square of four in a second image."""
    vision = lab.checkpoint.config.vision_config
    dim = 3 * vision.temporal_patch_size * vision.patch_size**2
    grids = (Grid(1, 2, 2 * (n_visual - 4)), Grid(1, 4, 4))
    patches = torch.randn(4 * n_visual, dim, generator=torch.Generator().manual_seed(n_visual))
    shapes = tuple(
        ImageShape(width=1, height=1, resized_width=1, resized_height=1, grid=grid, visual_tokens=grid.n_patches // 4)
        for grid in grids
    )
    return Pixels(patches=patches, shapes=shapes)


def _pair(lab: Lab, padding: str, more: str = "") -> tuple[Pipeline, Pipeline]:
    """The fastest recipe on stock patches, as it is and padded."""
    text = f"fastest, preprocessor.payload=float32, preprocessor.temporal=duplicated{more}"
    plain, padded = (Recipe.parse(text + changes) for changes in ("", f", capture.shapes={padding}"))
    checkpoint = dataclasses.replace(lab.checkpoint, session_len=1024)
    return Pipeline(checkpoint, plain, Memory(checkpoint)), Pipeline(checkpoint, padded, Memory(checkpoint))


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def test_sizes() -> None:
    sizes = {option: size_of(option) for option in PADDINGS}
    for size in sizes.values():
        assert size is not None
        padded = [size(n) for n in range(1, 2000)]
        assert all(p >= n for n, p in enumerate(padded, 1))
        assert all(size(p) == p for p in padded)
    expected = {
        "multiples_of_64": [64, 64, 128, 1664],
        "multiples_of_256": [256, 256, 256, 1792],
        "powers_of_two": [64, 64, 128, 2048],
    }
    assert {option: [size(n) for n in (1, 64, 65, 1636)] for option, size in sizes.items() if size} == expected
    assert size_of("exact") is None
    assert [keys_of_a_step(n) for n in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_padded_visual_tokens_are_the_same_at_every_edge(lab: Lab, padding: str) -> None:
    plain, padded = _pair(lab, padding)
    size = size_of(padding)
    assert size is not None
    for edge in (size(1), 2 * size(1)):
        for n in (edge - 1, edge, edge + 1):
            pixels = _strip(lab, n)
            ours, theirs = padded.stages.encode(pixels, OFF), plain.stages.encode(pixels, OFF)
            assert len(ours.parts) == len(theirs.parts)
            assert all(_close(a, b) for a, b in zip(ours.parts, theirs.parts, strict=True))


@pytest.mark.parametrize("kv", ["static", "paged"])
@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_padded_prompts_and_steps_are_the_same_at_every_edge(shallow: Lab, padding: str, kv: str) -> None:
    """Logits of prompts and of steps across an edge, with visual tokens and without; the store holds the tokens and no padding."""
    pipelines, size = _pair(shallow, padding, f", cache.kv={kv}"), size_of(padding)
    assert size is not None
    for n in (size(1) - 2, size(1) - 1, size(1), size(1) + 1, 2 * size(1)):
        for n_visual in (0, 9):
            prompt, vision = _prompt(shallow, n, n_visual)
            logits, stores = [], []
            for pipeline in pipelines:
                place = pipeline.cache.admit(prompt, 8, tuple)
                for pair in pipeline.cache.store.layers:  # type: ignore[union-attr]
                    for side in pair:
                        side.zero_()
                hidden = merge(prompt, vision, pipeline.decoder.weights.embed)
                place.extend(n)
                made = [pipeline.stages.prefill(hidden, prompt, vision, place.kv, OFF)]
                for step in range(4):
                    place.extend(1)
                    token, position = torch.full((1,), 7 * step), torch.full((1,), n + step)
                    made.append(pipeline.stages.decode(token, position, place.kv, OFF).logits)
                logits.append(torch.cat(made))
                stores.append([side[:-1].clone() for pair in pipeline.cache.store.layers for side in pair])
                place.close()
            assert _close(logits[1], logits[0])
            for ours, theirs in zip(*reversed(stores), strict=True):
                assert torch.equal(ours.any(-1), theirs.any(-1)), "padding is kept nowhere but in the slot that is no sequence's"
                assert int(ours.flatten(1).any(-1).sum()) == n + 4


def _prompt(lab: Lab, n: int, n_visual: int) -> tuple[Prompt, VisionTokens | None]:
    prompt, width = text_prompt(lab, n, 8), lab.checkpoint.config.get_text_config().hidden_size
    if n_visual == 0:
        return prompt, None
    levels = len(getattr(lab.checkpoint.config.vision_config, "deepstack_visual_indexes", ()))
    parts = torch.randn(1 + levels, n_visual, width, generator=torch.Generator().manual_seed(n))
    index = torch.arange(3, 3 + n_visual)
    with_image = Prompt(
        input_ids=prompt.input_ids, positions=prompt.positions, visual_index=index, next_position=n, images=((3, n_visual),)
    )
    return with_image, VisionTokens(embeds=parts[0], deepstack=tuple(parts[1:]))


@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_recipes_make_the_same_tokens(lab: Lab, padding: str) -> None:
    recipe = Recipe.parse(f"fastest, capture.shapes={padding}")
    for request in (_request((168, 140)), _request(None), _request((300, 84), "A longer question about it, " * 9)):
        ours, theirs = lab.run(request, recipe), lab.run(request, recipe.oracle(lab.checkpoint.image_backend))
        assert ours.tokens == theirs.tokens
        assert (ours.logits - theirs.logits).abs().max() < 1e-4
    n_patches = sum(shape.grid.n_patches for shape in ours.shapes)
    computed = {
        stage: ours.trace.counts[f"{what} computed"] for stage, what in [("vit", "vit: patches"), ("prefill", "prefill: tokens")]
    }
    assert ours.trace.padding["vit"] == pytest.approx(1 - n_patches / computed["vit"])
    assert ours.trace.padding["prefill"] == pytest.approx(1 - ours.n_prompt / computed["prefill"])
    assert 0 < ours.trace.padding["decode"] < 1
    assert f"{ours.trace.padding['vit']:.1%} of vit" in repr(ours)
    assert theirs.trace.padding == {}


def test_images_kept_by_a_padded_recipe_are_not_another_one_s(lab: Lab) -> None:
    """Padding rounds differently, and what is reused was rounded by the recipe that finds it."""
    mine, request = lab.apart(), _request((168, 140))
    text = "fastest, cache.image_reuse=on"
    recipes = (text, f"{text}, capture.shapes=multiples_of_64")
    assert [mine.run(request, recipe).kind for recipe in (*recipes, *recipes)] == ["cold", "cold", "cache_hit", "cache_hit"]


def test_compiled_stages_take_any_image_size(shallow_labs: dict[str, Lab]) -> None:
    """A window, odd sides, many windows, and text alone: the tokens of Transformers, and at most 4 compilations a stage.

    Of the family with windows; tests of parity hold compiled stages of both to Transformers at eight shapes of requests.
    """
    lab = shallow_labs["tiny-qwen2.5-vl"]
    fresh = lab.apart()
    text = "fastest, capture.vit=compile, capture.prefill=compile, capture.decode=compile"
    recipe = Recipe.parse(text)
    oracle = recipe.oracle(lab.checkpoint.image_backend)
    kinds, compilations = [], 0
    for size in [(56, 56), (84, 300), (448, 336), None, (56, 56)]:
        run, theirs = fresh.run(_request(size), recipe), fresh.run(_request(size), oracle)
        assert run.tokens == theirs.tokens
        assert (run.logits - theirs.logits).abs().max() < 1e-4
        assert (len(run.captures) > 0) == any("compilations" in name for name in run.trace.counts)
        kinds.append(run.kind)
        compilations += len(run.captures)
        if run.captures:
            assert run.kind == "cold"
            assert any(span.name.endswith(".compile") and span.depth == 1 for span in run.trace.spans)
            assert "compile of" in repr(run)
            assert Run.from_record(run.to_record()).captures == run.captures
    assert kinds[0] == "cold"
    assert kinds[-1] == "warm"
    made = fresh.captures(recipe)
    assert len(made) == compilations
    for stage in ("vit", "prefill", "decode"):
        mine = [capture for capture in made if capture.stage == stage]
        assert 1 <= len(mine) <= 4
        assert all(capture.seconds > 0 and capture.how == "compile" for capture in mine)


@pytest.mark.parametrize(
    "text", ["capture.vit=graph", "capture.prefill=graph", "capture.decode=graph", "capture.first_token=single_graph"]
)
def test_graphs_are_refused_on_a_cpu_with_the_reason(lab: Lab, text: str) -> None:
    with pytest.raises(RecipeError, match="needs a CUDA device, and the lab runs on cpu"):
        lab.run(_request(None), f"fastest, {text}")


GRAPHS = {
    "stages": "capture.vit=graph, capture.prefill=graph, capture.decode=graph",
    "single": "capture.first_token=single_graph, capture.decode=graph",
}


@pytest.mark.parametrize("shapes", ["exact", "multiples_of_64"])
@pytest.mark.parametrize("graphs", GRAPHS)
def test_recorded_stages_make_the_same_tokens_and_record_nothing_in_steady_state(played: Lab, graphs: str, shapes: str) -> None:
    recipe = Recipe.parse(f"fastest, {GRAPHS[graphs]}, capture.shapes={shapes}")
    oracle = recipe.oracle(played.checkpoint.image_backend)
    requests = [_request(size) for size in (SIZES[1], SIZES[2], None, SIZES[5])]
    theirs = [played.run(request, oracle) for request in requests]
    first = [played.run(request, recipe) for request in requests]
    again = [played.run(request, recipe) for request in requests]
    for ours, truth in zip([*first, *again], [*theirs, *theirs], strict=True):
        assert ours.tokens == truth.tokens
        assert (ours.logits - truth.logits).abs().max() < 1e-4
    assert len(first[0].captures) == {"stages": 3, "single": 2}[graphs]
    assert all(run.kind == "cold" for run in first)
    assert all(run.captures == () and run.kind == "warm" for run in again)
    stages = {span.name for span in again[0].trace.spans if span.depth == 0}
    assert ("first_token" in stages) == (graphs == "single")
    assert stages.isdisjoint({"vit", "merge", "prefill"} if graphs == "single" else {"first_token"})
    kept = played.captures(recipe)
    assert len(kept) == sum(len(run.captures) for run in first)
    assert all(capture.how == "graph" and capture.n_bytes > 0 and capture.uses > 0 for capture in kept)


def test_a_request_that_is_left_leaves_its_graphs_usable(played: Lab) -> None:
    recipe = Recipe.parse(f"fastest, {GRAPHS['stages']}")
    truth = played.run(_request(SIZES[1], n=12), recipe.oracle(played.checkpoint.image_backend))
    for chunk in played.stream(_request(SIZES[1], n=12), recipe):
        assert chunk.tokens
        break
    assert played.run(_request(SIZES[1], n=12), recipe).tokens == truth.tokens


def test_a_request_of_another_image_does_not_see_what_was_replayed_before(played: Lab) -> None:
    recipe = Recipe.parse(f"fastest, {GRAPHS['single']}")
    same_size = [Request(images=[photo(name, (168, 140))], prompt="?", max_new_tokens=4) for name in ("coffee", "rocket", "coffee")]
    runs = [played.run(request, recipe) for request in same_size]
    assert torch.equal(runs[0].logits, runs[2].logits)
    assert not torch.equal(runs[0].logits, runs[1].logits)
    assert [len(run.captures) > 0 for run in runs] == [True, False, False]


@ONE_FAMILY
def test_many_shapes_stay_within_the_budget(played: Lab) -> None:
    """60 requests of 20 shapes in a room for a few graphs, by number and by bytes; what has no room is counted."""
    recipe = Recipe.parse(f"fastest, {GRAPHS['single']}")
    truth = {number: played.run(_request((28 * (number + 1), 56), n=2), Recipe.fastest()).tokens for number in range(20)}
    for max_bytes, max_graphs in ((2**30, 5), (1_000_000, 1000)):
        played.graphs = store = GraphStore(PlayedRecorder(), max_bytes=max_bytes, max_graphs=max_graphs)
        played._engines.clear()
        refused = []
        for number in range(60):
            run = played.run(_request((28 * (number % 20 + 1), 56), n=2), recipe)
            assert run.tokens == truth[number % 20]
            if "first_token: over graph_budget, run eager" in run.trace.counts:
                refused.append(run)
            assert len(store) <= max_graphs
            assert store.n_bytes <= max_bytes
        assert (len(refused) > 0) == (max_bytes < 2**30)
        assert all("over graph_budget, run eager" in repr(run) for run in refused)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _X:
    x: torch.Tensor = tensors(dim=0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Implied:
    x: torch.Tensor = tensors(dim=0, implied=True)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Constant:
    x: torch.Tensor = tensors(dim=0, constant=True)


def _doubling(store: GraphStore) -> Graphs:
    return Graphs("vit", _doubled, store)


def _doubled(inputs: Any) -> tuple[torch.Tensor, ...]:
    return (inputs.x * 2,)


def test_graphs_are_listed_from_any_thread_while_others_are_used() -> None:
    store = GraphStore(PlayedRecorder(), max_bytes=10_000, max_graphs=100)
    graphs, over, failed = _doubling(store), threading.Event(), list[Exception]()
    for n in range(1, 21):
        graphs(_X(x=torch.ones(n)), OFF)

    def look() -> None:
        while not over.is_set() and not failed:
            try:
                assert len(graphs.captures) == 20
            except Exception as error:
                failed.append(error)

    before, looking = sys.getswitchinterval(), threading.Thread(target=look)
    sys.setswitchinterval(1e-6)
    try:
        looking.start()
        for n in [*range(1, 21)] * 30:
            graphs(_X(x=torch.ones(n)), OFF)
    finally:
        over.set()
        looking.join()
        sys.setswitchinterval(before)
    assert not failed


def test_of_too_many_graphs_the_one_unused_for_longest_goes() -> None:
    recorder = PlayedRecorder()
    graphs = _doubling(GraphStore(recorder, max_bytes=10_000, max_graphs=2))
    for length, recorded in ((3, 1), (4, 2), (3, 2), (5, 3), (3, 3), (4, 4)):
        x = torch.arange(float(length))
        (y,) = graphs(_X(x=x), OFF)
        assert torch.equal(y, 2 * x)
        assert recorder.n_recorded == recorded
    assert [(capture.shape, capture.uses) for capture in graphs.captures] == [("x 3", 3), ("x 4", 1)]


@pytest.mark.parametrize("lengths", [(5000, 3, 2600), (700, 2000, 6, 2000), (1300, 1300, 900)])
def test_what_does_not_fit_runs_as_it_is_and_is_counted_and_throws_no_other_out(lengths: tuple[int, ...]) -> None:
    """Two graphs that just do not fit together would else be recorded in turn for ever."""
    recorder, tracer = PlayedRecorder(), Tracer(CPU, "off")
    store = GraphStore(recorder, max_bytes=10_000, max_graphs=10)
    graphs, refused, kept = _doubling(store), 0, set()
    tracer.start()
    for _ in range(3):
        for length in lengths:
            (y,) = graphs(_X(x=torch.full((length,), 3.0)), tracer)
            assert torch.equal(y, torch.full((length,), 6.0))
            now = {capture.shape for capture in graphs.captures}
            assert now >= kept
            refused += f"x {length}" not in now
            kept = now
            assert store.n_bytes <= 10_000
    assert recorder.n_recorded == len(kept) > 0 or max(lengths) == 5000
    assert refused > 0 or sum(lengths) * 8 <= 10_000
    assert tracer.finish().counts.get("vit: over graph_budget, run eager", 0) == refused
    assert len(graphs.fresh) == len(kept)


def test_what_was_refused_is_asked_for_again_once_another_owner_is_gone() -> None:
    recorder = PlayedRecorder()
    store = GraphStore(recorder, max_bytes=10_000, max_graphs=10)
    first, second = _doubling(store), _doubling(store)
    x = torch.ones(700)
    first(_X(x=x), OFF)
    for _ in range(2):
        assert torch.equal(second(_X(x=x), OFF)[0], 2 * x)
    assert (len(store), second.captures) == (1, ())
    del first
    assert len(store) == 0
    recorder.n_bytes = 0  # as CUDA's pool is once its graphs are gone
    second(_X(x=x), OFF)
    assert len(second.captures) == 1


def test_an_input_that_its_size_implies_is_copied_when_it_is_recorded_and_never_again() -> None:
    store = GraphStore(PlayedRecorder(), max_bytes=10_000, max_graphs=5)
    graphs = _doubling(store)
    for n in (3, 5):
        assert torch.equal(graphs(_Implied(x=torch.arange(n)), OFF)[0], 2 * torch.arange(n))
        assert torch.equal(graphs(_Implied(x=torch.zeros(n, dtype=torch.int64)), OFF)[0], 2 * torch.arange(n))


def test_lent_outputs_are_the_graphs_own_and_the_others_copies() -> None:
    store = GraphStore(PlayedRecorder(), max_bytes=10_000, max_graphs=5)
    graphs = Graphs("decode", lambda inputs: (inputs.x * 2, inputs.x + 1), store, lent=1)
    lent, copied = graphs(_X(x=torch.ones(2)), OFF)
    again, _ = graphs(_X(x=torch.zeros(2)), OFF)
    assert again is lent
    assert lent.tolist() == [0, 0]
    assert copied.tolist() == [2, 2]


def test_a_constant_input_is_copied_once_and_not_kept_alive() -> None:
    recorder = PlayedRecorder()
    store = GraphStore(recorder, max_bytes=10_000, max_graphs=2)
    graphs = _doubling(store)
    x = torch.ones(3)
    for _ in range(2):
        assert graphs(_Constant(x=x), OFF)[0].tolist() == [2, 2, 2]
        x.zero_()  # which a constant never is: what was copied at first is still there
    gone = weakref.ref(x)
    del x
    assert gone() is None
    assert graphs(_Constant(x=torch.full((3,), 4.0)), OFF)[0].tolist() == [8, 8, 8]
    assert recorder.n_recorded == 1


def test_graphs_go_with_their_lab_and_wait_for_no_garbage_collector(played: Lab) -> None:
    """A graph that a collection destroys in the middle of another's capture spoils it on CUDA."""
    lab = played.apart()
    lab.graphs = store = GraphStore(PlayedRecorder(), max_bytes=2**30, max_graphs=1000)
    lab.run(_request(SIZES[1]), f"fastest, {GRAPHS['stages']}")
    assert len(store) > 0
    gone = weakref.ref(store)
    gc.disable()
    try:
        del lab, store
        assert gone() is None
    finally:
        gc.enable()


def test_warming_up_leaves_nothing_to_be_made_for_its_shapes(played: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.parse(f"fastest, {GRAPHS['stages']}, capture.shapes=powers_of_two")
    long = Request(prompt="A question without an image. " * 20, max_new_tokens=80, ignore_eos=True)
    requests = [_request((300, 200), n=20), _request((168, 140), n=20), long]
    made = played.warm_up(recipe, requests)
    assert {capture.stage for capture in made} == {"vit", "prefill", "decode"}
    kept = played.captures(recipe)
    assert len(kept) == len(made)
    assert {(capture.stage, capture.shape) for capture in kept} == {(capture.stage, capture.shape) for capture in made}
    assert "warm-up" in capsys.readouterr().err
    for request in requests:
        assert played.run(request, recipe).captures == ()
    assert played.warm_up(recipe, [(640, 480)], progress=False) != ()
    assert played.warm_up(recipe, [(640, 480), tuple(np.array([640, 480]))], progress=False) == ()
    for shape in ((300,), (0, 10), "300x200", (10**6, 10**6)):
        with pytest.raises(RequestError, match="a shape to warm up is"):
            played.warm_up(recipe, [shape])  # type: ignore[list-item]


@pytest.fixture
def short_session(played: Lab) -> Lab:
    """Sessions of 1,200 tokens: widths from 64 to 1,024, and what is left."""
    played.checkpoint = dataclasses.replace(played.checkpoint, session_len=1200)
    played.memory = Memory(played.checkpoint)
    return played


@pytest.mark.parametrize(
    ("shallow", "shapes", "kv"),
    [
        (QWEN2_5, "exact", "static"),
        (QWEN3, "multiples_of_64", "paged"),
        (QWEN2_5, "powers_of_two", "static"),
        by_night(QWEN3, "exact", "static"),
        by_night(QWEN2_5, "multiples_of_64", "paged"),
        by_night(QWEN3, "powers_of_two", "static"),
    ],
    indirect=["shallow"],
)
def test_no_answer_records_in_its_middle_after_a_warm_up(short_session: Lab, shapes: str, kv: str) -> None:
    """600 tokens, whose steps read up to 1,024 keys, after a warm-up by two tokens; the largest width is made first."""
    lab = short_session
    recipe = Recipe.parse(f"fastest, cache.kv={kv}, capture.decode=graph, capture.shapes={shapes}")
    made = lab.warm_up(recipe, [_request(None, n=2)], progress=False)
    widths = [int(capture.shape.rpartition("slot_of 1x")[2].partition(",")[0]) for capture in made]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] >= 1200
    assert widths[-1] == (256 if shapes in ("exact", "multiples_of_256") else 64)
    recorder = lab.graphs._recorder  # type: ignore[union-attr]
    n_recorded = recorder.n_recorded  # type: ignore[attr-defined]
    assert n_recorded == len(made)
    for request in (_request(None, n=600), _request((168, 140), n=20), _request(None, "long " * 200, n=30)):
        run = lab.run(request, recipe)
        assert run.captures == ()
        assert run.tokens == lab.run(request, f"fastest, cache.kv={kv}").tokens
    assert recorder.n_recorded == n_recorded  # type: ignore[attr-defined]
    assert lab.warm_up(recipe, [_request(None, n=2)], progress=False) == ()


@ONE_FAMILY
def test_a_compiled_step_needs_the_least_and_the_most_keys_alone(
    short_session: Lab, monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    recipe, seen = Recipe.parse("fastest, capture.decode=compile, capture.shapes=multiples_of_64"), []
    call = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, *on: (seen.append(on[0].kv.slot_of.shape[1]), call(self, *on))[1])
    assert len(short_session.warm_up(recipe, [], progress=False)) <= 2
    assert seen == [1201, 64]
    assert short_session.run(_request(None, n=200), recipe).captures == ()


def test_widths_that_are_too_many_for_the_store_leave_half_of_its_places_to_others(short_session: Lab) -> None:
    recipe = Recipe.parse("fastest, capture.decode=graph, capture.shapes=multiples_of_64")
    short_session.graphs = GraphStore(PlayedRecorder(), max_bytes=2**30, max_graphs=10)
    made = short_session.warm_up(recipe, [], progress=False)
    assert [capture.shape.rpartition("slot_of 1x")[2].partition(",")[0] for capture in made] == ["320", "256", "192", "128", "64"]


@pytest.mark.parametrize(
    ("shallow", "choices"),
    [
        (QWEN3, "cache.kv=paged"),
        (QWEN2_5, "capture.decode=graph"),
        by_night(QWEN2_5, "cache.kv=paged"),
        by_night(QWEN3, "capture.decode=graph"),
    ],
    indirect=["shallow"],
)
def test_a_warm_up_leaves_no_launch_of_a_decode_step_to_be_tuned(
    played: Lab, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every number of keys: the interpreter has nothing to choose from, and notes what it would have chosen for."""
    monkeypatch.setattr(decode_share_kernel, "_chosen", {})
    played.checkpoint = dataclasses.replace(played.checkpoint, session_len=270)
    played.memory = Memory(played.checkpoint)
    recipe = Recipe.parse(f"fastest, attention.decode=triton, {choices}")
    played.warm_up(recipe, [], progress=False)
    tuned = decode_share_kernel.launches()
    assert {case["keys"] for case, _ in tuned} >= {"256", "1024"}
    run = played.run(_request(None, n=5), recipe)
    assert run.tokens == played.run(_request(None, n=5), "fastest").tokens
    assert decode_share_kernel.launches() == tuned


@pytest.mark.parametrize("kv", ["static", "paged"])
def test_a_warm_up_of_steps_touches_nothing_of_earlier_requests(short_session: Lab, kv: str) -> None:
    """Prefixes that are kept in blocks are found as they were, and an answer goes on as it would have."""
    more = ", cache.prefix_reuse=on" if kv == "paged" else ""
    recipe = Recipe.parse(f"fastest, cache.kv={kv}, capture.decode=graph{more}")
    request = _request((168, 140), "A question with a prefix. " * 3, n=12)
    expected = short_session.run(request, "fastest").tokens
    short_session.run(request, f"fastest, cache.kv={kv}{more}")
    assert short_session.run(request, recipe).tokens == expected
    short_session.warm_up(recipe, [], progress=False)
    again = short_session.run(request, recipe)
    assert again.tokens == expected
    assert (again.kind == "cache_hit") == (kv == "paged")


@pytest.mark.parametrize(("short", "long"), [(4, 150), (1, 90), (30, 120)])
def test_a_graph_that_a_short_request_recorded_serves_a_longer_one(played: Lab, short: int, long: int) -> None:
    """In place, a token's slot is its own place whoever recorded the graph."""
    recipe = Recipe.parse(f"fastest, {GRAPHS['stages']}")
    played.run(_request(None, n=short + 1), recipe)
    request = _request(None, n=long)
    run = played.run(request, recipe)
    assert [capture.stage for capture in run.captures] == []
    assert run.tokens == played.run(request, recipe.oracle(played.checkpoint.image_backend)).tokens


@pytest.mark.parametrize(
    ("choices", "kv"),
    [
        ("capture.decode=graph", "static"),
        ("capture.decode=graph", "paged"),
        ("capture.shapes=multiples_of_64", "static"),
        ("capture.shapes=multiples_of_64", "paged"),
    ],
)
def test_a_steps_program_chooses_its_token_and_gives_the_logits_that_it_chose_from(played: Lab, choices: str, kv: str) -> None:
    plain, made = (
        Pipeline(played.checkpoint, Recipe.parse(f"fastest, cache.kv={kv}{more}"), Memory(played.checkpoint), played.graphs)
        for more in ("", f", {choices}")
    )
    prompt, steps = text_prompt(played, 30, 8), {}
    with torch.inference_mode():
        for name, pipeline in (("plain", plain), ("made", made)):
            place = pipeline.cache.admit(prompt, 8, tuple)
            place.extend(30)
            hidden = merge(prompt, None, pipeline.decoder.weights.embed)
            pipeline.stages.prefill(hidden, prompt, None, place.kv, OFF)
            steps[name] = []
            for number in range(4):
                place.extend(1)
                step = pipeline.stages.decode(torch.full((1,), 7 * number), torch.full((1,), 30 + number), place.kv, OFF)
                steps[name].append((step.logits.clone(), step.token))
            place.close()
    for (ours, token), (theirs, none) in zip(steps["made"], steps["plain"], strict=True):
        assert _close(ours, theirs)
        assert none is None
        assert token.tolist() == [int(ours.argmax())]


def test_a_capture_pays_after_as_many_requests_as_its_seconds_need() -> None:
    costs = [
        Capture(stage=stage, how="graph", shape="", seconds=seconds, n_bytes=0)
        for stage, seconds in (("vit", 0.5), ("decode", 0.26))
    ]
    assert break_even(costs, eager=0.020, captured=0.010) == 76
    assert break_even(costs, eager=0.010, captured=0.010) is None
    assert break_even([], eager=0.020, captured=0.010) == 0


COMPILE = """
import dataclasses, sys, torch
from fastvl_lab.capture.compile_cache import keep_compiled
from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.inputs import tensors
from fastvl_lab.trace import Tracer

@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class X:
    x: torch.Tensor = tensors(dim=0)

keep_compiled()
stage = Compiled("vit", lambda inputs: (inputs.x.sin() + inputs.x * 2,))
x = torch.arange(30.0).view(10, 3)
(y,) = stage(X(x=x), Tracer(torch.device("cpu"), "off"))
assert torch.allclose(y, x.sin() + x * 2), y
assert len(stage.captures) == 1
"""


def test_compiled_code_is_kept_between_processes_and_a_damaged_cache_is_no_obstacle(
    tmp_path: Path, forked: Callable[..., str]
) -> None:
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    own = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": None, "TRITON_CACHE_DIR": None}
    forked(script, **own)
    compiled = [path for path in (tmp_path / "fastvl_lab" / "compiled").rglob("*") if path.is_file()]
    stamps = {path: path.stat().st_mtime_ns for path in compiled if path.suffix == ".so"}
    assert stamps
    forked(script, **own)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "nothing was compiled again"
    for path in compiled:
        path.write_bytes(b"damaged")
    forked(script, **own)


def test_a_cache_folder_of_somebody_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(theirs))
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(theirs)
    assert not may_be_damaged()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", _broken)
    with pytest.raises(CaptureError, match=r"capture.vit=compile: torch.compile cannot compile this stage here \(.*out of order"):
        Compiled("vit", _doubled)(_X(x=torch.ones(3, 2)), OFF)
    assert theirs.is_dir()


def _broken(*_: object) -> None:
    raise RuntimeError("out of order")


def test_the_cache_goes_if_it_was_at_fault_and_stays_if_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "fastvl_lab" / "compiled" / "inductor" / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("good")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept.parent))
    assert may_be_damaged()
    with pytest.raises(RuntimeError, match="out of order"):
        without_cache(_broken)
    assert kept.read_text() == "good"
    assert without_cache(lambda: kept.exists()) is False
    assert not kept.exists()
    assert not [path for path in kept.parent.parent.iterdir() if path.name.startswith(".")]


def test_each_compiled_program_counts_its_own_uses() -> None:
    compiled = Compiled("vit", _doubled)
    for n in (1, 5, 6, 1, 7, 1):  # torch takes one row for a program of its own
        (out,) = compiled(_X(x=torch.ones(n, 2)), OFF)
        assert torch.equal(out, torch.full((n, 2), 2.0))
    assert [capture.uses for capture in compiled.captures] == [3, 3]
