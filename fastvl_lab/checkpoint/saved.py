"""A checkpoint in memory written as a folder in Hugging Face format, for programs that take nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import GenerationConfig

from fastvl_lab.checkpoint.loading import Checkpoint
from fastvl_lab.checkpoint.memory import gigabytes
from fastvl_lab.errors import CheckpointError


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write weights (safetensors, in the checkpoint's dtype), tokenizer, image processor and what ends an answer.

    Raises `CheckpointError` where the disk has no room for them.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in checkpoint.model.parameters())
    if needed > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} needs {gigabytes(needed)} on disk for other engines to read it, and {folder.parent} "
            f"has {gigabytes(free)} free; set TMPDIR to a folder that has more"
        )
    # Parameters are views of fused and padded tensors; each is saved as what it is alone.
    checkpoint.model.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    settings = checkpoint.image_processor.to_dict() | {"image_processor_type": "Qwen2VLImageProcessor"}  # of whichever backend
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    GenerationConfig(
        do_sample=False, eos_token_id=list(checkpoint.eos_token_ids), pad_token_id=checkpoint.tokenizer.pad_token_id
    ).save_pretrained(folder)
