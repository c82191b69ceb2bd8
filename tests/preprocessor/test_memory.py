"""Images go one at a time: many of a request take no more memory than one, and too many pixels are refused by their headers."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvl_lab import Lab, Recipe, Request, RequestCancelledError, RequestError
from fastvl_lab.messages import read_messages
from fastvl_lab.preprocessor import PIXELS_AT_ONCE, _groups, bind
from fastvl_lab.request import MAX_REQUEST_PIXELS, ImageInput

PEAK = """
import ctypes, io, sys, fastvl_lab as fl
from PIL import Image

# A fixed threshold makes the allocator give large blocks back at once, so that the high-water mark is the program's own.
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD

def encoded(form):
    out = io.BytesIO()
    Image.radial_gradient("L").resize((2000, 1900)).convert("RGB").save(out, form, compress_level=1)
    return out.getvalue()

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def peak(bound, images):
    request = fl.Request(images=images, prompt="?", max_pixels=20_000)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    before = status("VmRSS")
    bound.pixels(request)
    return status("VmHWM") - before

lab = fl.Lab("tiny-qwen2.5-vl", device="cpu")
for case in sys.argv[1:]:
    recipe, _, form = case.partition(": ")
    data, bound = encoded(form), lab._bind(lab.engine(recipe)).images
    peak(bound, [data])  # whatever is allocated once
    print(peak(bound, [data]), peak(bound, [data] * 4))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is read where Linux keeps it")
def test_four_large_images_take_less_than_twice_the_memory_of_one(forked: Callable[..., str], tmp_path: Path) -> None:
    """Also by the stock processor, where threads decode, and for a PNG, whose orientation may stand behind its pixels."""
    cases = (
        "baseline: JPEG",
        "fastest: JPEG",
        "fastest: PNG",
        "baseline, preprocessor.resize=pillow, preprocessor.threads=all: JPEG",
    )
    (tmp_path / "peak.py").write_text(PEAK)
    for case, line in zip(cases, forked(tmp_path / "peak.py", *cases).splitlines(), strict=True):
        one, four = map(int, line.split())
        assert one > 10e6, case  # as many bytes as the image has
        assert four < 2 * one, case


def _flat(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "images",
    [[_flat(9000, 9000)] * 64, [_flat(9000, 9000)] * 3, [np.broadcast_to(np.uint8(0), (9000, 9000, 3))] * 3],
    ids=["64 files", "3 files", "3 arrays"],
)
def test_too_many_pixels_of_a_request_are_refused_by_their_sum(lab: Lab, images: list[object]) -> None:
    request = Request(images=images, prompt="?", max_pixels=lab.checkpoint.image_settings.min_pixels)  # type: ignore[arg-type]
    total = 81_000_000 * len(images)
    for engine in ("transformers", "baseline", "fastest"):
        with pytest.raises(RequestError, match=rf"{len(images)} images .* {total} pixels together.* limit is {MAX_REQUEST_PIXELS}"):
            lab.run(request, engine)


def test_eight_photographs_of_twenty_megapixels_are_within_the_limit(labs: dict[str, Lab]) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    request = Request(images=[_flat(5472, 3648)] * 8, prompt="?", max_pixels=20_000)
    assert len(bind(Recipe.fastest().preprocessor, lab.checkpoint).open(request).shapes) == 8


def test_too_many_bytes_of_a_request_are_refused_by_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.messages.MAX_REQUEST_BYTES", 1000)
    parts = [{"type": "image", "image": bytes([number]) * 400} for number in range(5)]
    with pytest.raises(RequestError, match="the first 3 images of the request have 1200 bytes; the limit is 1000"):
        read_messages([{"role": "user", "content": parts}])
    same = bytes(400)
    read_messages([{"role": "user", "content": [{"type": "image", "image": same}] * 5}])  # held once


@pytest.mark.parametrize("threads", ["one", "all"])
def test_a_request_that_is_given_up_ends_between_two_images(lab: Lab, threads: str) -> None:
    stop, noise = threading.Event(), np.random.default_rng(0).integers(256, size=(80, 60, 3), dtype=np.uint8)
    seen: list[str] = []

    def gone(span: object) -> None:
        seen.append(span.name)  # type: ignore[attr-defined]
        if seen.count("preprocess") == 2:
            stop.set()

    recipe = f"fastest, preprocessor.threads={threads}"
    with pytest.raises(RequestCancelledError):
        lab.run(Request(images=[noise] * 6, prompt="?"), recipe, stop=stop, on_stage=gone)
    assert seen.count("preprocess") == 2


def test_the_trace_says_what_was_decoding_and_what_preprocessing(lab: Lab) -> None:
    run = lab.run(Request(images=[_flat(600, 400), _flat(300, 200), _flat(200, 200)], prompt="?", max_new_tokens=1), "fastest")
    names = [span.name for span in run.trace.within_ttft()]
    assert names.count("decode_image") == 1 + 3  # the headers, then each image
    assert names.count("preprocess") == 3
    assert names.count("upload") == 3 + 1  # each image, then the prompt
    assert names[3:9] == ["decode_image", "preprocess", "upload"] * 2
    assert {"decode_image", "preprocess", "upload"} < run.trace.stages().keys()


def test_images_one_at_a_time_are_what_they_are_together(lab: Lab) -> None:
    """Against the stock processor, which takes them all."""
    random = np.random.default_rng(1)
    sizes = [(90, 61), (40, 200), (90, 61), (333, 28), (31, 33)]
    pictures = [Image.fromarray(random.integers(256, size=(h, w, 3), dtype=np.uint8)) for w, h in sizes]
    together = lab.checkpoint.image_processor(pictures, return_tensors="pt")["pixel_values"]
    for threads in ("one", "all"):
        for resize in ("transformers", "pillow"):
            recipe = Recipe.parse(f"baseline, preprocessor.resize={resize}, preprocessor.threads={threads}")
            pixels = bind(recipe.preprocessor, lab.checkpoint).pixels(Request(images=pictures, prompt="?"))
            assert torch.equal(pixels.patches, together) or lab.checkpoint.image_backend == "torchvision"


def test_threads_decode_no_more_than_a_bound_at_once(lab: Lab) -> None:
    bound = bind(Recipe.parse("fastest, preprocessor.threads=all").preprocessor, lab.checkpoint)
    sizes = [(100, 100), (100, 100), (7000, 5000), (3000, 3000), (3000, 3000), (4000, 4000), (100, 100)]
    images = [ImageInput.of(np.broadcast_to(np.uint8(0), (height, width, 3))) for width, height in sizes]
    request = Request(images=images, prompt="?", max_pixels=lab.checkpoint.image_settings.min_pixels)
    opened = bound.open(request).images
    groups = [[one.image.size for one in group] for group in _groups(opened, 4)]
    assert groups == [sizes[:2], sizes[2:3], sizes[3:5], sizes[5:]]
    assert all(len(group) == 1 or sum(w * h for w, h in group) <= PIXELS_AT_ONCE for group in groups)
    assert [len(group) for group in _groups(opened, 1)] == [1] * 7
