"""The oracle: Transformers on the same weights, float32, logits of the last prompt token and 32 greedy tokens."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, photo, toggles
from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import tiny
from fastvl_lab.measure.recipes import cannot_run

TOLERANCE = 1e-4


def _requests() -> dict[str, dict]:
    first, second, third = photo("coffee", (201, 133)), photo("astronaut", (97, 310)), photo("rocket", (150, 151))
    uri = "data:image/jpeg;base64," + base64.b64encode(second).decode()
    between = [
        {"role": "system", "content": "Answer in one word."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare this: "},
                {"type": "image", "image": first},
                {"type": "text", "text": " with this: "},
                {"type": "image_url", "image_url": {"url": uri}},
                {"type": "text", "text": " – which is larger?"},
            ],
        },
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "Why?"},
    ]
    return {
        "no image": {"prompt": "Count to ten."},
        "one image": {"images": [first], "prompt": "What is this?"},
        "three odd sizes": {"images": [first, second, third], "prompt": "Which differs?"},
        "strip": {"images": [photo("coffee", (2800, 28))], "prompt": "What is this?"},
        "tall": {"images": [photo("rocket", (60, 1100))], "prompt": "How tall?"},
        "text around images": {"messages": between},
        "non-ASCII": {"images": [second], "prompt": "¿Qué es esto? 这是什么？ Ωμέγα 👩‍🚀 e\u0301"},
        "limits": {"images": [first], "prompt": "Smaller.", "min_pixels": 3136, "max_pixels": 28 * 28 * 20},
    }


def _recipes() -> dict[str, Recipe]:
    """The baseline, the presets, and every exact option alone on top of both ends of the catalogue."""
    recipes = {"baseline": Recipe.baseline(), "fastest": Recipe.fastest()}
    free = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean")
    for toggle in toggles():
        for option in toggle.options:
            if option.exact and option.needs.unmet(Target(device=torch.device("cpu"))) is None:
                recipes[f"{toggle.path}={option.value}"] = free.choose(toggle.path, option.value)
    for options in itertools.product(("uint8", "uint8_folded"), ("duplicated", "folded"), ("conv3d", "linear")):
        paths = ("preprocessor.payload", "preprocessor.temporal", "vit.patch_embed")
        recipes[" ".join(options)] = free.replace(dict(zip(paths, options, strict=True)))
    return {name: recipe for name, recipe in recipes.items() if name in ("baseline", "fastest") or recipe != free}


REQUESTS, RECIPES = _requests(), _recipes()


def _oracle(lab: Lab, recipe: Recipe) -> str:
    """Transformers, behind the recipe's own pixels where they are not those of its backend here."""
    return recipe.oracle(lab.checkpoint.image_backend)


def _assert_parity(lab: Lab, case: str, recipes: dict[str, Recipe], *, at_length: Collection[str] = ()) -> None:
    """32 tokens of the presets, and of those recipes after one image; of the others, whose prompts alone differ, the first 4."""
    request = Request(**REQUESTS[case], max_new_tokens=32, ignore_eos=True)
    first = dataclasses.replace(request, max_new_tokens=4)
    oracles = {name: lab.run(request, name) for name in {_oracle(lab, recipe) for recipe in recipes.values()}}
    for name, recipe in recipes.items():
        asked = request if name in ("baseline", "fastest") or (case == "one image" and name in at_length) else first
        run, expected = lab.run(asked, recipe), oracles[_oracle(lab, recipe)]
        assert len(expected.tokens) == 32
        assert (run.logits - expected.logits).abs().max() < TOLERANCE, name
        assert run.tokens == expected.tokens[: asked.max_new_tokens], name
        assert run.text == expected.text or asked is first, name
        assert run.shapes == expected.shapes, name


COMPILED = {name: recipe for name, recipe in RECIPES.items() if name.endswith("=compile")}
PLAIN = {name: recipe for name, recipe in RECIPES.items() if name not in COMPILED}


def _every_second(name: str, case: str) -> dict[str, Recipe]:
    """The presets and half of the rest: each recipe meets every request in one family, and every family in every second request."""
    first = (tiny.NAMES.index(name) + list(REQUESTS).index(case)) % 2
    presets = {label: PLAIN[label] for label in ("baseline", "fastest")}
    return presets | dict(itertools.islice(PLAIN.items(), first, None, 2))


WHOLE = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["pairs", "whole"])


@WHOLE
@pytest.mark.parametrize("case", REQUESTS)
def test_every_exact_recipe_equals_transformers(lab: Lab, shallow_labs: dict[str, Lab], case: str, whole: bool) -> None:
    """After one image all in both families, at length in one; after another request all in one family, of fewer layers.

    By night all in both, by all layers.
    """
    some = PLAIN if whole else _every_second(lab.checkpoint.name, case)
    recipes = PLAIN if case == "one image" else some
    if case != "one image" and not whole:
        lab = shallow_labs[lab.checkpoint.name]
    with lab.hold(recipes.values()):
        _assert_parity(lab, case, recipes, at_length=some)


def test_stages_that_torch_has_read_as_programs_equal_transformers(shallow_labs: dict[str, Lab], without_inductor: None) -> None:
    """Of the family with DeepStack; a test of capture has Inductor compile the other."""
    lab = shallow_labs[tiny.NAMES[-1]].apart()
    for case in ("no image", "one image", "three odd sizes", "text around images"):
        _assert_parity(lab, case, COMPILED, at_length=COMPILED)


@pytest.mark.nightly
@pytest.mark.parametrize("name", tiny.NAMES)
def test_compiled_stages_equal_transformers(labs: dict[str, Lab], name: str) -> None:
    lab = labs[name].apart()
    for case in REQUESTS:
        _assert_parity(lab, case, COMPILED, at_length=COMPILED)


def test_tokens_depend_on_the_picture_and_on_the_words(lab: Lab) -> None:
    """Else equal tokens would prove nothing."""
    pictures = [photo("coffee", (201, 133)), photo("astronaut", (201, 133))]
    runs = [
        lab.run(Request(images=[picture], prompt=prompt, max_new_tokens=16, ignore_eos=True), "fastest")
        for picture in pictures
        for prompt in ("What is this?", "Where is it?")
    ]
    assert len({run.tokens for run in runs}) == 4
    assert all(len(set(run.tokens)) > 4 for run in runs)


def test_end_of_text_ends_the_answer_as_in_transformers(lab: Lab, picture: bytes) -> None:
    """Any token can be the one that ends the answer: the sixth of the greedy ones is made to."""
    request = {"images": [picture], "prompt": "What is this?", "max_new_tokens": 16}
    tokens = lab.run(Request(**request, ignore_eos=True)).tokens
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    published = lab.checkpoint.eos_token_ids
    object.__setattr__(lab.checkpoint, "eos_token_ids", (end,))  # engines are bound to this frozen checkpoint
    try:
        expected, run = lab.run(Request(**request), "transformers"), lab.run(Request(**request))
    finally:
        object.__setattr__(lab.checkpoint, "eos_token_ids", published)
    assert run.tokens == expected.tokens == tokens[: tokens.index(end) + 1]
    assert run.text == expected.text
    assert len(lab.run(Request(**request, ignore_eos=True)).tokens) == 16


def test_the_same_request_gives_the_same_tokens(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="Again.", max_new_tokens=8, ignore_eos=True)
    assert len({lab.run(request, "fastest").tokens for _ in range(3)}) == 1


@WHOLE
@pytest.mark.parametrize("name", tiny.NAMES)
def test_in_bfloat16_every_recipe_stays_near_transformers_own_error(
    shallow_lab: Callable[..., Lab], name: str, whole: bool
) -> None:
    """On a picture that is nearly flat around the mean, where folded weights would show a loss of digits first.

    Each recipe in one family, of fewer layers; in both, of all layers, and those of compiled stages, by night.
    """
    recipes = RECIPES if whole else _every_second(name, "one image")
    noise = np.random.default_rng(0).integers(-5, 6, size=(140, 168, 3))
    picture = (noise + np.array([123, 117, 104])).astype(np.uint8)
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=1)
    load = Lab if whole else shallow_lab
    high, low = (load(name, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    truths = {oracle: high.run(request, oracle).logits for oracle in {_oracle(high, recipe) for recipe in recipes.values()}}
    stock = {oracle: (low.run(request, oracle).logits - truth).norm() for oracle, truth in truths.items()}
    for engine, recipe in recipes.items():
        if (reason := cannot_run(recipe, low.checkpoint.target)) is not None:
            assert "oneDNN" in reason  # this CPU's; whatever else runs in float32 runs in bfloat16
            continue
        oracle = _oracle(high, recipe)
        assert (low.run(request, recipe).logits - truths[oracle]).norm() <= 2 * stock[oracle], engine


REUSING = "fastest, cache.kv=paged, cache.image_reuse=on, cache.prefix_reuse=on"
LONG = {
    "one character": {"prompt": "a"},
    "4,000 tokens": {"prompt": "".join(f"{number} bottles; " for number in range(315))},
    "four images": {
        "images": [photo(name, (140 + 28 * number, 112)) for number, name in enumerate(("coffee", "rocket", "astronaut", "cat"))],
        "prompt": "Which of these is alive?",
    },
}


@WHOLE
@pytest.mark.parametrize("case", LONG)
def test_64_tokens_of_short_and_long_prompts_with_every_cache(
    lab: Lab, shallow_labs: dict[str, Lab], case: str, whole: bool
) -> None:
    """With reuse the request comes twice: the second time it is a hit. By night the longest prompt is read by all layers too."""
    if case == "4,000 tokens" and not whole:
        lab = shallow_labs[lab.checkpoint.name]
    request = Request(**LONG[case], max_new_tokens=64, ignore_eos=True)
    expected = lab.run(request, _oracle(lab, Recipe.fastest()))
    assert len(expected.tokens) == 64
    if case == "4,000 tokens":
        assert 3950 < expected.n_prompt < 4050
    engines = [f"fastest, cache.kv={kind}" for kind in ("concat", "static", "paged")]
    runs = [lab.run(request, engine) for engine in [*engines, REUSING, REUSING]]
    for run in runs:
        assert (run.logits - expected.logits).abs().max() < TOLERANCE, run.title()
        assert run.tokens == expected.tokens, run.title()
    assert runs[-1].kind == "cache_hit"
