"""Models of a real geometry with random weights: the shapes are published facts, the values are not trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab.checkpoint.byte_tokenizer import write_byte_tokenizer
from fastvl_lab.checkpoint.user_cache import whole_folder
from fastvl_lab.families import FAMILIES, Family, Geometry

RANDOM_PREFIX = "random:"

# Raised whenever what is written below changes, so that an older cached folder is not used.
FORMAT = 1


def published(families: Sequence[Family] = FAMILIES) -> tuple[str, ...]:
    """The hub ids whose geometry is known without the hub."""
    return tuple(hub_id for family in families for hub_id in family.published)


def write_published_folder(hub_id: str, families: Sequence[Family] = FAMILIES) -> Path:
    """A cached folder with config, tokenizer and preprocessor config of a published geometry, and no weights."""
    family = next(family for family in families if hub_id in family.published)

    def write(folder: Path) -> None:
        write_checkpoint_files(folder, family, family.published[hub_id], special_tokens=family.special_tokens)

    return whole_folder(f"random/{hub_id.replace('/', '--')}-v{FORMAT}", write)


def write_checkpoint_files(folder: Path, family: Family, geometry: Geometry, special_tokens: Mapping[str, int]) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json, tokenizer and chat template."""
    end, pad = special_tokens["<|im_end|>"], special_tokens["<|endoftext|>"]
    config = AutoConfig.for_model(
        family.model_type,
        text_config={**geometry.text, "bos_token_id": pad, "eos_token_id": end},
        vision_config=dict(geometry.vision),
        tie_word_embeddings=geometry.tie_word_embeddings,
        **{key: special_tokens[token] for key, token in family.config_tokens.items()},
        dtype="float32" if geometry.text["hidden_size"] < 1024 else "bfloat16",
    )
    config.save_pretrained(folder)
    _write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
        "image_mean": geometry.mean,
        "image_std": geometry.std,
        **asdict(family.patches(config)),
    }
    _write_json(folder / "preprocessor_config.json", preprocessor)
    vocab_size = geometry.text["vocab_size"]
    write_byte_tokenizer(folder, chat_template=family.chat_template, special_tokens=special_tokens, vocab_size=vocab_size)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def random_model(
    family: Family, config: Any, *, device: torch.device, dtype: torch.dtype, seed: int, quiet_ids: torch.Tensor | None = None
) -> Any:
    """The stock model with weights drawn on the device; the same seed, device type and dtype give the same weights.

    quiet_ids: bool [vocab], tokens that greedy decoding should rarely choose.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to_empty(device=device)
    model.tie_weights()
    _restore_buffers(model)
    randomise(family, model, seed=seed, quiet_ids=quiet_ids)
    return model


def _restore_buffers(model: Any) -> None:
    """Compute the rotary frequencies that `to_empty` left blank, as the stock modules do when built."""
    for module in model.modules():
        if module._buffers:
            fresh = type(module)(module.config)
            for name, buffer in module._buffers.items():
                buffer.copy_(fresh._buffers[name])


@torch.no_grad()
def randomise(family: Family, model: Any, *, seed: int, quiet_ids: torch.Tensor | None = None) -> None:
    """Fill every parameter so that signals keep their size through the layers and greedy tokens vary with the input.

    Matrices get a standard deviation of 1/sqrt(inputs). The decoder's MLPs write more than that, so that a tied head does not
    repeat the last token for ever, and its queries are sharper, so that a long prompt is not averaged into a constant. Norm
    weights and biases are off their neutral values, so that forgetting one shows. `quiet_ids` are rarely chosen.
    """
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    text, positions = family.text(model), family.vision(model).learned_positions
    tables = {id(text.embed), id(text.head.weight)}
    norms = {id(own) for module in model.modules() if type(module).__name__.endswith("Norm") for own in module.parameters()}
    sharper = {id(own) for layer in text.layers for own in (layer.q.weight, layer.q_norm)}
    louder = {id(layer.down.weight) for layer in text.layers}
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if id(parameter) in tables:
            parameter.mul_(0.3)
            if quiet_ids is not None:
                parameter[quiet_ids] *= 0.3
        elif id(parameter) in norms:
            parameter.mul_(0.1)
            if name.endswith("weight"):
                parameter.add_(1.0)
        elif id(parameter) == id(positions):
            parameter.mul_(0.2)
        elif name.endswith("bias"):
            parameter.mul_(0.05)
        else:
            parameter.div_(parameter[0].numel() ** 0.5)
        if id(parameter) in sharper:
            parameter.mul_(2.0)
        if id(parameter) in louder:
            parameter.mul_(4.0)
