"""The decoder's parameters as the lean decoder reads them: the checkpoint's own, none of them copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.fused import side_by_side
from fastvl_lab.errors import CheckpointError
from fastvl_lab.language.rope import MRope


class Linear(NamedTuple):
    """A projection: weight [out, in], and bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's parameters; qkv and gate_up are q with k and v, and gate with up, as one tensor over the same memory.

    q_norm, k_norm: [head_dim] for Qwen3-VL, None for Qwen2.5-VL.
    """

    norm1: torch.Tensor
    q: Linear
    k: Linear
    v: Linear
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    norm2: torch.Tensor
    gate: Linear
    up: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """The decoder's parameters and what its geometry decides; embed, lm_head: [vocab, hidden], one tensor when tied."""

    layers: tuple[Layer, ...]
    embed: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor
    eps: float
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: MRope


def decoder_weights(checkpoint: Checkpoint) -> DecoderWeights:
    """Read a stock model; no parameter is copied. Raises `CheckpointError` for geometries this decoder has no code for."""
    text, config = checkpoint.model.model.language_model, checkpoint.config.get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise CheckpointError(f"checkpoint {checkpoint.name!r} uses sliding-window attention, which the lean decoder has not")
    if text.rotary_emb.rope_type in ("dynamic", "longrope"):
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} uses {text.rotary_emb.rope_type} RoPE, whose frequencies change with length; "
            f"the lean decoder has it not"
        )
    if config.hidden_act != "silu":
        raise CheckpointError(f"checkpoint {checkpoint.name!r} has hidden_act={config.hidden_act!r}; the lean decoder has 'silu'")
    return DecoderWeights(
        layers=tuple(_layer(layer) for layer in text.layers),
        embed=text.embed_tokens.weight,
        norm=text.norm.weight,
        lm_head=checkpoint.model.lm_head.weight,
        eps=config.rms_norm_eps,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rope=MRope(
            inv_freq=text.rotary_emb.inv_freq.float(),
            scaling=text.rotary_emb.attention_scaling,
            sections=tuple(text.rotary_emb.mrope_section),
            interleaved=checkpoint.family == "qwen3_vl",
        ),
    )


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v = (_linear(x) for x in (attention.q_proj, attention.k_proj, attention.v_proj))
    gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)
    return Layer(
        norm1=layer.input_layernorm.weight,
        q=q,
        k=k,
        v=v,
        qkv=_fused(q, k, v),
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        o=_linear(attention.o_proj),
        norm2=layer.post_attention_layernorm.weight,
        gate=gate,
        up=up,
        gate_up=_fused(gate, up),
        down=_linear(mlp.down_proj),
    )


def _linear(module: Any) -> Linear:
    return Linear(module.weight, module.bias)


def _fused(*linears: Linear) -> Linear:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Linear(side_by_side([linear.weight for linear in linears]), side_by_side(biases) if biases else None)
