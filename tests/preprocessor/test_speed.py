"""Speed and memory against the stock processor, side by side on the machine at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvl_lab import Lab, Recipe, Request, photo
from fastvl_lab.measure.samples import Interval
from fastvl_lab.measure.tasks import Preprocessing, time_task

BIT_EQUAL = "fastest, preprocessor.decode=pillow, preprocessor.resize=pillow, preprocessor.threads=all"
SIZES = {"1280x960": ((1280, 960), 6), "4032x3024": ((4032, 3024), 8)}
MAX_PIXELS = 1003520  # a budget that engines set in practice; the built-in checkpoint's own would not shrink a photograph of 12 MP


@pytest.mark.benchmark
@pytest.mark.parametrize("size", SIZES)
def test_patches_are_made_several_times_faster_than_by_the_stock_processor(
    labs: dict[str, Lab], size: str, assert_reaches: Callable[[Callable[[], Interval], float], None]
) -> None:
    """From decoded pixels to what the vision tower is given."""
    (width, height), bar = SIZES[size]
    request = Request(images=[photo("coffee", (width, height))], prompt="?", max_pixels=None if width < 2000 else MAX_PIXELS)

    def ratio(recipe: str) -> Interval:
        recipes = {"stock": Recipe.baseline(), "ours": Recipe.parse(recipe)}
        rounds = time_task(labs["tiny-qwen2.5-vl"], Preprocessing(request), recipes, repeats=9)
        return rounds.ratio("ours", "stock", "preprocess", "upload")

    assert_reaches(lambda: ratio("fastest"), bar)
    assert_reaches(lambda: ratio(BIT_EQUAL), 2)


PEAK = """
import ctypes, json, sys, fastvl_lab as fl
from fastvl_lab.preprocessor import bind

# A fixed threshold makes the allocator give large blocks back at once, so that the high-water mark is the program's own.
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD

lab = fl.Lab("tiny-qwen2.5-vl", device="cpu")

def peak(bound, size, max_pixels):
    request = fl.Request(images=[fl.photo("coffee", size)], prompt="?", max_pixels=max_pixels)
    (one,) = bound.open(request).images
    (picture,) = bound.unpack([one])
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    before = status("VmRSS")
    bound.upload(bound.preprocess(picture, one))
    return status("VmHWM") - before

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

sizes, *recipes = map(json.loads, sys.argv[1:])
for recipe in recipes:
    bound = bind(fl.Recipe.parse(recipe).preprocessor, lab.checkpoint)
    peak(bound, (100, 80), 20_000)  # whatever is allocated once
    print(json.dumps([peak(bound, size, 1003520) for size in sizes]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is read where Linux keeps it")
def test_at_most_half_of_the_stock_processors_memory_is_taken(forked: Callable[..., str], tmp_path: Path) -> None:
    recipes = ("baseline", "fastest", BIT_EQUAL)
    (tmp_path / "peak.py").write_text(PEAK)
    arguments = map(json.dumps, ([[1280, 960], [4032, 3024]], *recipes))
    stock, *ours = map(json.loads, forked(tmp_path / "peak.py", *arguments).splitlines()[-len(recipes) :])
    assert min(stock) > 10e6
    for recipe, peaks in zip(recipes[1:], ours, strict=True):
        assert all(peak <= most / 2 for peak, most in zip(peaks, stock, strict=True)), recipe
