"""A vision tower in neutral words: what a family reads out of its stock module, and what the lean tower computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# (hidden, what a block adds to it or None) -> (their sum, which may take the place of hidden, and its norm).
AddNorm = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]

# (qkv [N, 3 * H * D], H, cos, sin [N, D / 2]) -> q and k rotated, and v; [H, N, D] each. qkv may be overwritten.
TowerRotate = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

# (table [rows, width], indices, weights [N, k]) -> [N, width] in the table's dtype.
Interpolate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

Function = Callable[[torch.Tensor], torch.Tensor]

# (the linear modules that make a width, the one that reads it) -> functions that do the same.
Between = Callable[[Sequence[Any], Any], tuple[Sequence[Function], Function]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerOperations:
    """The operations that the toggles chose; rms_norm(weight, eps) and layer_norm(weight, bias, eps) make norms.

    linear(module) does what a linear module does. silu_mul maps gate and up, which it may overwrite, to silu(gate) * up.
    """

    linear: Callable[[Any], Function]
    rms_norm: Callable[[torch.Tensor, float], AddNorm]
    layer_norm: Callable[[torch.Tensor, torch.Tensor, float], AddNorm]
    rotate: TowerRotate
    silu_mul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    interpolate: Interpolate


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """One transformer block; qkv, proj and mlp map [N, hidden] to [N, hidden], qkv to three times the width."""

    norm1: AddNorm
    qkv: Function
    proj: Function
    norm2: AddNorm
    mlp: Function


@dataclass(frozen=True, kw_only=True, eq=False)
class Vision:
    """A stock vision tower by what its parts are for; modules and tensors are its own.

    patch_embed: the convolution, weight [hidden, C, F, p, p]. full_attention: of each block, whether it sees its whole frame; the
    others see windows of `window` x `window` visual tokens (None for a tower without). merger and deepstack (block index ->
    merger): modules that map [n_patches, hidden] to [n_visual, out_hidden]. inv_freq: float32 [head_dim / 4], of the axial rotary
    embedding. learned_positions: [side * side or a few more, hidden], interpolated to the grid and added, or None.
    """

    module: Any
    patch_embed: Any
    blocks: Sequence[Any]
    full_attention: tuple[bool, ...]
    window: int | None = None
    merger: Any
    deepstack: Mapping[int, Any]
    inv_freq: torch.Tensor
    learned_positions: torch.Tensor | None = None
    hidden_size: int
    n_heads: int
