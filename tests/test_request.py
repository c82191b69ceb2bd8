"""What a request may be made of, and how it refuses the rest."""

from __future__ import annotations

import base64
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
    assert plain.messages == ({"role": "user", "content": ({"type": "image"}, text)},)
    for part in (
        {"type": "image", "image": str(path)},
        {"type": "image", "image": picture},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": f"file://{path}"},
    ):
        request = Request(messages=[{"role": "user", "content": [part, text]}])
        assert request.messages == plain.messages
        assert [image.data for image in request.images] == [picture]  # type: ignore[union-attr]


def test_images_may_be_pixels_already() -> None:
    array = np.zeros((4, 6, 3), dtype=np.uint8)
    images = Request(images=[array, Image.fromarray(array)], prompt="?").images
    assert images[0].data is array  # type: ignore[union-attr]
    assert [image.label for image in images] == ["array 4x6x3", "PIL image 6x4"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "either prompt .* or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "and not both"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, "mapping with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'text', 'image' and 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image part without an image"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number of at least 1"),
        ({"prompt": "a", "min_pixels": -1}, "min_pixels is -1"),
        ({"prompt": "a", "min_pixels": 10, "max_pixels": 5}, "min_pixels 10 is over max_pixels 5"),
        ({"prompt": "a", "images": "photo.jpg"}, r"put it in a list: images=\[image\]"),
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
        ("/", "cannot be read: Is a directory"),
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
    ],
)
def test_image_addresses_that_cannot_be_read_are_refused(url: str, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        Request(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
