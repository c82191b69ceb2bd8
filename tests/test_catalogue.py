"""The catalogue is the only list of options and of what they need."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastvl_lab import Lab, Recipe, RecipeError, Request, toggles, view, workbench
from fastvl_lab.catalogue import SLOTS, HeadDims, Needs, Option, Target, catalogue_markdown
from fastvl_lab.engine import Place, find
from fastvl_lab.vit import attention

CPU, CUDA = Target(device=torch.device("cpu")), Target(device=torch.device("cuda"))


def test_the_slots_stand_in_the_order_of_the_corridor() -> None:
    corridor = ["preprocessor", "vit", "attention", "cache", "capture", "streaming", "schedule"]
    chosen = [field for field in dataclasses.fields(Recipe) if field.compare]  # its origin is no choice
    assert [field.name for field in chosen] == list(SLOTS) == corridor
    assert [type(field.default) for field in chosen] == list(SLOTS.values())


def test_the_first_option_of_every_toggle_is_exact_and_runs_anywhere() -> None:
    for toggle in toggles():
        assert toggle.options[0].exact, toggle.path
        assert toggle.options[0].needs == Needs(), toggle.path
        assert len(set(toggle.values)) == len(toggle.values), toggle.path
    assert Recipe.baseline() == Recipe()
    assert Recipe.baseline().changes() == {}


def test_every_option_says_what_it_does_and_who_does_it() -> None:
    """A reader must be able to tell an engine's idea from the lab's; who it is, only a search can tell."""
    for toggle in toggles():
        for option in toggle.options:
            what, _, who = option.does.rpartition("; ")
            assert what, f"{toggle.path}={option.value}"
            assert who, f"{toggle.path}={option.value}"
            assert "\n" not in option.does
            assert "|" not in option.does  # it stands in a table


HEADS = HeadDims(of="tower", multiple_of=16, most=64)


@pytest.mark.parametrize(
    ("needs", "words", "meets", "fails", "why"),
    [
        (Needs(device="cuda"), ("cuda",), CUDA, CPU, "it needs a CUDA device, and the lab runs on cpu"),
        (Needs(device="cpu"), ("cpu",), CPU, CUDA, "it needs a CPU, and the lab runs on cuda"),
        (
            Needs(half=True),
            ("half precision",),
            dataclasses.replace(CPU, dtype=torch.float16),
            dataclasses.replace(CPU, dtype=torch.float32),
            "it needs the model in bfloat16 or float16, and it is in float32",
        ),
        (
            Needs(head_dims=HEADS),
            ("heads of a multiple of 16 up to 64",),
            dataclasses.replace(CPU, tower_head_dim=48, decoder_head_dim=80),
            dataclasses.replace(CPU, tower_head_dim=80, decoder_head_dim=48),
            "it takes heads of a multiple of 16 up to 64, and the tower's have 80",
        ),
        (
            Needs(head_dims=dataclasses.replace(HEADS, of="decoder")),
            ("heads of a multiple of 16 up to 64",),
            dataclasses.replace(CPU, tower_head_dim=80, decoder_head_dim=64),
            dataclasses.replace(CPU, decoder_head_dim=40),
            "it takes heads of a multiple of 16 up to 64, and the decoder's have 40",
        ),
        (
            Needs(device="cuda", package="no_such_package"),
            ("cuda", "no_such_package"),
            None,
            CUDA,
            "it needs the package no_such_package, which is not installed",
        ),
        (Needs(package="torch"), ("torch",), CPU, None, ""),
    ],
)
def test_an_option_says_what_it_needs_and_why_it_cannot_run(
    needs: Needs, words: tuple[str, ...], meets: Target | None, fails: Target | None, why: str
) -> None:
    assert needs.words == words
    if meets is not None:
        assert needs.unmet(meets) is None
    if fails is not None:
        assert needs.unmet(fails) == why


def test_what_is_not_known_of_a_target_is_no_reason() -> None:
    assert Needs(half=True, head_dims=HEADS).unmet(CPU) is None


def test_a_compiler_is_needed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert Needs(compiler=True).unmet(CPU) == "it needs a C++ compiler, and neither c++, g++ nor clang++ is found"
    for name in ("clang++", "mine"):
        (tmp_path / name).touch(mode=0o755)
        assert Needs(compiler=True).unmet(CPU) is None
    (tmp_path / "clang++").unlink()
    assert Needs(compiler=True).unmet(CPU) is not None
    monkeypatch.setenv("CXX", str(tmp_path / "mine"))
    assert Needs(compiler=True).unmet(CPU) is None


def test_triton_needs_the_c_compiler_that_it_would_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = Needs(package="triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    reason = "Triton needs a C compiler for what launches its kernels, and found none"
    assert triton.unmet(CPU) == f"{reason} (gcc, clang)"
    for name in ("clang", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert triton.unmet(CPU) is None
    monkeypatch.setenv("CC", "gcc")
    assert triton.unmet(CPU) == f"{reason} (gcc)"
    monkeypatch.setenv("CC", str(tmp_path / "mine"))
    assert triton.unmet(CPU) is None


def test_a_kernel_is_named_where_torch_has_a_choice_and_half_precision_is_asked_for() -> None:
    half, wide = (dataclasses.replace(CUDA, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for path in ("attention.prefill", "attention.decode"):
        why = "it needs a CPU, and the lab runs on cuda; the choices here are 'eager', 'sdpa_efficient', 'sdpa_flash'"
        with pytest.raises(RecipeError, match=f"{path}=sdpa cannot run here: {why}"):
            Recipe.parse(f"baseline, {path}=sdpa", "cuda")
        for kernel, in_float32 in (("flash", False), ("cudnn", False), ("efficient", True), ("math", True)):
            recipe = Recipe.baseline().choose(path, f"sdpa_{kernel}")
            recipe.check(half)
            recipe.check(CUDA)  # the dtype is not known yet
            if in_float32:
                recipe.check(wide)
            else:
                with pytest.raises(RecipeError, match=r"it needs the model in bfloat16 or float16, and it is in float32"):
                    recipe.check(wide)
    with pytest.raises(RecipeError, match=r"attention.decode=sdpa_flash needs capture.shapes=exact"):
        Recipe.parse("fastest, attention.decode=sdpa_flash, capture.shapes=powers_of_two")
    Recipe.fastest("cuda").check(wide)  # it runs in every dtype


@pytest.mark.parametrize("option", ["varlen", "triton"])
@pytest.mark.parametrize("width", [132, 136, 60])
def test_a_towers_heads_that_a_kernel_has_not_are_refused(option: str, width: int) -> None:
    target = dataclasses.replace(CUDA, dtype=torch.float16, tower_head_dim=width, decoder_head_dim=128)
    recipe = Recipe.parse(f"fastest, vit.attention={option}", "cuda")
    why = f"it takes heads of a multiple of 8 up to 128, and the tower's have {width}; the choices here are 'per_window', 'grouped'"
    with pytest.raises(RecipeError, match=f"vit.attention={option} cannot run here: {why}"):
        recipe.check(target)
    recipe.check(dataclasses.replace(target, tower_head_dim=80, decoder_head_dim=1))


def test_a_checkpoint_is_a_target_of_which_all_is_known(lab: Lab) -> None:
    config = lab.checkpoint.config
    assert lab.checkpoint.target == Target(
        device=torch.device("cpu"),
        dtype=torch.float32,
        tower_head_dim=config.vision_config.hidden_size // config.vision_config.num_heads,
        decoder_head_dim=lab.checkpoint.model.model.language_model.layers[0].self_attn.head_dim,
    )


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        (Needs(half=True), "it needs the model in bfloat16 or float16, and it is in float32"),
        (Needs(device="cuda"), "it needs a CUDA device, and the lab runs on cpu"),
        (
            Needs(head_dims=HeadDims(of="tower", multiple_of=1, most=4)),
            "it takes heads of a multiple of 1 up to 4, and the tower's",
        ),
        (Needs(package="no_such_package"), "it needs the package no_such_package, which is not installed"),
    ],
    ids=["half", "cuda", "heads", "package"],
)
def test_an_options_needs_are_a_word_in_the_catalogue(
    add_option: Callable[[str, Option], None], monkeypatch: pytest.MonkeyPatch, needs: Needs, why: str
) -> None:
    """Added here while everything runs, as a line of the catalogue and a function: panel, parse and binding refuse it alike."""
    pytest.importorskip("ipywidgets")
    add_option("vit.attention", Option(value="new", does="something new; nobody yet", needs=needs))
    monkeypatch.setitem(attention.OPTIONS, "new", attention.grouped)
    lab, request = Lab("tiny-qwen2.5-vl", device="cpu"), Request(prompt="Hello.", max_new_tokens=1)
    refused = re.escape(f"vit.attention=new cannot run here: {why}")

    text = "fastest, vit.attention=new"
    recipe = Recipe.parse(text)  # for any device
    with pytest.raises(RecipeError, match=refused):
        Recipe.parse(text, lab.checkpoint.target)
    if needs.device is None and needs.package is None:
        assert Recipe.parse(text, "cpu") == recipe  # of which dtype and heads are not known
    else:
        with pytest.raises(RecipeError, match=refused):
            Recipe.parse(text, "cpu")
    with pytest.raises(RecipeError, match=refused):
        lab.run(request, recipe)
    with pytest.raises(RecipeError, match=refused):
        lab.compute(lambda: find(recipe).bind(Place(checkpoint=lab.checkpoint, memory=lab.memory)))

    bench = workbench("tiny-qwen2.5-vl", "coffee", image_size=(56, 56), max_new_tokens=2, repeats=0, device="cpu")
    assert bench.wait(60)
    assert why in bench.controls["vit.attention"].unmet["new"]
    with pytest.raises(RecipeError, match=refused):
        bench.controls["vit.attention"].value = "new"
    bench.close()

    words = ", ".join(needs.words)
    assert f"| `new` (needs {words}) | yes | something new; nobody yet |" in catalogue_markdown()
    assert words in set(view.catalogue_frame()["needs"])


def test_an_option_runs_where_its_needs_are_met(
    add_option: Callable[[str, Option], None], monkeypatch: pytest.MonkeyPatch, picture: bytes
) -> None:
    add_option("vit.attention", Option(value="new", does="something new; nobody yet", needs=Needs(half=True)))
    monkeypatch.setitem(attention.OPTIONS, "new", attention.grouped)
    lab = Lab("tiny-qwen3-vl", device="cpu", dtype="bfloat16")
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True)
    assert lab.run(request, "fastest, vit.attention=new").tokens == lab.run(request, "fastest").tokens


def test_the_page_of_toggles_is_the_catalogue_as_it_is(repository: Path) -> None:
    assert (repository / "docs" / "toggles.md").read_text() == catalogue_markdown() + "\n", "make toggles writes it anew"
