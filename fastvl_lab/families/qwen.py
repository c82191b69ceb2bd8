"""What Qwen2.5-VL and Qwen3-VL have in common: names of modules and of settings, tokens, and M-RoPE positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastvl_lab.families.family import Fault, Patches, not_counts
from fastvl_lab.families.text import Text, read_text
from fastvl_lab.request import Grid

PLACEHOLDERS = ("image_token_id", "video_token_id")

SPECIAL_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}

CONFIG_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

# A conversation as the published templates write it; only Qwen2.5-VL's supplies a system message of its own.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}"
    "{%- else %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def patches(config: Any) -> Patches:
    """From vision_config."""
    vision = config.vision_config
    return Patches(
        patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=vision.spatial_merge_size
    )


def vision_faults(config: Any) -> Iterator[Fault]:
    """Sizes of the tower that are no counts, or that fit neither images, nor one another, nor the decoder."""
    vision, width = config.vision_config, config.get_text_config().hidden_size
    keys = ("patch_size", "spatial_merge_size", "temporal_patch_size", "hidden_size", "num_heads", "depth")
    yield from not_counts(vision, "vision_config.", *keys)
    if vision.in_channels != 3:
        yield Fault("vision_config.in_channels", vision.in_channels, "3, as an image has")
    if vision.hidden_size % (4 * vision.num_heads):  # half of a head turns by the row, half by the column; each in pairs
        fits = f"such that 4 times it divides hidden_size, {vision.hidden_size}"
        yield Fault("vision_config.num_heads", vision.num_heads, fits)
    if vision.out_hidden_size != width:
        yield Fault("vision_config.out_hidden_size", vision.out_hidden_size, f"{width}, the decoder's hidden_size")


def vision_parts(visual: Any) -> dict[str, Any]:
    """Fields of `Vision` that both towers fill alike."""
    return {
        "module": visual,
        "patch_embed": visual.patch_embed.proj,
        "blocks": visual.blocks,
        "merger": visual.merger,
        "inv_freq": visual.rotary_pos_emb.inv_freq.float(),
        "hidden_size": visual.config.hidden_size,
        "n_heads": visual.config.num_heads,
    }


def text(model: Any, *, head_norms: bool, axis: torch.Tensor) -> Text:
    return read_text(model.model.language_model, model.lm_head, head_norms=head_norms, axis=axis)


def stock_inputs(is_image: torch.Tensor, patches: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
    """mm_token_type_ids tell the stock model which tokens have the places of an image."""
    return {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": is_image.int()}


def section_faults(model: Any, *, fill: bool) -> Iterator[Fault]:
    """Sections of M-RoPE that are no three counts; fill: whether they must be all frequencies together."""
    rotary = model.model.language_model.rotary_emb
    sections, half = rotary.mrope_section, len(rotary.inv_freq)
    three = isinstance(sections, list | tuple) and len(sections) == 3 and all(type(n) is int and n >= 0 for n in sections)
    if not three or (fill and sum(sections) != half):
        yield Fault("mrope_section", sections, f"three whole numbers, {half} together")


def mrope_positions(is_image: np.ndarray, grids: Sequence[Grid], merge_size: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions of a prompt, and the position of the token after it (`Family.positions`).

    Text counts up in all three rows. An image of merged grid (t, h, w) starting at p has rows p+t, p+h, p+w, and the text after it
    goes on at p + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index` in Transformers). Both families place
    images alike; they differ for videos.
    """
    segments, position, begin = [], 0, 0
    for at, grid in zip(np.flatnonzero(is_image), grids, strict=True):
        text = np.arange(at - begin) + position
        position += int(at - begin)
        h, w = grid.h // merge_size, grid.w // merge_size
        image = np.indices((grid.t, h, w)).reshape(3, -1) + position
        segments += [np.broadcast_to(text, (3, len(text))), image]
        position += max(h, w)
        begin = int(at) + 1
    tail = np.arange(len(is_image) - begin) + position
    segments.append(np.broadcast_to(tail, (3, len(tail))))
    return np.concatenate(segments, axis=1).astype(np.int64), position + len(tail)
