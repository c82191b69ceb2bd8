"""The kernel against its reference in float64: in Triton's interpreter on a CPU, natively on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastvl_lab.kernels.patchify import patchify, patchify_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE, SHIFT = torch.tensor([0.0146, 0.015, 0.0142]), torch.tensor([1.79, 1.75, 1.48])

GEOMETRIES = [
    {"patch_size": 14, "merge_size": 2},
    {"patch_size": 16, "merge_size": 2},
    {"patch_size": 5, "merge_size": 3},
    {"patch_size": 4, "merge_size": 1},
]


def _clip(length: int, rows: int, columns: int, patch_size: int) -> torch.Tensor:
    size = (length, rows * patch_size, columns * patch_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


def _error(clip: torch.Tensor, geometry: dict[str, int], frames: int, dtype: torch.dtype) -> tuple[float, float]:
    """The largest errors of the kernel and of plain PyTorch in float32, both rounded to `dtype`, against float64."""
    options = {**geometry, "frames": frames}
    exact = patchify_reference(clip, SCALE.double().to(DEVICE), SHIFT.double().to(DEVICE), **options, dtype=torch.float64)
    scale, shift = SCALE.to(DEVICE), SHIFT.to(DEVICE)
    plain = patchify_reference(clip, scale, shift, **options, dtype=dtype)
    made = patchify(clip, scale, shift, **options, dtype=dtype)
    assert (made.shape, made.dtype) == (plain.shape, dtype)
    return float((made - exact).abs().max()), float((plain - exact).abs().max())


CLIPS = [(1, 1), (1, 2), (4, 2), (3, 3)]
# Each dtype with half of the geometries of each clip, and with the others by night.
CASES = [
    pytest.param(geometry, *clip, dtype, marks=() if (g + c + d) % 2 else pytest.mark.nightly, id=f"{geometry}-{clip}-{dtype}")
    for (g, geometry), (c, clip), (d, dtype) in itertools.product(
        enumerate(GEOMETRIES), enumerate(CLIPS), enumerate([torch.float32, torch.bfloat16])
    )
]


@pytest.mark.parametrize(("geometry", "length", "frames", "dtype"), CASES)
def test_the_kernel_is_as_exact_as_plain_pytorch(geometry: dict[str, int], length: int, frames: int, dtype: torch.dtype) -> None:
    merge = geometry["merge_size"]
    for rows, columns in itertools.product((1, 3), (1, 2)):
        clip = _clip(length, rows * merge, columns * merge, geometry["patch_size"])
        error, plain = _error(clip, geometry, frames, dtype)
        assert error <= 2 * plain + 4 * torch.finfo(dtype).eps


def test_strided_clips_are_read_where_they_lie() -> None:
    """Planar, as torch's resize leaves an image, and a window of a larger one."""
    whole = _clip(1, 6, 8, 14)
    planar = whole.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for clip in (planar, whole[:, 28:84, 28:112], whole.flip(2)[:, :, 28:84]):
        error, plain = _error(clip, GEOMETRIES[0], 2, torch.float32)
        assert error <= 2 * plain + 1e-6


def test_every_value_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was poisoned with NaN before has none after."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    made = patchify(_clip(1, 4, 6, 16), SCALE.to(DEVICE), SHIFT.to(DEVICE), **GEOMETRIES[1], frames=2, dtype=torch.float32)
    assert not made.isnan().any()
