"""Host tensors to the device that computes."""

from __future__ import annotations

import dataclasses

import torch

from fastvl_lab.request import Pixels, Prompt


def upload(pixels: Pixels | None, prompt: Prompt, device: torch.device, dtype: torch.dtype) -> tuple[Pixels | None, Prompt]:
    """Copy patches and prompt; the patches take the model's dtype on the device. A no-op on a CPU in float32."""
    if pixels is not None:
        pixels = dataclasses.replace(pixels, patches=pixels.patches.to(device).to(dtype))
    on_device = dataclasses.replace(
        prompt,
        input_ids=prompt.input_ids.to(device),
        positions=prompt.positions.to(device),
        visual_index=prompt.visual_index.to(device),
    )
    return pixels, on_device
