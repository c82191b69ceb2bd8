"""Host tensors to the device that computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastvl_lab.checkpoint.image_settings import ImageSettings
from fastvl_lab.request import Prompt

PatchUpload = Callable[[torch.Tensor], torch.Tensor]
Copy = Callable[[torch.Tensor], torch.Tensor]


def upload_prompt(prompt: Prompt, copy: Copy) -> Prompt:
    """Copy the prompt's tensors; a no-op on a CPU."""
    return dataclasses.replace(
        prompt,
        input_ids=copy(prompt.input_ids),
        positions=copy(prompt.positions),
        visual_index=copy(prompt.visual_index),
    )


def pageable(device: torch.device) -> Copy:
    """A copy from ordinary memory: CUDA waits for it, and stages it through page-locked memory of its own."""
    return lambda tensor: tensor.to(device)


def pinned(device: torch.device) -> Copy:
    """A copy from page-locked memory that the host does not wait for; torch keeps the memory until the copy is done."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return copy


def normalised(copy: Copy, dtype: torch.dtype) -> PatchUpload:
    """Patches that were normalised before, in the model's dtype on the device."""
    return lambda patches: copy(patches).to(dtype)


def normalising(copy: Copy, device: torch.device, dtype: torch.dtype, settings: ImageSettings, frames: int) -> PatchUpload:
    """uint8 patches, normalised in float32 on the device and then in the model's dtype."""
    per_channel = frames * settings.patch_size**2
    scale, shift = (x.float().repeat_interleave(per_channel).to(device) for x in settings.scale_shift)  # [C * F * p * p]
    return lambda patches: torch.mul(copy(patches), scale).sub_(shift).to(dtype)
