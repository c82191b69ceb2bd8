"""The tower over padded products: it computes the same, over rows of whole lines, and its copies are made once."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab import Lab, Recipe, Request, photo, preprocessor, toggles
from fastvl_lab.capture.compiled import Compiled
from fastvl_lab.capture.stages import Programs, vit_inputs
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.errors import RecipeError
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import LeanEncoder, bind
from fastvl_lab.vit.padding import aligned, in_lines

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
    randomise(model, seed=3)
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
        if toggle.slot == "vit" and toggle.name not in ("tower", "patch_embed", "padding", "attention"):
            changes += [{toggle.path: value} for value in toggle.values[1:]]
    for change in changes:
        recipe = LEAN.replace(change)
        ours, theirs = (_parts(r, checkpoint, SIZES[1:]) for r in (recipe.replace("vit.padding", "aligned"), recipe))
        _assert_same(ours, theirs)


@torch.inference_mode()
def test_it_can_be_compiled(lab: Lab) -> None:
    recipe, checkpoint = LEAN.replace(BYTES).replace("vit.padding", "aligned"), _other(lab, SMALL)
    images = preprocessor.bind(recipe.preprocessor, checkpoint)
    encoder = bind(recipe.vit, checkpoint, images.patch_format, compiled=True)
    assert isinstance(encoder, LeanEncoder)
    plain = Programs(encoder=encoder, decoder=None, layers=(), in_place=False).vit()  # type: ignore[arg-type]
    compiled = Compiled("vit", plain)
    for size in ((112, 84), (84, 140), (140, 56)):
        pixels = images.pixels(Request(images=[photo("coffee", size)], prompt="?"))
        tensors, rest = vit_inputs(encoder, pixels, 2, None, OFF)
        _assert_same(compiled(tensors, rest, OFF), plain(tensors, rest))
    assert len(compiled.captures) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "bias"), [(5, True), (48, False), (100, True)])
def test_copies_are_made_where_they_are_needed_once_and_go_with_the_model(width: int, bias: bool, dtype: torch.dtype) -> None:
    makers = [torch.nn.Linear(64, width, bias=bias, dtype=dtype) for _ in range(2)]
    reader = torch.nn.Linear(width, 24, bias=bias, dtype=dtype)
    first, second = (in_lines(makers, reader) for _ in range(2))
    functions = [(*of, last) for of, last in (first, second)]
    if aligned(width, dtype) == width:
        assert functions[0] == functions[1] == (*makers, reader)
        return
    for one, other, module in zip(*functions, [*makers, reader], strict=True):
        assert one.keywords["weight"] is other.keywords["weight"]  # type: ignore[attr-defined]
        assert not one.keywords["weight"].requires_grad  # type: ignore[attr-defined]
        assert module.weight.shape in {(width, 64), (24, width)}, "the model's own stay as they are"
    x = torch.randn(3, 64, dtype=dtype)
    (gate, up), down = first
    made = gate(x) * up(x)
    assert made.shape == (3, aligned(width, dtype))
    assert not made[:, width:].any()
    assert torch.allclose(down(made), reader(makers[0](x) * makers[1](x)), atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    gone = weakref.ref(functions[0][0].keywords["weight"])  # type: ignore[attr-defined]
    del makers, reader, module, first, second, functions, one, other, gate, up, down, made
    gc.collect()
    assert gone() is None


@torch.inference_mode()
def test_it_costs_the_mlps_of_the_tower_once_more_and_what_is_aligned_nothing(labs: dict[str, Lab]) -> None:
    """In float32 the MLPs of tiny-qwen3-vl are whole lines by themselves, those of tiny-qwen2.5-vl are not."""
    for name, copied in (("tiny-qwen2.5-vl", True), ("tiny-qwen3-vl", False)):
        seen: set[int] = set()
        encoders = [bind(LEAN.replace("vit.padding", "aligned").vit, labs[name].checkpoint, _stock(labs[name])) for _ in range(3)]
        for encoder in encoders:
            assert isinstance(encoder, LeanEncoder)
            functions = [cell.cell_contents for cell in encoder.tower.blocks[0].mlp.__closure__]  # type: ignore[attr-defined]
            seen |= {f.keywords["weight"].data_ptr() for f in functions if hasattr(f, "keywords")}
        assert len(seen) == (3 if copied else 0)


def _stock(lab: Lab) -> Any:
    return preprocessor.bind(LEAN.preprocessor, lab.checkpoint).patch_format


def test_it_needs_the_patch_embedding_as_a_product() -> None:
    with pytest.raises(RecipeError, match=r"vit.padding=aligned needs vit.patch_embed=linear, and vit.patch_embed is 'conv3d'"):
        Recipe.parse("baseline, vit.tower=lean, vit.padding=aligned")
    with pytest.raises(RecipeError, match=r"but vit.tower=transformers does that step itself"):
        Recipe.baseline().replace({"vit.padding": "aligned", "vit.patch_embed": "linear"})
    chosen = Recipe.baseline().choose("vit.padding", "aligned")
    assert (chosen.vit.tower, chosen.vit.patch_embed, chosen.vit.padding) == ("lean", "linear", "aligned")
    assert Recipe.fastest().vit.padding == "exact"
