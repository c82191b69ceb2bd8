"""Operations that tower and decoder both have, by the option that does them: plain PyTorch, or a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastvl_lab.kernels.plain import rms_norm

# (hidden, what is added to it or None, weight, …, eps) -> (their sum, which may take the place of hidden, and its norm).
NormOfSum = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# (gate, up) -> silu(gate) * up; gate may be overwritten.
SiluMul = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def add_rms_norm(option: str) -> NormOfSum:
    """By "eager", "native" or "fused"; takes (hidden, added, weight, eps)."""
    return {"eager": lambda: after_add(rms_norm), "native": lambda: after_add(native_rms_norm), "fused": _fused_rms_norm}[option]()


def add_layer_norm(option: str) -> NormOfSum:
    """The same with (hidden, added, weight, bias, eps)."""
    native = after_add(_layer_norm)
    return {"eager": lambda: native, "native": lambda: native, "fused": _fused_layer_norm}[option]()


def silu_mul(option: str) -> SiluMul:
    """By "eager" or "fused"."""
    return {"eager": lambda: _silu_mul, "fused": _fused_silu_mul}[option]()


def after_add(norm: Callable[..., torch.Tensor]) -> NormOfSum:
    """A norm, with the addition before it."""

    def add_norm(hidden: torch.Tensor, added: torch.Tensor | None, *given: object) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden if added is None else hidden.add_(added)
        return hidden, norm(hidden, *given)

    return add_norm


def native_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate, inplace=True).mul_(up)


def _fused_rms_norm() -> NormOfSum:
    from fastvl_lab.kernels.add_norm import add_rms_norm

    return add_rms_norm


def _fused_layer_norm() -> NormOfSum:
    from fastvl_lab.kernels.add_norm import add_layer_norm

    return add_layer_norm


def _fused_silu_mul() -> SiluMul:
    from fastvl_lab.kernels.silu_mul import silu_mul

    return silu_mul
