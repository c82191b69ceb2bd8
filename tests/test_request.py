"""What a request may be made of, and how it refuses the rest."""

from __future__ import annotations

import base64
import dataclasses
import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from fastvl_lab import ImageError, Lab, Request, RequestError
from fastvl_lab.errors import quoted, shortened
from fastvl_lab.preprocessor.layout import smart_resize
from fastvl_lab.request import ImageInput


def test_prompt_openai_and_transformers_forms_are_one(picture: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(picture)
    uri = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    text = {"type": "text", "text": "What is this?"}
    plain = Request(images=[path], prompt="What is this?")
    assert plain.conversation == ({"role": "user", "content": ({"type": "image"}, text)},)
    for part in (
        {"type": "image", "image": str(path)},
        {"type": "image", "image": picture},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": f"file://{path}"},
    ):
        request = Request(messages=[{"role": "user", "content": [part, text]}])
        assert request.conversation == plain.conversation
        assert [image.data for image in request.image_inputs] == [picture]
    for image in (str(path), path.as_uri(), uri):
        assert [one.data for one in Request(images=[image], prompt="?").image_inputs] == [picture]


def test_images_may_be_pixels_already() -> None:
    array = np.zeros((4, 6, 3), dtype=np.uint8)
    images = Request(images=[array, Image.fromarray(array)], prompt="?").image_inputs
    assert images[0].data is array
    assert [image.label for image in images] == ["array 4x6x3", "PIL image 6x4"]


def test_a_request_can_be_replaced_and_takes_any_whole_number(picture: bytes) -> None:
    request = Request(images=[picture], prompt="?", max_new_tokens=np.int64(4))  # type: ignore[arg-type]
    longer = dataclasses.replace(request, max_new_tokens=9)
    assert (longer.max_new_tokens, longer.conversation) == (9, request.conversation)
    numbers = Request(prompt="?", max_new_tokens=np.int8(4), min_pixels=np.uint16(9), max_pixels=np.int64(99))  # type: ignore[arg-type]
    assert {type(n) for n in (numbers.max_new_tokens, numbers.min_pixels, numbers.max_pixels)} == {int}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "either prompt .* or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "and not both"),
        ({"messages": []}, "messages is empty"),
        ({"messages": 5}, "messages is a int; give a list"),
        ({"messages": ["hello"]}, "mapping with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'text', 'image' and 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image part without an image"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number of at least 1"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens is True"),
        ({"prompt": 5}, "prompt is of type int; it must be a string"),
        ({"prompt": "a", "images": [None]}, "an image is None"),
        ({"prompt": "\ud800"}, "text that is no Unicode"),
        ({"prompt": "a", "images": None}, "images is not a list"),
        ({"messages": [{"role": "user", "content": None}]}, "a content of type NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text of type NoneType"),
        ({"messages": [{"role": 1, "content": "a"}]}, "message 0 has a role of type int"),
        ({"prompt": "a", "min_pixels": -1}, "min_pixels is -1"),
        ({"prompt": "a", "min_pixels": 10, "max_pixels": 5}, "min_pixels 10 is over max_pixels 5"),
        ({"prompt": "a", "images": "photo.jpg"}, r"put a single image in one: images=\[image\]"),
        ({"messages": [{"role": "user", "content": "a"}], "images": [b"x"]}, "images belong inside the messages"),
    ],
)
def test_requests_that_cannot_be_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Request(**arguments)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("no/such.jpg", "image 'no/such.jpg' does not exist"),
        ("", "image '' does not exist"),
        ("/", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("a\0b", "is no path|does not exist"),
        ("file://[bad", "does not exist"),
        ("~nosuchuser/x.jpg", "cannot be read"),
        ("https://example.com/a.jpg", "the lab fetches nothing"),
        (3, "given as int; give a path, encoded bytes"),
    ],
)
def test_images_that_cannot_be_read_are_refused(image: object, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        Request(images=[image], prompt="?")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.com/a.jpg", "the lab fetches nothing"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,%%%", "broken base64"),
        ("data:image/png;base64,é", "broken base64"),
    ],
)
def test_image_addresses_that_cannot_be_read_are_refused(url: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        Request(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


def _encoded(form: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((37, 23), 60).convert("RGB").save(out, form)
    return out.getvalue()


HEADS = (
    "data:image/png;base64,",
    "data:image/png,",
    "data:image/png;charset=utf-8;base64,",
    "data:image/x-anything; BASE64 ,",
    "data:image/webp;base64;name=a.webp,",
    "",
)
SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "wrapped": lambda text: "\n".join(textwrap.wrap(text, 60)),
    "CRLF": lambda text: "\r\n".join(textwrap.wrap(text, 76)) + "\r\n",
    "indented": lambda text: "\t" + "\n\t".join(textwrap.wrap(text, 64)),
    "a stray character": lambda text: f"{text[:50]}*{text[50:]}",
    "more padding": lambda text: text + "==",
    "another part behind it": lambda text: text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4) + ",rest",
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_that_load_image_reads_is_read(form: str) -> None:
    data = _encoded(form)
    text, read = base64.b64encode(data).decode(), 0
    for head in HEADS:
        for name, spelt in SPELLINGS.items():
            uri = head + spelt(text)
            try:
                expected = load_image(uri)
            except ValueError:
                continue
            read += 1
            (image,) = Request(images=[uri], prompt="?").image_inputs
            assert isinstance(image.data, bytes), (head, name)
            assert load_image(Image.open(io.BytesIO(image.data))).tobytes() == expected.tobytes(), (head, name)
    assert read > 30


@pytest.mark.parametrize(
    "spelt",
    [
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode().rstrip("="),
        lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode().replace("+", "%2B").replace("=", "%3D"),
        lambda data: "data:application/octet-stream;base64," + base64.b64encode(data).decode(),
        lambda data: " DATA:;base64," + base64.b64encode(data).decode(),
        lambda data: "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        lambda data: base64.urlsafe_b64encode(data).decode(),
    ],
    ids=["no padding", "URL-safe", "percent", "another type", "capitals", "no base64 at all", "URL-safe alone"],
)
def test_other_sensible_spellings_are_read_too(spelt: Callable[[bytes], str]) -> None:
    data = _encoded("PNG")
    assert [image.data for image in Request(images=[spelt(data)], prompt="?").image_inputs] == [data]


def test_file_urls_are_paths_however_they_are_written(picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a photo.jpg").write_bytes(picture)
    encoded = (tmp_path / "a photo.jpg").as_uri().removeprefix("file://")
    for name in (
        f"file://localhost{encoded}",
        f"file:{encoded}",
        f"FILE://LOCALHOST{encoded}",
        "file:a%20photo.jpg",
        "./a photo.jpg",
    ):
        assert [image.data for image in Request(images=[name], prompt="?").image_inputs] == [picture], name


@pytest.mark.parametrize(
    "name",
    [
        *("x" * 400_000, "A" * 400_000, "data:" + "x" * 99_999, "data:image/png;base64," + "A" * 400_001, "http://" + "a" * 99_999),
        *(
            "file:" + "b" * 99_999,
            "a/" * 3000,
            "\n" * 500,
            "\0" * 300,
            "data:image/png;base64,\ud800",
            "data:" + ";" * 99_999 + ",",
        ),
    ],
)
def test_what_an_error_quotes_is_cut(name: str) -> None:
    with pytest.raises(ImageError) as error:
        Request(images=[name], prompt="?")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a", "max_new_tokens": "9" * 10_000},
        {"prompt": "a", "max_pixels": [list(range(1000))] * 1000},
        {"prompt": "a", "min_pixels": 10**6000},
        {"messages": [{"role": "user", "content": [{"type": "t" * 100_000}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "k" * 100_000: 1}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": b"x", "detail": {"a": "b" * 100_000}}]}]},
        {"messages": [{"role": "user", "content": "a", "f" * 100_000: b"bytes"}]},
    ],
)
def test_errors_of_a_request_stay_a_line(arguments: dict) -> None:
    with pytest.raises(RequestError) as error:
        Request(**arguments)
    assert len(str(error.value)) < 400


def test_quoting() -> None:
    assert quoted("short") == "'short'"
    assert quoted("x" * 100, 10) == "'xxxxxxxxxx'… (100 characters)"
    assert quoted("two\nlines") == r"'two\nlines'"
    assert len(quoted({"a": ["b" * 1000] * 1000})) <= 81
    assert quoted(1.5) == "1.5"
    assert shortened("a\n  b") == "a b"
    assert shortened("word " * 100, 9) == "word word…"
    label = ImageInput(data=b"", label="l" * 5000).label
    assert len(label) == 81


IMAGE = np.zeros((40, 60, 3), np.uint8)


def _message(part: dict, *, kind: str = "image", **more: object) -> list[dict]:
    return [{"role": "user", "content": [{"type": kind, **part}, {"type": "text", "text": "?", **more}]}]


def test_limits_stand_beside_an_image_or_beside_its_url() -> None:
    uri = "data:image/png;base64," + base64.b64encode(_encoded("PNG")).decode()
    for part, kind, limits in (
        ({"image": IMAGE, "max_pixels": 5000}, "image", (None, 5000)),
        ({"image": IMAGE, "min_pixels": np.int32(4000), "max_pixels": 5000}, "image", (4000, 5000)),
        ({"image_url": {"url": uri, "max_pixels": 6000, "detail": "auto"}}, "image_url", (None, 6000)),
        ({"image_url": {"url": uri, "min_pixels": 50, "detail": "high"}, "max_pixels": 70}, "image_url", (50, 70)),
        ({"image_url": {"url": uri, "max_pixels": 70}, "max_pixels": 70}, "image_url", (None, 70)),
        ({"path": uri, "max_pixels": None, "detail": None, "cache_control": {"type": "ephemeral"}}, "image", (None, None)),
        ({"url": uri, "resized_height": None}, "image", (None, None)),
        ({"base64": uri.partition(",")[2], "max_pixels": 9}, "image", (None, 9)),
        ({"image": ImageInput(data=IMAGE, label="mine", max_pixels=8), "min_pixels": 3}, "image", (3, 8)),
    ):
        (image,) = Request(messages=_message(part, kind=kind)).image_inputs
        assert (image.min_pixels, image.max_pixels) == limits, part
        assert all(type(limit) in (int, type(None)) for limit in limits)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"image": IMAGE, "crop": [0, 0, 5, 5]}, "'crop'.*what is honoured .* min_pixels, max_pixels, resized_width"),
        ({"image": IMAGE, "resized_height": 56}, "one of resized_width and resized_height; give both"),
        ({"image_url": {"url": "a.png", "resized_width": 2.5}, "resized_height": 56}, "resized_width of an image .* is 2.5"),
        ({"image": IMAGE, "nframes": 8}, "'nframes'"),
        ({"image_url": {"url": "a.png", "quality": 3}}, "'quality'"),
        ({"image_url": {"url": "a.png", "detail": "low"}}, "detail 'low'; .* max_pixels"),
        ({"image": IMAGE, "detail": "original"}, "detail 'original'; .* max_pixels"),
        ({"image": IMAGE, "max_pixels": "5000"}, "max_pixels of an image in message 0 is '5000'"),
        ({"image": IMAGE, "min_pixels": 0}, "min_pixels of an image in message 0 is 0"),
        ({"image": IMAGE, "min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is over max_pixels 8"),
        ({"image_url": {"url": "a.png", "max_pixels": 5}, "max_pixels": 6}, "max_pixels is 6 and 5; give one of them"),
        ({"image": IMAGE, "image_url": {"url": "a.png"}}, "'image' and 'image_url'; give one of them"),
        ({"image_url": {"detail": "auto"}}, "'image_url' has no 'url'"),
    ],
)
def test_keys_of_an_image_that_are_not_honoured_are_refused_by_name(part: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Request(messages=_message(part))


def test_keys_of_a_text_that_are_not_honoured_are_refused_by_name() -> None:
    Request(messages=_message({"image": IMAGE}, cache_control={"type": "ephemeral"}, annotations=[], image_url=None))
    for more in ({"emphasis": "strong"}, {"max_pixels": 5}, {"image_url": "a.png"}):
        with pytest.raises(RequestError, match=f"text part with '{next(iter(more))}'"):
            Request(messages=_message({"image": IMAGE}, **more))


def test_limits_of_an_image_go_before_the_requests_and_they_before_the_checkpoints(lab: Lab) -> None:
    side = lab.checkpoint.image_settings.factor
    large = np.random.default_rng(0).integers(256, size=(6 * side, 9 * side, 3), dtype=np.uint8)
    content = [
        {"type": "image", "image": large, "max_pixels": 2 * side**2, "min_pixels": side**2},
        {"type": "image", "image": large},
        {"type": "image", "image": large, "min_pixels": 60 * side**2, "max_pixels": 90 * side**2},
    ]
    request = Request(messages=[{"role": "user", "content": content}], min_pixels=1, max_pixels=30 * side**2, max_new_tokens=1)
    seen = []
    for engine in ("transformers", "baseline", "fastest"):
        areas = [shape.resized_width * shape.resized_height // side**2 for shape in lab.run(request, engine).shapes]
        assert areas[0] <= 2
        assert 15 < areas[1] <= 30
        assert 60 <= areas[2] <= 90
        seen.append(areas)
    assert seen[0] == seen[1] == seen[2]
    crossed = [{"type": "image", "image": large, "min_pixels": 100 * side**2}]
    with pytest.raises(RequestError, match="one is the image's, the other the request's; set both beside the image"):
        lab.run(Request(messages=[{"role": "user", "content": crossed}], max_pixels=50 * side**2), "fastest")


@pytest.mark.parametrize(("width", "height"), [(60, 130), (300, 57), (5, 900), (448, 448)])
def test_a_size_that_is_asked_for_is_reached_within_the_limits(lab: Lab, width: int, height: int) -> None:
    """As qwen-vl-utils reaches it: by Pillow, from the picture as it is; wherever beside the image it is said."""
    factor, area = lab.checkpoint.image_settings.factor, 40 * lab.checkpoint.image_settings.factor**2
    picture = np.random.default_rng(1).integers(256, size=(150, 210, 3), dtype=np.uint8)
    asked = {"resized_width": width, "resized_height": height, "min_pixels": 1, "max_pixels": area}
    expected = smart_resize(height, width, factor=factor, min_pixels=1, max_pixels=area)
    resized = np.asarray(Image.fromarray(picture).resize(expected[::-1], Image.Resampling.BICUBIC))
    plain = Request(images=[resized], prompt="", min_pixels=1, max_pixels=10**9, max_new_tokens=4, ignore_eos=True)
    stock = lab.run(plain, "transformers, preprocessor.resize=pillow")
    for part in ({"type": "image", "image": picture, **asked}, {"type": "image_url", "image_url": {"url": _png(picture), **asked}}):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": ""}]}]
        request = Request(messages=messages, max_new_tokens=4, ignore_eos=True)
        for engine in ("transformers", "baseline, preprocessor.resize=pillow", "fastest, preprocessor.resize=pillow"):
            run = lab.run(request, engine)
            assert (run.shapes[0].resized_height, run.shapes[0].resized_width) == expected
            assert run.tokens == stock.tokens
        assert lab.run(request, "fastest").shapes == run.shapes


def _png(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_content_stays_as_it_was_given() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": IMAGE}]
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "5"},
        {"role": "assistant", "tool_calls": (call,)},
    ]
    conversation = Request(messages=messages).conversation
    assert conversation[0] == messages[0]
    assert conversation[1] == {"role": "user", "content": ({"type": "text", "text": "a"}, {"type": "image"}), "name": "Ann"}
    assert conversation[2] == messages[2]
    assert conversation[3] == messages[3]
    assert conversation[4] == {"role": "assistant", "tool_calls": [call]}
    assert conversation[2]["tool_calls"][0] is not call  # a copy, which nobody changes behind the request's back


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "assistant", "content": None, "tool_calls": []}, "a content of type NoneType"),
        ({"role": "assistant", "refusal": None}, "mapping with 'role' and 'content'"),
        ({"role": "user", "content": None, "name": "Ann"}, "a content of type NoneType"),
        ({"role": "tool", "tool_call_id": "1"}, "mapping with 'role' and 'content'"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"f": b"x"}]}, "in 'tool_calls' b'x'; give what JSON can hold"),
        ({"role": "assistant", "content": "a", "tool_calls": [float("inf")]}, "in 'tool_calls' inf; give what JSON can hold"),
        ({"role": "assistant", "content": "a", "reasoning_content": "\ud800"}, "in 'reasoning_content' a text that is no Unicode"),
        ({"role": "assistant", "content": "a", "tool_calls": [{5: "x"}]}, "in 'tool_calls' a key of type int"),
        ({"role": "user", "content": b"bytes"}, "a content of type bytes"),
    ],
)
def test_fields_that_no_template_could_write_are_refused(message: dict, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        Request(messages=[message])


def test_fields_may_be_deep_and_not_bottomless() -> None:
    deep: list = []
    for _ in range(60):
        deep = [deep]
    Request(messages=[{"role": "assistant", "content": "a", "tool_calls": deep}])
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="in 'tool_calls' more than 64 levels"):
        Request(messages=[{"role": "assistant", "content": "a", "tool_calls": deep}])
