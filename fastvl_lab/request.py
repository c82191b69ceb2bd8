"""The nouns that travel: what one request is made of on its way from image bytes to text.

A `Request` enters the pipeline; `Pixels`, `Prompt`, `VisionTokens` and `Prefilled` pass between its stages; `Chunk`s leave
it. All are frozen: a stage makes a new noun instead of changing one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from fastvl_lab.errors import ImageError, RequestError

if TYPE_CHECKING:
    import torch

ImageSource = bytes | str | Path | Image.Image | np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageInput:
    """One image as the request carries it: encoded bytes, or pixels already decoded by the caller.

    `data` is bytes (an encoded file), a `PIL.Image`, or a uint8 array [height, width] or [height, width, 3].
    """

    data: bytes | Image.Image | np.ndarray
    label: str

    @classmethod
    def of(cls, source: ImageSource | ImageInput) -> ImageInput:
        """Read a path, or take bytes, an image or an array as they are; raises `ImageError`."""
        if isinstance(source, ImageInput):
            return source
        if isinstance(source, bytes):
            return cls(data=source, label=f"{len(source)} bytes")
        if isinstance(source, Image.Image):
            return cls(data=source, label=f"PIL image {source.width}x{source.height}")
        if isinstance(source, np.ndarray):
            return cls(data=source, label=f"array {'x'.join(map(str, source.shape))}")
        if isinstance(source, str | Path):
            return cls._of_path(source)
        raise ImageError(f"an image is given as {type(source).__name__}; give a path, encoded bytes, a PIL.Image or a uint8 array")

    @classmethod
    def _of_path(cls, source: str | Path) -> ImageInput:
        path = Path(str(source).removeprefix("file://")).expanduser()
        try:
            return cls(data=path.read_bytes(), label=path.name)
        except FileNotFoundError:
            raise ImageError(f"image {str(source)!r} does not exist; give the path of a file, or its bytes") from None
        except OSError as error:
            raise ImageError(f"image {str(source)!r} cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a client asks: images and a prompt, or chat messages, and how many tokens to make.

    Give `images` and `prompt` (images come first), or `messages` as OpenAI and Transformers write them. `min_pixels` and
    `max_pixels` override the checkpoint's own limits on the area of the resized image. Decoding is greedy: no sampling and no
    repetition penalty. `ignore_eos` makes exactly `max_new_tokens` tokens.

    Paths are read when the request is made, so that a run starts with the bytes at hand. After construction, `images` holds
    `ImageInput`s in order and `messages` the conversation with an `{"type": "image"}` part where each belongs.
    """

    images: Sequence[ImageSource | ImageInput] = ()
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_new_tokens: int = 32
    ignore_eos: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt (with images) or messages, and not both")
        if self.messages is not None and len(self.images) > 0:
            raise RequestError("images belong inside the messages when messages are given; leave images empty")
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number of at least 1")
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} is {value!r}; it must be a whole number of at least 1, or None")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise RequestError(f"min_pixels {self.min_pixels} is over max_pixels {self.max_pixels}")
        if self.messages is not None:
            messages, images = _normalise(self.messages)
        else:
            if isinstance(self.images, bytes | str | Path | Image.Image | np.ndarray):
                raise RequestError("images is a single image; put it in a list: images=[image]")
            assert self.prompt is not None
            images = tuple(ImageInput.of(source) for source in self.images)
            parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": self.prompt}]
            messages = ({"role": "user", "content": tuple(parts)},)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "messages", messages)


def _normalise(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[dict[str, Any], ...], tuple[ImageInput, ...]]:
    """Bring OpenAI's and Transformers' message forms into one, and collect the images in order."""
    images: list[ImageInput] = []
    normalised = []
    if len(messages) == 0:
        raise RequestError("messages is empty; give at least one message with a role and a content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RequestError(f"message {number} must be a mapping with 'role' and 'content'")
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                parts.append({"type": "text", "text": str(part["text"])})
            elif kind in ("image", "image_url"):
                images.append(_image_of_part(part, number))
                parts.append({"type": "image"})
            else:
                raise RequestError(f"message {number} has a part of type {kind!r}; the choices are 'text', 'image' and 'image_url'")
        normalised.append({"role": str(message["role"]), "content": tuple(parts)})
    return tuple(normalised), tuple(images)


def _image_of_part(part: Mapping[str, Any], number: int) -> ImageInput:
    source = part.get("image", part.get("image_url", part.get("path")))
    if isinstance(source, Mapping):  # OpenAI: {"image_url": {"url": …}}
        source = source.get("url")
    if source is None:
        raise RequestError(f"message {number} has an image part without an image; give 'image' or 'image_url'")
    if isinstance(source, str) and source.startswith("data:"):
        header, _, payload = source.partition(",")
        if not header.endswith(";base64"):
            raise ImageError(f"message {number} has a data URI that is not base64: {header[:60]!r}")
        try:
            return ImageInput.of(base64.b64decode(payload, validate=True))
        except binascii.Error as error:
            raise ImageError(f"message {number} has a data URI with broken base64: {error}") from None
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(
            f"message {number} names an image by address, and the lab fetches nothing; give a path, bytes or a data URI"
        )
    return ImageInput.of(source)


class Grid(NamedTuple):
    """The patches of one image: temporal, vertical and horizontal counts (`image_grid_thw` in Transformers)."""

    t: int
    h: int
    w: int


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """What became of one image's size: decoded, resized (pixels), its patch grid, and its visual tokens."""

    width: int
    height: int
    resized_width: int
    resized_height: int
    grid: Grid
    visual_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """All images of a request as patches, in merge order, ready for the patch embedding.

    patches: [n_patches, channels * temporal_patch_size * patch_size**2], one row a patch; the grids are in `shapes`.
    """

    patches: torch.Tensor
    shapes: tuple[ImageShape, ...]

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(shape.grid for shape in self.shapes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """The prompt as the decoder reads it, placeholders already expanded to one token per visual token.

    input_ids: int64 [n_tokens]; positions: int64 [3, n_tokens], the temporal, height and width rows of M-RoPE;
    visual_index: int64 [n_visual], where visual tokens stand; next_position: the position of the first decoded token.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    visual_index: torch.Tensor
    next_position: int

    @property
    def n_tokens(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionTokens:
    """What the vision tower hands to the decoder.

    embeds: [n_visual, hidden]; deepstack: for Qwen3-VL, one [n_visual, hidden] per DeepStack level, else empty.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefilled:
    """The state after prefill: logits of the last prompt token, float32 [vocab], and the filled KV cache."""

    logits: torch.Tensor
    cache: Any


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What the consumer receives at once: new text, the token ids behind it, and when it was in the consumer's hands.

    `time` is in seconds from the moment the engine was given the request. `str(chunk)` is its text.
    """

    text: str
    tokens: tuple[int, ...]
    time: float

    def __str__(self) -> str:
        return self.text
