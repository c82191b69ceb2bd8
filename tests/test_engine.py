"""What can answer a request is found by its name, its recipe or itself, and a peer is one file that registers itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastvl_lab import Lab, Recipe, RecipeError, Request, compare, engine as engines
from fastvl_lab.engine import Engine, engine, find, find_recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("text", ["baseline", "baseline, vit.tower=lean", "fastest, attention.rope=eager"])
def test_a_recipe_is_one_engine_however_it_is_given(text: str) -> None:
    found = find(text)
    assert found == find(found) == find(Recipe.parse(text)) == find(found.name) == find(str(found), CPU)
    assert len({found, find(Recipe.parse(text)), find(found.text(CPU))}) == 1
    assert found.recipe == Recipe.parse(text) == find_recipe(found)
    assert not found.remote


def test_fastest_is_another_engine_on_another_device() -> None:
    assert find("fastest", CPU) != find("fastest", CUDA)
    assert find("fastest", CPU).text(CPU) == find("fastest", CUDA).text(CUDA) == "fastest"


@pytest.mark.parametrize(
    ("text", "name", "oracle"),
    [
        (" transformers ", "transformers", "transformers"),
        ("transformers,preprocessor.resize=torch", *["transformers, preprocessor.resize=torch"] * 2),
        (" http://127.0.0.1:8000/v1/ ", "http://127.0.0.1:8000/v1", "transformers"),
        ("https://[::1]/v1,model=a,b", "https://[::1]/v1, model=a,b", "transformers"),
        ("http://h/v1, model=a,b,account=off", "http://h/v1, model=a,b, account=off", "transformers"),
    ],
)
def test_a_peer_has_one_spelling_and_one_that_answers_for_it(text: str, name: str, oracle: str) -> None:
    found = find(text)
    assert (found.name, found.text(CUDA), found.oracle("pillow")) == (name, name, oracle)
    assert found == find(name)
    assert found.remote == ("http" in name)
    assert (found.recipe, found.within("pillow"), found.exact) == (None, None, True)


@pytest.mark.parametrize("text", ["baseline", "fastest, vit.rope=eager", "fastest, preprocessor.resize=pillow"])
@pytest.mark.parametrize("image_backend", ["pillow", "torchvision"])
def test_a_recipe_is_held_against_what_it_says(text: str, image_backend: str) -> None:
    found, recipe = find(text), Recipe.parse(text)
    assert found.oracle(image_backend) == recipe.oracle(image_backend)  # type: ignore[arg-type]
    assert found.within(image_backend) == recipe.within(image_backend)  # type: ignore[arg-type]
    assert found.exact is recipe.exact


@pytest.mark.parametrize("given", ["quickest", "llm, model=x", "baselin, vit.tower=slow", "ftp://127.0.0.1/v1", 5, None, ""])
def test_what_is_no_engine_is_refused_with_the_choices(given: object) -> None:
    with pytest.raises(RecipeError, match=r"; or a peer: vllm, sglang, lmdeploy, transformers, an http\(s\) address ending in /v1"):
        find(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["fastest, vit.tower=slow", "baseline, vit.towr=lean", "fastest, vit.tower=transformers"])
def test_what_is_wrong_with_a_recipe_is_told_without_peers(text: str) -> None:
    with pytest.raises(RecipeError) as raised:
        find(text)
    assert "peer" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("transformers, vit.tower=lean", "changes vit.tower, which a peer does not have; the choices are preprocessor.decode"),
        ("http://127.0.0.1:8000/v1, modle=x", "what may follow its address is model=<name>"),
        ("http://127.0.0.1:8000/v1, model=x, model=y", "has an option twice"),
        ("http://:8000/v1", "is no address; it reads http://host:port/v1"),
        ("http://127.0.0.1:8000/v1?api-version=1", "is no address; it reads http://host:port/v1"),
        ("http://127.0.0.1:8000/v1#there", "is no address; it reads http://host:port/v1"),
        ("https://me:secret@host/v1", "endpoint at host has a name or password in its address, which is sent to nobody"),
    ],
)
def test_a_peers_text_is_read_strictly(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as raised:
        find(text)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("text", ["transformers", "transformers, preprocessor.resize=torch", "http://127.0.0.1:8000/v1"])
def test_where_only_a_recipe_will_do_a_peer_is_refused(text: str) -> None:
    for given in (text, find(text)):
        with pytest.raises(RecipeError, match="is a peer, which has no toggles; give a recipe"):
            find_recipe(given)


@pytest.mark.parametrize("text", ["quickest", "llm, model=x", "baselin, vit.tower=lean"])
def test_where_only_a_recipe_will_do_no_peer_is_a_choice(text: str) -> None:
    with pytest.raises(RecipeError, match="the choices are baseline, fastest") as raised:
        find_recipe(text)
    assert "peer" not in str(raised.value)


@pytest.fixture
def echo() -> Iterator[str]:
    """A peer that somebody adds: Transformers under another name."""

    @engine("echo")
    def read(text: str) -> Engine:
        return Engine(name=text.strip(), bind=find("transformers").bind, held_against="transformers")

    yield "echo"
    del engines._PEERS["echo"]


def test_a_peer_is_added_by_its_decorator_alone(lab: Lab, picture: bytes, echo: str) -> None:
    """It runs, is compared and checked like any other, and errors name it among the choices."""
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    run = lab.run(request, echo)
    assert (run.engine, run.recipe, run.tokens) == (echo, None, lab.run(request, "transformers").tokens)
    assert compare(lab, request, {"theirs": echo, "ours": "fastest"}, repeats=1).parity("theirs")
    with pytest.raises(RecipeError, match=r"or a peer: echo, vllm, sglang, lmdeploy, transformers, an http"):
        lab.run(request, "ecco")


def test_peers_are_imported_when_a_text_is_no_recipe(forked: Callable[..., str], tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        "import sys; from fastvl_lab.engine import find; find('fastest'); print('fastvl_lab.peer.http' in sys.modules);"
        "find('transformers'); print('fastvl_lab.peer.http' in sys.modules)"
    )
    assert forked(code).split() == ["False", "True"]
