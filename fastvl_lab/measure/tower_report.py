"""The vision tower on this device, in one command: parity first, then times by option against the stock tower and the floor.

    python -m fastvl_lab.measure.tower_report [--tiny] [--out tower.json]

Without arguments it needs a GPU: the published 3B and 4B geometries with random weights in bfloat16, at 448x448, 1280x960 and
1920x1080. `--tiny` runs the built-in checkpoints in float32 on small images anywhere. torch, transformers and triton are enough.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastvl_lab import preprocessor, vit
from fastvl_lab.errors import sentence
from fastvl_lab.families import Family
from fastvl_lab.lab import Lab, device_name
from fastvl_lab.measure.floors import matmul_ceiling, vit_flops
from fastvl_lab.measure.parity import wider, within_budget, worst_error
from fastvl_lab.measure.slot_report import Row, command, picture, runnable, table
from fastvl_lab.measure.towers import grids_of, time_towers
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Request
from fastvl_lab.trace import Tracer

FULL = {
    "checkpoints": ("random:Qwen/Qwen2.5-VL-3B-Instruct", "random:Qwen/Qwen3-VL-4B-Instruct"),
    "sizes": ((448, 448), (1280, 960), (1920, 1080)),
    "device": "cuda",
    "dtype": "bfloat16",
}
TINY = {
    "checkpoints": ("tiny-qwen2.5-vl", "tiny-qwen3-vl"),
    "sizes": ((168, 140), (336, 280)),
    "device": None,
    "dtype": "float32",
}


def variants(device: torch.device, dtype: torch.dtype, family: Family) -> dict[str, Recipe]:
    """The stock tower, the lean one, each of its options that can run here alone, and all of the last ones together."""
    lean = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean")
    recipes = {"stock": Recipe.parse("baseline, preprocessor.resize=pillow"), "lean": lean}
    last: dict[str, Any] = {}
    for toggle, option in runnable("vit", device, dtype):
        if toggle.name != "tower":
            label = f"{toggle.name}={option.value}"
            if option.value != lean.value(toggle.path) and label not in family.idle:
                recipes[label] = lean.replace(toggle.path, option.value)
            last[toggle.path] = option.value
    recipes["last of each"] = lean.replace(last)
    if last["vit.attention"] == "triton" and dtype != torch.float32:
        recipes["last of each, varlen"] = lean.replace(last | {"vit.attention": "varlen"})
    recipes["fastest"] = Recipe.fastest(device)
    return recipes


def errors(lab: Lab, request: Request, recipes: Mapping[str, Recipe]) -> dict[str, float | str]:
    """The worst visual token's relative error of each recipe, DeepStack features included, or why it could not run.

    Against the stock tower in a wider dtype, on the recipe's own pixels.
    """
    return lab.compute(lambda: _errors(lab, request, recipes))


@torch.inference_mode()
def _errors(lab: Lab, request: Request, recipes: Mapping[str, Recipe]) -> dict[str, float | str]:
    wide = wider(lab.dtype)
    vision, stock = copy.deepcopy(lab.checkpoint.vision.module).to(wide), lab.checkpoint.family.stock_vision
    found: dict[str, float | str] = {}
    for label, recipe in recipes.items():
        sent = preprocessor.bind(recipe.preprocessor, lab.checkpoint)
        stock_form = dataclasses.replace(recipe.preprocessor, payload="float32", temporal="duplicated")
        whole = preprocessor.bind(stock_form, lab.checkpoint)
        try:
            pixels, stock_pixels = sent.pixels(request), whole.patches(request)
            grid = torch.tensor(stock_pixels.grids, device=lab.device)
            truth = stock(vision, stock_pixels.patches.to(lab.device, wide), grid)
            made = vit.bind(recipe.vit, lab.checkpoint, sent.patch_format)(pixels, Tracer(lab.device, "off"))
            found[label] = worst_error(zip(made.parts, truth.parts, strict=True))
        except Exception as error:  # one option that a device cannot run must not cost the others their rows
            found[label] = sentence(error)
    return found


def report(
    checkpoints: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    device: str | None,
    dtype: str,
    *,
    repeats: int = 20,
    on_rows: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """One row a checkpoint, size and recipe: error, and where it is within twice the stock tower's, ms, ratio and floor.

    on_rows is called with all rows so far after each size.
    """
    rows: list[Row] = []
    for name in checkpoints:
        lab = Lab(name, device=device, dtype=dtype)
        recipes = variants(lab.device, lab.dtype, lab.checkpoint.family)
        for width, height in sizes:
            request = Request(images=[picture(width, height)], prompt="?")
            grids, ceiling = grids_of(lab, request), matmul_ceiling(lab.device, lab.dtype)
            found = errors(lab, request, recipes)
            right = within_budget(found, "stock", lab.dtype)
            good = {label: recipe for label, recipe in recipes.items() if label in right}
            rounds = time_towers(lab, request, good, repeats=repeats) if good else None
            for label, recipe in recipes.items():
                row: Row = {"checkpoint": name, "image": f"{width}x{height}", "recipe": label}
                row |= {"device": device_name(lab.device), "dtype": dtype, "error": found[label], "parity": label in good}
                if rounds is not None and label in good:
                    frames = 1 if recipe.preprocessor.temporal == "folded" else None
                    flops = vit_flops(lab.checkpoint, grids, frames=frames).total
                    ratio, seconds = rounds.ratio(label, "stock"), rounds.median(label).median
                    row |= {"ms": seconds * 1e3, "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
                    row |= {"floor_ms": flops / ceiling * 1e3, "share_of_ceiling": flops / seconds / ceiling}
                rows.append(row)
            on_rows(rows)
        del lab
    return rows


def text(rows: Sequence[Row]) -> str:
    """The rows as text, a block a checkpoint and size."""
    return table(
        rows,
        lambda row: f"{row['checkpoint']}, {row['image']}, {row['device']} {row['dtype']}",
        lambda row: (
            f"{row['ms']:9.3f} ms  {row['ratio']:5.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
            f"  floor {row['floor_ms']:8.3f} ms  {row['share_of_ceiling']:4.0%} of the ceiling  error {row['error']:.1e}"
        ),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    command(report, text, full=FULL, tiny=TINY, about=__doc__, repeats=20, arguments=arguments)


if __name__ == "__main__":
    main()
