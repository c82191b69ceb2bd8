"""What only a GPU can show: parity on the device, and the device lane."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, photo, preprocessor, toggles, vit
from fastvl_lab.checkpoint import tiny
from fastvl_lab.measure.preprocessing import model_pictures, pixel_differences
from fastvl_lab.trace import Tracer

pytestmark = pytest.mark.gpu


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
    if (reason := option.unavailable(lab.device)) is not None:
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
        t.path: [o.value for o in t.options if o.unavailable(lab.device) is None]
        for t in toggles()
        if t.slot == "vit" and t.name != "tower"
    }
    free = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean")
    recipes = [free.replace(path, value) for path, values in options.items() for value in values]
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
    counts = {}
    for level in ("off", "stages"):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            lab.run(request, "fastest", trace=level)  # type: ignore[arg-type]
        names = [event.key for event in profile.key_averages() for _ in range(event.count)]
        counts[level] = names.count("cudaStreamSynchronize")
    assert counts["off"] == counts["stages"]
