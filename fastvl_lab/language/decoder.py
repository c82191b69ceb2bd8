"""The decoder's layers as one plain forward over the checkpoint's own parameters, for prefill and decode alike.

Both families: RMSNorm, grouped-query attention with M-RoPE, SwiGLU. Qwen2.5-VL has biases on q, k, v; Qwen3-VL has none and
normalises each head of q and k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import CheckpointError
from fastvl_lab.kernels.plain import rms_norm, rotate_half
from fastvl_lab.language.rope import MRope

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Inner = Callable[[str], AbstractContextManager[None]]


class KvCache(Protocol):
    """What a layer asks of the cache slot."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    """The stock decoder's parameters, shared, with what its geometry decides.

    layers: the stock layer modules, of which only the weights are used. embed, lm_head: [vocab, hidden], one tensor when tied.
    """

    layers: tuple[Any, ...]
    embed: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor
    eps: float
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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderWeights(
        layers=tuple(text.layers),
        embed=text.embed_tokens.weight,
        norm=text.norm.weight,
        lm_head=checkpoint.model.lm_head.weight,
        eps=config.rms_norm_eps,
        head_dim=head_dim,
        rope=MRope(
            inv_freq=text.rotary_emb.inv_freq.float(),
            scaling=text.rotary_emb.attention_scaling,
            sections=tuple(config.rope_parameters["mrope_section"]),
            interleaved=checkpoint.family == "qwen3_vl",
        ),
    )


def decode_layers(
    hidden: torch.Tensor,
    positions: torch.Tensor,
    weights: DecoderWeights,
    attend: Attend,
    cache: KvCache,
    inner: Inner,
    *,
    deepstack: Sequence[torch.Tensor] = (),
    visual_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """All layers over new tokens: hidden [n, hidden] at positions [3, n]; returns [n, hidden] before the final norm.

    deepstack: one [n_visual, hidden] per early layer, added after it at the rows of visual_index (arXiv 2406.04334).
    """
    cos, sin = weights.rope.cos_sin(positions, hidden.dtype)  # [n, 1, head_dim]
    for index, layer in enumerate(weights.layers):
        with inner(f"language.layer.{index}"):
            hidden = _layer(hidden, layer, index, cos, sin, weights, attend, cache)
            if index < len(deepstack):
                assert visual_index is not None
                hidden.index_add_(0, visual_index, deepstack[index])
    return hidden


def _layer(
    hidden: torch.Tensor,
    layer: Any,
    index: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: DecoderWeights,
    attend: Attend,
    cache: KvCache,
) -> torch.Tensor:
    n, attention, mlp, eps = hidden.shape[0], layer.self_attn, layer.mlp, weights.eps
    x = rms_norm(hidden, layer.input_layernorm.weight, eps)
    q = attention.q_proj(x).view(n, -1, weights.head_dim)  # [n, n_heads, head_dim]
    k = attention.k_proj(x).view(n, -1, weights.head_dim)  # [n, n_kv_heads, head_dim]
    v = attention.v_proj(x).view(n, -1, weights.head_dim)
    if hasattr(attention, "q_norm"):
        q = rms_norm(q, attention.q_norm.weight, eps)
        k = rms_norm(k, attention.k_norm.weight, eps)
    q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
    keys, values = cache.append(index, k, v)
    hidden = hidden + attention.o_proj(attend(q, keys, values).flatten(1))
    x = rms_norm(hidden, layer.post_attention_layernorm.weight, eps)
    written: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return hidden + written


def last_token_logits(hidden: torch.Tensor, weights: DecoderWeights) -> torch.Tensor:
    """Final norm and LM head on the last token only: float32 [vocab]."""
    return F.linear(rms_norm(hidden[-1], weights.norm, weights.eps), weights.lm_head).float()
