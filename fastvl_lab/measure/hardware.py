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
# GB/s, TFLOP/s; torch's name for an H200 SXM is "NVIDIA H200", and the other's is "NVIDIA H200 NVL".
_PUBLISHED: dict[str, tuple[float, float, str, tuple[str, ...]]] = {
    "RTX A6000": (768, 154.8, "NVIDIA RTX A6000 datasheet", ()),
    "A40": (696, 149.7, "NVIDIA A40 datasheet", ()),
    "A100 40GB": (1555, 312, "NVIDIA A100 datasheet", ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "A100 80GB PCIe": (1935, 312, "NVIDIA A100 80GB datasheet", ()),
    "A100 80GB SXM": (2039, 312, "NVIDIA A100 80GB datasheet", ("A100-SXM4-80GB",)),
    "L4": (300, 121, "NVIDIA L4 datasheet", ()),
    "L40": (864, 181.05, "NVIDIA L40 datasheet", ()),
    "L40S": (864, 362.05, "NVIDIA L40S datasheet", ()),
    "RTX 3090": (936, 71, "NVIDIA Ampere GA102 GPU architecture, appendix A", ()),
    "RTX 4090": (1008, 165.2, "NVIDIA Ada GPU architecture, appendix A", ()),
    "RTX 5090": (1792, 209.5, "NVIDIA RTX Blackwell GPU architecture, appendix A", ()),
    "H100 SXM": (3350, 989.5, "NVIDIA H100 datasheet", ("H100 80GB HBM3",)),
    "H100 PCIe": (2039, 756.5, "NVIDIA H100 datasheet", ("H100 80GB HBM2e",)),
    "H100 NVL": (3900, 835.5, "NVIDIA H100 datasheet", ("H100 94GB",)),
    "H200 SXM": (4800, 989.5, "NVIDIA H200 datasheet", ("H200", "H200 141GB HBM3e")),
    "H200 NVL": (4800, 835.5, "NVIDIA H200 datasheet", ()),
    "B200": (8000, 2250, "NVIDIA HGX B200 datasheet", ()),
}
HARDWARE = tuple(
    Hardware(name=name, memory_bandwidth=gigabytes * 1e9, peak_flops=tera * 1e12, source=source, also=also)
    for name, (gigabytes, tera, source, also) in _PUBLISHED.items()
)


def find_hardware(name: str, *, instead: str = "") -> Hardware:
    """The GPU meant by "RTX A6000", "A6000" or torch's "NVIDIA H100 80GB HBM3".

    A name that is some GPU's own means that GPU; else every word of it must be one of the GPU's. Raises `DeviceError` for a name
    that fits none or several, with the choices, and what else could be given instead.
    """
    asked = _words(str(name))
    names = {known: [_words(own) for own in (known.name, *known.also)] for known in HARDWARE}
    exact = [known for known, own in names.items() if asked in own]
    fits = exact or [known for known, own in names.items() if asked and asked <= frozenset().union(*own)]
    if len(fits) == 1:
        return fits[0]
    choices = ", ".join(known.name for known in fits or HARDWARE)
    what = "may be several" if fits else "is unknown"
    raise DeviceError(f"hardware {name!r} {what}; the choices are {choices}{instead}")


def _words(name: str) -> frozenset[str]:
    """The words that tell one GPU from another: "NVIDIA A100-SXM4-80GB" has a100, sxm and 80gb."""
    joined = re.sub(r"(\d)\s+gb\b", r"\1gb", name.lower())
    words = (re.sub(r"^sxm\d$", "sxm", word) for word in re.findall(r"[a-z0-9]+", joined))
    return frozenset(words) - {"nvidia", "geforce", "tesla"}
