"""The nouns that travel: what one request is made of on its way from image bytes to text.

A `Request` enters the pipeline; `Prompt`, `Pixels` and `VisionTokens` pass between its stages; `Chunk`s leave it. All are frozen: a
stage makes a new noun instead of changing one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from fastvl_lab.errors import RequestError, check_whole_number as check_whole_number, quoted
from fastvl_lab.image_input import MAX_IMAGE_BYTES as MAX_IMAGE_BYTES, ImageInput as ImageInput, ImageSource as ImageSource
from fastvl_lab.messages import Message, check_limits, count_images, read_messages
from fastvl_lab.sampling import Sampling

if TYPE_CHECKING:
    import torch

MAX_IMAGES = 64

# Of all images of a request together, as their headers say. One image has Pillow's own limit (`Image.MAX_IMAGE_PIXELS`).
MAX_REQUEST_PIXELS = 200_000_000

# Decoded, upright RGB: Pillow's, or uint8 [height, width, 3], whichever the next step wants.
Picture: TypeAlias = "Image.Image | torch.Tensor"

# Whether a run was the first of its kind, reused something of an earlier request, or neither; or nobody says. See `Run`.
Kind = Literal["cold", "warm", "cache_hit", "unknown"]

# Fields of a request that are what is said in it.
_SAID = ("images", "prompt", "messages")

# Why an answer ended: an end token or a stop, or as many tokens as it may have. In OpenAI's words.
FinishReason = Literal["stop", "length"]

# In the place of a token that an endpoint counts and does not name.
UNNAMED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a client asks: images and a prompt, or chat messages, and how many tokens to make.

    Give `images` and `prompt` (images come first), or `messages` as OpenAI and Transformers write them. `min_pixels` and
    `max_pixels` override the checkpoint's own limits on the area of the resized image; those beside an image in its part go before
    them. `sampling` says how tokens are chosen, by default greedily, and which texts end the answer. `ignore_eos` lets no end token
    end it; `fit` makes fewer than `max_new_tokens` where a session has no room for so many. `raw` takes the prompt as it is, and
    neither chat template nor images. Raises `RequestError` and `ImageError`.

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
    sampling: Sampling = Sampling()
    raw: bool = False
    image_inputs: tuple[ImageInput, ...] = field(init=False, repr=False)
    conversation: tuple[Message, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt (with images) or messages, and not both")
        if isinstance(self.images, bytes | str | Path | Image.Image | np.ndarray) or not isinstance(self.images, Sequence):
            raise RequestError("images is not a list; put a single image in one: images=[image]")
        if self.messages is not None and len(self.images) > 0:
            raise RequestError("images belong inside the messages when messages are given; leave images empty")
        if self.raw and (not self.prompt or len(self.images) > 0):
            raise RequestError("a raw request has a prompt that is not empty and no images, whose places the chat template writes")
        for name in ("max_new_tokens", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None or name == "max_new_tokens":
                check_whole_number(name, value)
                object.__setattr__(self, name, operator.index(value))  # an int, whatever kind of integer it was
        check_limits(self.min_pixels, self.max_pixels)
        if not isinstance(self.sampling, Sampling):
            raise RequestError(f"sampling is {quoted(self.sampling)}; give a fastvl_lab.Sampling")
        if self.sampling.min_tokens > self.max_new_tokens:
            raise RequestError(f"min_tokens is {self.sampling.min_tokens}, over max_new_tokens, {self.max_new_tokens}")
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
        if (n_images := count_images(messages)) > MAX_IMAGES:
            raise RequestError(f"the request has {n_images} images; the limit is {MAX_IMAGES}")
        conversation, image_inputs = read_messages(messages)
        object.__setattr__(self, "conversation", conversation)
        object.__setattr__(self, "image_inputs", image_inputs)

    def settings(self) -> dict[str, Any]:
        """What it asks besides its words and images: keywords for another request."""
        return {own.name: getattr(self, own.name) for own in fields(self) if own.init and own.name not in _SAID}


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


def check_request(request: object) -> None:
    """Raise `RequestError` for what is none."""
    if not isinstance(request, Request):
        raise RequestError(f"the request is a {type(request).__name__}; give a fastvl_lab.Request")


@dataclass(frozen=True, kw_only=True)
class ImageShape:
    """What became of one image's size: unpacked, resized (pixels), its patch grid, and its visual tokens."""

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
    visual_index: int64 [n_visual], where visual tokens stand; next_position: the position of the first new token. images: of
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

    embeds: [n_visual, hidden]; deepstack: one [n_visual, hidden] per DeepStack level, in a family that has any.
    """

    embeds: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """All of its tensors."""
        return (self.embeds, *self.deepstack)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token, its bytes (`spelt`; a special one's are its name's), and the natural logarithm of its probability.

    top: the likeliest tokens in its place, the likeliest first, where they were asked for.
    """

    token: int
    spelt: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What the consumer receives at once: new text, the token ids behind it, and when it was in the consumer's hands.

    `time` is in seconds from the moment the engine was given the request. `tokens` has `UNNAMED` for each that an endpoint counts
    and does not name. `logprobs`, where the request asked for them, are of each token but those of a stop, which has no text here.
    `str(chunk)` is its text.
    """

    text: str
    tokens: tuple[int, ...]
    time: float
    logprobs: tuple[TokenLogprob, ...] = ()

    def __str__(self) -> str:
        return self.text
