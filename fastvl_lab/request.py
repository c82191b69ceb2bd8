"""The nouns that travel: what one request is made of on its way from image bytes to text.

A `Request` enters the pipeline; `Prompt`, `Decoded`, `Pixels` and `VisionTokens` pass between its stages; `Chunk`s leave it. All
are frozen: a stage makes a new noun instead of changing one.
"""

from __future__ import annotations

import base64
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from fastvl_lab.errors import ImageError, RequestError

if TYPE_CHECKING:
    import torch

# Refused before they are read. Pixels are limited where they are decoded, by the header.
MAX_IMAGE_BYTES = 100_000_000
MAX_IMAGES = 64

# Decoded, upright RGB: Pillow's, or uint8 [height, width, 3], whichever the next step wants.
Picture: TypeAlias = "Image.Image | torch.Tensor"

ImageSource = bytes | str | Path | Image.Image | np.ndarray

# Whether a run was the first of its kind, reused something of an earlier request, or neither; or nobody says. See `Run`.
Kind = Literal["cold", "warm", "cache_hit", "unknown"]

# In the place of a token that an endpoint counts and does not name.
UNNAMED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageInput:
    """One image as the request carries it: encoded bytes, or pixels already decoded by the caller.

    `data` is bytes (an encoded file), a `PIL.Image`, or a uint8 array [height, width] or [height, width, 3].
    """

    data: bytes | Image.Image | np.ndarray
    label: str

    @classmethod
    def of(cls, source: ImageSource | ImageInput) -> ImageInput:
        """Read a path, `file://` URL or base64 data URI, or take bytes, an image or an array as they are; raises `ImageError`."""
        if isinstance(source, ImageInput):
            return source
        if isinstance(source, bytes):
            _check_bytes(len(source), f"{len(source)} bytes")
            return cls(data=source, label=f"{len(source)} bytes")
        if isinstance(source, Image.Image):
            return cls(data=source, label=f"PIL image {source.width}x{source.height}")
        if isinstance(source, np.ndarray):
            return cls(data=source, label=f"array {'x'.join(map(str, source.shape))}")
        if isinstance(source, Path):
            return cls._of_path(source)
        if isinstance(source, str):
            scheme = source.partition(":")[0].lower()
            if scheme == "data":
                return cls._of_data_uri(source)
            if scheme in ("http", "https"):
                raise ImageError(
                    f"image {source[:80]!r} is an address, and the lab fetches nothing; give a path, bytes or a data URI"
                )
            return cls._of_path(Path(url2pathname(source[len("file://") :]) if scheme == "file" else source))
        raise ImageError(f"an image is given as {type(source).__name__}; give a path, encoded bytes, a PIL.Image or a uint8 array")

    @classmethod
    def _of_path(cls, path: Path) -> ImageInput:
        try:
            path = path.expanduser()
            if path.exists() and not path.is_file():  # a folder, a pipe, a device: reading might never end
                raise ImageError(f"image {str(path)!r} is no regular file")
            _check_bytes(path.stat().st_size, str(path))
            return cls(data=path.read_bytes(), label=path.name)
        except FileNotFoundError:
            raise ImageError(f"image {str(path)!r} does not exist; give the path of a file, or its bytes") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: ~user without such a user
            raise ImageError(f"image {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        except ValueError as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"image {str(path)!r} is no path: {error}") from None

    @classmethod
    def _of_data_uri(cls, uri: str) -> ImageInput:
        header, _, payload = uri.partition(",")
        if not header.endswith(";base64"):
            raise ImageError(f"a data URI is not base64: {header[:60]!r}")
        try:
            return cls.of(base64.b64decode(payload, validate=True))
        except ValueError as error:
            raise ImageError(f"a data URI has broken base64: {error}") from None


def _check_bytes(n_bytes: int, label: str) -> None:
    if n_bytes > MAX_IMAGE_BYTES:
        raise ImageError(f"image {label!r} has {n_bytes} bytes; the limit is {MAX_IMAGE_BYTES}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a client asks: images and a prompt, or chat messages, and how many tokens to make.

    Give `images` and `prompt` (images come first), or `messages` as OpenAI and Transformers write them. `min_pixels` and
    `max_pixels` override the checkpoint's own limits on the area of the resized image. Decoding is greedy: no sampling and no
    repetition penalty. `ignore_eos` makes exactly `max_new_tokens` tokens; `fit` makes fewer where a session has no room for so
    many. Raises `RequestError` and `ImageError`.

    Paths are read when the request is made, so that a run starts with the bytes at hand. What engines read is derived:
    `image_inputs`, the images in order, and `conversation`, the messages with an `{"type": "image"}` part where each belongs.
    """

    images: Sequence[ImageSource | ImageInput] = ()
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_new_tokens: int = 32
    ignore_eos: bool = False
    fit: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_inputs: tuple[ImageInput, ...] = field(init=False, repr=False)
    conversation: tuple[dict[str, Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt (with images) or messages, and not both")
        if isinstance(self.images, bytes | str | Path | Image.Image | np.ndarray) or not isinstance(self.images, Sequence):
            raise RequestError("images is not a list; put a single image in one: images=[image]")
        if self.messages is not None and len(self.images) > 0:
            raise RequestError("images belong inside the messages when messages are given; leave images empty")
        for name in ("max_new_tokens", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None or name == "max_new_tokens":
                check_whole_number(name, value)
                object.__setattr__(self, name, operator.index(value))  # an int, whatever kind of integer it was
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise RequestError(f"min_pixels {self.min_pixels} is over max_pixels {self.max_pixels}")
        messages = self.messages
        if messages is not None and not isinstance(messages, list | tuple):
            raise RequestError(f"messages is a {type(messages).__name__}; give a list of messages")
        if messages is None:
            if not isinstance(self.prompt, str):
                raise RequestError(f"prompt is of type {type(self.prompt).__name__}; it must be a string")
            if any(source is None for source in self.images):
                raise RequestError("an image is None; give a path, encoded bytes, a PIL.Image or a uint8 array")
            parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in self.images]
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]
        n_images = sum(_is_image(part) for message in messages for part in _parts(message))
        if n_images > MAX_IMAGES:
            raise RequestError(f"the request has {n_images} images; the limit is {MAX_IMAGES}")
        conversation, image_inputs = _normalise(messages)
        object.__setattr__(self, "conversation", conversation)
        object.__setattr__(self, "image_inputs", image_inputs)


def check_whole_number(name: str, value: Any, *, least: int = 1) -> None:
    """Raise `RequestError` for all but an integer from `least` up, of any type; a bool is none."""
    try:
        good = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        good = False
    if not good:
        raise RequestError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _parts(message: Any) -> Sequence[Any]:
    """The content parts of a message that may not be well-formed; what is wrong with it is said when it is normalised."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list | tuple) else ()


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


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
        if not isinstance(content, Sequence):
            raise RequestError(f"message {number} has a content of type {type(content).__name__}; give a text or a list of parts")
        parts: list[dict[str, Any]] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                parts.append({"type": "text", "text": _text(part.get("text"), f"message {number} has a text")})
            elif kind in ("image", "image_url"):
                images.append(_image_of_part(part, number))
                parts.append({"type": "image"})
            else:
                raise RequestError(f"message {number} has a part of type {kind!r}; the choices are 'text', 'image' and 'image_url'")
        normalised.append({"role": _text(message["role"], f"message {number} has a role"), "content": tuple(parts)})
    return tuple(normalised), tuple(images)


def _text(value: Any, what: str) -> str:
    """A string that can be encoded; lone surrogates cannot."""
    if not isinstance(value, str):
        raise RequestError(f"{what} of type {type(value).__name__}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} that is no Unicode: {error.reason} at {error.start}") from None
    return value


def _image_of_part(part: Mapping[str, Any], number: int) -> ImageInput:
    source = part.get("image", part.get("image_url", part.get("path")))
    if isinstance(source, Mapping):  # OpenAI: {"image_url": {"url": …}}
        source = source.get("url")
    if source is None:
        raise RequestError(f"message {number} has an image part without an image; give 'image' or 'image_url'")
    return ImageInput.of(source)


class Grid(NamedTuple):
    """The patches of one image: temporal, vertical and horizontal counts (`image_grid_thw` in Transformers)."""

    t: int
    h: int
    w: int

    @property
    def n_patches(self) -> int:
        return self.t * self.h * self.w

    def visual_tokens(self, merge_size: int) -> int:
        """Visual tokens after merging merge_size x merge_size patches."""
        return self.n_patches // merge_size**2


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """What became of one image's size: decoded, resized (pixels), its patch grid, and its visual tokens."""

    width: int
    height: int
    resized_width: int
    resized_height: int
    grid: Grid
    visual_tokens: int


@dataclass(frozen=True, kw_only=True)
class PatchFormat:
    """What a patch is when it reaches the patch embedding.

    frames: how many times an image is in its clip: temporal_patch_size, or 1 where the embedding stands for the rest. normalised:
    whether values are normalised, or bytes 0 to 255 for an embedding that does it.
    """

    frames: int
    normalised: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """All images of a request as upright RGB pictures, and what will become of their sizes.

    A picture may be smaller than its shape says the image was, where it was decoded at a reduced scale.
    """

    pictures: tuple[Picture, ...]
    shapes: tuple[ImageShape, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """All images of a request as patches, in merge order.

    patches: float or uint8 [n_patches, channels * frames * patch_size**2], one row a patch (`PatchFormat`); the grids are in
    `shapes`.
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
    visual_index: int64 [n_visual], where visual tokens stand; next_position: the position of the first decoded token. images: of
    each image, in order, its first token and how many it has.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    visual_index: torch.Tensor
    next_position: int
    images: tuple[tuple[int, int], ...]

    @property
    def n_tokens(self) -> int:
        return self.input_ids.shape[0]

    def after(self, n: int) -> Prompt:
        """What remains behind the first n tokens; on the host. `images` stay as they are."""
        if n == 0:
            return self
        visual_index = self.visual_index[self.visual_index >= n] - n
        return replace(self, input_ids=self.input_ids[n:], positions=self.positions[:, n:], visual_index=visual_index)


@dataclass(frozen=True, kw_only=True, eq=False)
class VisionTokens:
    """What the vision tower hands to the decoder.

    embeds: [n_visual, hidden]; deepstack: for Qwen3-VL, one [n_visual, hidden] per DeepStack level, else empty.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """All of its tensors."""
        return (self.embeds, *self.deepstack)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What the consumer receives at once: new text, the token ids behind it, and when it was in the consumer's hands.

    `time` is in seconds from the moment the engine was given the request. `tokens` has `UNNAMED` for each that an endpoint counts
    and does not name. `str(chunk)` is its text.
    """

    text: str
    tokens: tuple[int, ...]
    time: float

    def __str__(self) -> str:
        return self.text
