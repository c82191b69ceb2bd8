"""What a request may be made of, and how it refuses the rest."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvl_lab import ImageError, Request, RequestError


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
