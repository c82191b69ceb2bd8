"""Options of the slot against one another and against Transformers' processor: decoders, resizes, threads, time."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from fastvl_lab import Lab, MissingExtraError, Recipe, RecipeError, Request, photo
from fastvl_lab.preprocessor import BoundPreprocessor, bind, decode_image, patchify, resize
from fastvl_lab.preprocessor.layout import own_settings, smart_resize
from fastvl_lab.preprocessor.patchify_triton import with_triton
from fastvl_lab.request import Grid, ImageInput, ImageShape, Picture

BICUBIC = Image.Resampling.BICUBIC


def _shape(width: int, height: int) -> ImageShape:
    """Only the resized size matters here."""
    return ImageShape(width=0, height=0, resized_width=width, resized_height=height, grid=Grid(1, 0, 0), visual_tokens=0)


def _encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


@cache
def _page() -> Image.Image:
    image = Image.new("RGB", (2800, 2800), "white")
    draw = ImageDraw.Draw(image)
    for top in range(0, 2800, 12):
        draw.text((2, top), "Visual tokens, black on white, 0123456789 " * 12, fill="black")
    return image


def _text(width: int, height: int) -> Image.Image:
    return _page().crop((0, 0, width, height))


def _gradient(width: int, height: int) -> Image.Image:
    row, column = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    return Image.fromarray(np.stack(np.broadcast_arrays(row, column, (row + column) / 2), -1).astype(np.uint8))


def _photograph(name: str) -> Callable[[int, int], Image.Image]:
    picture = Image.open(io.BytesIO(photo(name))).convert("RGB")
    return lambda width, height: picture.resize((width, height), Image.Resampling.LANCZOS)


PICTURES: dict[str, Callable[[int, int], Image.Image]] = {
    "coffee": _photograph("coffee"),
    "astronaut": _photograph("astronaut"),
    "rocket": _photograph("rocket"),
    "noise": _noise,
    "text": _text,
    "gradient": _gradient,
}

# (width, height): photographs, odd sides, strips both ways, one pixel sides, and small ones that are enlarged.
SIZES = [
    *((640, 480), (641, 479), (480, 641), (1279, 719), (1001, 777), (333, 500), (512, 512), (600, 137), (137, 600), (801, 801)),
    *((1600, 60), (60, 1600), (1999, 37), (37, 1999), (2800, 28), (28, 2800), (700, 7), (7, 700), (199, 1), (1, 199)),
    *((1, 1), (1, 2), (2, 1), (3, 5), (13, 17), (27, 29), (31, 33), (56, 56), (57, 55), (100, 90)),
    *((97, 310), (201, 133), (448, 336), (449, 337), (224, 1000), (1000, 224), (225, 223), (784, 790), (1120, 1130), (900, 1300)),
]
LIMITS = [(3136, 12845056, 28), (65536, 16777216, 32), (3136, 60000, 28)]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["pairs", "whole"])
@pytest.mark.parametrize("kind", PICTURES)
def test_torch_and_device_resizes_are_within_two_levels_of_pillow(kind: str, whole: bool) -> None:
    """Under both families' own limits, and under one that shrinks nearly all; on average over a picture under a quarter level.

    Each picture in each size, and each size under each limit; all three together by night.
    """
    assert len(SIZES) == len(set(SIZES)) == 40
    options = {"torch": resize.with_torch(as_pillow=True), "device": resize.on_device(lambda x: x, as_pillow=True)}
    turn = list(PICTURES).index(kind)
    pairs = [(size, LIMITS[(number + turn) % len(LIMITS)]) for number, size in enumerate(SIZES)]
    orders = set()
    for (width, height), (least, most, factor) in itertools.product(SIZES, LIMITS) if whole else pairs:
        picture = PICTURES[kind](width, height)
        high, wide = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
        shape, expected = _shape(wide, high), np.asarray(picture.resize((wide, high), BICUBIC)).astype(int)
        orders.add(resize.columns_first(width, height, shape))
        for name, resized in options.items():
            difference = np.abs(resized(decode_image.as_tensor(picture), shape).numpy() - expected)
            assert difference.max() <= 2, (name, width, height, wide, high)
            assert difference.mean() < 0.25, (name, width, height, wide, high)
    assert orders == {True, False}


@pytest.mark.parametrize("order", ["torch", "pillow"])
def test_the_torch_resize_is_one_call_of_the_torchvision_backends_kernel(order: str) -> None:
    """Bit for bit, wherever the width comes first."""
    for width, height, wide, high in [(640, 480, 448, 364), (100, 90, 140, 140), (333, 500, 308, 476), (700, 300, 28, 28)]:
        pixels, shape = decode_image.as_tensor(_noise(width, height)), _shape(wide, high)
        planar = pixels.permute(2, 0, 1)[None].contiguous()
        expected = F.interpolate(planar, (high, wide), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        made = resize.with_torch(as_pillow=order == "pillow")(pixels, shape)
        assert made.is_contiguous()  # interleaved as it came: torch took the fast path
        if order == "torch" or not resize.columns_first(width, height, shape):
            assert torch.equal(made, expected)


@pytest.mark.parametrize("n_threads", [2, 3, 16])
def test_pillow_in_strips_is_bit_equal_to_pillow(n_threads: int) -> None:
    with ThreadPoolExecutor(n_threads) as pool:
        resized = resize.with_pillow_in_strips(pool.map, n_threads)
        for (width, height), (least, most, factor) in itertools.product(SIZES, LIMITS[1:]):
            picture = _noise(width, height)
            high, wide = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
            shape = _shape(wide, high)
            assert torch.equal(resized(picture, shape), resize.with_pillow(picture, shape)), (width, height, wide, high)


def _decoded(lab: Lab, recipe: str, images: Sequence[bytes], **limits: int) -> list[np.ndarray]:
    request = Request(images=list(images), prompt="?", **limits)
    return [np.asarray(picture) for picture in _pictures(bind(Recipe.parse(recipe).preprocessor, lab.checkpoint), request)]


def _pictures(bound: BoundPreprocessor, request: Request) -> list[Picture]:
    return bound.unpack(bound.open(request).images)


def _jpegs() -> dict[str, bytes]:
    picture, exif = PICTURES["coffee"](301, 203), Image.Exif()
    jpegs = {f"subsampling {s}": _encoded(picture, subsampling=s, quality=q) for s, q in ((0, 95), (1, 80), (2, 30))}
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        jpegs[f"orientation {orientation}"] = _encoded(picture, exif=exif.tobytes())
    jpegs["progressive"] = _encoded(picture, progressive=True)
    jpegs["restart markers"] = _encoded(picture, restart_marker_rows=1)
    jpegs["RGB inside"] = _encoded(picture, keep_rgb=True)
    jpegs["two pictures (MPO)"] = _encoded(picture, "MPO", save_all=True, append_images=[picture.rotate(90)])
    jpegs["grey"] = _encoded(picture.convert("L"))
    jpegs["CMYK"] = _encoded(picture.convert("CMYK"))
    jpegs["one pixel"] = _encoded(picture.resize((1, 1)))
    jpegs["bytes behind its end"] = _encoded(picture) + b"more"
    jpegs["a PNG"] = _encoded(picture, "PNG")
    return jpegs


@pytest.mark.parametrize("name", _jpegs())
def test_turbojpeg_gives_pillows_pixels_upright(labs: dict[str, Lab], name: str) -> None:
    pytest.importorskip("simplejpeg")
    data, lab = _jpegs()[name], labs["tiny-qwen3-vl"]
    expected = _decoded(lab, "baseline", [data])[0]
    made = _decoded(lab, "baseline, preprocessor.decode=turbojpeg, preprocessor.resize=torch", [data])[0]
    assert np.array_equal(made, expected)
    lies = name.startswith("orientation") and int(name[-1]) >= 5
    assert expected.shape == ((1, 1, 3) if name == "one pixel" else (301, 203, 3) if lies else (203, 301, 3))


def test_turbojpeg_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fastvl-lab\[fast\]'"):
        decode_image.with_turbojpeg(decode_image.open_image(ImageInput.of(_jpegs()["progressive"])), _shape(28, 28))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "late PNG"])
def test_every_format_is_upright_and_of_the_grid_that_transformers_gives_it(lab: Lab, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = PICTURES["coffee"](300, 100)
    data = _encoded(picture, form.split()[-1], exif=exif if form == "TIFF" else exif.tobytes())
    if form == "late PNG":  # the block with the orientation, moved behind the pixels
        at = data.index(b"eXIf") - 4
        length = 12 + int.from_bytes(data[at : at + 4], "big")
        end = data.index(b"IEND") - 4
        data = data[:at] + data[at + length : end] + data[at : at + length] + data[end:]
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((100, 300) if orientation >= 5 else (300, 100))
    request = Request(images=[data, Image.open(io.BytesIO(data))], prompt="?")
    for recipe in ("baseline", "baseline, preprocessor.resize=pillow", "fastest"):
        bound = bind(Recipe.parse(recipe).preprocessor, lab.checkpoint)
        bound.patches(request)  # the stock processor's grid is asserted inside
        for one, shape in zip(_pictures(bound, request), bound.open(request).shapes, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(expected))
            assert (shape.width, shape.height) == expected.size


def test_one_picture_twice_in_a_request_is_read_once(lab: Lab) -> None:
    """Two threads that read one file at a time would tear it."""
    opened = Image.open(io.BytesIO(_encoded(PICTURES["coffee"](640, 480))))
    bound = bind(Recipe.parse("fastest, preprocessor.threads=all").preprocessor, lab.checkpoint)
    first, second = _pictures(bound, Request(images=[opened, opened], prompt="?"))
    assert torch.equal(first, second)


def test_jpegs_go_to_turbojpeg_and_others_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    simplejpeg = pytest.importorskip("simplejpeg")
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda data, **k: seen.append(len(data)) or decode_jpeg(data, **k))
    for name, data in _jpegs().items():
        decode_image.with_turbojpeg(decode_image.open_image(ImageInput.of(data)), _shape(28, 28))
        assert (seen.pop() if seen else None) == (None if name in ("a PNG", "grey", "CMYK") else len(data)), name


def test_draft_decodes_at_the_smallest_scale_that_is_enough(labs: dict[str, Lab]) -> None:
    lab, exif = labs["tiny-qwen2.5-vl"], Image.Exif()
    exif[0x0112] = 6
    picture = PICTURES["coffee"](1200, 800)
    recipe = "baseline, preprocessor.decode=draft, preprocessor.resize=pillow"
    for max_pixels, scale in ((1200 * 800, 1), (300_000, 1), (240_000, 2), (59_000, 4), (15_000, 8), (4_000, 8)):
        made = _decoded(lab, recipe, [_encoded(picture), _encoded(picture, "PNG")], max_pixels=max_pixels)
        assert made[0].shape == (800 // scale, 1200 // scale, 3), max_pixels
        assert made[1].shape == (800, 1200, 3)
    upright = _decoded(lab, recipe, [_encoded(picture, exif=exif.tobytes())], max_pixels=240_000)[0]
    assert upright.shape == (600, 400, 3)


def test_draft_keeps_the_grid_of_the_whole_image(labs: dict[str, Lab]) -> None:
    """A reduced image may be a pixel off in its proportions."""
    lab = labs["tiny-qwen2.5-vl"]
    for width, height in ((1201, 799), (1007, 1009), (2051, 77)):
        request = Request(images=[_encoded(_noise(width, height))], prompt="?", max_pixels=60_000)
        shapes = [
            bind(Recipe.parse(f"baseline, preprocessor.decode={decode}, preprocessor.resize=torch").preprocessor, lab.checkpoint)
            .open(request)
            .shapes
            for decode in ("pillow", "draft")
        ]
        assert shapes[0] == shapes[1]


def test_a_picture_of_the_callers_own_is_left_as_it_was(labs: dict[str, Lab]) -> None:
    """Also one that was opened and not yet read, which Pillow could still scale."""
    opened = Image.open(io.BytesIO(_encoded(PICTURES["coffee"](1200, 800))))
    recipe = Recipe.parse("baseline, preprocessor.decode=draft, preprocessor.resize=pillow")
    bound = bind(recipe.preprocessor, labs["tiny-qwen2.5-vl"].checkpoint)
    (picture,) = _pictures(bound, Request(images=[opened], prompt="?", max_pixels=10_000))
    assert opened.size == picture.size == (1200, 800)
    array = np.asarray(_noise(60, 40))
    array.setflags(write=False)
    kept = array.copy()
    fast = bind(Recipe.fastest().preprocessor, labs["tiny-qwen2.5-vl"].checkpoint)
    request = Request(images=[array], prompt="?")
    fast.pixels(request)
    assert np.array_equal(array, kept)


@pytest.mark.parametrize("recipe", ["baseline", "baseline, preprocessor.resize=pillow", "fastest"])
def test_threads_change_no_pixel(lab: Lab, recipe: str) -> None:
    images = [photo("coffee", (201, 133)), photo("rocket", (97, 310)), _encoded(_noise(300, 40), "PNG"), np.asarray(_noise(70, 50))]
    request = Request(images=images, prompt="?")
    patches = []
    for threads in ("one", "all"):
        bound = bind(Recipe.parse(f"{recipe}, preprocessor.threads={threads}").preprocessor, lab.checkpoint)
        patches.append(bound.pixels(request).patches)
    assert torch.equal(*patches)


def test_an_error_in_a_thread_is_the_callers(lab: Lab) -> None:
    bound = bind(Recipe.parse("fastest, preprocessor.threads=all").preprocessor, lab.checkpoint)
    broken = photo("coffee", (201, 133))[:-2000]
    with pytest.raises(ValueError, match="is broken: image file is truncated"):
        bound.pixels(Request(images=[photo("rocket", (97, 310)), broken], prompt="?"))


def test_what_headers_say_is_refused_before_any_pixel_is_decoded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    strips = [_encoded(_noise(900, 4), form) for form in ("JPEG", "PNG", "WEBP", "TIFF")]
    large = photo("coffee")
    for one in (*strips, large):
        monkeypatch.setattr(type(Image.open(io.BytesIO(one))), "load", load)
    for engine in ("transformers", "baseline", "fastest"):
        fresh = Lab(lab.checkpoint.name, device="cpu")
        for strip in strips:
            with pytest.raises(ValueError, match="aspect ratio of 225; the limit is 200"):
                fresh.run(Request(images=[large, strip], prompt="?"), engine)
        with pytest.raises(ValueError, match="over session_len"):
            fresh.run(Request(images=[large], prompt="?", min_pixels=10**9, max_pixels=10**9), engine)


def test_video_frames_keep_their_own_time_axis(lab: Lab) -> None:
    """Against the permutation of Transformers' processors, [T/F, F, C, G, m, p, H, m, p] -> [T/F, G, H, m, m, C, F, p, p]."""
    layout, side = own_settings(lab.checkpoint), own_settings(lab.checkpoint).factor
    clip = torch.from_numpy(np.random.default_rng(0).integers(256, size=(6, 2 * side, 3 * side, 3), dtype=np.uint8))
    m, p, frames = layout.merge_size, layout.patch_size, 2
    planar = clip.permute(0, 3, 1, 2).reshape(3, frames, 3, 2, m, p, 3, m, p)
    expected = planar.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(3 * 2 * m * 3 * m, -1)
    for to_patches in (patchify.with_numpy, patchify.with_torch):
        made = to_patches([clip, clip[:1]], layout, frames=frames, normalised=False)
        assert torch.equal(made[: len(expected)], expected)
        assert len(made) == len(expected) * 4 // 3  # an image is one group of frames, a clip of six has three
        first = made[len(expected) :].view(-1, 3, frames, p, p)
        assert torch.equal(first[:, :, 0], first[:, :, 1])


@pytest.mark.parametrize("temporal", ["duplicated", "folded"])
def test_the_triton_option_makes_the_patches_that_the_others_upload(lab: Lab, temporal: str) -> None:
    frames = {"duplicated": 2, "folded": 1}[temporal]
    recipe = Recipe.parse(f"baseline, preprocessor.resize=pillow, vit.tower=lean, preprocessor.temporal={temporal}")
    request = Request(images=[_noise(90, 61), _noise(40, 80, seed=1)], prompt="?")
    bound, layout = bind(recipe.preprocessor, lab.checkpoint), own_settings(lab.checkpoint)
    expected, opened = bound.pixels(request).patches, bound.open(request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    to_patches = with_triton(layout, frames, lambda x: x.to(device), device, torch.float32)
    resized = map(resize.with_pillow, bound.unpack(opened.images), opened.shapes)
    made = torch.cat([to_patches(image) for image in resized])
    assert made.dtype == torch.float32
    assert (made.cpu() - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preprocessor.decode": "draft"}, "decode=draft needs preprocessor.resize=pillow or torch or device, and"),
        ({"preprocessor.resize": "device"}, "resize=device needs preprocessor.patchify=torch or triton, and"),
        ({"preprocessor.decode": "gpu", "preprocessor.resize": "torch"}, "decode=gpu needs preprocessor.resize=device, and"),
    ],
)
def test_combinations_without_meaning_are_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.baseline().replace(changes)


@pytest.mark.parametrize("path", ["preprocessor.decode=gpu", "preprocessor.patchify=triton", "preprocessor.upload=pinned"])
def test_what_needs_a_gpu_says_so_on_a_cpu(lab: Lab, path: str) -> None:
    if lab.device.type == "cuda":
        pytest.skip("a GPU is at hand")
    toggle, _, value = path.partition("=")
    recipe = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean").choose(toggle, value)
    with pytest.raises(RecipeError, match=f"{path} cannot run here: it needs a CUDA device"):
        lab.run(Request(images=[_noise(60, 40)], prompt="?"), recipe)


def test_approximate_options_answer_to_transformers_on_their_own_pixels(lab: Lab, stock_resize: str) -> None:
    """What comes after the pixels is exact still, and the pixels do differ; so with those of the other image backend."""
    request = Request(images=[photo("coffee", (1280, 960))], prompt="What is this?", max_new_tokens=8, max_pixels=65536 * 2)
    stock = lab.run(request, "transformers")
    other = "torch" if stock_resize == "pillow" else "pillow"
    for path, value in (("preprocessor.decode", "draft"), ("preprocessor.resize", "device"), ("preprocessor.resize", other)):
        recipe = Recipe.parse("fastest, preprocessor.decode=pillow").choose(path, value)
        oracle = recipe.oracle(lab.checkpoint.image_backend)
        assert oracle.startswith("transformers, preprocessor.")
        run, expected = lab.run(request, recipe), lab.run(request, oracle)
        assert run.tokens == expected.tokens
        assert (run.logits - expected.logits).abs().max() < 1e-4
        assert (expected.logits - stock.logits).abs().max() > 1e-5, value


def test_the_oracle_names_what_the_pixels_depend_on() -> None:
    free = Recipe.parse("baseline, preprocessor.resize=pillow, preprocessor.patchify=torch, vit.tower=lean")
    assert Recipe.baseline().oracle("pillow") == Recipe.baseline().oracle("torchvision") == "transformers"
    assert free.oracle("pillow") == "transformers"
    assert free.oracle("torchvision") == "transformers, preprocessor.resize=pillow"
    torch_resize = free.replace("preprocessor.resize", "torch")
    assert torch_resize.oracle("torchvision") == "transformers"
    assert torch_resize.oracle("pillow") == "transformers, preprocessor.resize=torch"
    folded = torch_resize.replace({"preprocessor.payload": "uint8_folded", "preprocessor.temporal": "folded"})
    assert folded.oracle("pillow") == torch_resize.oracle("pillow")
    device = folded.choose("preprocessor.resize", "device").replace("preprocessor.decode", "draft")
    expected = "transformers, preprocessor.decode=draft, preprocessor.resize=device, preprocessor.patchify=torch"
    assert device.oracle("pillow") == device.oracle("torchvision") == expected
    assert [r.within("pillow") for r in (Recipe.baseline(), free, folded, device)] == [0, 0, 2, None]
