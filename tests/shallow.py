"""The built-in checkpoints with two blocks and two layers: compilers and interpreters take as long as a model is deep."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastvl_lab import Lab
from fastvl_lab.families import FAMILIES

CUT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"depth": 2, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 2, "deepstack_visual_indexes": [0]},
}


def shallow_lab(name: str, **settings: Any) -> Lab:
    """`Lab` of that tiny checkpoint, cut; its own name is shallow-NAME."""
    family = next(family for family in FAMILIES if name in family.tiny)
    tall = family.tiny[name]
    vision, text = {**tall.vision, **CUT[family.model_type]}, {**tall.text, "num_hidden_layers": 2}
    geometry = dataclasses.replace(tall, vision=vision, text=text)
    return Lab(f"shallow-{name}", families=[dataclasses.replace(family, tiny={f"shallow-{name}": geometry})], **settings)
