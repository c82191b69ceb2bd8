"""A recipe is what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from fastvl_lab import Lab, Recipe, RecipeError, Request, toggles
from fastvl_lab.catalogue import Vit
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.trace import Tracer

CPU = torch.device("cpu")


def _recipes() -> list[Recipe]:
    free = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean")
    return [free.choose(t.path, v) for t in toggles() for v in t.values]


@pytest.mark.parametrize("recipe", [Recipe.baseline(), Recipe.fastest(), *_recipes()], ids=str)
def test_a_recipe_survives_json_yaml_and_text(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert Recipe.parse(str(recipe)) == Recipe.parse(recipe.text()) == recipe
    assert len(recipe.text()) <= len(str(recipe))
    assert hash(Recipe.from_dict(recipe.to_dict())) == hash(recipe)


def test_the_shortest_text_starts_from_the_nearer_preset() -> None:
    assert Recipe.baseline().text() == "baseline"
    assert Recipe.fastest().text() == "fastest"
    assert Recipe.parse("fastest, vit.rope=eager").text() == "fastest, vit.rope=eager"
    assert Recipe.parse("baseline, vit.tower=lean").text() == "baseline, vit.tower=lean"


def test_an_option_can_be_chosen_with_what_it_needs() -> None:
    chosen = Recipe.baseline().choose("preprocessor.decode", "gpu")
    assert chosen.changes() == {
        "preprocessor.decode": "gpu",
        "preprocessor.resize": "device",
        "preprocessor.patchify": "torch",
    }
    assert Recipe.fastest().choose("vit.attention", "triton") == Recipe.fastest().replace("vit.attention", "triton")
    kept = Recipe.parse("baseline, preprocessor.resize=pillow, preprocessor.patchify=torch")
    assert kept.choose("preprocessor.resize", "transformers") == Recipe.baseline()
    folded = Recipe.parse("baseline, preprocessor.resize=torch").choose("preprocessor.temporal", "folded")
    assert folded.vit.tower == "lean"


def test_a_recipe_is_never_changed() -> None:
    baseline = Recipe.baseline()
    changed = baseline.replace("vit.tower", "lean")
    assert baseline.vit.tower == "transformers"
    assert changed.vit.tower == "lean"
    assert changed.changes() == {"vit.tower": "lean"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        baseline.vit.tower = "lean"  # type: ignore[misc]


def test_several_toggles_change_at_once_where_one_alone_would_mean_nothing() -> None:
    with pytest.raises(RecipeError, match=r"vit.tower=transformers does that step itself"):
        Recipe.baseline().replace("vit.patch_embed", "linear")
    recipe = Recipe.baseline().replace({"vit.patch_embed": "linear", "vit.tower": "lean"})
    assert recipe.vit == Vit(tower="lean", patch_embed="linear")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"vision": {}}, r"slot 'vision' is unknown; the choices are preprocessor, vit, attention"),
        ({"vit": {"towr": "lean"}}, r"toggle 'vit.towr' is unknown \(did you mean 'vit.tower'\?\); the choices are .*vit.tower"),
        ({"vit": {"tower": "fast"}}, r"vit.tower is 'fast'; the choices are 'transformers', 'lean'"),
        ({"streaming": {"steps_per_round": "1"}}, r"streaming.steps_per_round is '1'; the choices are 1, 2, 16"),
        ({"streaming": {"steps_per_round": True}}, r"streaming.steps_per_round is True; the choices are 1, 2, 16"),
        ({"vit": None}, r"slot 'vit' is None; give a mapping"),
        ({"vit": "lean"}, r"slot 'vit' is 'lean'; give a mapping"),
        ({"vit": {"tower": ["lean"]}}, r"vit.tower is \['lean'\]; the choices are"),
        (None, "a recipe is given as None"),
        (
            {"preprocessor": {"resize": "pillow", "temporal": "folded"}},
            r"preprocessor.temporal=folded needs vit.tower=lean, and vit.tower is 'transformers'",
        ),
        ({"preprocessor": {"payload": "uint8"}}, r"resize=transformers does that step itself; leave it at 'float32'"),
        ({"preprocessor": {"patchify": "torch"}}, r"resize=transformers does that step itself; leave it at 'numpy'"),
    ],
)
def test_unknown_names_and_meaningless_combinations_are_refused_with_the_choices(data: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quickest", r"starts with 'quickest'; the choices are baseline, fastest"),
        ("baseline, vit.tower", r"a change reads slot.toggle=value"),
        ("baseline, vit.tower=fast", r"the choices are 'transformers', 'lean'"),
        ("baseline, vit.tower=lean, vit.tower=transformers", r"sets vit.tower twice"),
        (5, "a recipe is given as 5"),
        ("fastest, vit.tower=leen", r"vit.tower is 'leen'; the choices are 'transformers', 'lean'"),
    ],
)
def test_recipe_texts_are_read_strictly(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(text)


def test_a_text_is_read_for_the_device_that_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which need not be there: what this machine lacks is no fault then."""
    captured = "fastest, capture.vit=graph"
    assert Recipe.parse(captured).changes() == Recipe.fastest("cpu").choose("capture.vit", "graph").changes()
    assert Recipe.parse(captured, "cuda") == Recipe.fastest("cuda").replace("capture.vit", "graph")
    with pytest.raises(RecipeError, match=r"capture.vit=graph cannot run here: it needs a CUDA device, and the lab runs on cpu"):
        Recipe.parse(captured, CPU)
    with pytest.raises(RecipeError, match="device 'nowhere'; the choices are 'cpu' and 'cuda'"):
        Recipe.parse("baseline", "nowhere")
    compiled = "fastest, vit.attention=triton, capture.vit=compile"
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.delenv("CC", raising=False)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(RecipeError, match="needs a C compiler") if there else contextlib.nullcontext():
            Recipe.parse(compiled, "cuda")


def test_presets_hold_exact_options_only() -> None:
    for device in ("cpu", "cuda"):
        assert Recipe.fastest(device).exact
    for device in ("mps", "nowhere", None):
        with pytest.raises(RecipeError, match=f"no fastest recipe is known for device '{device}'; the choices are"):
            Recipe.fastest(device)


def _bind_and_run(lab: Lab, recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "check", lambda recipe, target: None)
        pipeline = Pipeline(lab.checkpoint, recipe, lab.memory)
    pipeline.run(Request(prompt="Hello.", max_new_tokens=1), Tracer(CPU), lambda text, tokens: None)


def test_every_toggle_is_bound_to_what_runs(labs: dict[str, Lab]) -> None:
    """A value that no binding knows must fail: a toggle that nothing read would be ignored in silence."""
    for toggle in toggles():
        recipe = Recipe.from_dict(Recipe.fastest().to_dict())
        object.__setattr__(getattr(recipe, toggle.slot), toggle.name, "unheard-of")
        with pytest.raises((KeyError, AssertionError)):
            _bind_and_run(labs["tiny-qwen3-vl"], recipe)
