"""The built-in checkpoints: random, deterministic models of each family's true architecture, tiny and small.

They are saved once to the user's cache as ordinary checkpoint folders and then read by the loading code of any other. Tiny ones
are sized so that on two CPU cores a 1280x960 image takes some hundred milliseconds to its first token, with preprocessing, ViT and
prefill all visible; small ones so that their time is that of matrix products, as a real model's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from fastvl_lab.checkpoint.byte_tokenizer import printable_ids
from fastvl_lab.checkpoint.random_weights import random_model, write_checkpoint_files
from fastvl_lab.checkpoint.user_cache import whole_folder
from fastvl_lab.families import FAMILIES, Family, Geometry

# Raised whenever the geometry or the weights change, so that an older cached folder is not used.
FORMAT = 1
SEED = 20251


def names(families: Sequence[Family] = FAMILIES) -> tuple[str, ...]:
    """Those of the families, the tiny ones first."""
    sizes = [[family.tiny for family in families], [family.small for family in families]]
    return tuple(name for size in sizes for geometries in size for name in geometries)


NAMES = tuple(name for family in FAMILIES for name in family.tiny)


def folder(name: str, families: Sequence[Family] = FAMILIES) -> Path:
    """The checkpoint folder of a built-in model, written on first use.

    Its name carries the Transformers version, because that library chooses the file format.
    """
    family, geometry = next((f, size[name]) for f in families for size in (f.tiny, f.small) if name in size)
    write = partial(_write, family=family, geometry=geometry)
    return whole_folder(f"{name}-v{FORMAT}-transformers-{transformers.__version__}", write)


def _write(path: Path, family: Family, geometry: Geometry) -> None:
    """A whole checkpoint with random weights; its special tokens follow the 256 bytes."""
    tokens = {token: 256 + number for number, token in enumerate(family.special_tokens)}
    write_checkpoint_files(path, family, geometry, special_tokens=tokens)
    config = AutoConfig.from_pretrained(path)
    quiet = torch.ones(geometry.text["vocab_size"], dtype=torch.bool)
    quiet[list(printable_ids())] = False
    model = random_model(family, config, device=torch.device("cpu"), dtype=torch.float32, seed=SEED, quiet_ids=quiet)
    model.generation_config = GenerationConfig.from_pretrained(path)
    model.save_pretrained(path)
