"""Packed weights: one copy for all recipes of a checkpoint, counted, and let go with the last that has it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, catalogue, learnt, photo
from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import packed as module
from fastvl_lab.checkpoint.packed import PackedWeights
from fastvl_lab.errors import DeviceError, RecipeError
from fastvl_lab.view.workbench.session import _held

TOWER, DECODER = {"vit.weights": "packed"}, {"attention.weights": "packed"}
FASTEST = Recipe.fastest()
PLAIN = FASTEST.replace({"vit.weights": "plain", "attention.weights": "plain"})


def _request() -> Request:
    return Request(images=[photo("coffee", (112, 84))], prompt="?", max_new_tokens=3, ignore_eos=True)


def _apart(lab: Lab) -> Lab:
    """The lab with copies of its own: what other tests' recipes hold of the same checkpoint is not counted."""
    lab = lab.apart()
    lab.checkpoint = dataclasses.replace(lab.checkpoint, packed=PackedWeights())
    return lab


def _bytes(weights: Sequence[torch.Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


def _tower(lab: Lab) -> list[torch.Tensor]:
    """The weights of its linear modules; the patch embedding is none."""
    return [linear.weight for linear in lab.checkpoint.vision.module.modules() if isinstance(linear, torch.nn.Linear)]


def _decoder(lab: Lab) -> list[torch.Tensor]:
    linears = [linear for linear in lab.checkpoint.text.module.modules() if isinstance(linear, torch.nn.Linear)]
    return [linear.weight for linear in linears]


def test_each_weight_is_held_once_for_all_recipes(lab: Lab) -> None:
    """What is held is that of the tower, of the decoder, or of both, with the padding of their blocks and no more."""
    lab = _apart(lab)
    kept = lab.checkpoint.packed
    tower, decoder, both = (PLAIN.replace(changes) for changes in (TOWER, DECODER, TOWER | DECODER))
    lab.run(_request(), tower)
    of_tower = kept.n_bytes
    assert _bytes(_tower(lab)) <= of_tower <= 1.25 * _bytes(_tower(lab))
    lab.run(_request(), decoder)
    together = kept.n_bytes
    assert _bytes(_decoder(lab)) <= together - of_tower <= 1.25 * _bytes(_decoder(lab))
    for recipe in (both, both.replace("cache.kv", "paged"), both.replace("vit.rope", "eager")):
        lab.run(_request(), recipe)
        assert kept.n_bytes == together
    assert _held(lab, both)["weights, packed"] == together
    lab.apart().run(_request(), both)  # another lab over the checkpoint
    assert kept.n_bytes == together
    separate = both.replace("attention.projections", "separate")  # reads q, k, v, gate and up one by one: copies of their own
    lab.run(_request(), separate)
    assert together < kept.n_bytes < together + 1.25 * _bytes(_decoder(lab))
    for key in list(lab._engines):
        lab._forget(key)
    gc.collect()
    assert kept.n_bytes == 0


def test_an_answer_is_the_same_over_packed_weights(lab: Lab) -> None:
    lab = lab.apart()
    request = Request(
        images=[photo("coffee", (112, 84)), photo("astronaut", (56, 140))], prompt="?", max_new_tokens=16, ignore_eos=True
    )
    for start in (PLAIN, Recipe.baseline().choose("vit.tower", "lean"), PLAIN.choose("schedule.batching", "continuous")):
        ours, plain = (lab.run(request, recipe) for recipe in (start.replace(TOWER | DECODER), start))
        assert ours.tokens == plain.tokens
        assert 0 < (ours.logits - plain.logits).abs().max() <= 1e-4  # by another kernel, then


def test_what_is_already_packed_is_found_by_its_weight_alone() -> None:
    kept, weight = PackedWeights(), torch.randn(12, 8)
    copy = kept.of(weight)
    assert kept.of(weight.view(12, 8)) is copy
    half = kept.of(weight[:6])
    assert half is not copy
    assert kept.of(weight.clone()) is not copy
    del copy, half
    gc.collect()
    assert kept.n_bytes == 0


def test_copies_that_do_not_fit_into_memory_are_refused_in_words(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = _apart(lab)
    monkeypatch.setattr(module, "available_bytes", lambda device: 100)
    with pytest.raises(DeviceError, match=r"packed weights take memory a second time: .* and 0.0 MB are free; choose 'plain'"):
        lab.run(_request(), PLAIN.replace(TOWER))


def test_what_packed_weights_do_not_go_with_is_said() -> None:
    refused = {
        "fastest, vit.weights=packed, capture.vit=compile": "vit.weights=packed needs capture.vit=eager, and",
        "fastest, vit.weights=packed, vit.padding=aligned": "vit.weights=packed needs vit.padding=exact, and",
        "baseline, vit.weights=packed": "vit.weights is 'packed', but vit.tower=transformers does that step itself",
        "fastest, attention.weights=packed, capture.prefill=compile": "attention.weights=packed needs capture.prefill=eager",
        "fastest, attention.weights=packed, capture.decode=compile": "attention.weights=packed needs capture.decode=eager",
    }
    for text, reason in refused.items():
        with pytest.raises(RecipeError, match=reason):
            Recipe.parse(text)
    chosen = Recipe.parse("fastest, capture.vit=compile, vit.padding=aligned").choose("vit.weights", "packed")
    assert (chosen.vit.weights, chosen.vit.padding, chosen.capture.vit) == ("packed", "exact", "eager")
    assert chosen.choose("capture.vit", "compile").vit.weights == "plain"


def test_the_fastest_recipe_has_them_where_they_can_be_had(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has oneDNN for the dtype, and where the weights have room in memory twice."""
    assert lab.fastest == FASTEST != PLAIN
    n_bytes = sum(weight.nbytes for weight in lab.checkpoint.model.parameters())
    for free, expected in ((2 * n_bytes, FASTEST), (2 * n_bytes - 1, PLAIN), (None, FASTEST)):
        monkeypatch.setattr(learnt, "available_bytes", lambda device, free=free: free)
        short = lab.apart()
        short.relearn()
        assert short.fastest == expected
        assert ("its weights stay plain: packed ones would take" in short.fastest.origin) == (expected == PLAIN)
    monkeypatch.setattr(catalogue, "takes", lambda dtype: dtype == torch.float32)
    half = Target(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert Recipe.fastest(half) == Recipe.parse("fastest", half) == PLAIN
    monkeypatch.setattr(catalogue, "takes", lambda dtype: False)
    assert Recipe.fastest() == PLAIN


def test_packed_weights_of_a_preset_give_way_to_what_is_written() -> None:
    for changes, left in (
        ({"capture.vit": "compile"}, "attention.weights"),
        ({"vit.padding": "aligned"}, "attention.weights"),
        ({"capture.decode": "compile"}, "vit.weights"),
    ):
        written = ", ".join(f"{path}={value}" for path, value in changes.items())
        recipe = Recipe.parse(f"fastest, {written}")
        assert recipe == PLAIN.replace({**changes, left: "packed"})
        assert Recipe.parse(recipe.text()) == recipe
