"""The lists of named recipes that are compared, here and in the notebooks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from fastvl_lab.catalogue import OptionValue, Target, toggles
from fastvl_lab.engine import EngineLike, find
from fastvl_lab.errors import RecipeError, RequestError, quoted, sentence
from fastvl_lab.families import Family
from fastvl_lab.recipe import Recipe

STOCK = "transformers"
START = "baseline"

Changes = Mapping[str, OptionValue]


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """A recipe after `Recipe.choose` of each change in turn."""
    for path, value in changes.items():
        recipe = recipe.choose(path, value)
    return recipe


def named(only: Sequence[str]) -> frozenset[str]:
    """The toggles that are named or whose slots are, of all where none is; raises `RequestError`."""
    known = {name for toggle in toggles() for name in (toggle.slot, toggle.path)}
    if not isinstance(only, Sequence) or isinstance(only, str) or not set(only) <= known:
        raise RequestError(f"only is {quoted(only)}; give a list of slots such as 'vit', or of toggles such as 'vit.rope'")
    return frozenset(toggle.path for toggle in toggles() if not only or {toggle.slot, toggle.path} & set(only))


def choices_of(recipe: Recipe, slot: str) -> dict[str, OptionValue]:
    """What a recipe chooses in a slot beyond the first options."""
    return {path: value for path, value in recipe.changes().items() if path.startswith(f"{slot}.")}


def each_alone(recipe: Recipe, choices: Changes) -> dict[str, Recipe]:
    """The recipe with each of the choices alone, and what that requires: "+ rope=fused" -> a recipe."""
    return {f"+ {path.partition('.')[2]}={value}": recipe.choose(path, value) for path, value in choices.items()}


def each_undone(recipe: Recipe, choices: Changes, bare: Recipe) -> dict[str, Recipe]:
    """The recipe with each of the choices alone as `bare` has it: "all but rope" -> a recipe."""
    return {f"all but {path.partition('.')[2]}": recipe.choose(path, bare.value(path)) for path in choices}


def undone_alone(reported: Recipe) -> dict[str, Recipe]:
    """The recipe, then the same with each of its streaming toggles back at its first option alone."""
    first = {path: Recipe.baseline().value(path) for path in choices_of(reported, "streaming")}
    undone = {f"as reported, but {path.partition('.')[2]}={value}": reported.replace(path, value) for path, value in first.items()}
    return {"as reported": reported} | undone


def steps_between(start: Recipe, end: Recipe) -> dict[str, Recipe]:
    """Recipes from `start` to `end` by what each changes, in the order of the corridor.

    A toggle that is not allowed without another waits for it; what is only allowed together changes in one step.
    """
    found, current = {START if start == Recipe.baseline() else "start": start}, start
    pending = [toggle.path for toggle in toggles() if start.value(toggle.path) != end.value(toggle.path)]
    while pending:
        for path in pending:
            try:
                current, taken = current.replace(path, end.value(path)), [path]
            except RecipeError:
                continue
            break
        else:
            current, taken = end, list(pending)
        found[", ".join(f"{path}={end.value(path)}" for path in taken)] = current
        pending = [path for path in pending if path not in taken]
    assert current == end
    return found


def attention_variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with every way of attention, in prefill and decode alike where both have it: "attention=sdpa" -> a recipe."""
    variants: dict[str, Recipe] = {}
    for toggle in toggles():
        for value in toggle.values if toggle.path in ("attention.prefill", "attention.decode") else ():
            label = f"attention={value}"
            variants[label] = variants.get(label, recipe).choose(toggle.path, value)
    return variants


def cannot_run(engine: EngineLike, target: Target) -> str | None:
    """Why an engine cannot run on the target, or None if nothing is known against it."""
    try:
        if (recipe := find(engine, target.device).recipe) is not None:
            recipe.check(target)
    except RecipeError as error:
        return sentence(error)
    return None


# Slot, or a toggle of its own -> the stages in which it works.
_STAGES_OF = {
    "preprocessor": ("preprocess", "await_image"),
    "preprocessor.decode": ("decode_image", "await_image"),
    "preprocessor.threads": ("decode_image", "preprocess", "await_image"),
    "preprocessor.upload": ("upload",),
    "vit": ("vit", "merge"),
    "attention": ("prefill", "sample"),
    "attention.decode": ("decode",),
    "cache": ("admit", "prefill"),
    "capture": ("vit", "merge", "prefill", "first_token"),
    "capture.vit": ("vit",),
    "capture.prefill": ("prefill",),
    "capture.decode": ("decode",),
    "capture.shapes": (),  # nothing where nothing is captured
    "streaming": ("decode", "emit"),
    "schedule.overlap": ("decode_image", "preprocess", "await_image"),
}


def stages_of(path: str) -> tuple[str, ...]:
    """The stages in which the toggle "slot.toggle" works; none of those that say who shares a step."""
    return _STAGES_OF[path] if path in _STAGES_OF else _STAGES_OF.get(path.partition(".")[0], ())


# What the report compares of one slot.


def _each_option(lean: Recipe, paths: Container[str], target: Target) -> tuple[dict[str, EngineLike], Recipe]:
    """The recipe with each exact option of these toggles that can run, and what that requires; and the one with all the last."""
    alone: dict[str, EngineLike] = {}
    last = lean
    for toggle in toggles():
        for option in toggle.options if toggle.path in paths else ():
            if option.exact and option.needs.unmet(target) is None:
                if option.value != lean.value(toggle.path):
                    alone[f"{toggle.name}={option.value}"] = lean.choose(toggle.path, option.value)
                last = last.choose(toggle.path, option.value)
    return alone, last


def _paths(slot: str) -> list[str]:
    return [toggle.path for toggle in toggles() if toggle.slot == slot]


def of_the_tower(target: Target, family: Family) -> dict[str, EngineLike]:
    """The stock tower, the lean one, each of its options that can run here alone with what it requires, and all the last ones."""
    stock = Recipe.parse("baseline, preprocessor.resize=pillow")
    lean = stock.replace("vit.tower", "lean")
    alone, last = _each_option(lean, [path for path in _paths("vit") if path != "vit.tower"], target)
    found: dict[str, EngineLike] = {"stock": stock, "lean": lean}
    found |= {label: recipe for label, recipe in alone.items() if label not in family.idle} | {"last of each": last}
    varlen = last.replace("vit.attention", "varlen")
    if last.vit.attention == "triton" and cannot_run(varlen, target) is None:
        found["last of each, varlen"] = varlen
    return found | {"fastest": Recipe.fastest(target)}


def of_the_decoder(target: Target) -> dict[str, EngineLike]:
    """Transformers, the baseline, and the lean decoder with SDPA: plain, with each option of its slot and each KV cache that can
    run here alone, and what that requires, and with all the last ones. Then the fastest known."""
    sdpa = "sdpa_efficient" if target.device.type == "cuda" else "sdpa"
    lean = Recipe.parse(f"baseline, attention.prefill={sdpa}, attention.decode={sdpa}")
    alone, last = _each_option(lean, _paths("attention"), target)
    found: dict[str, EngineLike] = {STOCK: STOCK, "baseline": Recipe.baseline(), "lean": lean, **alone}
    found |= _each_option(lean, ["cache.kv"], target)[0] | {"last of each": last}
    if last.attention.prefill == "triton":
        found["last of each, sdpa"] = last.replace({"attention.prefill": sdpa, "attention.decode": sdpa})
        varlen = last.replace("attention.prefill", "varlen")
        if cannot_run(varlen, target) is None:
            found["last of each, varlen"] = varlen
    return found | {"fastest": Recipe.fastest(target)}


# What the report compares of whole requests.

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
    f"sdpa_{kernel}": {"attention.prefill": f"sdpa_{kernel}", "attention.decode": f"sdpa_{kernel}"}
    for kernel in ("efficient", "flash", "cudnn", "math")
}

# What decides how the stages up to the first token are executed, by the names under which the report compares it.
MODES: dict[str, Changes] = {
    "eager": {},
    "compile": {"capture.vit": "compile", "capture.prefill": "compile"},
    "per-stage graphs": {"capture.vit": "graph", "capture.prefill": "graph"},
    "single graph": {"capture.first_token": "single_graph"},
}
_GRAPHS: dict[str, Changes] = {
    "graphs": {**MODES["per-stage graphs"], "capture.decode": "graph"},
    "one graph": {**MODES["single graph"], "capture.decode": "graph"},
}

# Beyond what the fastest recipe has, of one slot: slot -> label -> changes.
_OF_A_SLOT: dict[str, dict[str, Changes]] = {
    "preprocessor": {"pinned": _PINNED, "triton": {**_PINNED, "preprocessor.patchify": "triton"}},
    "vit": {name: {**_FUSED_VIT, "vit.attention": name} for name in ("varlen", "triton", "grouped_flash", "grouped_cudnn")},
    "attention": {
        name: {**_FUSED_DECODER, **{path: value for path, value in changes.items() if path.startswith("attention.")}}
        for name, changes in {**_ATTENTION, **_KERNELS}.items()
    },
    "cache": {"paged": {"cache.kv": "paged"}},
    "capture": _GRAPHS,
    "streaming": {f"{n} a round": {"streaming.steps_per_round": n} for n in (2, 16)},
}


def of_a_request(target: Target) -> dict[str, EngineLike]:
    """What is compared, by label; no two are the same engine, and some may be unable to run here (`cannot_run`).

    Transformers, the baseline and the fastest recipe known for the target. Then the baseline with one slot of the fastest recipe,
    as it is and with that slot's candidates for CUDA. Then the fastest recipe with candidates of all slots together.
    """
    baseline, fastest = Recipe.baseline(), Recipe.fastest(target)
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
    one_graph = changed(fused(fastest), _GRAPHS["one graph"])
    add("all: varlen, one graph, 2 a round", one_graph.choose("streaming.steps_per_round", 2))
    add("all: varlen, patchify", one_graph.choose("preprocessor.patchify", "triton"))
    return found


def of_a_load(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with requests that share steps, by label: prompts whole or in pieces, images too, or images unpacked ahead."""
    together = recipe.choose("schedule.batching", "continuous")
    pieces = together.choose("schedule.prefill", "chunked")
    return {
        "continuous": together,
        "continuous, in pieces": pieces,
        "continuous, in pieces and by blocks": pieces.choose("schedule.tower", "by_blocks"),
        "continuous, images ahead": together.choose("schedule.vision", "ahead"),
    }


def fused(recipe: Recipe, attention: str = "varlen") -> Recipe:
    """A recipe with every fused kernel, page-locked uploads, and attention in tower and prefill: "varlen", "triton" or "cudnn"."""
    return changed(recipe, {**_PINNED, **_FUSED_VIT, **_FUSED_DECODER, **_ATTENTION[attention]})


def modes(recipe: Recipe) -> dict[str, Recipe]:
    """One recipe with its stages up to the first token executed in every way of `MODES`, on shapes as they are.

    They differ in nothing else: what does not go with one of them is at its first option in all.
    """
    first = Recipe.baseline().value
    eager = recipe.replace({path: first(path) for path in _paths("capture")})
    for made in [changed(eager, changes) for changes in MODES.values()]:
        given_up = [path for path in eager.changes() if made.value(path) == first(path)]
        eager = eager.replace({path: first(path) for path in given_up})
    return {name: changed(eager, changes) for name, changes in MODES.items()}


def with_slot(recipe: Recipe, slot: str, source: Recipe) -> Recipe:
    """A recipe with one slot as `source` has it, and elsewhere what that slot cannot do without."""
    paths = _paths(slot)
    made = changed(recipe, {path: source.value(path) for path in paths if source.value(path) != recipe.value(path)})
    assert all(made.value(path) == source.value(path) for path in paths)
    return made


# What a decode step depends on; engines that agree in it take the same steps.
_OF_A_STEP = (
    *(f"attention.{name}" for name in ("decode", "projections", "weights", "norms", "rope", "activation", "argmax")),
    *("capture.decode", "capture.shapes"),
)


def same_steps(some: Mapping[str, EngineLike]) -> dict[str, str]:
    """Label -> the first label among them whose decode steps are the same."""
    first: dict[object, str] = {}
    return {label: first.setdefault(_step(engine), label) for label, engine in some.items()}


def _step(engine: EngineLike) -> object:
    recipe = find(engine).recipe
    return engine if recipe is None else (recipe.cache, recipe.streaming, *(recipe.value(path) for path in _OF_A_STEP))
