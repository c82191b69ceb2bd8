"""The lean tower against the stock one, and its tables against Transformers'."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from covering import covering
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from fastvl_lab import Lab, Recipe, Request, photo, toggles
from fastvl_lab.catalogue import OptionValue, Target
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.packed import PackedWeights
from fastvl_lab.checkpoint.padded import pad_widths
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.request import Grid, ImageShape, Pixels
from fastvl_lab.trace import Tracer
from fastvl_lab.vit import attention, bind, lean, positions, stock_format
from fastvl_lab.vit.attention import Prepared, SegmentAttention
from fastvl_lab.vit.operations import bind_operations
from fastvl_lab.vit.patch_embed import PatchProjection, bind_patch_embed, fold
from fastvl_lab.vit.plan import Plan, PlanCache

CPU = torch.device("cpu")
OFF = Tracer(CPU, "off")
OPERATIONS = bind_operations(
    PackedWeights(), weights="plain", norms="eager", rope="eager", activation="eager", interpolation="eager"
)

grids_strategy = st.lists(
    st.builds(lambda t, h, w: Grid(t, 2 * h, 2 * w), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17)),
    min_size=1,
    max_size=3,
)


def _pixels(grids: list[Grid], patch_dim: int, seed: int = 0) -> Pixels:
    n = sum(g.t * g.h * g.w for g in grids)
    patches = torch.randn(n, patch_dim, generator=torch.Generator().manual_seed(seed))
    shapes = [
        ImageShape(width=0, height=0, resized_width=0, resized_height=0, grid=g, visual_tokens=g.t * g.h * g.w // 4) for g in grids
    ]
    return Pixels(patches=patches, shapes=tuple(shapes))


def _patch_dim(visual: torch.nn.Module) -> int:
    return visual.patch_embed.proj.weight[0].numel()


def _combinations() -> list[dict[str, OptionValue]]:
    """Every combination of the lean tower's exact options that means something and can run on a CPU."""
    free = [
        [(t.path, o.value) for o in t.options if o.exact and o.needs.unmet(Target(device=torch.device("cpu"))) is None]
        for t in toggles()
        if t.slot == "vit" and t.name != "tower"
    ]
    every = [dict(choice) for choice in itertools.product(*free)]
    plain = {path: value for options in free for path, value in options[:1]}
    return [
        choice
        for choice in every
        if (choice["vit.padding"] == "exact" or choice["vit.patch_embed"] == "linear")
        and (choice["vit.weights"] == "plain" or choice == {**plain, "vit.weights": "packed"})  # which no other toggle sees
    ]


COMBINATIONS = _combinations()
UNPACKED = [choice for choice in COMBINATIONS if choice["vit.weights"] == "plain"]  # which any dtype and device have


def _checkpoint_of(checkpoint: Checkpoint, visual: torch.nn.Module) -> Checkpoint:
    """A checkpoint that has this tower and nothing else that matters here."""
    model = SimpleNamespace(model=SimpleNamespace(visual=visual), config=SimpleNamespace(vision_config=visual.config))
    return dataclasses.replace(checkpoint, model=model)


@torch.inference_mode()
def _assert_lean_equals_stock(checkpoint: Checkpoint, grids: list[Grid], combinations: Sequence[dict[str, OptionValue]]) -> None:
    visual = checkpoint.model.model.visual
    pixels = _pixels(grids, _patch_dim(visual))
    expected = visual(pixels.patches, grid_thw=torch.tensor(grids))
    features = getattr(expected, "deepstack_features", None) or []
    for changes in combinations:
        slot = Recipe.parse("baseline, vit.tower=lean").replace(changes).vit
        encode = bind(slot, checkpoint, stock_format(checkpoint))
        for _ in range(2 if slot.positions == "cached" else 1):  # what is known must be as good as what is built
            vision = encode(pixels, OFF)
            assert (vision.embeds - expected.pooler_output).abs().max() < 1e-4, changes
            assert len(vision.deepstack) == len(features)
            for ours, stock in zip(vision.deepstack, features, strict=True):
                assert (ours - stock).abs().max() < 1e-4, changes


@settings(max_examples=30, deadline=None)
@given(grids=grids_strategy, data=st.data())
@pytest.mark.parametrize("name", tiny.NAMES)
def test_lean_equals_stock_over_random_grids_and_mixes(
    shallow_labs: dict[str, Lab], name: str, grids: list[Grid], data: st.DataObject
) -> None:
    """Several images of odd sizes; grids with a time axis, as video will have, too; a few combinations of options each time."""
    chosen = [data.draw(st.sampled_from(COMBINATIONS)) for _ in range(4)]
    _assert_lean_equals_stock(shallow_labs[name].checkpoint, grids, chosen)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["pairs", "every"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_combinations_of_exact_options_equal_stock(labs: dict[str, Lab], name: str, every: bool) -> None:
    """On two images with windows cut on the right, below and in the corner, and a clip.

    Every two options that go together, and every combination by night.
    """
    assert len(COMBINATIONS) == 3 * 2 * 2 * 2 * 2 + 1
    chosen = COMBINATIONS if every else covering(COMBINATIONS)
    _assert_lean_equals_stock(labs[name].checkpoint, [Grid(1, 10, 14), Grid(2, 6, 18)], chosen)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny-qwen2.5-vl", {"depth": 3, "num_heads": 4, "hidden_size": 96, "fullatt_block_indexes": [0], "window_size": 56}),
        ("tiny-qwen2.5-vl", {"depth": 2, "fullatt_block_indexes": [], "window_size": 168, "intermediate_size": 100}),
        ("tiny-qwen3-vl", {"depth": 5, "num_heads": 3, "deepstack_visual_indexes": [4, 1], "num_position_embeddings": 100}),
        ("tiny-qwen3-vl", {"depth": 2, "deepstack_visual_indexes": [], "out_hidden_size": 64}),
        ("tiny-qwen3-vl", {"depth": 1, "deepstack_visual_indexes": [0], "num_position_embeddings": 99}),  # no square: 81 are read
    ],
)
def test_lean_equals_stock_on_other_geometries(labs: dict[str, Lab], name: str, changes: dict) -> None:
    config = AutoConfig.from_pretrained(tiny.folder(name))
    for field, value in changes.items():
        setattr(config.vision_config, field, value)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    randomise(labs[name].checkpoint.family, model, seed=3)
    pad_widths(model.model.visual)
    checkpoint = _checkpoint_of(labs[name].checkpoint, model.model.visual)
    _assert_lean_equals_stock(checkpoint, [Grid(1, 10, 14), Grid(1, 2, 30), Grid(1, 8, 8)], COMBINATIONS[::3])


@settings(max_examples=50, deadline=None)
@given(grids=grids_strategy, window=st.integers(1, 6))
def test_position_tables_equal_transformers(grids: list[Grid], window: int) -> None:
    grid_thw = torch.tensor(grids)
    row_column = positions.coordinates(grids, 2, CPU)
    assert torch.equal(row_column, get_vision_position_ids(grid_thw, 2))
    indices, weights = positions.interpolation(grids, row_column, side=48)
    stock_indices, stock_weights = get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    table = torch.randn(48 * 48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, stock = ((table[i] * w[:, :, None]).sum(1) for i, w in ((indices, weights), (stock_indices, stock_weights)))
    assert torch.allclose(ours, stock, atol=1e-5)

    # The windows are Transformers', each with its tokens in order; which window comes first is the tower's own matter.
    order, rank = positions.window_order(grids, 2, window, CPU)
    assert torch.equal(order[rank], torch.arange(len(order)))
    lengths = [group.length for group in positions.windows(grids, 2, window) for _ in range(group.number)]
    stock_order, boundaries = get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=window * 28, patch_size=14)
    assert sorted(map(tuple, _split(order, [n // 4 for n in lengths]))) == sorted(
        map(tuple, _split(stock_order, (boundaries.diff() // 4).tolist()))
    )
    # And none leaves its frame, so that full attention finds each frame in one piece.
    frame_of = torch.cat([torch.full((g.h * g.w // 4,), i) for i, g in enumerate(g for g in grids for _ in range(g.t))])
    assert torch.equal(frame_of[order], frame_of)


def _split(order: torch.Tensor, lengths: list[int]) -> list[list[int]]:
    return [part.tolist() for part in order.split(lengths)]


def test_groups_are_maximal_and_cover_every_patch() -> None:
    grids = [Grid(1, 18, 26), Grid(3, 8, 8), Grid(1, 2, 4)]
    for groups in (positions.windows(grids, 2, 4), positions.frames(grids)):
        at = 0
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            assert group.start == at
            assert group.number * group.length > 0
            assert following is None or following.length != group.length
            at += group.number * group.length
        assert at == sum(grid.n_patches for grid in grids)
    assert positions.frames(grids)[1] == positions.Group(18 * 26, 3, 64)


@pytest.mark.parametrize("option", ["conv3d", "linear"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [128, 5, 0])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_folding_keeps_the_error_budget(
    labs: dict[str, Lab], name: str, option: str, has_bias: bool, dtype: torch.dtype, spread: int
) -> None:
    """Bytes sent once, against the same bytes normalised and sent twice, by their errors against float64.

    Also on pictures that are nearly flat around the mean, where bytes and bias would have to cancel.
    """
    generator = torch.Generator().manual_seed(spread)
    weight = torch.randn(16, 3, 2, 14, 14, generator=generator) / 1176**0.5 + 0.01  # with a DC part, as trained ones have
    bias = torch.randn(16, generator=generator) * 0.1 if has_bias else None
    scale, shift = labs[name].checkpoint.image_settings.scale_shift
    mean = (shift / scale).round().int().view(1, 3, 1, 1, 1)
    noise = torch.randint(-spread, spread + 1, (40, 3, 1, 14, 14), generator=generator, dtype=torch.int32)
    clip = (mean + noise).clamp(0, 255).to(torch.uint8)
    per_channel = (1, 3, 1, 1, 1)
    normalised = (clip.double() * scale.view(per_channel) - shift.view(per_channel)).expand(40, 3, 2, 14, 14)

    def embed(projection: PatchProjection, patches: torch.Tensor) -> torch.Tensor:
        return bind_patch_embed(option, projection)(patches.flatten(1)).double()

    truth = embed(PatchProjection(weight=weight.double(), bias=None if bias is None else bias.double()), normalised)
    low = PatchProjection(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
    stock = (embed(low, normalised.to(dtype)) - truth).norm()
    folded = (embed(fold(low, frames=1, scale_shift=(scale, shift)), clip) - truth).norm()
    assert folded <= 2 * stock + 4 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("option", [attention.per_window, attention.grouped])
def test_segments_see_only_themselves(option: Callable[[torch.dtype], SegmentAttention]) -> None:
    """Changing one patch changes its own segment of the output, and no other."""
    generator, attend = torch.Generator().manual_seed(0), option(torch.float32)
    groups = (positions.Group(0, 2, 4), positions.Group(8, 1, 5), positions.Group(13, 3, 2))
    prepared = attend.prepare(groups, CPU)
    q, k, v = (torch.randn(2, 19, 8, generator=generator) for _ in range(3))
    before = attend.attend(q, k, v, prepared)
    assert before.shape == (19, 16)
    k[:, 9] += 1
    changed = (attend.attend(q, k, v, prepared) - before).abs().amax(1) > 0
    assert changed.tolist() == [8 <= patch < 13 for patch in range(19)]


@torch.inference_mode()
def test_the_lean_tower_may_stop_between_blocks(lab: Lab) -> None:
    """Beside another image that goes through it too: visual tokens and DeepStack features are those of one go, bit for bit."""
    encoder = bind(Recipe.fastest().vit, lab.checkpoint, stock_format(lab.checkpoint))
    several = [_pixels(grids, _patch_dim(lab.checkpoint.model.model.visual)) for grids in ([Grid(1, 4, 6)], [Grid(1, 8, 8)] * 2)]
    whole = [encoder(pixels, OFF) for pixels in several]
    parts = [encoder.in_parts(encoder.inputs(pixels, OFF, None)) for pixels in several]
    n = parts[0].n_blocks
    assert n == len(lab.checkpoint.vision.blocks) > 1
    for turn in range(n):
        made = [part.go_on(1, OFF.inner) for part in parts]
        assert [part.n_left for part in parts] == [n - turn - 1] * 2
        assert all((tokens is None) == (turn < n - 1) for tokens in made)
    for ours, tokens in zip(made, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours.parts, tokens.parts, strict=True))


def test_the_lean_tower_copies_no_parameter(lab: Lab) -> None:
    visual = lab.checkpoint.model.model.visual
    tower = lean.tower_of(lab.checkpoint, OPERATIONS)
    assert tower.blocks[0].qkv.weight is visual.blocks[0].attn.qkv.weight  # type: ignore[attr-defined]
    if tower.vision.learned_positions is not None:
        assert tower.vision.learned_positions is visual.pos_embed.weight


@pytest.mark.parametrize("positions_option", ["recomputed", "cached"])
def test_positions_are_built_once_a_grid_where_they_are_kept(
    lab: Lab, positions_option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Sequence[Grid]] = []
    build = lean.build_plan

    def counted(tower: Any, attend: Any, grids: Sequence[Grid], n_patches: int | None) -> Plan:
        built.append(grids)
        return build(tower, attend, grids, n_patches)

    monkeypatch.setattr(lean, "build_plan", counted)
    fresh = Lab(lab.checkpoint.name, device="cpu", dtype="float32")
    recipe = Recipe.parse(f"fastest, vit.positions={positions_option}")
    runs = [
        fresh.run(Request(images=[photo("coffee", size)], prompt="?", max_new_tokens=1), recipe)
        for size in ((168, 140), (168, 140), (140, 168), (168, 140))
    ]
    kept = positions_option == "cached"
    assert len(built) == (2 if kept else 4)
    known = [run.trace.counts.get("vit.positions known", 0) for run in runs]
    assert known == ([0, 1, 0, 1] if kept else [0, 0, 0, 0])
    assert "vit.positions" in repr(runs[0])


def test_the_cache_of_plans_is_bounded() -> None:
    """10,000 grids leave no more behind than the bounds allow, and the latest are known."""

    def build(grids: Sequence[Grid], _: int | None = None) -> Plan:
        table, none = torch.empty(grids[0].n_patches, 8), Prepared(table=None, fixed=())
        return Plan(order=None, rank=None, cos=table, sin=table, learned=None, windows=none, frames=none)

    cache = PlanCache(build, max_entries=20, max_bytes=50_000)
    for number in range(10_000):
        grids = [Grid(1, 2 * (number % 100) + 2, 2 * (number // 100) + 2)]
        assert cache(grids)[1] is False
        assert cache(grids)[1] is (build(grids).n_bytes <= 50_000)
        assert len(cache._plans) <= 20
        assert sum(plan.n_bytes for plan in cache._plans.values()) == cache._bytes <= 50_000
    small = [[Grid(1, 2, 2 * n)] for n in range(1, 5)]
    assert [cache(grids)[1] for grids in small] == [False] * 4
    assert cache([Grid(1, 1000, 1000)])[1] is False  # too large to keep, and no reason to forget the others
    assert [cache(grids)[1] for grids in small] == [True] * 4


class _OnlyOnMeta(TorchDispatchMode):
    """Fails when a value is read from a tensor, or a tensor is made on another device than `meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a value was read"
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", f"{func} made a tensor on {tensor.device}"
        return out


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_lean_tower_reads_nothing_back_and_makes_nothing_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has no values at all, where reading one is an error; and without the words that read."""
    checkpoint = dataclasses.replace(Lab(name, device="cpu", dtype="float32").checkpoint)  # which has looked at no tower yet
    visual = checkpoint.model.model.visual.to("meta")  # which loses the padding
    pad_widths(visual)
    pixels = _pixels([Grid(1, 10, 14), Grid(2, 6, 18)], _patch_dim(visual))
    on_meta = Pixels(patches=pixels.patches.to("meta"), shapes=pixels.shapes)
    encoders = []
    for changes in UNPACKED:
        slot = Recipe.parse("baseline, vit.tower=lean").replace(changes).vit
        encoders.append(bind(slot, checkpoint, stock_format(checkpoint)))

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read back")

    for word in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, word, read)
    with torch.inference_mode(), _OnlyOnMeta():
        for encode in encoders:
            assert encode(on_meta, OFF).embeds.device.type == "meta"


def test_the_stock_tower_would_not_pass_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Lab("tiny-qwen2.5-vl", device="cpu", dtype="float32").checkpoint
    encode = bind(Recipe.baseline().vit, checkpoint, stock_format(checkpoint))
    pixels = _pixels([Grid(1, 10, 14)], _patch_dim(checkpoint.model.model.visual))

    def read(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read back")

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with torch.inference_mode(), pytest.raises(AssertionError, match="read back"):
        encode(pixels, OFF)


def test_lean_in_bfloat16_is_within_the_error_budget(picture: bytes) -> None:
    """The error of bfloat16 against float64 is at most twice that of the stock tower in bfloat16."""
    for name in tiny.NAMES:
        exact = Lab(name, device="cpu", dtype="float32").checkpoint
        visual = exact.model.model.visual.double()
        pixels = _pixels([Grid(1, 12, 18)], _patch_dim(visual))
        with torch.inference_mode():
            truth = visual(pixels.patches.double(), grid_thw=torch.tensor(pixels.grids)).pooler_output
            half = Lab(name, device="cpu", dtype="bfloat16").checkpoint
            low = Pixels(patches=pixels.patches.bfloat16(), shapes=pixels.shapes)
            lean_tower = Recipe.parse("baseline, vit.tower=lean")
            slots = [Recipe.baseline().vit, *(lean_tower.replace(changes).vit for changes in UNPACKED)]
            stock, *ours = (
                (bind(slot, half, stock_format(half))(low, OFF).embeds.double() - truth).norm() / truth.norm() for slot in slots
            )
        assert 0 < stock < 0.05
        assert max(ours) <= 2 * stock + 1e-3


FUSED = {"attention": "triton", "norms": "fused", "rope": "fused", "activation": "fused", "interpolation": "fused"}


# All at once in both families; each alone in one of them, and by night in the other.
FUSED_IN = [
    pytest.param(name, fused, id=f"{name}-{' '.join(fused)}", marks=pytest.mark.nightly if (number + other) % 2 else ())
    for number, fused in enumerate([name] for name in FUSED)
    for other, name in enumerate(tiny.NAMES)
] + [pytest.param(name, list(FUSED), id=f"{name}-all") for name in tiny.NAMES]


@pytest.mark.parametrize(("name", "fused"), FUSED_IN)
def test_triton_options_equal_the_stock_tower(shallow_labs: dict[str, Lab], name: str, fused: list[str]) -> None:
    """The whole tower on each kernel and on all: in Triton's interpreter on a CPU, which a recipe does not offer."""
    slot = Recipe.parse("baseline, vit.tower=lean").replace({f"vit.{option}": FUSED[option] for option in fused}).vit
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = shallow_labs[name].checkpoint if device.type == "cpu" else Lab(name, device="cuda", dtype="float32").checkpoint
    visual = checkpoint.model.model.visual
    grids = [Grid(1, 10, 14), Grid(2, 4, 6)]
    pixels = _pixels(grids, _patch_dim(visual))
    pixels = Pixels(patches=pixels.patches.to(device), shapes=pixels.shapes)
    with torch.inference_mode():
        expected = visual(pixels.patches, grid_thw=torch.tensor(grids, device=device))
        vision = bind(slot, checkpoint, stock_format(checkpoint))(pixels, OFF)
    assert (vision.embeds - expected.pooler_output).abs().max() < 1e-4
    for ours, stock in zip(vision.deepstack, getattr(expected, "deepstack_features", None) or [], strict=True):
        assert (ours - stock).abs().max() < 1e-4
