"""Lists of recipes: each is what its label says, no two are the same, and a GPU's are known without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastvl_lab import Lab, Recipe, toggles
from fastvl_lab.catalogue import Target, toggle_at
from fastvl_lab.measure.recipes import (
    MODES,
    attention_variants,
    cannot_run,
    choices_of,
    each_alone,
    each_undone,
    modes,
    of_a_request,
    of_the_decoder,
    of_the_tower,
    same_steps,
    steps_between,
    undone_alone,
)
from fastvl_lab.measure.tasks import bindable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "end",
    [
        "fastest",
        "fastest, cache.kv=paged, cache.prefix_reuse=on",
        "fastest, capture.vit=compile, capture.shapes=multiples_of_64",
        "baseline, capture.first_token=single_graph, vit.tower=lean, cache.kv=static",
        "baseline",
    ],
)
def test_every_step_is_a_recipe_and_changes_only_what_it_says(end: str) -> None:
    last = Recipe.parse(end)
    steps = steps_between(Recipe.baseline(), last)
    labels, recipes = list(steps), list(steps.values())
    assert labels[0] == "baseline"
    assert recipes[0] == Recipe.baseline()
    assert recipes[-1] == last
    for label, before, after in zip(labels[1:], recipes, recipes[1:], strict=False):
        changed = {t.path: after.value(t.path) for t in toggles() if after.value(t.path) != before.value(t.path)}
        assert label == ", ".join(f"{path}={value}" for path, value in changed.items())
    assert len(labels) - 1 <= len(last.changes())


def test_the_way_back_starts_from_a_recipe_that_is_not_the_baseline() -> None:
    steps = steps_between(Recipe.fastest(), Recipe.baseline())
    assert next(iter(steps)) == "start"
    assert list(steps.values())[-1] == Recipe.baseline()


def test_every_way_of_attention_is_a_recipe_and_those_that_cannot_run_say_why(lab: Lab) -> None:
    fastest = Recipe.fastest(lab.device)
    variants = attention_variants(Recipe.parse("baseline, cache.kv=concat, attention.norms=native"))
    options = {o.value for t in toggles() if t.path in ("attention.prefill", "attention.decode") for o in t.options}
    assert set(variants) == {f"attention={value}" for value in options}
    assert variants["attention=sdpa"].attention.prefill == variants["attention=sdpa"].attention.decode == "sdpa"
    assert variants["attention=varlen"].attention.decode == "eager"  # it has no decode, which stays the recipe's
    assert variants["attention=triton"].cache.kv == "static"  # and what an option cannot do without comes with it
    assert all(variant.attention.norms == "native" for variant in variants.values())

    can, cannot = bindable(lab, attention_variants(fastest) | {"fastest": fastest})
    assert {"attention=eager", "attention=sdpa", "fastest"} <= set(can)
    assert can["fastest"] == fastest
    if lab.device.type == "cpu":
        assert "needs a CUDA device" in cannot["attention=varlen"]
        assert "needs a CUDA device" in cannot["attention=triton"]
    assert not set(can) & set(cannot)


@pytest.mark.parametrize(
    "text", ["fastest", "baseline, vit.tower=lean, vit.attention=grouped", "fastest, streaming.steps_per_round=16"]
)
@pytest.mark.parametrize("slot", ["vit", "attention", "streaming"])
def test_choices_alone_and_undone_differ_in_one_toggle_and_what_it_requires(text: str, slot: str) -> None:
    recipe, bare = Recipe.parse(text), Recipe.baseline()
    choices = choices_of(recipe, slot)
    assert set(choices) == {path for path in recipe.changes() if path.partition(".")[0] == slot}
    for (path, value), (label, alone) in zip(choices.items(), each_alone(bare, choices).items(), strict=True):
        assert label == f"+ {path.partition('.')[2]}={value}"
        assert alone.value(path) == value
        assert path in alone.changes()
    for path, (label, without) in zip(choices, each_undone(recipe, choices, bare).items(), strict=True):
        assert label == f"all but {path.partition('.')[2]}"
        assert without.value(path) == bare.value(path)


def test_a_report_of_held_tokens_is_undone_a_toggle_at_a_time() -> None:
    everything = {"streaming.steps_per_round": 16, "streaming.gate": "round", "streaming.positions": "host_sync"}
    found = undone_alone(Recipe.fastest().replace(everything))
    assert next(iter(found)) == "as reported"
    assert set(found) == {
        "as reported",
        *(f"as reported, but {undone}" for undone in ("steps_per_round=1", "gate=open", "positions=on_device")),
    }
    for label, recipe in list(found.items())[1:]:
        (path,) = recipe.changes().items() ^ found["as reported"].changes().items() and {
            p for p in everything if recipe.value(p) != everything[p]
        }
        assert label == f"as reported, but {path.partition('.')[2]}={recipe.value(path)}"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_engine_is_another_and_is_what_its_label_says(device: torch.device) -> None:
    """What a GPU would be given is known without one."""
    compared, fastest = of_a_request(Target(device=device)), Recipe.fastest(device)
    assert len(set(compared.values())) == len(compared)
    assert [compared[label] for label in ("transformers", "baseline", "fastest")] == ["transformers", Recipe.baseline(), fastest]
    for slot in ("preprocessor", "vit", "attention", "cache"):
        alone = compared[slot]
        assert isinstance(alone, Recipe)
        assert getattr(alone, slot) == getattr(fastest, slot)
        needed = {path for toggle in toggles() if toggle.slot == slot for path, _ in alone.option(toggle).required()}
        assert {path for path in alone.changes() if not path.startswith(slot)} <= needed
    for label, engine in compared.items():
        assert isinstance(engine, str) or engine.exact
        if label.startswith("all: "):
            assert isinstance(engine, Recipe)
            name = label.removeprefix("all: ").partition(",")[0]
            assert engine.attention.prefill.removeprefix("sdpa_") == name
            assert (engine.capture.first_token == "single_graph") == label.endswith(("one graph", "2 a round", "patchify"))
            assert (engine.capture.prefill == "graph") == label.endswith(", graphs")


def test_every_exact_choice_that_only_cuda_has_is_met_there() -> None:
    compared = [engine for engine in of_a_request(Target(device=CUDA)).values() if isinstance(engine, Recipe)]
    for toggle in toggles():
        for option in toggle.options:
            if option.exact and option.needs.device == "cuda":
                assert option.value in {engine.value(toggle.path) for engine in compared}, (toggle.path, option.value)


def test_an_engine_that_cannot_run_here_says_what_it_lacks() -> None:
    target = Target(device=CPU, dtype=torch.bfloat16)
    reasons = {label: cannot_run(engine, target) for label, engine in of_a_request(target).items()}
    assert str(reasons["capture: graphs"]).startswith(
        "capture.vit=graph cannot run here: it needs a CUDA device, and the lab runs on cpu; the choices here are 'eager'"
    )
    assert reasons["transformers"] is reasons["baseline"] is reasons["fastest"] is None


def test_varlen_attention_is_not_tried_in_float32() -> None:
    varlen = Recipe.parse("fastest, attention.prefill=varlen", CUDA)
    assert "it needs the model in bfloat16 or float16" in str(cannot_run(varlen, Target(device=CUDA, dtype=torch.float32)))
    assert cannot_run(varlen, Target(device=CUDA, dtype=torch.bfloat16)) is None


def test_ways_to_execute_differ_in_nothing_else() -> None:
    ways = modes(Recipe.parse("fastest, capture.decode=compile"))
    assert list(ways) == list(MODES)
    for way, recipe in ways.items():
        assert {path.partition(".")[0] for path in recipe.changes().keys() ^ ways["eager"].changes().keys()} <= {"capture"}
        assert (recipe == ways["eager"]) == (way == "eager")
        assert recipe.capture.decode == "eager"


def test_steps_are_the_same_where_only_what_comes_before_them_differs() -> None:
    some: dict[str, Any] = {"stock": "transformers", "a": Recipe.parse("fastest"), "b": Recipe.baseline()}
    some |= {"c": Recipe.parse("fastest, vit.positions=recomputed, attention.last_layer=all_tokens, attention.prefill=eager")}
    for toggle in toggles():
        if toggle.slot == "cache" or toggle.path in ("attention.decode", "attention.norms", "streaming.gate"):
            last = toggle.options[-1 if toggle.path != "attention.norms" else 1].value
            some[toggle.path] = some["a"].choose(toggle.path, last)
    same = same_steps(some)
    assert same.pop("c") == "a"
    assert all(label == first for label, first in same.items())


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_option_of_the_slot_has_a_row_with_what_it_requires(device: torch.device) -> None:
    """What a GPU would be given is known without one."""
    target = Target(device=device, dtype=torch.bfloat16)
    engines = of_the_decoder(target)
    for toggle in toggles():
        if toggle.slot == "attention" or toggle.path == "cache.kv":
            for option in toggle.options:
                met = {e.value(toggle.path) for e in engines.values() if isinstance(e, Recipe)}
                assert (option.value in met) == (option.needs.unmet(target) is None), (toggle.path, option.value)
    assert {"transformers", "baseline", "lean", "kv=static", "kv=paged", "last of each", "fastest"} <= set(engines)
    assert engines["fastest"] == Recipe.fastest(target)
    alone = {label: e.changes().keys() - engines["lean"].changes().keys() for label, e in engines.items() if "=" in label}
    assert all(changed <= {f"attention.{label.split('=')[0]}", "cache.kv"} for label, changed in alone.items())
    if device == CUDA:
        assert engines["prefill=triton"].cache.kv == engines["rope=fused"].cache.kv == "static"
        assert engines["norms=fused"].cache.kv == "concat"
        assert engines["last of each"].attention.prefill == engines["last of each"].attention.decode == "triton"
        assert "prefill=varlen" not in of_the_decoder(Target(device=device, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_option_of_the_tower_has_a_row_unless_its_family_has_no_use_for_it(
    labs: dict[str, Lab], device: torch.device, dtype: torch.dtype
) -> None:
    for lab in labs.values():
        family = lab.checkpoint.family
        engines = of_the_tower(Target(device=device, dtype=dtype), family)
        recipes = [engine for engine in engines.values() if isinstance(engine, Recipe)]
        for toggle in toggles():
            for option in toggle.options if toggle.slot == "vit" else ():
                met = option.value in {recipe.value(toggle.path) for recipe in recipes}
                idle = f"{toggle.name}={option.value}" in family.idle
                can = option.exact and option.needs.unmet(Target(device=device, dtype=dtype)) is None
                assert met or idle or not can, (toggle.path, option.value)
        alone = {k: e.changes().keys() - engines["lean"].changes().keys() for k, e in engines.items() if "=" in k}
        for label, changes in alone.items():
            toggle = toggle_at(f"vit.{label.partition('=')[0]}")
            needed = {path for path, _ in engines[label].option(toggle).required()}
            assert changes <= {toggle.path, *needed}, label
