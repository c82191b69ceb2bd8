"""One way from an image in any form to RGB, held to Transformers: `load_image`, then its image processor's own conversion."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Iterator
from copy import copy

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from transformers.image_utils import load_image

from fastvl_lab import ImageError, Lab, Recipe, Request
from fastvl_lab.preprocessor import bind
from fastvl_lab.preprocessor.decode_image import as_tensor, open_image, read_orientation, rgb_of, with_turbojpeg
from fastvl_lab.request import Grid, ImageInput, ImageShape

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of palettes with several transparent colours, and of odd EXIF


OWN_RESIZE = {"pillow": "pillow", "torchvision": "torch"}  # whose pixels are the stock backend's own
SHAPE = ImageShape(width=0, height=0, resized_width=28, resized_height=28, grid=Grid(1, 2, 2), visual_tokens=1)


def _noise(mode: str, width: int = 44, height: int = 33) -> Image.Image:
    random = np.random.default_rng(3)
    rgb = Image.fromarray(random.integers(256, size=(height, width, 3), dtype=np.uint8))
    if mode.startswith("I;16"):
        return Image.frombytes(mode, rgb.size, random.bytes(width * height * 2))
    if mode == "LAB":
        return Image.frombytes(mode, rgb.size, random.bytes(width * height * 3))
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "P"}
    return rgb.convert(by_way_of[mode]).convert(mode) if mode in by_way_of else rgb.convert(mode)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _logo(form: str, **transparency: object) -> bytes:
    """Shapes on a background that is a colour of the palette, and transparent."""
    image = Image.new("P", (200, 150), 2)
    image.putpalette([250, 240, 10, 20, 30, 200, 0, 0, 0] + [0] * 759)
    image.paste(0, (30, 40, 120, 100))
    image.paste(1, (100, 60, 180, 140))
    return _encoded(image, form, **(transparency or {"transparency": 2}))


def _expected(lab: Lab, image: Image.Image | bytes) -> np.ndarray:
    """uint8 [height, width, 3], by Transformers alone."""
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    processor = lab.checkpoint.image_processor
    return np.asarray(processor.process_image(load_image(picture), do_convert_rgb=processor.do_convert_rgb)).transpose(1, 2, 0)


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")
TRANSPARENCY = (None, 0, 7, 300, b"\x00\xff\x80", bytes(256), (12, 34, 56), (0, 0, 0), "seven")


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode_are_what_transformers_makes_of_them(labs: dict[str, Lab], mode: str) -> None:
    """With any value that `info` may hold for transparency, and turned; what Transformers cannot convert is refused in words."""
    lab = labs["tiny-qwen3-vl"]
    for transparency in TRANSPARENCY:
        for orientation in (1, 6):
            image, exif = _noise(mode), Image.Exif()
            exif[0x0112] = orientation
            image.info = {"exif": exif.tobytes()} | ({} if transparency is None else {"transparency": transparency})
            mine, theirs = image.copy(), image.copy()
            try:
                expected = _expected(lab, theirs)
            except Exception:
                with pytest.raises(ImageError, match=r"image 'PIL image 44x33' (cannot be turned into RGB|is broken)"):
                    rgb_of(ImageInput.of(mine))
                continue
            assert np.array_equal(np.asarray(rgb_of(ImageInput.of(mine))), expected), (transparency, orientation)


def _files() -> Iterator[tuple[str, bytes]]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for form in ("PNG", "GIF", "WEBP", "TIFF", "BMP"):
            for transparency in (None, 5, b"\x00\x10\xff", (1, 2, 3)):
                options = {} if transparency is None else {"transparency": transparency}
                try:
                    yield f"{form} {mode} {transparency}", _encoded(_noise(mode), form, **options)
                except Exception:  # not every format has every mode
                    continue
    frames = [_noise("P"), _noise("P").rotate(90), _noise("P").rotate(180)]
    yield "GIF of three frames", _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=3)
    yield "PNG of two frames", _encoded(_noise("P"), "PNG", save_all=True, append_images=frames[1:])


def test_files_with_transparency_are_what_transformers_makes_of_them(labs: dict[str, Lab]) -> None:
    files = dict(_files())
    assert len(files) > 60
    for name, data in files.items():
        expected = _expected(labs["tiny-qwen3-vl"], data)
        assert np.array_equal(np.asarray(rgb_of(ImageInput.of(data))), expected), name


@pytest.mark.parametrize(
    "image",
    [
        _logo("GIF"),
        _logo("PNG"),
        _logo("PNG", transparency=b"\xff\x80\x00"),
        _encoded(
            _noise("RGB").quantize(4).convert("RGB"), "PNG", transparency=_noise("RGB").quantize(4).convert("RGB").getpixel((0, 0))
        ),
        _encoded(_noise("L"), "PNG", transparency=_noise("L").getpixel((4, 4))),
    ],
    ids=["GIF", "PNG", "PNG, bytes", "PNG, RGB", "PNG, L"],
)
def test_every_exact_option_gives_the_stock_processors_pixels_of_a_transparent_image(lab: Lab, image: bytes) -> None:
    request = Request(images=[image, Image.open(io.BytesIO(image))], prompt="What is this?")
    loaded = load_image(Image.open(io.BytesIO(image)))
    stock = lab.checkpoint.image_processor([loaded, loaded], return_tensors="pt")["pixel_values"]
    for text in ("baseline", "baseline, preprocessor.resize=pillow", "baseline, preprocessor.resize=torch"):
        recipe = Recipe.parse(text)
        if (levels := recipe.within(lab.checkpoint.image_backend)) is None:  # the other backend's pixels are no promise of its
            continue
        patches = bind(recipe.preprocessor, lab.checkpoint).pixels(request).patches
        level = (1 / 255) / min(lab.checkpoint.image_settings.std)
        assert (patches - stock).abs().max() <= levels * level + 1e-6, text


def test_every_exact_engine_makes_transformers_tokens_of_a_transparent_image(lab: Lab) -> None:
    request = Request(images=[_logo("GIF")], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    runs = [lab.run(request, engine).tokens for engine in ("transformers", "baseline", "fastest")]
    assert runs[0] == runs[1] == runs[2]


def test_a_processor_that_does_not_convert_is_given_what_load_image_gives(lab: Lab) -> None:
    processor = copy(lab.checkpoint.image_processor)
    processor.do_convert_rgb = False
    checkpoint = dataclasses.replace(lab.checkpoint, image_processor=processor)
    request = Request(images=[_logo("GIF")], prompt="?")
    stock = processor([load_image(Image.open(io.BytesIO(_logo("GIF"))))], return_tensors="pt")["pixel_values"]
    for recipe in ("baseline", f"baseline, preprocessor.resize={OWN_RESIZE[lab.checkpoint.image_backend]}"):
        patches = bind(Recipe.parse(recipe).preprocessor, checkpoint).pixels(request).patches
        assert (patches - stock).abs().max() <= 1e-6, recipe


def _exif(kind: int, value: object) -> bytes:
    """An EXIF block whose orientation has a type of TIFF that need not be its own."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory.tagtype[0x0112] = kind
    directory[0x0112] = value
    return b"Exif\0\0II*\0\x08\0\0\0" + directory.tobytes(8)


SHORT, BYTE, ASCII, LONG, RATIONAL, UNDEFINED, FLOAT = 3, 1, 2, 4, 5, 7, 11
ORIENTATIONS = [(SHORT, 0), (SHORT, 9), (BYTE, 6), (ASCII, "6"), (LONG, 8), (RATIONAL, TiffImagePlugin.IFDRational(6, 1))]
ORIENTATIONS += [(UNDEFINED, b"\x06"), (FLOAT, 5.0), (FLOAT, 6.5), (SHORT, (6, 6))]
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'


def _turned() -> Iterator[tuple[str, bytes]]:
    image = _noise("RGB")
    for form in ("JPEG", "PNG", "WEBP"):
        for kind, value in ORIENTATIONS:
            yield f"{form} {kind} {value}", _encoded(image, form, exif=_exif(kind, value))
    for kind, value in ORIENTATIONS:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[0x0112] = kind
        tags[0x0112] = value
        yield f"TIFF {kind} {value}", _encoded(image, "TIFF", tiffinfo=tags)
    yield "JPEG, XMP", _encoded(image, "JPEG", xmp=XMP.encode())
    yield "TIFF, XMP", _encoded(image, "TIFF", tiffinfo={700: XMP.encode()})
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP)
    data = _encoded(image, "PNG", pnginfo=text)
    yield "PNG, XMP", data
    at, end = data.index(b"iTXt") - 4, data.index(b"IEND") - 4
    behind = at + 12 + int.from_bytes(data[at : at + 4], "big")
    yield "PNG, XMP behind the pixels", data[:at] + data[behind:end] + data[at:behind] + data[end:]


@pytest.mark.parametrize("name", dict(_turned()))
def test_an_orientation_of_any_type_and_place_turns_as_in_transformers(labs: dict[str, Lab], name: str) -> None:
    """And the header's size, which the prompt is written from, is that of the pixels."""
    data = dict(_turned())[name]
    for image in (data, Image.open(io.BytesIO(data))):
        expected = _expected(labs["tiny-qwen3-vl"], data)
        assert np.array_equal(np.asarray(rgb_of(ImageInput.of(image))), expected)
        opened = read_orientation(open_image(ImageInput.of(image)))
        assert opened.size == expected.shape[1::-1]
        if opened.is_rgb_jpeg and importlib.util.find_spec("simplejpeg"):
            assert np.array_equal(as_tensor(with_turbojpeg(opened, SHAPE)), expected)


def test_no_pixel_of_a_file_is_decoded_for_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    for name, data in _turned():
        with monkeypatch.context() as patched:
            patched.setattr(type(Image.open(io.BytesIO(data))), "load", load)
            assert open_image(ImageInput.of(data)).width, name
