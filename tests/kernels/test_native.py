"""The Triton kernels as machine code, compiled for GPUs that need not be there; and how tuned launch settings are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Of one block, in bytes, by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # as 8.6 and 8.9 have it, which take code of 8.0
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# Calls of what is tuned, and of the rest: all for Hopper, and for the others of each kernel the one that takes most.
CALLS = {90: ("windows_80", "frames_80", "frames_64", "prefill", "decode", "rest"), 80: ("frames_80", "prefill", "decode", "rest")}
CALLS[100] = ("frames_80", "decode")


@pytest.fixture
def shared_cache() -> Path:
    """What one of these scripts has compiled no other compiles again."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "native"


@pytest.fixture
def script(forked: Callable[..., str]) -> Callable[..., Any]:
    """What a script of this folder prints, given Triton's cache and arguments."""
    return lambda name, cache, *arguments: json.loads(
        forked(HERE / name, *arguments, TRITON_CACHE_DIR=str(cache)).strip().splitlines()[-1]
    )


@pytest.fixture
def native(script: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    return lambda cache, gpu, *calls: script("native.py", cache, str(gpu), *calls)


EVERY = "--every-launch"


@pytest.mark.parametrize(
    ("capability", "options"),
    [(90, ()), *(pytest.param(capability, (EVERY,), marks=pytest.mark.native) for capability in CALLS)],
    ids=lambda value: str(value) if isinstance(value, int) else "".join(value) or "extremes",
)
def test_every_kernel_compiles_and_has_a_launch_that_fits(
    native: Callable[..., dict[str, Any]], capability: int, options: tuple[str, ...], shared_cache: Path
) -> None:
    """On cards from Ampere to Blackwell: into shared memory and registers, and onto the card's tensor cores."""
    compiled = native(shared_cache, capability, *CALLS[capability], *options)["compiled"]
    for call in [call for call in CALLS[capability] if call != "rest"]:
        launches = [kernel for kernel in compiled if kernel["call"].startswith(call) and kernel["block_k"]]
        assert [kernel for kernel in launches if kernel["shared"] <= SHARED_MEMORY[capability] and kernel["stack"] == 0], launches
        # Of one query a head, products are too small for any but the oldest instruction.
        expected = "mma.sync" if call == "decode" else TENSOR_CORES[capability]
        assert all(expected in kernel["uses"] for kernel in launches), (call, launches)
    assert [kernel for kernel in compiled if kernel["call"].startswith("rest") and kernel["stack"] > 0] == []


def test_torch_compile_reads_every_kernel_and_leaves_none_out(script: Callable[..., Any], shared_cache: Path) -> None:
    """What it must read where a stage is compiled on a device."""
    kernels = script("traced.py", shared_cache)
    assert set(kernels) >= set(CALLS[90])
    assert kernels["prefill"] == ["prefill_attention_kernel"]
    assert kernels["decode"] == ["decode_share_kernel", "_gather_kernel"]
    assert len(kernels["rest"]) == 10


COMPILED = tuple(f"capture.{stage}=compile" for stage in ("vit", "prefill", "decode"))


@pytest.mark.parametrize(
    ("checkpoint", "choices", "stages"),
    [
        ("tiny-qwen2.5-vl", COMPILED, ["vit", "prefill", "decode"]),
        ("tiny-qwen3-vl", ("cache.kv=paged",), []),
    ],
)
def test_another_size_of_image_is_no_reason_to_compile(
    script: Callable[..., Any], checkpoint: str, choices: tuple[str, ...], stages: list[str], shared_cache: Path
) -> None:
    """Whatever can be is Triton's: all of it is compiled for the first request, and a stage again where it is another program."""
    first, *others = script("dry_run.py", shared_cache, checkpoint, *choices)
    assert {"_patchify_kernel", "segment_attention_kernel", "prefill_attention_kernel", "decode_share_kernel"} <= {
        *first["kernels"]
    }
    assert first["stages"] == stages
    assert len(others) > 3
    assert [request for request in others if request["kernels"]] == []
    again = [request["stages"] for request in others if request["stages"]]
    assert again == ([["vit"]] if stages else [])  # of the image whose only segment is a window


def test_what_was_tuned_is_kept_for_other_processes_on_the_same_card(native: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = native(tmp_path, "90,H100 SXM", "decode")
    n_launches = first["measured"]
    assert n_launches > 1
    last_launch = first["compiled"][n_launches - 1]
    again = native(tmp_path, "90,H100 SXM", "decode", "decode_250")
    assert again["measured"] == 0  # 200 and 250 keys share settings
    assert again["compiled"][0] == last_launch  # the one that was made out to be the fastest
    assert native(tmp_path, "90,H100 PCIe", "decode")["measured"] == n_launches
