"""Image bytes to patches, against Transformers' own processor."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as stock_smart_resize

from fastvl_lab import CheckpointError, ImageError, Lab, Recipe, Request, RequestError, photo
from fastvl_lab.preprocessor import BoundPreprocessor, bind
from fastvl_lab.preprocessor.decode_image import FORMATS
from fastvl_lab.preprocessor.layout import smart_resize
from fastvl_lab.request import ImageInput, Pixels

Decode = Callable[[Sequence[object]], list[Image.Image]]


def _preprocess(lab: Lab, recipe: Recipe, request: Request) -> tuple[Pixels, BoundPreprocessor]:
    bound = bind(recipe.preprocessor, lab.checkpoint)
    return bound.patches(request), bound


def _encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


@settings(max_examples=400, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([28, 32]),
    min_pixels=st.sampled_from([1, 3136, 65536]),
    max_pixels=st.sampled_from([65536, 1003520, 12845056]),
)
def test_smart_resize_equals_transformers(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> None:
    limits = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ImageError, match=r"aspect ratio of .*; the limit is 200"):
            smart_resize(height, width, **limits)
    else:
        assert smart_resize(height, width, **limits) == stock_smart_resize(height, width, **limits)


PAYLOADS = [
    {"preprocessor.payload": payload, "preprocessor.temporal": temporal, "preprocessor.patchify": patchify}
    for payload in ("float32", "uint8", "uint8_folded")
    for temporal in ("duplicated", "folded")
    for patchify in ("numpy", "torch")
]


@pytest.mark.parametrize("changes", PAYLOADS, ids=lambda changes: " ".join(changes.values()))
def test_every_payload_is_the_stock_one_in_another_form(lab: Lab, changes: dict[str, str], stock_resize: str) -> None:
    """Undone by hand: frames repeated, values normalised."""
    recipe = Recipe.parse(f"baseline, preprocessor.resize={stock_resize}, vit.tower=lean").replace(changes)
    request = Request(images=[_noise(90, 61), _noise(40, 200, seed=1)], prompt="?")
    stock = _preprocess(lab, Recipe.baseline(), request)[0].patches
    pixels, bound = _preprocess(lab, recipe, request)
    sent = pixels.patches
    floats, once = recipe.preprocessor.payload == "float32", recipe.preprocessor.temporal == "folded"
    assert sent.dtype == (torch.float32 if floats else torch.uint8)
    assert sent.numel() * (2 if once else 1) == stock.numel()
    values = bound.upload(sent)
    assert bound.patch_format.normalised == (recipe.preprocessor.payload != "uint8_folded")
    assert bound.patch_format.frames == (1 if once else 2)
    values = values.view(len(values), 3, bound.patch_format.frames, -1)
    if not bound.patch_format.normalised:
        scale, shift = (x.view(1, 3, 1, 1) for x in lab.checkpoint.image_settings.scale_shift)
        values = values * scale - shift
    assert (values.expand(-1, -1, 2, -1).flatten(1) - stock).abs().max() < 2e-6


@pytest.mark.parametrize("size", [(56, 56), (201, 133), (640, 480), (33, 700), (28, 2800), (1, 1)])
def test_patches_equal_the_stock_processors(lab: Lab, size: tuple[int, int], stock_resize: str) -> None:
    """Bit for bit with numpy where Pillow's backend is the stock one, else to a rounding; with several images in one request."""
    request = Request(images=[_noise(*size), _noise(90, 61, seed=1)], prompt="?")
    stock = _preprocess(lab, Recipe.baseline(), request)[0]
    for patchify, tolerance in (("numpy", 0 if stock_resize == "pillow" else 1e-6), ("torch", 1e-6)):
        recipe = Recipe.baseline().replace({"preprocessor.resize": stock_resize, "preprocessor.patchify": patchify})
        pixels = _preprocess(lab, recipe, request)[0]
        assert pixels.shapes == stock.shapes
        assert pixels.patches.dtype == stock.patches.dtype == torch.float32
        assert pixels.patches.shape == stock.patches.shape
        assert (pixels.patches - stock.patches).abs().max() <= tolerance


def test_pixel_limits_of_the_request_are_obeyed_by_every_engine(lab: Lab) -> None:
    picture, factor = photo("coffee", (640, 480)), lab.checkpoint.image_processor.patch_size * 2
    for engine in ("transformers", "baseline", "fastest"):
        for least, most in ((None, factor**2 * 70), (factor**2 * 600, None), (factor**2 * 100, factor**2 * 120), (1, factor**2)):
            run = lab.run(Request(images=[picture], prompt="?", max_new_tokens=1, min_pixels=least, max_pixels=most), engine)
            area = run.shapes[0].resized_width * run.shapes[0].resized_height
            assert area <= (most or area), engine
            assert area >= (least or area), engine
        crossed = Request(images=[picture], prompt="?", max_pixels=lab.checkpoint.image_settings.min_pixels - 1)
        with pytest.raises(RequestError, match="one is the request's, the other the checkpoint's"):
            lab.run(crossed, engine)


@pytest.mark.parametrize("form", FORMATS)
def test_every_allowed_format_is_decoded(decode: Decode, form: str) -> None:
    image = _noise(20, 10)
    decoded = decode([_encoded(image, form)])[0]
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))
    if form in ("PNG", "BMP", "TIFF"):
        assert decoded.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(decode: Decode, mode: str) -> None:
    image = Image.new("I;16", (20, 10), 300) if mode == "I;16" else _noise(20, 10).convert(mode)
    decoded = decode([_encoded(image, "JPEG" if mode == "CMYK" else "PNG")])[0]
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))


def test_exif_orientation_is_applied(decode: Decode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn to stand upright
    decoded = decode([_encoded(_noise(20, 10), "JPEG", exif=exif.tobytes())])[0]
    assert decoded.size == (10, 20)


def test_arrays_and_pictures_need_no_encoding(decode: Decode, picture: bytes) -> None:
    image = decode([picture])[0]
    forms = [picture, image, np.asarray(image), np.asarray(image)[:, :, 0]]
    decoded = decode(forms)
    assert len({one.size for one in decoded}) == 1
    assert decoded[0].tobytes() == decoded[1].tobytes() == decoded[2].tobytes()
    assert decoded[3].mode == "RGB"


JPEG = _encoded(_noise(64, 48), "JPEG")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, world", "is not an image of a supported type; the choices are JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (_encoded(_noise(8, 8), "PPM"), "is not an image of a supported type"),
        (JPEG[:200], "is broken|is not an image"),
        (JPEG[:-600], "is broken"),
        (_encoded(_noise(64, 48))[:-200], "is broken"),
        (np.zeros((0, 4, 3), np.uint8), r"is uint8 of shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "is float32 of shape"),
        (np.zeros((4, 4, 4), np.uint8), r"must be uint8, \[height, width, 3\]"),
        (Image.new("RGB", (0, 5)), "is 0x5; both sides must be at least 1 pixel"),
    ],
)
def test_what_is_no_image_is_refused(decode: Decode, image: object, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        decode([image])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it skips
def test_a_broken_exif_block_is_an_error_of_ours(decode: Decode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(_encoded(_noise(20, 10), "JPEG", exif=exif.tobytes()))
    at = data.index(b"Exif\x00\x00") + 6
    for offset in range(30):
        for value in (0x00, 0x7F, 0xFF):
            broken = bytearray(data)
            broken[at + offset] = value
            try:
                decode([bytes(broken)])
            except ImageError:
                continue


def test_images_longer_than_the_model_are_refused_before_a_pixel_is_touched(lab: Lab) -> None:
    request = Request(images=[np.zeros((40, 40, 3), np.uint8)], prompt="?", min_pixels=10**9, max_pixels=10**9)
    for engine in ("transformers", "baseline", "fastest"):
        with pytest.raises(RequestError, match=r"the images alone have \d+ visual tokens, over session_len"):
            lab.run(request, engine)


@pytest.mark.parametrize(("field", "value"), [("do_normalize", False), ("do_rescale", False), ("resample", 2)])
def test_settings_that_the_labs_own_preprocessing_has_not_are_refused(lab: Lab, field: str, value: object) -> None:
    """They are honoured by the stock processor, and never ignored by ours."""
    processor = copy.copy(lab.checkpoint.image_processor)
    setattr(processor, field, value)
    checkpoint = dataclasses.replace(lab.checkpoint, image_processor=processor)
    bind(Recipe.baseline().preprocessor, checkpoint)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json has {field}={value}"):
        bind(Recipe.fastest().preprocessor, checkpoint)


def test_decompression_bombs_are_refused_by_their_header(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"is too large: .*; the limit is 1000 pixels"):
        decode([ImageInput(data=JPEG, label="bomb.jpg")])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"no picture", r"'10 bytes, 2 of 3' is not an image"),
        (JPEG[: len(JPEG) // 2], r"image '\d+ bytes, 2 of 3' is broken"),
        (np.zeros((4, 4, 3)), r"image 'array 4x4x3, 2 of 3' is float64"),
        (np.zeros((4, 900, 3), np.uint8), r"aspect ratio of 225; the limit is 200 \(image 2 of 3\)"),
    ],
)
def test_of_several_images_an_error_says_which(lab: Lab, bad: bytes | np.ndarray, says: str) -> None:
    request = Request(images=[JPEG, bad, JPEG], prompt="?")
    for engine in ("transformers", "baseline", "fastest"):
        with pytest.raises(ImageError, match=says):
            lab.run(request, engine)


def test_too_long_a_strip_is_refused_by_every_engine(lab: Lab) -> None:
    request = Request(images=[np.zeros((4, 900, 3), np.uint8)], prompt="?")
    for engine in ("transformers", "baseline", "fastest"):
        with pytest.raises(ImageError, match="an image of 900x4 has an aspect ratio of 225; the limit is 200"):
            lab.run(request, engine)
