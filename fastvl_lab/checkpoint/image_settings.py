"""What a checkpoint's image processor does to an image, read once from its settings and checked.

Transformers keeps these settings in whatever form their file has them, and finds out in each call whether it can use them. Here a
value is read in every form that Transformers can use, or refused in words when the checkpoint is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from fastvl_lab.checkpoint.reading import File
from fastvl_lab.errors import is_number, quoted, shortened
from fastvl_lab.families.family import whole_number

CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The settings that the lab reads, in one form each.

    min_pixels, max_pixels: of the resized area (`size`, as shortest_edge and longest_edge). rescale, mean, std: a byte x becomes
    (x * rescale - mean) / std; mean and std have one value a channel. converts: whether the processor makes RGB of a picture itself
    (`do_convert_rgb`), which is where Transformers puts transparency on white. unlike: settings, as "key=value", with which the
    lab's own preprocessing would make other pixels.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    converts: bool
    unlike: tuple[str, ...]

    @property
    def factor(self) -> int:
        """Pixels along one side of a visual token; resized sides are multiples of it."""
        return self.patch_size * self.merge_size

    @cached_property
    def scale_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rescale and normalise in one: a byte x of a channel becomes x * scale - shift; float64 [channels] each, on the host."""
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (self.mean, self.std))
        return self.rescale / std, mean / std


def read_image_settings(processor: Any, file: File) -> ImageSettings:
    """Read an image processor that Transformers has loaded from `file`; raises `CheckpointError` for what cannot be used."""
    kind = getattr(processor, "image_processor_type", None)
    if not type(processor).__name__.startswith("Qwen2VL") or not (kind is None or str(kind).startswith("Qwen")):
        raise file.refused("image_processor_type", kind or type(processor).__name__, "'Qwen2VLImageProcessor', or left out")
    if not processor.do_resize:
        raise file.refused("do_resize", processor.do_resize, "true: images have to fill whole patches")
    least, most = _limits(processor.size, file)
    rescale, mean, std = 1.0, (0.0,) * CHANNELS, (1.0,) * CHANNELS
    if processor.do_rescale:
        rescale = processor.rescale_factor
        if not is_number(rescale) or rescale == 0:
            raise file.refused("rescale_factor", rescale, "a number other than zero")
    if processor.do_normalize:
        mean, std = (_channels(getattr(processor, key), file, key) for key in ("image_mean", "image_std"))
        if 0 in std:
            raise file.refused("image_std", processor.image_std, "other than zero: it divides")
    return ImageSettings(
        min_pixels=least,
        max_pixels=most,
        patch_size=file.count("patch_size", processor.patch_size),
        merge_size=file.count("merge_size", processor.merge_size),
        temporal_patch_size=file.count("temporal_patch_size", processor.temporal_patch_size),
        rescale=float(rescale),
        mean=mean,
        std=std,
        converts=bool(processor.do_convert_rgb),
        unlike=tuple(_unlike(processor)),
    )


def _limits(size: Any, file: File) -> tuple[int, int]:
    """Least and greatest area; raises `CheckpointError`.

    Qwen's processors call the two shortest_edge and longest_edge. Older files have min_pixels and max_pixels: at the top, where
    Transformers reads them, or inside size, where it does not, though they can mean only one thing.
    """
    given = dict(size) if size is not None else {}
    least, most = (
        whole_number(given.get(edge, given.get(pixels)))
        for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
    )
    if least is None or most is None or not 1 <= least <= most:
        taken = "shortest_edge and longest_edge (or min_pixels and max_pixels): whole numbers of pixels, the smaller first"
        raise file.refused("size", given, taken)
    return least, most


def _channels(value: Any, file: File, key: str) -> tuple[float, ...]:
    """One number for all channels, or one each."""
    values = list(value) if isinstance(value, list | tuple) else [value] * CHANNELS
    if len(values) != CHANNELS or not all(map(is_number, values)):
        raise file.refused(key, value, f"a number, or a list of {CHANNELS}")
    return tuple(map(float, values))


def _unlike(processor: Any) -> list[str]:
    """Settings under which the lab's own preprocessing would not make the processor's pixels, as "key=value".

    Types count: a resample of 3.0 is no filter that Transformers knows, so it uses another than 3.
    """
    unlike = [
        f"{key}={quoted(getattr(processor, key))}" for key in ("do_rescale", "do_normalize") if getattr(processor, key) is not True
    ]
    resample = processor.resample
    if isinstance(resample, bool) or not isinstance(resample, int) or resample != Image.Resampling.BICUBIC:
        unlike.append(f"resample={quoted(resample)}")
    return unlike


def try_image_processor(processor: Any, settings: ImageSettings, file: File) -> None:
    """Run it on one image of one visual token; raises `CheckpointError` where it fails, as it would in every request."""
    factor, merge = settings.factor, settings.merge_size
    area = {"shortest_edge": factor**2, "longest_edge": factor**2}
    try:
        batch = processor([Image.new("RGB", (factor + 1, factor + 1))], size=area, return_tensors="pt")
        shape, grid = tuple(batch["pixel_values"].shape), batch["image_grid_thw"].tolist()
    except Exception as error:  # whatever a library raises for settings that it does not understand
        why = shortened(f"{type(error).__name__}: {error}", 300)
        raise file.fails(f"with which Transformers' own image processor fails: {why}") from None
    expected = (merge**2, CHANNELS * settings.temporal_patch_size * settings.patch_size**2)
    if grid != [[1, merge, merge]] or shape != expected:
        raise file.fails(
            f"with which Transformers' own image processor makes patches of shape {shape} of an image of one visual token; "
            f"Qwen-VL's are of shape {expected}"
        )
