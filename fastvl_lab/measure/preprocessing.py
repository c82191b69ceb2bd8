"""The preprocessor alone: its steps timed variant by variant, and what each variant makes of the pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fastvl_lab.errors import RequestError
from fastvl_lab.lab import Lab
from fastvl_lab.measure.rounds import Rounds, Task, now, time_rounds
from fastvl_lab.preprocessor import BoundPreprocessor, bind
from fastvl_lab.preprocessor.layout import PatchLayout
from fastvl_lab.preprocessor.patchify import to_picture
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request

STEPS = ("decode_image", "preprocess", "upload")


def time_preprocessing(
    lab: Lab, request: Request, recipes: Mapping[str, Recipe], *, repeats: int = 10, warm_up: int = 2, seed: int = 0
) -> Rounds:
    """Seconds of each of `STEPS` for every recipe's preprocessor, side by side; the device is waited for after each step.

    Raises `RequestError` for a request without images, and `RecipeError` for a recipe that cannot run here.
    """
    tasks = {label: _task(lab, request, _bound(lab, request, recipe)) for label, recipe in recipes.items()}
    return time_rounds(tasks, repeats=repeats, warm_up=warm_up, seed=seed)


def _bound(lab: Lab, request: Request, recipe: Recipe) -> BoundPreprocessor:
    if not request.image_inputs:
        raise RequestError("the request has no images; the preprocessor has nothing to do")
    recipe.check(lab.checkpoint.target)
    return bind(recipe.preprocessor, lab.checkpoint)


def _task(lab: Lab, request: Request, bound: BoundPreprocessor) -> Task:
    device = lab.device

    @torch.inference_mode()
    def run() -> dict[str, float]:
        seconds = dict.fromkeys(STEPS, 0.0)

        @contextmanager
        def span(step: str) -> Iterator[None]:
            started = now(device)
            yield
            seconds[step] += now(device) - started

        with span("decode_image"):
            opened = bound.open(request)
        bound.make(opened, span)
        return seconds

    return partial(lab.compute, run)


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelDifference:
    """How far two recipes' pixels are apart, in levels of 255: a map uint8 [height, width, 3], its largest and its mean."""

    levels: np.ndarray
    largest: int
    mean: float


def model_pictures(lab: Lab, request: Request, recipe: Recipe) -> tuple[np.ndarray, ...]:
    """The request's images as the model sees them: resized, before normalisation; uint8 [height, width, 3] each."""
    if recipe.preprocessor.patchify == "triton":  # which changes no pixel, but writes them in the model's dtype
        recipe = recipe.replace("preprocessor.patchify", "torch")
    bound, layout = _bound(lab, request, recipe), PatchLayout.of(lab.checkpoint)
    pixels = lab.compute(lambda: bound.patches(request))
    parts = pixels.patches.cpu().split([grid.n_patches for grid in pixels.grids])
    return tuple(to_picture(part, grid, layout).numpy() for part, grid in zip(parts, pixels.grids, strict=True))


def pixel_differences(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[PixelDifference, ...]:
    """Pictures as `model_pictures` gives them for two recipes, image by image."""
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        levels = np.abs(one.astype(np.int16) - other).astype(np.uint8)
        differences.append(PixelDifference(levels=levels, largest=int(levels.max()), mean=float(levels.mean())))
    return tuple(differences)
