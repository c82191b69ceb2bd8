"""What vendors publish about their GPUs, and which of them a name means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastvl_lab.errors import DeviceError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Published peaks of one GPU.

    memory_bandwidth: bytes a second. peak_flops: of dense bfloat16 or float16 matrix products with float32 sums, in operations a
    second, where a multiply and an add are two; what a datasheet gives "with sparsity" is halved. source: where both stand. also:
    other names of it, such as those that torch reports.
    """

    name: str
    memory_bandwidth: float
    peak_flops: float
    source: str
    also: tuple[str, ...] = ()


# Where a vendor's documents give two figures for one GPU, the greater stands here: a limit must accuse nobody wrongly.
HARDWARE = (
    Hardware(name="RTX A6000", memory_bandwidth=768e9, peak_flops=154.8e12, source="NVIDIA RTX A6000 datasheet"),
    Hardware(name="A40", memory_bandwidth=696e9, peak_flops=149.7e12, source="NVIDIA A40 datasheet"),
    Hardware(
        name="A100 40GB",
        memory_bandwidth=1555e9,
        peak_flops=312e12,
        source="NVIDIA A100 datasheet",
        also=("A100-SXM4-40GB", "A100-PCIE-40GB"),
    ),
    Hardware(
        name="A100 80GB PCIe",
        memory_bandwidth=1935e9,
        peak_flops=312e12,
        source="NVIDIA A100 80GB datasheet",
    ),
    Hardware(
        name="A100 80GB SXM",
        memory_bandwidth=2039e9,
        peak_flops=312e12,
        source="NVIDIA A100 80GB datasheet",
        also=("A100-SXM4-80GB",),
    ),
    Hardware(name="L4", memory_bandwidth=300e9, peak_flops=121e12, source="NVIDIA L4 datasheet"),
    Hardware(name="L40", memory_bandwidth=864e9, peak_flops=181.05e12, source="NVIDIA L40 datasheet"),
    Hardware(name="L40S", memory_bandwidth=864e9, peak_flops=362.05e12, source="NVIDIA L40S datasheet"),
    Hardware(name="RTX 3090", memory_bandwidth=936e9, peak_flops=71e12, source="NVIDIA Ampere GA102 GPU architecture, appendix A"),
    Hardware(name="RTX 4090", memory_bandwidth=1008e9, peak_flops=165.2e12, source="NVIDIA Ada GPU architecture, appendix A"),
    Hardware(
        name="RTX 5090", memory_bandwidth=1792e9, peak_flops=209.5e12, source="NVIDIA RTX Blackwell GPU architecture, appendix A"
    ),
    Hardware(
        name="H100 SXM",
        memory_bandwidth=3350e9,
        peak_flops=989.5e12,
        source="NVIDIA H100 datasheet",
        also=("H100 80GB HBM3",),
    ),
    Hardware(
        name="H100 PCIe",
        memory_bandwidth=2039e9,
        peak_flops=756.5e12,
        source="NVIDIA H100 datasheet",
        also=("H100 80GB HBM2e",),
    ),
    Hardware(name="H100 NVL", memory_bandwidth=3900e9, peak_flops=835.5e12, source="NVIDIA H100 datasheet", also=("H100 94GB",)),
    Hardware(
        name="H200 SXM",
        memory_bandwidth=4800e9,
        peak_flops=989.5e12,
        source="NVIDIA H200 datasheet",
        also=("H200", "H200 141GB HBM3e"),  # torch's name for it is "NVIDIA H200"; the other is "NVIDIA H200 NVL"
    ),
    Hardware(name="H200 NVL", memory_bandwidth=4800e9, peak_flops=835.5e12, source="NVIDIA H200 datasheet"),
    Hardware(name="B200", memory_bandwidth=8000e9, peak_flops=2250e12, source="NVIDIA HGX B200 datasheet"),
)


def find_hardware(name: str, *, instead: str = "") -> Hardware:
    """The GPU meant by "RTX A6000", "A6000" or torch's "NVIDIA H100 80GB HBM3".

    A name that is some GPU's own means that GPU; else every word of it must be one of the GPU's. Raises `DeviceError` for a name
    that fits none or several, with the choices, and what else could be given instead.
    """
    asked = _words(str(name))
    exact = [known for known in HARDWARE if any(asked == _words(own) for own in (known.name, *known.also))]
    fits = exact or [known for known in HARDWARE if asked and asked <= _all_words(known)]
    if len(fits) == 1:
        return fits[0]
    choices = ", ".join(known.name for known in fits or HARDWARE)
    what = "may be several" if fits else "is unknown"
    raise DeviceError(f"hardware {name!r} {what}; the choices are {choices}{instead}")


def _all_words(known: Hardware) -> frozenset[str]:
    return _words(" ".join((known.name, *known.also)))


def _words(name: str) -> frozenset[str]:
    """The words that tell one GPU from another: "NVIDIA A100-SXM4-80GB" has a100, sxm and 80gb."""
    joined = re.sub(r"(\d)\s+gb\b", r"\1gb", name.lower())
    words = (re.sub(r"^sxm\d$", "sxm", word) for word in re.findall(r"[a-z0-9]+", joined))
    return frozenset(words) - {"nvidia", "geforce", "tesla"}
