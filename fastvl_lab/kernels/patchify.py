"""A resized clip to normalised patches, in one kernel from bytes to the model's dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def patchify_reference(
    clip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    patch_size: int,
    merge_size: int,
    frames: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What `patchify` computes, in plain PyTorch and in the precision of `scale` and `shift`."""
    (length, height, width, channels), m, p = clip.shape, merge_size, patch_size
    values = (clip * scale - shift).to(dtype)
    if length == 1:
        values = values.expand(frames, -1, -1, -1)
    blocks = values.reshape(-1, frames, height // (m * p), m, p, width // (m * p), m, p, channels)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * frames * p * p)


def patchify(
    clip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    patch_size: int,
    merge_size: int,
    frames: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Patches of a clip in merge order, each channel x of it as x * scale - shift; [n_patches, C * frames * p * p] in `dtype`.

    clip: uint8 [T, height, width, C] of any strides, with T = 1 (an image, repeated over the frames of a patch) or a multiple of
    `frames`; scale, shift: float32 [C]. The arithmetic is float32, rounded once.
    """
    length, height, width, channels = clip.shape
    assert length == 1 or length % frames == 0
    columns, rows = width // patch_size, height // patch_size
    n_patches = max(length // frames, 1) * rows * columns
    values = channels * frames * patch_size**2
    patches = torch.empty((n_patches, values), dtype=dtype, device=clip.device)
    _patchify_kernel[(n_patches,)](
        clip,
        scale,
        shift,
        patches,
        rows * columns,
        columns // merge_size,
        *clip.stride(),
        frames_given=1 if length == 1 else frames,
        frames=frames,
        merge=merge_size,
        patch=patch_size,
        n_values=values,
        block=triton.next_power_of_2(values),
    )
    return patches


# The size of an image is no reason to compile again: none of its values is special.
@triton.jit(do_not_specialize=["patches_a_frame", "tokens_a_row", "stride_t", "stride_y"])
def _patchify_kernel(
    clip,
    scale,
    shift,
    patches,
    patches_a_frame,
    tokens_a_row,
    stride_t,
    stride_y,
    stride_x,
    stride_c,
    frames_given: tl.constexpr,
    frames: tl.constexpr,
    merge: tl.constexpr,
    patch: tl.constexpr,
    n_values: tl.constexpr,
    block: tl.constexpr,
):
    """One program a patch: its place in the image from its number in merge order, then one gather and one store."""
    number = tl.program_id(0).to(tl.int64)
    group, within = number // patches_a_frame, number % patches_a_frame
    token, inner = within // (merge * merge), within % (merge * merge)
    row = token // tokens_a_row * merge + inner // merge
    column = token % tokens_a_row * merge + inner % merge

    value = tl.arange(0, block)
    inside = value < n_values
    channel = value // (frames * patch * patch)
    frame = value // (patch * patch) % frames % frames_given
    y, x = row * patch + value // patch % patch, column * patch + value % patch
    source = (group * frames_given + frame) * stride_t + y * stride_y + x * stride_x + channel * stride_c
    byte = tl.load(clip + source, mask=inside, other=0).to(tl.float32)
    normalised = byte * tl.load(scale + channel, mask=inside, other=0) - tl.load(shift + channel, mask=inside, other=0)
    tl.store(patches + number * n_values + value, normalised.to(patches.dtype.element_ty), mask=inside)
