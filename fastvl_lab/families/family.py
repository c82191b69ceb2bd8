"""What a model family is to the lab: data and plain functions, all of one family in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from fastvl_lab.families.text import Text
from fastvl_lab.families.vision import Between, Block, Function, TowerOperations, Vision
from fastvl_lab.request import Grid, VisionTokens


class Fault(NamedTuple):
    """A value in config.json with which no request could be served, and what it must be."""

    key: str
    value: Any
    must_be: str


@dataclass(frozen=True, kw_only=True)
class Patches:
    """How images are cut: pixels along a patch, frames in one, and patches along a visual token."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shape of a model, from which one with random weights can be built.

    text, vision: config.json's parts. min_pixels, max_pixels, mean, std: preprocessor_config.json's.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tie_word_embeddings: bool
    min_pixels: int
    max_pixels: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of vision-language models, as Transformers has them.

    model_type: config.json's. special_tokens: their numbers in published checkpoints. config_tokens: the tokens that config.json
    has, by its keys; placeholders: the keys of those that stand for an image (first) and for anything else that is not text.

    config_faults(config), model_faults(model): what keeps a checkpoint of the family from being served. patches(config): how its
    images are cut. vision(model), text(model): its parts by what they are for. stock_vision(module, patches, grids): the stock
    tower's own forward; grids: int64 [n_images, 3]. stock_inputs(is_image, patches, grids): what the stock model's forward takes of
    images beside input_ids; is_image: bool [1, n_tokens].

    blocks(vision, operations, between), merger(module, operations, between): the same parameters as functions, made of the
    operations that the toggles chose; `between` makes the products inside an MLP. Raises `CheckpointError` for what they have not.
    positions(is_image, grids, merge_size): what each token's rotation turns by, int64 [3, n_tokens], and the next token's position;
    is_image: bool [n_unexpanded], true at each image's placeholder.

    chat_template: of checkpoints without one of their own, tiny, small and published: by name and by hub id, their shapes. idle:
    options of the vit slot, as "toggle=value", that change nothing in this family's tower.
    """

    model_type: str
    placeholders: tuple[str, ...]
    special_tokens: Mapping[str, int]
    config_tokens: Mapping[str, str]
    config_faults: Callable[[Any], Iterator[Fault]]
    model_faults: Callable[[Any], Iterator[Fault]]
    patches: Callable[[Any], Patches]
    vision: Callable[[Any], Vision]
    text: Callable[[Any], Text]
    stock_vision: Callable[[Any, torch.Tensor, torch.Tensor], VisionTokens]
    stock_inputs: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    blocks: Callable[[Vision, TowerOperations, Between], tuple[Block, ...]]
    merger: Callable[[Any, TowerOperations, Between], Function]
    positions: Callable[[np.ndarray, Sequence[Grid], int], tuple[np.ndarray, int]]
    chat_template: str
    tiny: Mapping[str, Geometry] = field(default_factory=dict)
    small: Mapping[str, Geometry] = field(default_factory=dict)
    published: Mapping[str, Geometry] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


def not_counts(part: Any, prefix: str, *keys: str) -> Iterator[Fault]:
    """A fault for each of these values that is no whole number of at least 1, as JSON writes it."""
    for key in keys:
        value = getattr(part, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield Fault(f"{prefix}{key}", value, "a whole number of at least 1")


def whole_number(value: Any) -> int | None:
    """The whole number that a JSON value is, also one written as 3.0; None for anything else, `true` included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value // 1 and abs(value) < 2**63 else None
