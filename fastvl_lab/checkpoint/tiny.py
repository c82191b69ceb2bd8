"""The built-in checkpoints: tiny, random, deterministic models of both families' true architecture.

They are saved once to the user's cache as ordinary checkpoint folders and then read by the loading code of any other. They
are sized so that on two CPU cores a 1280x960 image takes some hundred milliseconds to its first token, with preprocessing, ViT and
prefill all visible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from fastvl_lab.checkpoint.byte_tokenizer import printable_ids
from fastvl_lab.checkpoint.random_weights import random_model, write_checkpoint_files
from fastvl_lab.checkpoint.user_cache import whole_folder

# Raised whenever the geometry or the weights change, so that an older cached folder is not used.
FORMAT = 1
SEED = 20251

_SPECIAL_TOKENS = {
    token: 256 + number
    for number, token in enumerate(
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
            "<|image_pad|>",
            "<|video_pad|>",
        )
    )
}
_VOCAB_SIZE = 320

_GEOMETRY: dict[str, dict[str, Any]] = {
    "tiny-qwen2.5-vl": {
        "family": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text": {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": _VOCAB_SIZE,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "mrope_section": [8, 12, 12],
            "max_position_embeddings": 128000,
        },
        "vision": {
            "depth": 4,
            "hidden_size": 80,
            "intermediate_size": 216,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        "image": {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    },
    "tiny-qwen3-vl": {
        "family": "qwen3_vl",
        "tie_word_embeddings": True,
        "text": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "vocab_size": _VOCAB_SIZE,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000.0,
            "mrope_section": [8, 8, 8],
            "mrope_interleaved": True,
            "max_position_embeddings": 262144,
        },
        "vision": {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 192,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1, 2],
            "hidden_act": "gelu_pytorch_tanh",
        },
        "image": {"min_pixels": 65536, "max_pixels": 16777216, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    },
}

NAMES = tuple(_GEOMETRY)


def folder(name: str) -> Path:
    """The checkpoint folder of a built-in model, written on first use.

    Its name carries the Transformers version, because that library chooses the file format.
    """
    return whole_folder(f"{name}-v{FORMAT}-transformers-{transformers.__version__}", lambda path: _write(name, path))


def _write(name: str, path: Path) -> None:
    write_checkpoint_files(path, _GEOMETRY[name], special_tokens=_SPECIAL_TOKENS)
    config = AutoConfig.from_pretrained(path)
    quiet = torch.ones(_VOCAB_SIZE, dtype=torch.bool)
    quiet[list(printable_ids())] = False
    model = random_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=SEED, quiet_ids=quiet)
    model.generation_config = GenerationConfig.from_pretrained(path)
    model.save_pretrained(path)
