"""Qwen3-VL: a tower of LayerNorm and GELU with learned positions and DeepStack, and a decoder that normalises heads of q and k.

M-RoPE interleaves the sections of its three axes, so that each has low and high frequencies (`mrope_interleaved`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.families import qwen
from fastvl_lab.families.family import Family, Fault, Geometry, whole_number
from fastvl_lab.families.text import Text
from fastvl_lab.families.vision import Between, Block, Function, TowerOperations, Vision
from fastvl_lab.request import VisionTokens


def config_faults(config: Any) -> Iterator[Fault]:
    yield from qwen.vision_faults(config)
    levels, depth = config.vision_config.deepstack_visual_indexes, config.vision_config.depth
    if len(set(levels)) < len(levels) or not all(whole_number(level) is not None and 0 <= level < depth for level in levels):
        yield Fault("vision_config.deepstack_visual_indexes", levels, f"different blocks, 0 to {depth - 1}")


def vision(model: Any) -> Vision:
    """Full attention; features after the blocks of `deepstack_visual_indexes` go to the decoder (arXiv 2406.04334)."""
    visual = model.model.visual
    return Vision(
        **qwen.vision_parts(visual),
        full_attention=(True,) * len(visual.blocks),
        deepstack=dict(zip(visual.config.deepstack_visual_indexes, visual.deepstack_merger_list, strict=True)),
        learned_positions=visual.pos_embed.weight,
    )


def text(model: Any) -> Text:
    """The first axis has the frequencies that the two others leave."""
    rotary = model.model.language_model.rotary_emb
    axis = torch.zeros(len(rotary.inv_freq), dtype=torch.int64)
    for number in (1, 2):
        axis[number : rotary.mrope_section[number] * 3 : 3] = number
    return qwen.text(model, head_norms=True, axis=axis)


def stock_vision(module: Any, patches: torch.Tensor, grids: torch.Tensor) -> VisionTokens:
    output = module(patches, grid_thw=grids)
    return VisionTokens(embeds=output.pooler_output, deepstack=tuple(output.deepstack_features))


def blocks(vision: Vision, operations: TowerOperations, between: Between) -> tuple[Block, ...]:
    return tuple(_block(block, operations, between) for block in vision.blocks)


def _block(block: Any, operations: TowerOperations, between: Between) -> Block:
    (first,), second = between((block.mlp.linear_fc1,), block.mlp.linear_fc2)
    norm1, norm2 = (operations.layer_norm(norm.weight, norm.bias, norm.eps) for norm in (block.norm1, block.norm2))
    return Block(
        norm1=norm1,
        qkv=operations.linear(block.attn.qkv),
        proj=operations.linear(block.attn.proj),
        norm2=norm2,
        mlp=lambda x: second(block.mlp.act_fn(first(x))),
    )


def merger(merger: Any, _: TowerOperations, between: Between) -> Function:
    """The final merger normalises each patch; a DeepStack merger the patches of a visual token together."""
    (first,), second = between((merger.linear_fc1,), merger.linear_fc2)
    of_norm, width = merger.norm.normalized_shape[0], merger.linear_fc1.in_features
    return lambda x: second(F.gelu(first(merger.norm(x.reshape(-1, of_norm)).view(-1, width))))


def _geometry(
    text: dict[str, int], vision: dict[str, Any], *, head_dim: int, vocab_size: int, sections: list[int], tied: bool = True
) -> Geometry:
    """What differs between sizes, and what does not (each model's config.json and preprocessor_config.json on the hub)."""
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": sections, "mrope_interleaved": True}
    more = {"head_dim": head_dim, "vocab_size": vocab_size, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144}
    patches = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 2304}
    return Geometry(
        text=text | more | {"rope_parameters": rope},
        vision=vision | patches | {"hidden_act": "gelu_pytorch_tanh", "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        min_pixels=65536,
        max_pixels=16777216,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
    )


def _published(text: dict[str, int], vision: dict[str, Any], *, tied: bool = True) -> Geometry:
    return _geometry(text, vision, head_dim=128, vocab_size=151936, sections=[24, 20, 20], tied=tied)


_TINY = _geometry(
    {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    {"depth": 4, "hidden_size": 48, "intermediate_size": 192, "num_heads": 2, "deepstack_visual_indexes": [0, 1, 2]},
    head_dim=48,
    vocab_size=320,
    sections=[8, 8, 8],
)
_SMALL = _geometry(
    {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    {"depth": 8, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "deepstack_visual_indexes": [1, 3, 5]},
    head_dim=64,
    vocab_size=320,
    sections=[12, 10, 10],
)
_VISION_SMALL = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
_VISION_LARGE = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
_2B = _published(
    {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    _VISION_SMALL,
)
_4B = _published(
    {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    _VISION_SMALL,
)
_8B = _published(
    {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    _VISION_LARGE,
    tied=False,
)

FAMILY = Family(
    model_type="qwen3_vl",
    placeholders=qwen.PLACEHOLDERS,
    special_tokens=qwen.SPECIAL_TOKENS,
    config_tokens=qwen.CONFIG_TOKENS,
    config_faults=config_faults,
    model_faults=partial(qwen.section_faults, fill=False),
    patches=qwen.patches,
    vision=vision,
    text=text,
    stock_vision=stock_vision,
    stock_inputs=qwen.stock_inputs,
    blocks=blocks,
    merger=merger,
    positions=qwen.mrope_positions,
    chat_template=qwen.CHAT_TEMPLATE,
    tiny={"tiny-qwen3-vl": _TINY},
    small={"small-qwen3-vl": _SMALL},
    published={"Qwen/Qwen3-VL-2B-Instruct": _2B, "Qwen/Qwen3-VL-4B-Instruct": _4B, "Qwen/Qwen3-VL-8B-Instruct": _8B},
    idle=("activation=fused", "norms=native"),
)
