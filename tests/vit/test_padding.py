"""The tower over padded products: it computes the same, over rows of whole lines, and of the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab import Lab, Recipe, Request, photo, preprocessor, toggles
from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.capture.stages import vit_program
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.padded import aligned, pad_widths, with_padding
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.errors import RecipeError
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import LeanEncoder, bind
from fastvl_lab.vit.padding import in_lines

SIZES = ((112, 84), (56, 140))
OFF = Tracer(torch.device("cpu"), "off")
LEAN = Recipe.parse("baseline, preprocessor.resize=pillow, preprocessor.patchify=torch, vit.tower=lean, vit.patch_embed=linear")
BYTES = {"preprocessor.payload": "uint8_folded", "preprocessor.temporal": "folded"}


def test_a_row_of_the_padded_width_is_whole_lines() -> None:
    """Of the published towers: folded and whole patches, and the widths of MLPs."""
    half = {588: 608, 1176: 1184, 768: 768, 1536: 1536, 3420: 3424, 4304: 4320, 4096: 4096, 1: 32, 32: 32, 33: 64}
    assert {width: aligned(width, torch.bfloat16) for width in half} == half
    single = {588: 592, 1176: 1184, 3420: 3424, 4304: 4304, 1: 16, 17: 32}
    assert {width: aligned(width, torch.float32) for width in single} == single


class _Rows(TorchDispatchMode):
    """The widths that matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.linear:
            self.widths |= {args[0].shape[-1], len(args[1])}
        return func(*args, **(kwargs or {}))


# Geometries whose own widths are no whole lines, and one of which some are; a third has one value too many for a line.
GEOMETRIES: list[tuple[str, dict[str, Any]]] = [
    ("tiny-qwen2.5-vl", {"depth": 2, "intermediate_size": 100, "fullatt_block_indexes": [1]}),
    ("tiny-qwen2.5-vl", {"depth": 1, "intermediate_size": 65, "fullatt_block_indexes": [], "patch_size": 14}),
    ("tiny-qwen2.5-vl", {"depth": 1, "intermediate_size": 3420, "fullatt_block_indexes": [0]}),
    ("tiny-qwen3-vl", {"depth": 3, "intermediate_size": 217, "deepstack_visual_indexes": [0, 1]}),
    ("tiny-qwen3-vl", {"depth": 2, "intermediate_size": 33, "deepstack_visual_indexes": [1]}),
    ("tiny-qwen3-vl", {"depth": 1, "intermediate_size": 4305, "deepstack_visual_indexes": [0]}),
]


SMALL = {"depth": 1, "intermediate_size": 100, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}


def _other(lab: Lab, changes: dict[str, Any]) -> Checkpoint:
    config = AutoConfig.from_pretrained(tiny.folder(lab.checkpoint.name))
    for field, value in changes.items():
        setattr(config.vision_config, field, value)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    randomise(lab.checkpoint.family, model, seed=3)
    pad_widths(model.model.visual)
    only = SimpleNamespace(model=SimpleNamespace(visual=model.model.visual), config=config)
    return dataclasses.replace(lab.checkpoint, model=only)


def _parts(recipe: Recipe, checkpoint: Checkpoint, sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[torch.Tensor, ...]:
    images = preprocessor.bind(recipe.preprocessor, checkpoint)
    request = Request(images=[photo("coffee", size) for size in sizes], prompt="?", min_pixels=28 * 28)
    return bind(recipe.vit, checkpoint, images.patch_format)(images.pixels(request), OFF).parts


def _assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("sent", [{}, BYTES], ids=["floats", "bytes"])
@pytest.mark.parametrize(("name", "changes"), GEOMETRIES, ids=str)
def test_a_padded_tower_computes_the_same_over_whole_lines(
    labs: dict[str, Lab], name: str, changes: dict[str, Any], sent: dict[str, Any]
) -> None:
    checkpoint = _other(labs[name], changes)
    recipe = LEAN.replace(sent)
    with _Rows() as exact:
        theirs = _parts(recipe, checkpoint)
    with _Rows() as padded:
        ours = _parts(recipe.replace("vit.padding", "aligned"), checkpoint)
    _assert_same(ours, theirs)
    assert changes["intermediate_size"] in exact.widths
    assert [width for width in padded.widths if width * 4 % 64] == []


@torch.inference_mode()
def test_it_goes_with_every_other_option_and_format_of_patches(lab: Lab) -> None:
    """Those that run on a CPU; Triton's in its interpreter."""
    checkpoint = _other(lab, SMALL)
    changes: list[dict[str, Any]] = [{}, BYTES, {"preprocessor.temporal": "folded"}, {"preprocessor.payload": "uint8"}]
    for toggle in toggles():
        if toggle.slot == "vit" and toggle.name not in ("tower", "patch_embed", "padding", "weights", "attention"):
            changes += [{toggle.path: value} for value in toggle.values[1:]]
    for change in changes:
        recipe = LEAN.replace(change)
        ours, theirs = (_parts(r, checkpoint, SIZES[1:]) for r in (recipe.replace("vit.padding", "aligned"), recipe))
        _assert_same(ours, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["as read", "inductor"])
@pytest.mark.parametrize("name", [tiny.NAMES[0], pytest.param(tiny.NAMES[1], marks=pytest.mark.nightly)])
def test_it_can_be_compiled(labs: dict[str, Lab], name: str, inductor: bool, request: pytest.FixtureRequest) -> None:
    """By day as torch has read it: what padding changes is the program, and a test of capture has Inductor compile towers."""
    if not inductor:
        request.getfixturevalue("without_inductor")
    recipe, checkpoint = LEAN.replace(BYTES).replace("vit.padding", "aligned"), _other(labs[name], SMALL)
    images = preprocessor.bind(recipe.preprocessor, checkpoint)
    encoder = bind(recipe.vit, checkpoint, images.patch_format, compiled=True)
    assert isinstance(encoder, LeanEncoder)
    plain = vit_program(encoder)
    compiled = Compiled("vit", plain)
    for size in ((112, 84), (84, 140), (140, 56)):
        pixels = images.pixels(Request(images=[photo("coffee", size)], prompt="?"))
        inputs = encoder.inputs(pixels, OFF, None)
        _assert_same(compiled(inputs, OFF), plain(inputs))
    assert len(compiled.captures) <= 2


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "bias"), [(5, True), (48, False), (100, True)])
def test_padded_products_read_the_weights_of_the_modules_themselves(width: int, bias: bool, dtype: torch.dtype) -> None:
    makers = [torch.nn.Linear(64, width, bias=bias, dtype=dtype) for _ in range(2)]
    reader = torch.nn.Linear(width, 24, bias=bias, dtype=dtype)
    x = torch.randn(3, 64, dtype=dtype)
    before = reader(makers[0](x) * makers[1](x))
    pad_widths(torch.nn.ModuleList([*makers, reader]))
    assert all(maker.weight.shape == (width, 64) for maker in makers)
    assert torch.allclose(reader(makers[0](x) * makers[1](x)), before, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    (gate, up), down = in_lines(makers, reader)
    if aligned(width, dtype) == width:
        assert (gate, up, down) == (*makers, reader)
        return
    for function, module in zip((gate, up, down), (*makers, reader), strict=True):
        assert function.keywords["weight"].data_ptr() == module.weight.data_ptr()  # type: ignore[attr-defined]
    made = gate(x) * up(x)
    assert made.shape == (3, aligned(width, dtype))
    assert not made[:, width:].any()
    assert torch.allclose(down(made), before, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("hidden", "width", "n_makers"), [(1280, 3420, 2), (1152, 4304, 1)])
def test_padding_takes_less_than_a_hundredth_of_the_memory_of_published_mlps(hidden: int, width: int, n_makers: int) -> None:
    linears = torch.nn.ModuleList(torch.nn.Linear(hidden, width, dtype=torch.bfloat16) for _ in range(n_makers))
    linears.append(torch.nn.Linear(width, hidden, dtype=torch.bfloat16))
    before = sum(parameter.untyped_storage().nbytes() for parameter in linears.parameters())
    pad_widths(linears)
    after = sum(parameter.untyped_storage().nbytes() for parameter in linears.parameters())
    assert before < after <= 1.01 * before


def test_weights_that_nobody_has_laid_out_are_not_read_beyond_their_end() -> None:
    linear = torch.nn.Linear(100, 64)
    with pytest.raises(AssertionError, match="not padded"):
        with_padding(linear.weight, (64, 112))


def test_it_needs_the_patch_embedding_as_a_product() -> None:
    with pytest.raises(RecipeError, match=r"vit.padding=aligned needs vit.patch_embed=linear, and vit.patch_embed is 'conv3d'"):
        Recipe.parse("baseline, vit.tower=lean, vit.padding=aligned")
    with pytest.raises(RecipeError, match=r"but vit.tower=transformers does that step itself"):
        Recipe.baseline().replace({"vit.padding": "aligned", "vit.patch_embed": "linear"})
    chosen = Recipe.baseline().choose("vit.padding", "aligned")
    assert (chosen.vit.tower, chosen.vit.patch_embed, chosen.vit.padding) == ("lean", "linear", "aligned")
    assert Recipe.fastest().vit.padding == "exact"
