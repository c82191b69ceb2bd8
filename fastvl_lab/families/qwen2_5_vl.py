"""Qwen2.5-VL (arXiv 2502.13923): a tower of RMSNorm, SwiGLU and windows, and a decoder whose q, k and v have biases.

M-RoPE lays the sections of its three axes out one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.errors import CheckpointError
from fastvl_lab.families import qwen
from fastvl_lab.families.family import Family, Fault, Geometry, not_counts
from fastvl_lab.families.text import Text
from fastvl_lab.families.vision import Between, Block, Function, TowerOperations, Vision
from fastvl_lab.request import VisionTokens


def config_faults(config: Any) -> Iterator[Fault]:
    yield from qwen.vision_faults(config)
    vision, patches = config.vision_config, qwen.patches(config)
    yield from not_counts(vision, "vision_config.", "window_size")
    side = patches.patch_size * patches.merge_size
    if vision.window_size < side:
        yield Fault("vision_config.window_size", vision.window_size, f"at least {side}, the pixels of one visual token")


def vision(model: Any) -> Vision:
    """Windows except in `fullatt_block_indexes`; `window_size` is in pixels."""
    visual = model.model.visual
    config, full = visual.config, set(visual.config.fullatt_block_indexes)
    return Vision(
        **qwen.vision_parts(visual),
        full_attention=tuple(index in full for index in range(len(visual.blocks))),
        window=config.window_size // config.spatial_merge_size // config.patch_size,
        deepstack={},
    )


def text(model: Any) -> Text:
    axis = torch.arange(3).repeat_interleave(torch.tensor(model.model.language_model.rotary_emb.mrope_section))
    return qwen.text(model, head_norms=False, axis=axis)


def stock_vision(module: Any, patches: torch.Tensor, grids: torch.Tensor) -> VisionTokens:
    return VisionTokens(embeds=module(patches, grid_thw=grids).pooler_output)


def blocks(vision: Vision, operations: TowerOperations, between: Between) -> tuple[Block, ...]:
    if (activation := vision.module.config.hidden_act) != "silu":
        raise CheckpointError(
            f"vision_config has hidden_act={activation!r}; the lean tower has 'silu' only: choose vit.tower=transformers"
        )
    return tuple(_block(block, operations, between) for block in vision.blocks)


def _block(block: Any, operations: TowerOperations, between: Between) -> Block:
    (gate, up), down = between((block.mlp.gate_proj, block.mlp.up_proj), block.mlp.down_proj)
    return Block(
        norm1=operations.rms_norm(block.norm1.weight, block.norm1.variance_epsilon),
        qkv=operations.linear(block.attn.qkv),
        proj=operations.linear(block.attn.proj),
        norm2=operations.rms_norm(block.norm2.weight, block.norm2.variance_epsilon),
        mlp=lambda x: down(operations.silu_mul(gate(x), up(x))),
    )


def merger(merger: Any, operations: TowerOperations, between: Between) -> Function:
    (first,), second = between((merger.mlp[0],), merger.mlp[2])
    norm, width = operations.rms_norm(merger.ln_q.weight, merger.ln_q.variance_epsilon), merger.mlp[0].in_features
    return lambda x: second(F.gelu(first(norm(x, None)[1].view(-1, width))))


def _geometry(text: dict[str, int], vision: dict[str, Any], *, vocab_size: int, sections: list[int], tied: bool = True) -> Geometry:
    """What differs between sizes, and what does not (each model's config.json and preprocessor_config.json on the hub)."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections}
    more = {"vocab_size": vocab_size, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000, "rope_parameters": rope}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112}
    return Geometry(
        text=text | more,
        vision=vision | patches | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        min_pixels=3136,
        max_pixels=12845056,
        mean=[0.48145466, 0.4578275, 0.40821073],
        std=[0.26862954, 0.26130258, 0.27577711],
    )


_TINY = _geometry(
    {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1},
    {"depth": 4, "hidden_size": 80, "intermediate_size": 216, "num_heads": 2, "fullatt_block_indexes": [1, 3]},
    vocab_size=320,
    sections=[8, 12, 12],
)
_SMALL = _geometry(
    {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    {"depth": 8, "hidden_size": 320, "intermediate_size": 864, "num_heads": 4, "fullatt_block_indexes": [3, 7]},
    vocab_size=320,
    sections=[8, 12, 12],
)
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}
_3B = _geometry(
    {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
    _VISION,
    vocab_size=151936,
    sections=[16, 24, 24],
)
_7B = _geometry(
    {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    _VISION,
    vocab_size=152064,
    sections=[16, 24, 24],
    tied=False,
)

FAMILY = Family(
    model_type="qwen2_5_vl",
    placeholders=qwen.PLACEHOLDERS,
    special_tokens=qwen.SPECIAL_TOKENS,
    config_tokens=qwen.CONFIG_TOKENS,
    config_faults=config_faults,
    model_faults=partial(qwen.section_faults, fill=True),
    patches=qwen.patches,
    vision=vision,
    text=text,
    stock_vision=stock_vision,
    stock_inputs=qwen.stock_inputs,
    blocks=blocks,
    merger=merger,
    positions=qwen.mrope_positions,
    chat_template=(
        "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        + qwen.CHAT_TEMPLATE
    ),
    tiny={"tiny-qwen2.5-vl": _TINY},
    small={"small-qwen2.5-vl": _SMALL},
    published={"Qwen/Qwen2.5-VL-3B-Instruct": _3B, "Qwen/Qwen2.5-VL-7B-Instruct": _7B},
    idle=("interpolation=fused",),
)
