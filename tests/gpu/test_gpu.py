"""What only a GPU can show: parity on the device, and the device lane."""

from __future__ import annotations

import dataclasses
import json
import threading
from functools import partial

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, RequestCancelledError, Sampling, photo, preprocessor, toggles, vit
from fastvl_lab.capture.cuda_graphs import CudaRecorder
from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import tiny
from fastvl_lab.decoder.sampler import Sampler
from fastvl_lab.kernels import tuned as tuned_module
from fastvl_lab.kernels.argmax import argmax, argmax_reference
from fastvl_lab.kernels.decode_attention import decode_attention, decode_attention_reference
from fastvl_lab.kernels.prefill_attention import block_size, prefill_attention, prefill_attention_reference
from fastvl_lab.kernels.rotate_and_keep import rotate_and_keep, rotate_and_keep_reference
from fastvl_lab.measure.load import load
from fastvl_lab.measure.parity import check_decoder, model_pictures, pixel_differences, within_budget
from fastvl_lab.measure.profile import tuned_launches
from fastvl_lab.measure.recipes import STOCK, of_the_decoder
from fastvl_lab.measure.tasks import BoundDecoder, Decoding, text_prompt
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.schedule import overlap
from fastvl_lab.schedule.in_flight import InFlight
from fastvl_lab.schedule.inbox import Job
from fastvl_lab.trace import Level, Tracer

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch lets cuDNN, and nothing else, round float32 to TF32: the stock patch embedding alone would be off by 5e-3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("engine", ["baseline", "fastest"])
def test_parity_on_the_device(name: str, engine: str) -> None:
    lab = Lab(name, device="cuda", dtype="float32")
    request = Request(images=[photo("coffee", (201, 133)), photo("rocket", (97, 310))], prompt="Compare.", max_new_tokens=32)
    recipe = Recipe.parse(engine, lab.device)
    expected, run = lab.run(request, recipe.oracle(lab.checkpoint.image_backend)), lab.run(request, recipe)
    assert (run.logits - expected.logits).abs().max() < 1e-3
    assert run.tokens == expected.tokens


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("preprocessor.resize", "device"),
        ("preprocessor.patchify", "triton"),
        ("preprocessor.upload", "pinned"),
        ("preprocessor.decode", "gpu"),
    ],
)
def test_what_the_preprocessor_does_on_the_device_changes_no_token(name: str, path: str, value: str) -> None:
    lab = Lab(name, device="cuda", dtype="float32")
    option = next(toggle for toggle in toggles() if toggle.path == path).option(value)
    if (reason := option.needs.unmet(lab.checkpoint.target)) is not None:
        pytest.skip(reason)
    recipe = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean", lab.device).choose(path, value)
    request = Request(images=[photo("coffee", (640, 480)), photo("rocket", (97, 310))], prompt="Compare.", max_new_tokens=16)
    expected, run = lab.run(request, recipe.oracle(lab.checkpoint.image_backend)), lab.run(request, recipe)
    assert (run.logits - expected.logits).abs().max() < 1e-3
    assert run.tokens == expected.tokens


def test_resizing_on_the_device_is_within_two_levels_of_pillow() -> None:
    lab = Lab("tiny-qwen2.5-vl", device="cuda", dtype="float32")
    request = Request(images=[photo("coffee", (1280, 960))], prompt="?", max_pixels=300_000)
    device, stock = (Recipe.baseline().choose("preprocessor.resize", value) for value in ("device", "pillow"))
    (difference,) = pixel_differences(*(model_pictures(lab, request, recipe) for recipe in (device, stock)))
    assert difference.largest <= 2


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_way_through_the_lean_tower_equals_the_stock_one_and_waits_for_nothing(name: str) -> None:
    """In bfloat16 against its own error budget; plans built and known; torch raises where the host would wait for the device."""
    lab, high = Lab(name, device="cuda", dtype="bfloat16"), Lab(name, device="cuda", dtype="float32")
    options = {
        t.path: [o.value for o in t.options if o.needs.unmet(lab.checkpoint.target) is None]
        for t in toggles()
        if t.slot == "vit" and t.name != "tower"
    }
    free = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean")
    recipes = [free.choose(path, value) for path, values in options.items() for value in values]
    recipes.append(free.replace({path: values[-1] for path, values in options.items()}))
    request = Request(images=[photo("coffee", (640, 480)), photo("rocket", (97, 310))], prompt="?")
    images = preprocessor.bind(free.preprocessor, lab.checkpoint)
    pixels = images.pixels(request)
    off = Tracer(lab.device, "off")

    def encoded(of: Lab, recipe: Recipe) -> torch.Tensor:
        of_dtype = dataclasses.replace(pixels, patches=pixels.patches.to(of.dtype))
        encode = vit.bind(recipe.vit, of.checkpoint, images.patch_format)
        with torch.inference_mode():
            encode(of_dtype, off)  # kernels are built, and may wait, once
            if recipe.vit.tower == "lean":
                torch.cuda.set_sync_debug_mode("error")
            try:
                return encode(of_dtype, off).embeds.double()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    truth = encoded(high, Recipe.baseline())
    stock = (encoded(lab, Recipe.baseline()) - truth).norm()
    for recipe in recipes:
        assert (encoded(lab, recipe) - truth).norm() <= 2 * stock + 1e-3 * truth.norm(), str(recipe)


def _decoders(lab: Lab) -> dict[str, Recipe]:
    """Every option of the attention slot and every KV cache that can run here, all of the last ones together, and the presets."""
    engines = of_the_decoder(Target(device=lab.device, dtype=lab.dtype))
    assert {"prefill=triton", "decode=triton", "rope=fused", "kv=static", "kv=paged"} <= set(engines)
    return {label: engine for label, engine in engines.items() if isinstance(engine, Recipe)}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_way_through_the_decoder_gives_transformers_tokens(name: str) -> None:
    """Two images, so that the axes of their positions and DeepStack count; 64 greedy tokens on top."""
    lab = Lab(name, device="cuda", dtype="float32")
    images = [photo("coffee", (201, 133)), photo("rocket", (97, 310))]
    request = Request(images=images, prompt="Compare.", max_new_tokens=64, ignore_eos=True)
    recipes = _decoders(lab)
    oracles = {label: recipe.oracle(lab.checkpoint.image_backend) for label, recipe in recipes.items()}
    expected = {oracle: lab.run(request, oracle) for oracle in set(oracles.values())}
    for label, recipe in recipes.items():
        run = lab.run(request, recipe)
        assert (run.logits - expected[oracles[label]].logits).abs().max() < 1e-3, label
        assert run.tokens == expected[oracles[label]].tokens, label


@pytest.mark.parametrize("length", [1, 200, 1100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_way_through_the_decoder_stays_within_the_error_budget(name: str, dtype: str, length: int) -> None:
    """The same tokens forced on all: logits of the prompt's last token, and of 64 steps."""
    lab = Lab(name, device="cuda", dtype=dtype)
    engines = of_the_decoder(Target(device=lab.device, dtype=lab.dtype))
    found = {label: check.error for label, check in check_decoder(lab, Decoding(length, 64), engines).items()}
    assert within_budget(found, STOCK, lab.dtype) == set(engines), found


@pytest.mark.parametrize("name", tiny.NAMES)
def test_no_way_through_the_decoder_waits_for_the_device(name: str) -> None:
    """Torch raises where the host would wait, in prefill, in decode steps and in the choice of their tokens."""
    lab, steps = Lab(name, device="cuda", dtype="bfloat16"), 8
    prompt = text_prompt(lab, 60, steps)
    for label, recipe in _decoders(lab).items():
        bound = BoundDecoder.of(lab, recipe)
        for mode in ("default", "error"):  # kernels are built, and may wait, once
            with torch.inference_mode():
                place = bound.cache.admit(prompt, steps + 1, tuple)
                torch.cuda.set_sync_debug_mode(mode)
                try:
                    position = torch.full((1,), prompt.next_position, device=lab.device)
                    logits = bound.prefill(prompt, place)
                    for _ in range(steps):
                        logits = bound.step(bound.decoder.operations.argmax(logits), position, place)
                        position += 1
                except RuntimeError as error:
                    raise AssertionError(label) from error
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    place.close()
            assert logits.isfinite().all(), label


def _randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cuda").to(dtype)


def _assert_budget(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus rounding; a NaN is over it."""
    error, allowed = ((x.double() - truth).abs().max() for x in (ours, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * truth.abs().max()


def _scattered(lengths: list[int], n_slots: int) -> torch.Tensor:
    """The slots of each sequence's tokens, in no order; behind their end a slot that nothing may read."""
    order, at = torch.randperm(n_slots - 1, generator=torch.Generator().manual_seed(1)), 0
    slot_of = torch.full((len(lengths), max(lengths) + 5), n_slots - 1)
    for row, length in enumerate(lengths):
        slot_of[row, :length] = order[at : at + length]
        at += length
    return slot_of.to("cuda")


def _kept(n_slots: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (_randn(n_slots, kv_heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    for store in (keys, values):
        store[-1] = float("nan")
    return keys, values


# Of the decoders of 3B, 4B and 7B, and a head that is no power of two.
HEADS = [(16, 2, 128), (32, 8, 128), (28, 4, 128), (4, 2, 72)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rotation_native(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    n = 301
    packed, angles = _randn(n, heads + 2 * kv_heads, dim, dtype=dtype), _randn(n, dim // 2, seed=3)
    written = torch.randperm(400, generator=torch.Generator().manual_seed(4))[:n].to("cuda")
    for norms in ([None, None], [_randn(dim, dtype=dtype, seed=seed) for seed in (5, 6)]):

        def made(function, of: torch.dtype, norms: list = norms) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
            q, k, v = packed.to(of).split((heads, kv_heads, kv_heads), dim=1)
            table = torch.float64 if of == torch.float64 else torch.float32
            kept = [torch.full((400, kv_heads, dim), float("nan"), dtype=of, device="cuda") for _ in range(2)]
            cast = [None if norm is None else norm.to(of) for norm in norms]
            out = function(q, k, v, angles.cos().to(table), angles.sin().to(table), *cast, 1e-6, *kept, written)
            assert all(int(store.isnan().all(dim=(1, 2)).sum()) == 400 - n for store in kept)
            return [out, *(store[written] for store in kept)]

        ours, plain = made(rotate_and_keep, dtype), made(rotate_and_keep_reference, dtype)
        for one, other, truth in zip(ours, plain, made(rotate_and_keep_reference, torch.float64), strict=True):
            _assert_budget(one, other, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_prefill_attention_native(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Three sequences in one launch: a new one, a piece on top of many tokens, and one token on top of some."""
    before, new = [0, 300, 64], [257, 70, 1]
    lengths, blocks, start = [b + n for b, n in zip(before, new, strict=True)], [], 0
    for sequence, (b, n) in enumerate(zip(before, new, strict=True)):
        blocks += [
            [first, start + n, sequence, b - start] for first in range(start, start + n, block_size(dtype, heads // kv_heads))
        ]
        start += n
    table = torch.tensor(blocks, dtype=torch.int32, device="cuda")
    q = _randn(sum(new), heads + 2, dim, dtype=dtype)[:, :heads]
    kept, slot_of = _kept(sum(lengths) + 9, kv_heads, dim, dtype), _scattered(lengths, sum(lengths) + 9)
    truth = prefill_attention_reference(q.double(), kept[0].double(), kept[1].double(), slot_of, table)
    ours = prefill_attention(q, *kept, slot_of, table, longest=max(lengths))
    plain = prefill_attention_reference(q, *kept, slot_of, table)
    _assert_budget(ours, plain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_decode_attention_native(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """With shares of the keys that are empty: of the short sequences nearly all."""
    lengths = [1, 5000, 130]
    q = _randn(len(lengths), heads + 1, dim, dtype=dtype)[:, :heads]
    kept, slot_of = _kept(sum(lengths) + 9, kv_heads, dim, dtype), _scattered(lengths, sum(lengths) + 9)
    counts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    truth = decode_attention_reference(q.double(), kept[0].double(), kept[1].double(), slot_of, counts)
    plain = decode_attention_reference(q, *kept, slot_of, counts)
    for longest in (5000, 5001, 100_000):
        _assert_budget(decode_attention(q, *kept, slot_of, counts, longest=longest), plain, truth)


def test_argmax_native() -> None:
    """Over a published vocabulary: of equals the first, and a NaN before all, as in torch on the host."""
    x = _randn(151_936, dtype=torch.float32)
    cases = [x, torch.zeros_like(x), torch.full_like(x, float("-inf"))]
    for first, second in ((0, 151_935), (1_023, 1_024), (77_777, 150_000)):
        for value in (9e9, float("inf"), float("nan")):
            cases.append(x.index_fill(0, torch.tensor([first, second], device="cuda"), value))
    for case in cases:
        assert argmax(case).tolist() == argmax_reference(case.cpu()).tolist()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_both_lanes_lie_inside_the_request_on_one_axis(name: str) -> None:
    lab = Lab(name, device="cuda")
    request = Request(images=[photo("coffee", (640, 480))], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    for engine in ("transformers", "baseline", Recipe.fastest("cuda")):
        lab.run(request, engine)
        trace = lab.run(request, engine).trace
        host = {span.name: span for span in trace.within_ttft("host")}
        device = {span.name: span for span in trace.within_ttft("device")}
        assert {"vit", "merge", "prefill"} <= set(device)
        slack = 100_000  # ns between an event's host time and its device time on an idle stream
        assert host["vit"].start_ns - slack <= device["vit"].start_ns
        assert device["prefill"].end_ns <= trace.first_chunk_ns + slack
        assert sum(trace.stages().values()) + trace.unaccounted_ns == pytest.approx(trace.first_chunk_ns, rel=0.01)


def test_tracing_adds_no_synchronisation_to_a_request() -> None:
    """As many waits for a stream with it as without; those around a request are of the device, and counted apart."""
    lab = Lab("tiny-qwen3-vl", device="cuda")
    request = Request(images=[photo("coffee", (448, 448))], prompt="What is this?", max_new_tokens=1)
    lab.run(request, "fastest")

    def waits(level: Level) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            lab.run(request, "fastest", trace=level)
        return sum(event.count for event in profile.key_averages() if event.key == "cudaStreamSynchronize")

    off, stages = (lab.compute(partial(waits, level)) for level in ("off", "stages"))  # the profiler sees the thread that starts it
    assert off == stages > 0, "the host reads a token, and the profiler sees it"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_images_are_unpacked_beside_the_device_and_nobody_waits_for_it(name: str) -> None:
    """Torch raises where the host would wait, from the admission to the launch of the first token; tokens are those without."""
    lab = Lab(name, device="cuda", dtype="float32")
    request = Request(images=[photo("coffee", (640, 480)), photo("rocket", (97, 310))] * 2, prompt="?", max_new_tokens=16)
    recipe = Recipe.fastest("cuda").replace("schedule.overlap", "on")
    run, without = lab.run(request, recipe), lab.run(request, Recipe.fastest("cuda"))
    assert run.tokens == without.tokens
    assert (run.logits - without.logits).abs().max() < 1e-3
    assert {span.name for span in run.trace.within_ttft("beside")} == {"decode_image", "preprocess"}

    def launched() -> None:
        job = Job(number=0, request=request, tracer=Tracer(lab.device, "off"), deliver=lambda *_: None, end=lambda _: None)
        flight, unpacking = InFlight(job, pipeline), overlap.worker(lab.device)
        try:
            flight.open()
            overlap.first_token(flight, unpacking)
        finally:
            flight.close()
            unpacking.shutdown()

    pipeline = Pipeline(lab.checkpoint, recipe, lab.memory, lab.graphs)
    with torch.inference_mode():
        launched()  # kernels are built, and may wait, once
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched()
        finally:
            torch.cuda.set_sync_debug_mode("default")


GRAPHS = (
    "capture.vit=graph, capture.prefill=graph, capture.decode=graph",
    "capture.first_token=single_graph, capture.decode=graph",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["static", "paged"])
@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_graphs_equal_eager_stages_of_the_same_shapes_bit_for_bit(name: str, graphs: str, kv: str, dtype: str) -> None:
    """Replayed and captured, with other images in between; steady state captures nothing."""
    lab = Lab(name, device="cuda", dtype=dtype)
    eager = Recipe.parse(f"fastest, cache.kv={kv}, capture.shapes=multiples_of_64", lab.device)
    captured = Recipe.parse(f"fastest, cache.kv={kv}, capture.shapes=multiples_of_64, {graphs}", lab.device)
    sizes = ((448, 336), (168, 140), (140, 168), (448, 336))
    requests = [Request(images=[photo("coffee", size)], prompt="What?", max_new_tokens=24, ignore_eos=True) for size in sizes]
    expected = [lab.run(request, eager) for request in requests]
    for steady in (False, True):
        for request, theirs in zip(requests, expected, strict=True):
            run = lab.run(request, captured)
            assert run.tokens == theirs.tokens
            assert torch.equal(run.logits, theirs.logits)
            assert not steady or run.captures == ()


def test_graphs_of_many_shapes_stay_within_the_budget_and_a_left_request_leaves_them_usable() -> None:
    """200 requests of 40 shapes."""
    budget = 256 * 2**20
    lab = Lab("tiny-qwen2.5-vl", device="cuda", dtype="bfloat16", graph_budget=budget)
    recipe = Recipe.parse(f"fastest, {GRAPHS[1]}", lab.device)
    requests = [Request(images=[photo("coffee", (28 * (n + 2), 112))], prompt="?", max_new_tokens=4) for n in range(40)]
    lab.run(requests[-1], recipe)
    assert lab.graphs is not None
    for number in range(200):
        lab.run(requests[number * 7 % 40], recipe)
        assert lab.graphs.n_bytes <= budget
    held = torch.cuda.memory_reserved()
    truth = lab.run(requests[3], recipe).tokens
    for _ in lab.stream(requests[3], recipe):
        break
    assert lab.run(requests[3], recipe).tokens == truth
    assert torch.cuda.memory_reserved() <= held + budget


def test_graphs_outlive_those_that_are_evicted_and_labs_that_are_gone() -> None:
    """Each graph with a copy in another lab: one lab goes, and of the other every shape evicts one, while memory is given back."""
    labs = [Lab("tiny-qwen3-vl", device="cuda", dtype="bfloat16") for _ in range(2)]
    recipe = Recipe.parse(f"fastest, {GRAPHS[0]}", labs[0].device)
    requests = [Request(images=[photo("coffee", (28 * (n + 2), 112))], prompt="?", max_new_tokens=4) for n in range(12)]
    expected = [labs[0].run(request, Recipe.fastest("cuda")).tokens for request in requests]
    for lab in labs:
        assert lab.graphs is not None
        lab.graphs.max_graphs = 6
        assert [lab.run(request, recipe).tokens for request in requests] == expected
    del lab, labs[0]
    for _ in range(2):
        for request, tokens in zip(reversed(requests), reversed(expected), strict=True):
            torch.cuda.empty_cache()
            assert labs[0].run(request, recipe).tokens == tokens


def test_a_capture_that_fails_leaves_stream_and_recorder_usable() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, x = CudaRecorder(device), torch.ones(64, 64, device=device)
    calls, stream = [], torch.cuda.current_stream()

    def waits() -> tuple[torch.Tensor, ...]:
        calls.append(1)
        y = x @ x
        if len(calls) == 3:
            y.sum().item()  # the host may not wait inside a capture
        return (y,)

    with pytest.raises(RuntimeError):
        recorder.record(waits, 2**30)
    assert torch.cuda.current_stream() == stream
    recording = recorder.record(lambda: (x @ x,), 2**30)
    assert recording is not None
    x.fill_(2)
    recording.replay()
    assert torch.equal(recording.outputs[0], torch.full_like(x, 256))


@pytest.mark.parametrize("gate", ["open", "round"])
@pytest.mark.parametrize("positions", ["on_device", "host_sync"])
@pytest.mark.parametrize("steps", [1, 2, 16])
@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_steps_launched_ahead_on_the_stream_make_the_same_tokens(decode: str, steps: int, positions: str, gate: str) -> None:
    lab = Lab("tiny-qwen3-vl", device="cuda", dtype="bfloat16")
    plain = Recipe.parse(f"fastest, capture.decode={decode}", lab.device)
    recipe = plain.replace({"streaming.steps_per_round": steps, "streaming.positions": positions, "streaming.gate": gate})
    request = Request(images=[photo("coffee", (168, 140))], prompt="What?", max_new_tokens=50, ignore_eos=True)
    assert lab.run(request, recipe).tokens == lab.run(request, plain).tokens
    stop = threading.Event()
    with pytest.raises(RequestCancelledError):
        lab.run(request, recipe, on_chunk=lambda chunk: stop.set(), stop=stop)
    assert lab.run(request, recipe).tokens == lab.run(request, plain).tokens


SAMPLINGS = {
    "draws": Sampling(temperature=0.9, top_p=0.9, seed=3, logprobs=True, top_logprobs=3),
    "all": Sampling(
        temperature=1.2,
        top_p=0.95,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.2,
        logit_bias={7: 3.0},
        seed=4,
        min_tokens=40,
    ),
    "penalties": Sampling(repetition_penalty=1.3),
}


def _ways(lab: Lab) -> tuple[Recipe, list[Recipe]]:
    """One step at a time, and the ways to launch steps otherwise."""
    plain = Recipe.parse("fastest, capture.decode=eager", lab.device)
    return plain, [
        plain.replace("capture.decode", "graph"),
        plain.replace({"streaming.steps_per_round": 16, "streaming.gate": "round"}),
        plain.replace({"capture.decode": "graph", "streaming.steps_per_round": 2}),
        plain.choose("cache.kv", "paged").replace("schedule.batching", "continuous"),
    ]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampled_tokens_are_the_same_in_graphs_rounds_and_steps_that_are_shared(sampling: str) -> None:
    """And those that Transformers draws on this device, from the same seed."""
    lab = Lab("tiny-qwen3-vl", device="cuda", dtype="float32")
    request = Request(
        images=[photo("coffee", (168, 140))], prompt="What?", max_new_tokens=50, ignore_eos=True, sampling=SAMPLINGS[sampling]
    )
    plain, ways = _ways(lab)
    expected = lab.run(request, plain)
    told = [one for chunk in expected.chunks for one in chunk.logprobs]
    for recipe in ways:
        run = lab.run(request, recipe)
        assert run.tokens == expected.tokens, recipe
        for one, other in zip([one for chunk in run.chunks for one in chunk.logprobs], told, strict=True):
            assert one.token == other.token
            assert abs(one.logprob - other.logprob) < 1e-3
    theirs = dataclasses.replace(request, sampling=dataclasses.replace(SAMPLINGS[sampling], logprobs=False, top_logprobs=0))
    assert lab.run(theirs, "transformers").tokens == expected.tokens


def test_an_answer_keeps_to_its_format_in_graphs_rounds_and_steps_that_are_shared() -> None:
    """A grammar learns of each token from the device, and the device of what it allows, before the next is chosen."""
    pytest.importorskip("llguidance", reason="formats need llguidance (extra structured)")
    lab = Lab("tiny-qwen3-vl", device="cuda", dtype="float32")
    age = {"type": "integer", "minimum": 18, "maximum": 99}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"], "additionalProperties": False}
    for draws in ({}, {"temperature": 1.3, "top_k": 30, "seed": 5}):
        sampling = Sampling(format=schema, repetition_penalty=1.3, **draws)  # type: ignore[arg-type]
        request = Request(images=[photo("coffee", (168, 140))], prompt="Who?", max_new_tokens=120, sampling=sampling)
        theirs = lab.run(request, "transformers")
        assert 18 <= json.loads(theirs.text)["age"] <= 99
        plain, ways = _ways(lab)
        for recipe in (plain, *ways):
            assert lab.run(request, recipe).tokens == theirs.tokens, recipe


SHARED: dict[str, dict[str, str | int]] = {
    "whole": {},
    "chunked": {"schedule.prefill": "chunked", "schedule.budget": 128},
    "ahead": {"schedule.vision": "ahead", "preprocessor.patchify": "triton", "preprocessor.payload": "float32"},
    "batched": {"schedule.vision": "batched"},
    "by_blocks": {
        "schedule.prefill": "chunked",
        "schedule.budget": 128,
        "schedule.vision": "ahead",
        "schedule.tower": "by_blocks",
    },
}


@pytest.mark.parametrize("decode", ["eager", "graph"])
@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_requests_that_share_steps_make_the_tokens_that_each_makes_alone(name: str, way: str, decode: str) -> None:
    lab = Lab(name, device="cuda", dtype="float32")
    alone = Recipe.parse(f"fastest, capture.decode={decode}", lab.device)
    shared = alone.choose("cache.kv", "paged").replace({"schedule.batching": "continuous", "schedule.max_batch": 4, **SHARED[way]})
    pictures = [photo("coffee", (168, 140)), photo("rocket", (97, 310)), photo("coffee", (320, 240))]
    requests = [
        Request(images=pictures[: n % 4], prompt="Compare.", max_new_tokens=8 + 4 * n, ignore_eos=True, fit=True) for n in range(8)
    ]
    found = load(lab, requests, shared, concurrency=4, warm_up=0)
    assert not found.failures
    assert [run.tokens for run in found.runs if run is not None] == [lab.run(request, alone).tokens for request in requests]
    assert any(len(step.decoded) > 1 for step in found.steps)
    for run in found.finished:
        on_device = {span.name for span in run.trace.spans if span.lane == "device"}
        assert {"merge", "prefill", "decode", "sample"} <= on_device


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_choice_of_a_token_waits_for_the_device(sampling: str) -> None:
    """After the first, which uploads biases: so that steps can be launched ahead."""
    prompt = torch.arange(100, device="cuda")
    sampler = Sampler(SAMPLINGS[sampling], prompt, most=8, ends=(1, 2))
    logits = _randn(1, 1000, dtype=torch.float32)
    sampler(logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = [sampler(logits) for _ in range(7)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(0 <= int(token) < 1000 for token in tokens)


@pytest.mark.parametrize("stage", ["vit", "prefill", "decode"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_compiled_stages_make_the_same_tokens_on_the_device(name: str, stage: str) -> None:
    lab = Lab(name, device="cuda", dtype="float32")
    recipe = Recipe.parse(f"fastest, capture.{stage}=compile", lab.device)
    for size in ((448, 336), (168, 140), (140, 168)):
        request = Request(images=[photo("coffee", size)], prompt="What?", max_new_tokens=16, ignore_eos=True)
        assert lab.run(request, recipe).tokens == lab.run(request, recipe.oracle(lab.checkpoint.image_backend)).tokens
    assert len(lab.captures(recipe)) <= 4


def test_attention_kernels_are_tuned_in_the_warm_up_and_never_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 64 queries for windows and of 128 for whole frames, each with settings of its own."""
    lab = Lab("tiny-qwen2.5-vl", device="cuda", dtype="bfloat16")
    recipe = Recipe.parse("fastest, vit.attention=triton, attention.prefill=triton, attention.decode=triton", lab.device)
    lab.warm_up(recipe, [(640, 480)], max_new_tokens=4, progress=False)
    tuned = tuned_launches()
    assert {row["kernel"] for row in tuned} == {"segment_attention_kernel", "prefill_attention_kernel", "decode_share_kernel"}
    blocks = {row["tuned_for"]["block_q"] for row in tuned if row["kernel"] == "segment_attention_kernel"}
    assert {"64", "128"} <= blocks
    monkeypatch.setattr(tuned_module, "measured", lambda *_, **__: pytest.fail("tuned again"))
    # Of the same powers of four: 1,344 patches after 1,564; keys of its steps are of any number.
    request = Request(images=[photo("coffee", (588, 448))], prompt="What is this?", max_new_tokens=800, ignore_eos=True)
    lab.run(request, recipe)
    assert tuned_launches() == tuned
