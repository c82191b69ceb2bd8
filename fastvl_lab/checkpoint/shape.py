"""The shape of a model without its weights, for what follows from the shape alone: operations, bytes, visual tokens."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.loading import Checkpoint, as_checkpoint_error, resolve_dtype
from fastvl_lab.checkpoint.random_weights import RANDOM_PREFIX, published, write_published_folder
from fastvl_lab.errors import CheckpointError
from fastvl_lab.families import family_of, names


def without_weights(name: str, dtype: str) -> Checkpoint:
    """A checkpoint whose tensors are on the device "meta", and which has no tokenizer.

    name: as `checkpoint.load` takes it, or the last part of a published hub id, such as "Qwen3-VL-4B-Instruct". Raises
    `CheckpointError` for one whose geometry is not known here, or cannot be read.
    """
    source, of_type = _source(str(name)), resolve_dtype(dtype)
    assert of_type is not None
    with as_checkpoint_error(name):
        config = AutoConfig.from_pretrained(source)
        family = family_of(config.model_type)
        if family is None:
            raise CheckpointError(f"model {name!r} is a {config.model_type!r} model; the lab knows {names()}")
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=of_type, attn_implementation="sdpa")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(source)
    length = int(config.get_text_config().max_position_embeddings)
    return Checkpoint(
        name=name,
        family=family,
        model=model.eval(),
        tokenizer=None,
        image_processor=image_processor,
        eos_token_ids=(),
        max_length=length,
        session_len=length,
        device=torch.device("meta"),
        dtype=of_type,
    )


def _source(name: str) -> Path:
    """A folder with the config.json and the preprocessor_config.json of a model."""
    if name in tiny.NAMES:
        return tiny.folder(name)
    asked = name.removeprefix(RANDOM_PREFIX)
    for hub_id in published():
        if asked.lower() in (hub_id.lower(), hub_id.partition("/")[2].lower()):
            return write_published_folder(hub_id)
    if (path := Path(os.path.expanduser(name), "config.json")).is_file():  # pathlib's raises for an unknown user
        return path.parent
    raise CheckpointError(
        f"model {name!r} is unknown; the choices are {', '.join((*published(), *tiny.NAMES))}, or the folder of a checkpoint"
    )
