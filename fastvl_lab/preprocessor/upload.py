"""Host tensors to the device that computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastvl_lab.preprocessor.layout import PatchLayout
from fastvl_lab.request import Pixels, Prompt

PatchUpload = Callable[[torch.Tensor], torch.Tensor]


def upload_prompt(prompt: Prompt, device: torch.device) -> Prompt:
    """Copy the prompt's tensors; a no-op on a CPU."""
    return dataclasses.replace(
        prompt,
        input_ids=prompt.input_ids.to(device),
        positions=prompt.positions.to(device),
        visual_index=prompt.visual_index.to(device),
    )


def upload_pixels(pixels: Pixels, upload: PatchUpload) -> Pixels:
    """Copy the patches in one of the ways below."""
    return dataclasses.replace(pixels, patches=upload(pixels.patches))


def normalised(device: torch.device, dtype: torch.dtype) -> PatchUpload:
    """Patches that were normalised on the host, in the model's dtype on the device."""
    return lambda patches: patches.to(device).to(dtype)


def as_bytes(device: torch.device) -> PatchUpload:
    """uint8 patches that stay so."""
    return lambda patches: patches.to(device)


def normalising(device: torch.device, dtype: torch.dtype, layout: PatchLayout, frames: int) -> PatchUpload:
    """uint8 patches, normalised in float32 on the device and then in the model's dtype."""
    per_channel = frames * layout.patch_size**2
    scale, shift = (x.float().repeat_interleave(per_channel).to(device) for x in layout.scale_shift)  # [C * F * p * p]
    return lambda patches: torch.mul(patches.to(device), scale).sub_(shift).to(dtype)
