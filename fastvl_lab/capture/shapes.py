"""To what sizes a stage's inputs are padded, so that requests of neighbouring sizes share a program."""

from __future__ import annotations

from collections.abc import Callable

from fastvl_lab.kernels.plain import power_of_two

Size = Callable[[int], int]

_LEAST = 64

# How many keys a captured decode step reads at least; from there, powers of two.
_LEAST_KEYS = 256


def size_of(option: str) -> Size | None:
    """The function from a number of tokens to the number that is computed, or None for no padding at all."""
    sizes: dict[str, Size | None] = {
        "exact": None,
        "multiples_of_64": lambda n: -(-n // 64) * 64,
        "multiples_of_256": lambda n: -(-n // 256) * 256,
        "powers_of_two": lambda n: max(_LEAST, power_of_two(n)),
    }
    return sizes[option]


def keys_of_a_step(n: int) -> int:
    """Keys that a captured decode step reads where n are there: a graph for every length would be captured at every step."""
    return max(_LEAST_KEYS, power_of_two(n))


def rows_of_a_step(n: int) -> int:
    """Sequences that a captured decode step computes for n, as requests come and go (vLLM's `cudagraph_capture_sizes`)."""
    return power_of_two(n)


def sizes_up_to(longest: int, size: Size, most: int) -> list[int]:
    """All numbers, the least first, that numbers up to `longest` become, none above `most`."""
    sizes, n = [], 1
    while n <= longest:
        sizes.append(min(size(n), most))
        n = size(n) + 1
    return sizes
