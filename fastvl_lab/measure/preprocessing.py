"""The preprocessor alone: its steps timed variant by variant, and what each variant makes of the pixels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fastvl_lab.lab import Lab
from fastvl_lab.measure.rounds import Rounds, Task, time_rounds
from fastvl_lab.preprocessor import BoundPreprocessor, bind
from fastvl_lab.preprocessor.layout import PatchLayout
from fastvl_lab.preprocessor.patchify import to_picture
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request

STEPS = ("decode_image", "preprocess", "upload")


def time_preprocessing(
    lab: Lab, request: Request, recipes: Mapping[str, Recipe], *, repeats: int = 10, warm_up: int = 2, seed: int = 0
) -> Rounds:
    """Seconds of each of `STEPS` for every recipe's preprocessor, side by side; the device is waited for after each step."""
    tasks = {label: _task(bind(recipe.preprocessor, lab.checkpoint), request, lab.device) for label, recipe in recipes.items()}
    return time_rounds(tasks, repeats=repeats, warm_up=warm_up, seed=seed)


def _task(bound: BoundPreprocessor, request: Request, device: torch.device) -> Task:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @torch.inference_mode()
    def run() -> dict[str, float]:
        start = now()
        decoded = bound.decode(request)
        decoded_at = now()
        pixels = bound.preprocess(decoded, request)
        preprocessed_at = now()
        bound.upload(pixels.patches)
        return dict(zip(STEPS, np.diff([start, decoded_at, preprocessed_at, now()]).tolist(), strict=True))

    return run


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelDifference:
    """How far two recipes' pixels are apart, in levels of 255: a map uint8 [height, width, 3], its largest and its mean."""

    levels: np.ndarray
    largest: int
    mean: float


def model_picture(lab: Lab, request: Request, recipe: Recipe) -> np.ndarray:
    """The request's first image as the model sees it: resized, before normalisation; uint8 [height, width, 3]."""
    bound, layout = bind(recipe.preprocessor, lab.checkpoint), PatchLayout.of(lab.checkpoint)
    pixels = bound.preprocess(bound.decode(request), request)
    first = pixels.patches[: pixels.grids[0].n_patches].cpu()
    return to_picture(first, pixels.grids[0], layout).numpy()


def pixel_difference(lab: Lab, request: Request, recipe: Recipe, reference: Recipe) -> PixelDifference:
    """The recipe's pixels against the reference's, on the request's first image."""
    ours, theirs = (model_picture(lab, request, one).astype(np.int16) for one in (recipe, reference))
    levels = np.abs(ours - theirs).astype(np.uint8)
    return PixelDifference(levels=levels, largest=int(levels.max()), mean=float(levels.mean()))
