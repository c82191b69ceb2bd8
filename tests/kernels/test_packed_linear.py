"""Linear layers over packed weights: they compute what torch's do, and weights that oneDNN cannot pack are refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvl_lab.catalogue import Target, toggle_at
from fastvl_lab.errors import RecipeError
from fastvl_lab.kernels import packed
from fastvl_lab.kernels.packed import pack, packed_bytes, packed_linear, takes

CPU = torch.device("cpu")


@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n_in", "n_out"), [(320, 960), (37, 101), (1, 5), (864, 320), (37, 4001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_product_is_about_as_near_to_the_truth_as_a_plain_one(
    dtype: torch.dtype, n_in: int, n_out: int, bias: bool
) -> None:
    """Of any number of rows, of rows that are not next to one another, and of a weight that is a view.

    oneDNN adds up a longer run of products before it starts another sum than MKL does, whose error is a third of it.
    """
    if not takes(dtype):
        pytest.skip(f"oneDNN packs no weights in {dtype} for this CPU")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in + 3, generator=generator).to(dtype)[:, :n_in]
    b = torch.randn(n_out, generator=generator).to(dtype) if bias else None
    copy = pack(weight)
    assert packed_bytes(copy) >= weight.numel() * weight.itemsize
    for rows in (0, 1, 2, 7, 300):
        for x in (
            torch.randn(rows, n_in, generator=generator).to(dtype),
            torch.randn(n_in, rows, generator=generator).to(dtype).t(),
        ):
            wide = [None if t is None else t.double() for t in (x, weight, b)]
            truth = torch.nn.functional.linear(*wide)  # type: ignore[arg-type]
            plain, ours = torch.nn.functional.linear(x, weight, b), packed_linear(x, copy, weight, b)
            assert ours.shape == truth.shape
            assert ours.dtype == dtype
            if rows > 0:
                rounding = torch.finfo(dtype).eps * truth.norm()
                assert (ours - truth).norm() <= 4 * (plain - truth).norm() + rounding


class _Products(TorchDispatchMode):
    """The operators that ran, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("n_in", "rows", "onednn"), [(4096, 1, True), (4095, 1, False), (512, 8, True), (511, 255, False), (511, 256, True)]
)
def test_small_products_are_torchs_and_large_ones_onednns(n_in: int, rows: int, onednn: bool) -> None:
    """Also that of one row, which torch would give to one thread. What is packed is a copy; one row reads the weight itself."""
    weight, x = torch.ones(256, n_in), torch.ones(rows, n_in)
    copy = pack(weight)
    weight.zero_()
    with _Products() as ran:
        product = packed_linear(x, copy, weight, None)
    assert ("mkldnn::_linear_pointwise" in ran.names) == onednn
    assert product.eq(n_in if onednn and rows > 1 else 0).all()


def test_a_weight_that_is_not_packed_is_read_as_it_is() -> None:
    weight, x = torch.ones(256, 512), torch.ones(3, 512)
    with _Products() as ran:
        assert packed_linear(x, weight, weight, None).eq(512).all()
    assert "mkldnn::_linear_pointwise" in ran.names


def test_what_cannot_be_packed_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("vit.weights", "attention.weights"):
        toggle = toggle_at(path)
        toggle.check("packed", Target(device=CPU, dtype=torch.float32))
        with pytest.raises(RecipeError, match=f"{path}=packed cannot run here: it needs a CPU, and the lab runs on cuda"):
            toggle.check("packed", Target(device=torch.device("cuda"), dtype=torch.float32))
        with monkeypatch.context() as patched:
            patched.setattr(packed._mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
            with pytest.raises(
                RecipeError, match="whose oneDNN packs weights in bfloat16 for this CPU; the choices here are 'plain'"
            ):
                toggle.check("packed", Target(device=CPU, dtype=torch.bfloat16))
            toggle.check("packed", Target(device=CPU, dtype=torch.bfloat16, here=False))
        with monkeypatch.context() as patched:
            patched.setattr(torch.backends.mkldnn, "is_available", lambda: False)
            with pytest.raises(RecipeError, match="whose oneDNN packs weights in float32 for this CPU"):
                toggle.check("packed", Target(device=CPU, dtype=torch.float32))
