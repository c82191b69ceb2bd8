"""What the GPU report compares: each slot's best choices alone, whole recipes of them, and one recipe executed in every way."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastvl_lab.catalogue import OptionValue, Target, toggles
from fastvl_lab.engine import EngineLike, find
from fastvl_lab.errors import RecipeError, sentence
from fastvl_lab.recipe import Recipe

STOCK = "transformers"

Changes = dict[str, OptionValue]

_PINNED: Changes = {"preprocessor.upload": "pinned"}
_FUSED_VIT: Changes = {f"vit.{name}": "fused" for name in ("norms", "rope", "activation", "interpolation")}
_FUSED_DECODER: Changes = {f"attention.{name}": "fused" for name in ("norms", "rope", "activation", "argmax")}
_ATTENTION: dict[str, Changes] = {
    "varlen": {"vit.attention": "varlen", "attention.prefill": "varlen", "attention.decode": "triton"},
    "triton": {"vit.attention": "triton", "attention.prefill": "triton", "attention.decode": "triton"},
    "cudnn": {"vit.attention": "grouped_cudnn", "attention.prefill": "sdpa_cudnn", "attention.decode": "triton"},
}
# Kernels of torch's that are compared in the attention slot alone.
_KERNELS: dict[str, Changes] = {
    kernel: {"attention.prefill": f"sdpa_{kernel}", "attention.decode": f"sdpa_{kernel}"}
    for kernel in ("efficient", "flash", "cudnn", "math")
}

# What a decode step depends on; engines that agree in it take the same steps.
_OF_A_STEP = (
    *(f"attention.{name}" for name in ("decode", "projections", "norms", "rope", "activation", "argmax")),
    *("capture.decode", "capture.shapes"),
)

# What decides how the stages up to the first token are executed, by the names under which the report compares it.
MODES: dict[str, Changes] = {
    "eager": {},
    "compile": {"capture.vit": "compile", "capture.prefill": "compile"},
    "per-stage graphs": {"capture.vit": "graph", "capture.prefill": "graph"},
    "single graph": {"capture.first_token": "single_graph"},
}
_GRAPHS: dict[str, Changes] = {
    label: MODES[way] | {"capture.decode": "graph"}
    for label, way in (("graphs", "per-stage graphs"), ("one graph", "single graph"))
}

# Beyond what the fastest recipe has, of one slot: slot -> label -> changes.
_OF_A_SLOT: dict[str, dict[str, Changes]] = {
    "preprocessor": {"pinned": _PINNED, "triton": _PINNED | {"preprocessor.patchify": "triton"}},
    "vit": {name: _FUSED_VIT | {"vit.attention": name} for name in ("varlen", "triton", "grouped_flash", "grouped_cudnn")},
    "attention": {
        name: _FUSED_DECODER | {path: value for path, value in changes.items() if path.startswith("attention.")}
        for name, changes in {**_ATTENTION, **{f"sdpa_{kernel}": changes for kernel, changes in _KERNELS.items()}}.items()
    },
    "cache": {"paged": {"cache.kv": "paged"}},
    "capture": _GRAPHS,
    "streaming": {f"{n} a round": {"streaming.steps_per_round": n} for n in (2, 16)},
}


def engines(device: torch.device, dtype: torch.dtype) -> dict[str, EngineLike]:
    """What is compared, by label; no two are the same engine, and some may be unable to run here (`cannot_run`).

    Transformers, the baseline and the fastest recipe known for the device. Then the baseline with one slot of the fastest recipe,
    as it is and with that slot's candidates for CUDA. Then the fastest recipe with candidates of all slots together.
    """
    baseline, fastest = Recipe.baseline(), Recipe.fastest(device)
    found: dict[str, EngineLike] = {STOCK: STOCK, "baseline": baseline, "fastest": fastest}

    def add(label: str, recipe: Recipe) -> None:
        if recipe not in found.values():
            found[label] = recipe

    for slot in dict.fromkeys(toggle.slot for toggle in toggles()):
        alone = with_slot(baseline, slot, fastest)
        add(slot, alone)
        for label, changes in _OF_A_SLOT.get(slot, {}).items():
            add(f"{slot}: {label}", changed(alone, changes))
    for attention in _ATTENTION:
        whole = fused(fastest, attention)
        add(f"all: {attention}", whole)
        for label, changes in _GRAPHS.items():
            add(f"all: {attention}, {label}", changed(whole, changes))
    add("all: varlen, one graph, 2 a round", changed(fused(fastest), _GRAPHS["one graph"] | {"streaming.steps_per_round": 2}))
    add("all: varlen, patchify", changed(fused(fastest), _GRAPHS["one graph"] | {"preprocessor.patchify": "triton"}))
    return found


def fused(recipe: Recipe, attention: str = "varlen") -> Recipe:
    """A recipe with every fused kernel, page-locked uploads, and attention in tower and prefill: "varlen", "triton" or "cudnn"."""
    return changed(recipe, _PINNED | _FUSED_VIT | _FUSED_DECODER | _ATTENTION[attention])


def modes(recipe: Recipe) -> dict[str, Recipe]:
    """One recipe with its stages up to the first token executed in every way of `MODES`, on shapes as they are."""
    eager = recipe.replace({toggle.path: toggle.values[0] for toggle in toggles() if toggle.slot == "capture"})
    return {name: changed(eager, changes) for name, changes in MODES.items()}


def with_slot(recipe: Recipe, slot: str, source: Recipe) -> Recipe:
    """A recipe with one slot as `source` has it, and elsewhere what that slot cannot do without."""
    paths = [toggle.path for toggle in toggles() if toggle.slot == slot]
    made = changed(recipe, {path: source.value(path) for path in paths if source.value(path) != recipe.value(path)})
    assert all(made.value(path) == source.value(path) for path in paths)
    return made


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """A recipe after `Recipe.choose` of each change in turn."""
    for path, value in changes.items():
        recipe = recipe.choose(path, value)
    return recipe


def same_steps(some: Mapping[str, EngineLike]) -> dict[str, str]:
    """Label -> the first label among them whose decode steps are the same."""
    first: dict[object, str] = {}
    return {label: first.setdefault(_step(engine), label) for label, engine in some.items()}


def _step(engine: EngineLike) -> object:
    recipe = find(engine).recipe
    return engine if recipe is None else (recipe.cache, recipe.streaming, *(recipe.value(path) for path in _OF_A_STEP))


def cannot_run(engine: EngineLike, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an engine cannot run on the device in the dtype, or None if nothing is known against it."""
    recipe = find(engine, device).recipe
    try:
        if recipe is not None:
            recipe.check(Target(device=device, dtype=dtype))
    except RecipeError as error:
        return sentence(error)
    return None
