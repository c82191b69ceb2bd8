"""The decoder's parameters as the lean decoder reads them: the checkpoint's own, none of them copied but by `with_packed`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.fused import side_by_side
from fastvl_lab.checkpoint.packed import PackedWeights
from fastvl_lab.decoder.rope import MRope
from fastvl_lab.errors import CheckpointError
from fastvl_lab.families.text import Layer as StockLayer, Linear, head_dim
from fastvl_lab.kernels.packed import packed_linear


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer(StockLayer):
    """One layer's parameters; qkv and gate_up are q with k and v, and gate with up, as one tensor over the same memory."""

    qkv: Linear
    gate_up: Linear


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """The decoder's parameters and what its geometry decides; embed, lm_head's weight: [vocab, hidden], one tensor when tied.

    packed: where packed copies of the checkpoint's weights are kept.
    """

    layers: tuple[Layer, ...]
    embed: torch.Tensor
    norm: torch.Tensor
    lm_head: Linear
    eps: float
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: MRope
    packed: PackedWeights


def decoder_weights(checkpoint: Checkpoint) -> DecoderWeights:
    """Read a checkpoint; no parameter is copied. Raises `CheckpointError` for geometries this decoder has no code for."""
    text, config = checkpoint.text, checkpoint.config.get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise CheckpointError(f"checkpoint {checkpoint.name!r} uses sliding-window attention, which the lean decoder has not")
    if text.rope_type in ("dynamic", "longrope"):
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} uses {text.rope_type} RoPE, whose frequencies change with length; "
            f"the lean decoder has it not"
        )
    if config.hidden_act != "silu":
        raise CheckpointError(f"checkpoint {checkpoint.name!r} has hidden_act={config.hidden_act!r}; the lean decoder has 'silu'")
    return DecoderWeights(
        layers=tuple(_layer(layer) for layer in text.layers),
        embed=text.embed,
        norm=text.norm,
        lm_head=Linear(text.head.weight, text.head.bias),
        eps=config.rms_norm_eps,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        rope=MRope(inv_freq=text.inv_freq, scaling=text.scaling, axis=text.axis),
        packed=checkpoint.packed,
    )


def with_packed(weights: DecoderWeights, *names: str) -> DecoderWeights:
    """The same with these projections of every layer packed too.

    The LM head has a row a sequence, which gains little by the layout: oneDNN reads the checkpoint's own.
    """

    def packed(linear: Linear) -> Linear:
        return linear._replace(packed=weights.packed.of(linear.weight))

    def of_layer(layer: Layer) -> Layer:
        changes: dict[str, Any] = {name: packed(getattr(layer, name)) for name in names}
        return replace(layer, **changes)

    head = weights.lm_head._replace(packed=weights.lm_head.weight)
    return replace(weights, layers=tuple(map(of_layer, weights.layers)), lm_head=head)


def product(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    """x [n, in] by a projection: [n, out]."""
    weight, bias, packed = linear
    return F.linear(x, weight, bias) if packed is None else packed_linear(x, packed, weight, bias)


def _layer(layer: StockLayer) -> Layer:
    own = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return Layer(**own, qkv=_fused(layer.q, layer.k, layer.v), gate_up=_fused(layer.gate, layer.up))


def _fused(*linears: Linear) -> Linear:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return Linear(side_by_side([linear.weight for linear in linears]), side_by_side(biases) if biases else None)
