"""Models of a real geometry with random weights: the shapes are published facts, the values are not trained."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab.checkpoint.byte_tokenizer import write_byte_tokenizer
from fastvl_lab.checkpoint.user_cache import whole_folder

RANDOM_PREFIX = "random:"

# Raised whenever what is written below changes, so that an older cached folder is not used.
FORMAT = 1


@cache
def _geometry() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("fastvl_lab.checkpoint").joinpath("geometry.json").read_text())
    return data


def published() -> tuple[str, ...]:
    """The hub ids whose geometry is known without the hub."""
    return tuple(name for name in _geometry() if "/" in name)


def write_published_folder(hub_id: str) -> Path:
    """A cached folder with config, tokenizer and preprocessor config of a published geometry, and no weights."""

    def write(folder: Path) -> None:
        facts = _geometry()[hub_id]
        write_checkpoint_files(folder, facts, special_tokens=_geometry()["special_tokens"])

    return whole_folder(f"random/{hub_id.replace('/', '--')}-v{FORMAT}", write)


def write_checkpoint_files(folder: Path, facts: dict[str, Any], special_tokens: dict[str, int]) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json, tokenizer and chat template.

    facts: "family", "text", "vision", "image" and "tie_word_embeddings", as geometry.json has them.
    """
    family, text, image = facts["family"], dict(facts["text"]), facts["image"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": text.pop("mrope_section")}
    if text.pop("mrope_interleaved", False):
        rope["mrope_interleaved"] = True
    end, pad = special_tokens["<|im_end|>"], special_tokens["<|endoftext|>"]
    config = AutoConfig.for_model(
        family,
        text_config={**text, "rope_parameters": rope, "bos_token_id": pad, "eos_token_id": end},
        vision_config=facts["vision"],
        tie_word_embeddings=facts["tie_word_embeddings"],
        image_token_id=special_tokens["<|image_pad|>"],
        video_token_id=special_tokens["<|video_pad|>"],
        vision_start_token_id=special_tokens["<|vision_start|>"],
        vision_end_token_id=special_tokens["<|vision_end|>"],
        dtype="float32" if text["hidden_size"] < 1024 else "bfloat16",
    )
    config.save_pretrained(folder)
    _write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    vision = facts["vision"]
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": image["min_pixels"], "longest_edge": image["max_pixels"]},
        "image_mean": image["mean"],
        "image_std": image["std"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    write_byte_tokenizer(folder, family=family, special_tokens=special_tokens, vocab_size=text["vocab_size"])


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def random_model(config: Any, *, device: torch.device, dtype: torch.dtype, seed: int, quiet_ids: torch.Tensor | None = None) -> Any:
    """The stock model with weights drawn on the device; the same seed, device type and dtype give the same weights.

    quiet_ids: bool [vocab], tokens that greedy decoding should rarely choose.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to_empty(device=device)
    model.tie_weights()
    _restore_buffers(model)
    randomise(model, seed=seed, quiet_ids=quiet_ids)
    return model


def _restore_buffers(model: Any) -> None:
    """Compute the rotary frequencies that `to_empty` left blank, as the stock modules do when built."""
    for module in model.modules():
        if module._buffers:
            fresh = type(module)(module.config)
            for name, buffer in module._buffers.items():
                buffer.copy_(fresh._buffers[name])


@torch.no_grad()
def randomise(model: Any, *, seed: int, quiet_ids: torch.Tensor | None = None) -> None:
    """Fill every parameter so that signals keep their size through the layers and greedy tokens vary with the input.

    Matrices get a standard deviation of 1/sqrt(inputs). The decoder's MLPs write more than that, so that a tied head does not
    repeat the last token for ever, and its queries are sharper, so that a long prompt is not averaged into a constant. Norm
    weights and biases are off their neutral values, so that forgetting one shows. `quiet_ids` are rarely chosen.
    """
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.mul_(0.3)
            if quiet_ids is not None:
                parameter[quiet_ids] *= 0.3
        elif "norm" in name or "ln_q" in name:
            parameter.mul_(0.1)
            if name.endswith("weight"):
                parameter.add_(1.0)
        elif name.endswith("pos_embed.weight"):
            parameter.mul_(0.2)
        elif name.endswith("bias"):
            parameter.mul_(0.05)
        else:
            parameter.div_(parameter[0].numel() ** 0.5)
        if "language_model.layers" in name and name.endswith(("q_proj.weight", "q_norm.weight")):
            parameter.mul_(2.0)
        if "language_model.layers" in name and name.endswith("down_proj.weight"):
            parameter.mul_(4.0)
