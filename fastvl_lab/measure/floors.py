"""What a request and its stages must cost at least: operations and bytes, and what a device was seen to do with them a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastvl_lab.cache.slotted import KvShape
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.engine_thread import EngineThread
from fastvl_lab.errors import DeviceError, RequestError
from fastvl_lab.lab import Lab, device_name, dtype_name
from fastvl_lab.measure.hardware import find_hardware
from fastvl_lab.measure.samples import now, time_rounds
from fastvl_lab.measure.tasks import grids_of
from fastvl_lab.request import Grid, Request
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.vit import positions


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one forward, a multiply and an add counted as two.

    linear: of the matrix products with weights, in proportion to patches or tokens. attention: of queries with keys and weights
    with values, in proportion to the pairs that see one another.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def vit_flops(checkpoint: Checkpoint, grids: Sequence[Grid], *, frames: int | None = None) -> Flops:
    """Operations for these grids, whatever does them; frames: how many times an image is in its clip (config: twice)."""
    vision, in_clip, merge = checkpoint.vision, checkpoint.patches.temporal_patch_size, checkpoint.merge_size
    n_patches = sum(grid.n_patches for grid in grids)
    n_visual = n_patches // merge**2
    weights_a_patch = vision.patch_embed.weight.numel() * (in_clip if frames is None else frames) // in_clip
    weights_a_patch += sum(_matrix_weights(block) for block in vision.blocks)
    mergers = [vision.merger, *vision.deepstack.values()]
    linear = 2 * (n_patches * weights_a_patch + n_visual * sum(_matrix_weights(merger) for merger in mergers))

    segments = positions.frames(grids)
    squares = len(vision.blocks) * _squares(segments)
    if vision.window is not None:
        n_windowed = vision.full_attention.count(False)
        squares += n_windowed * (_squares(positions.windows(grids, merge, vision.window)) - _squares(segments))
    return Flops(linear=linear, attention=4 * vision.hidden_size * squares)


def prefill_flops(checkpoint: Checkpoint, length: int, *, last_token_alone: bool = False) -> Flops:
    """Operations of a prompt of `length` tokens in the decoder, whatever does them, and of the LM head on the last token.

    Causal attention counts as what it needs: a query with its own key and those before it. last_token_alone: of the last layer,
    the keys and values of all tokens, and all else of the last token only.
    """
    text = checkpoint.text
    linear = length * sum(_matrix_weights(block) for block in text.blocks) + text.head.weight.numel()
    pairs, last = len(text.blocks) * length * (length + 1) // 2, text.layers[-1]
    if last_token_alone:
        kept = last.k.weight.numel() + last.v.weight.numel()
        linear -= (length - 1) * (_matrix_weights(text.blocks[-1]) - kept)
        pairs -= length * (length - 1) // 2
    return Flops(linear=2 * linear, attention=4 * len(last.q.weight) * pairs)


def decode_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Bytes that one decode step must read, with keys and values of `length` tokens.

    Every weight of the layers, the final norm and the LM head once; of the embedding table one row, tied to the head or not.
    """
    text = checkpoint.text
    layers = [weight for block in text.blocks for weight in block.parameters()]
    weights: list[torch.Tensor] = [*layers, text.norm, text.head.weight, text.embed[0]]
    return sum(weight.nbytes for weight in weights) + length * KvShape.of(checkpoint).bytes_per_token


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device was seen to do per second: operations of matrix products; bytes read and written inside the device; bytes
    from page-locked memory of the host to the device, None on a CPU."""

    matmul: float
    copied: float
    uploaded: float | None

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        uploaded = upload_ceiling(device) if device.type == "cuda" else None
        return cls(matmul=matmul_ceiling(device, dtype), copied=copy_ceiling(device), uploaded=uploaded)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage cannot do with less of: operations, bytes to and from the device's memory, and bytes from the host."""

    flops: int = 0
    moved: int = 0
    uploaded: int = 0

    def seconds(self, ceilings: Ceilings) -> float:
        """The stage's floor: the longest of its `parts`, as if the others were free."""
        return max(self.parts(ceilings).values())

    def parts(self, ceilings: Ceilings) -> dict[str, float]:
        """The seconds of each; an upload is free where its ceiling is not known."""
        upload = self.uploaded / ceilings.uploaded if ceilings.uploaded else 0.0
        return {"operations": self.flops / ceilings.matmul, "memory": self.moved / ceilings.copied, "upload": upload}


def stage_works(checkpoint: Checkpoint, grids: Sequence[Grid], length: int, *, last_token_alone: bool = True) -> dict[str, Work]:
    """The least work of "upload", "vit" and "prefill" for images of these grids in a prompt of `length` tokens, and of a "decode"
    step.

    An image counts once in its clip, and goes to the device as bytes. A stage reads each of its weights once, and what is handed
    from layer to layer inside it counts as free. The decode step is the first, with the keys and values of the prompt.
    last_token_alone: `prefill_flops`.
    """
    vision, row = checkpoint.vision, checkpoint.text.embed[0].nbytes
    pixels = sum(grid.n_patches for grid in grids) * vision.patch_embed.weight[0].numel() // checkpoint.patches.temporal_patch_size
    n_visual = sum(grid.visual_tokens(checkpoint.merge_size) for grid in grids)
    made = (1 + len(vision.deepstack)) * n_visual * row
    of_vit = sum(weight.nbytes for weight in vision.module.parameters())
    prompt, longer = prefill_flops(checkpoint, length), prefill_flops(checkpoint, length + 1)
    step = prefill_flops(checkpoint, 1).linear + longer.attention - prompt.attention
    prefill = prefill_flops(checkpoint, length, last_token_alone=last_token_alone)
    return {
        "upload": Work(uploaded=pixels),
        "vit": Work(flops=vit_flops(checkpoint, grids, frames=1).total, moved=of_vit + pixels + made) if grids else Work(),
        "prefill": Work(flops=prefill.total, moved=decode_bytes(checkpoint, length) + (length - 1) * row),
        "decode": Work(flops=step, moved=decode_bytes(checkpoint, length + 1)),
    }


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a request must cost at least on a device that does no more a second than `ceilings`.

    works: by stage, as `stage_works` has them; source: where the ceilings come from; n_prompt, n_visual: tokens of the whole prompt
    and of its images.
    """

    works: Mapping[str, Work]
    ceilings: Ceilings
    source: str
    n_prompt: int
    n_visual: int

    @property
    def seconds(self) -> dict[str, float]:
        """By stage; "decode" is one step, the first."""
        return {stage: work.seconds(self.ceilings) for stage, work in self.works.items()}

    @property
    def patches(self) -> float:
        """Seconds from patches on the device to the first token."""
        return self.seconds["vit"] + self.seconds["prefill"]

    @property
    def tokens_per_second(self) -> float:
        """At most, in the decode steps of one request."""
        return 1 / self.seconds["decode"]

    def __str__(self) -> str:
        upload = "" if self.ceilings.uploaded is None else f", upload {self.ceilings.uploaded / 1e9:.1f} GB/s"
        lines = [
            f"floor of {self.n_prompt} tokens, {self.n_visual} of them visual; {self.source}: "
            f"matmul {self.ceilings.matmul / 1e12:.2f} TFLOP/s, memory {self.ceilings.copied / 1e9:.0f} GB/s{upload}",
            f"  {'stage':<8} {'GFLOP':>10} {'MB':>10} {'floor ms':>10}  bound by",
        ]
        for stage, work in self.works.items():
            seconds, limit = max((seconds, part) for part, seconds in work.parts(self.ceilings).items())
            if seconds > 0:
                done = f"{work.flops / 1e9:10.1f} {(work.moved + work.uploaded) / 1e6:10.1f}"
                lines.append(f"  {stage:<8} {done} {seconds * 1e3:10.3f}  {limit}")
        lines.append(f"  patches to first token {self.patches * 1e3:.2f} ms; at most {self.tokens_per_second:.0f} tokens/s")
        return "\n".join(lines)


def floor(lab: Lab, request: Request, *, ceilings: Ceilings | None = None, hardware: str | None = None) -> Floor:
    """The least time of a request's stages on the lab's device, as measured now, or on a GPU that need not be there.

    ceilings: measured before (`Ceilings.measure`). hardware: a GPU's name (`measure.hardware`), for what its vendor publishes of
    half precision, which the lab must then be in; an upload has no floor there. Raises `RequestError` and `ImageError` for a
    request that cannot be served, `DeviceError` for hardware that is unknown, or in float32, or given beside ceilings.
    """
    if ceilings is not None and hardware is not None:
        raise DeviceError(f"hardware is {hardware!r} and ceilings are given too; give one of them, or none to measure here")
    source = f"measured on {device_name(lab.device)} in {dtype_name(lab.dtype)}"
    if hardware is not None:
        known = find_hardware(hardware)
        if lab.dtype not in (torch.bfloat16, torch.float16):
            raise DeviceError(
                f"{known.name} is known in bfloat16 and float16, and the lab is in {lab.dtype}; load it with dtype='bfloat16'"
            )
        ceilings = Ceilings(matmul=known.peak_flops, copied=known.memory_bandwidth, uploaded=None)
        source = f"{known.name} as published ({known.source})"
    grids = grids_of(lab, request)
    n_prompt = tokenize(request, grids, lab.checkpoint).n_tokens
    return Floor(
        works=stage_works(lab.checkpoint, grids, n_prompt),
        ceilings=ceilings or Ceilings.measure(lab.device, lab.dtype),
        source=source,
        n_prompt=n_prompt,
        n_visual=sum(grid.visual_tokens(lab.checkpoint.merge_size) for grid in grids),
    )


def _squares(groups: positions.Groups) -> int:
    """Pairs of patches that see one another."""
    return sum(group.number * group.length**2 for group in groups)


def _matrix_weights(module: Any) -> int:
    """Weights that every row meets once: those of the linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def matmul_ceiling(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 5) -> float:
    """Operations a second of a square matrix product of random values, since zeros run faster; the median of some.

    size: of one side; by default 8192 on CUDA and 2048 on a CPU.
    """
    side = size or (8192 if device.type == "cuda" else 2048)

    def seconds() -> float:
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(side, side, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        return _median_seconds(device, lambda: torch.mm(a, b), repeats)

    return 2 * side**3 / EngineThread.of(device).call(seconds)


def copy_ceiling(device: torch.device, *, n_bytes: int | None = None, repeats: int = 5) -> float:
    """Bytes a second that a copy inside the device reads and writes, both counted; the median of some.

    n_bytes: of what is copied; by default 1 GiB on CUDA and 256 MiB on a CPU, more than its caches hold.
    """
    n = (n_bytes or (2**30 if device.type == "cuda" else 2**28)) // 4

    def seconds() -> float:
        source, target = (torch.full((n,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        return _median_seconds(device, lambda: target.copy_(source), repeats)

    return 2 * 4 * n / EngineThread.of(device).call(seconds)


def upload_ceiling(device: torch.device, *, n_bytes: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second of a copy from page-locked memory of the host to a CUDA device, the median of some."""
    source, target = torch.ones(n_bytes, dtype=torch.uint8, pin_memory=True), torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return n_bytes / _median_seconds(device, lambda: target.copy_(source, non_blocking=True), repeats)


def _median_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    def once() -> dict[str, float]:
        started = now(device)
        work()
        return {"": now(device) - started}

    return time_rounds({"": once}, repeats=repeats, quiet=None).median("").median  # the rounds of warm-up set libraries up


@dataclass(frozen=True, kw_only=True)
class Cost:
    """seconds = fixed + per_patch * n + per_pair * n**2, none of them negative."""

    fixed: float
    per_patch: float
    per_pair: float

    def parts(self, n: float) -> tuple[float, float, float]:
        """The seconds of each term at n patches."""
        return self.fixed, self.per_patch * n, self.per_pair * n * n

    def off(self, patches: Sequence[int], seconds: Sequence[float]) -> float:
        """The largest share by which it is off what was measured; NaN, the time of what was always disturbed, is left out."""
        return max(abs(sum(self.parts(n)) / t - 1) for n, t in zip(patches, seconds, strict=True) if t == t)


def fit_cost(patches: Sequence[int], seconds: Sequence[float]) -> Cost:
    """The cost that comes nearest in relative error, by least squares over the terms that can be positive together.

    Of all subsets of terms whose best fit has no negative term, the one with the least error is taken. NaN, the time of what was
    always disturbed, is left out; raises `RequestError` where nothing is left.
    """
    n, t = np.asarray(patches, float), np.asarray(seconds, float)
    n, t = n[np.isfinite(t)], t[np.isfinite(t)]
    if not n.size:
        raise RequestError("there is no time to fit a cost to: the machine was busy during every round")
    columns = np.stack([np.ones_like(n), n, n * n], axis=1) / t[:, None]
    best, least = np.zeros(3), np.inf
    for chosen in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [2], [1], [0]):
        values = np.linalg.lstsq(columns[:, chosen], np.ones_like(n), rcond=None)[0]
        error = float(((columns[:, chosen] @ values - 1) ** 2).sum())
        if (values >= 0).all() and error < least:
            least, best = error, np.zeros(3)
            best[chosen] = values
    return Cost(fixed=best[0], per_patch=best[1], per_pair=best[2])
