"""A checkpoint's stock model in a wider dtype, which shows what rounding costs in the narrow one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastvl_lab.checkpoint.loading import Checkpoint


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what the truth is computed that a dtype's errors are measured against."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def in_wider_dtype(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its stock model in the dtype of the truth; a weight is converted while its module computes.

    So no second copy of the weights is held: the largest alone takes twice its room for a while. The live model is not touched.
    """
    dtype = wider(checkpoint.dtype)
    stands_for: dict[int, Any] = {}
    for parameter in checkpoint.model.parameters():  # of its shape and dtype, without its bytes
        one = torch.empty((), dtype=dtype, device=parameter.device)
        stands_for[id(parameter)] = torch.nn.Parameter(one.expand(parameter.shape), requires_grad=False)
    model = copy.deepcopy(checkpoint.model, dict(stands_for))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    for theirs, ours in zip(checkpoint.model.modules(), model.modules(), strict=True):
        if own := {name: parameter for name, parameter in theirs._parameters.items() if parameter is not None}:
            ours.register_forward_pre_hook(_converting(own, dtype))
            ours.register_forward_hook(_letting_go(dict(ours._parameters)), always_call=True)
    return dataclasses.replace(checkpoint, model=model, dtype=dtype)


def _converting(own: Mapping[str, torch.nn.Parameter], dtype: torch.dtype) -> Callable[..., None]:
    def convert(module: Any, _: object) -> None:
        for name, parameter in own.items():
            module._parameters[name] = torch.nn.Parameter(parameter.data.to(dtype), requires_grad=False)

    return convert


def _letting_go(placeholders: Mapping[str, Any]) -> Callable[..., None]:
    def let_go(module: Any, *_: object) -> None:
        module._parameters.update(placeholders)

    return let_go
