"""A decoder in neutral words: what a family reads out of its stock module, and what the lean decoder computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Linear(NamedTuple):
    """A projection: weight [out, in], bias [out] or None, and the weight as `kernels.packed` reads it, or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    packed: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's parameters; q_norm, k_norm: [head_dim], or None both in a family that does not normalise heads."""

    norm1: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    norm2: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """A stock decoder by what its parts are for; modules and tensors are its own.

    module: the decoder; blocks: its layers as modules, `layers` as parameters; head: the LM head. embed: [vocab, hidden]. inv_freq:
    float32 [head_dim / 2]. scaling multiplies cosines and sines. axis: int64 [head_dim / 2], which row of a prompt's positions each
    frequency turns by.
    """

    module: Any
    blocks: Sequence[Any]
    layers: tuple[Layer, ...]
    embed: torch.Tensor
    norm: torch.Tensor
    head: Any
    rope_type: str
    inv_freq: torch.Tensor
    scaling: float
    axis: torch.Tensor


def head_dim(config: Any) -> int:
    """Values of a head, by a decoder's config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def read_text(module: Any, head: Any, *, head_norms: bool, axis: torch.Tensor) -> Text:
    """Read a decoder whose modules have the names of Transformers' Llama, as most decoders since do.

    head_norms: whether each head of q and k has a norm.
    """
    rotary = module.rotary_emb
    return Text(
        module=module,
        blocks=module.layers,
        layers=tuple(_layer(layer, head_norms) for layer in module.layers),
        embed=module.embed_tokens.weight,
        norm=module.norm.weight,
        head=head,
        rope_type=rotary.rope_type,
        inv_freq=rotary.inv_freq.float(),
        scaling=rotary.attention_scaling,
        axis=axis.to(rotary.inv_freq.device),
    )


def _layer(layer: Any, head_norms: bool) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        norm1=layer.input_layernorm.weight,
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        q_norm=attention.q_norm.weight if head_norms else None,
        k_norm=attention.k_norm.weight if head_norms else None,
        o=_linear(attention.o_proj),
        norm2=layer.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)
