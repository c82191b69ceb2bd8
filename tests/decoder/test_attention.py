"""Every attention option against float64, by error budget: at most twice the error of the written-out one, plus rounding."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

from fastvl_lab import Lab, toggles
from fastvl_lab.cache.concat import ConcatKv, ConcatSequence
from fastvl_lab.catalogue import Attention
from fastvl_lab.decoder import bind_decoder, eager, sdpa
from fastvl_lab.decoder.fixed_kv import KvTableInPlace
from fastvl_lab.decoder.steps import decode, prefill
from fastvl_lab.decoder.weights import decoder_weights
from fastvl_lab.request import Prompt
from fastvl_lab.trace import no_inner
from fastvl_lab.vit import attention as tower_attention

# Each of torch's kernels is named by an option; without CUDA their calls go to the CPU's kernel, and are otherwise the same.
STAGES = {
    "prefill": {"eager": eager.prefill} | {option: sdpa.bind_prefill(option) for option in sdpa.BACKENDS},
    "decode": {"eager": eager.decode} | dict.fromkeys(sdpa.BACKENDS, sdpa.decode),
}
OPTIONS = [(stage, option) for stage, options in STAGES.items() for option in options]


def test_every_option_that_a_cpu_can_compute_is_tested_here() -> None:
    for toggle in toggles():
        if toggle.slot == "attention" and toggle.name in STAGES:
            assert {o.value for o in toggle.options} - {"varlen", "triton"} == set(STAGES[toggle.name])


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last queries of a sequence, head by head and query by query, in float64."""
    out, group, before = torch.empty_like(q), q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    for row in range(q.shape[0]):
        seen = before + row + 1
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


def _sequences(
    lengths: Sequence[int], new: Sequence[int], heads: int, kv_heads: int, dim: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [((n, heads, dim), (length, kv_heads, dim), (length, kv_heads, dim)) for length, n in zip(lengths, new, strict=True)]
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in three) for three in shapes]  # type: ignore[misc]


def _cached(sequences: list, new: Sequence[int], dtype: torch.dtype) -> ConcatKv:
    """Their keys and values in a cache: what was before, then what is new."""
    cache = ConcatKv([ConcatSequence(1) for _ in sequences])
    before = [len(k) - n for (_, k, _), n in zip(sequences, new, strict=True)]
    for cut in ([slice(0, b) for b in before], [slice(b, None) for b in before]):
        parts = [(k[c].to(dtype), v[c].to(dtype)) for (_, k, v), c in zip(sequences, cut, strict=True)]
        if all(len(k) for k, _ in parts):
            cache.extend([len(k) for k, _ in parts])
            # Not contiguous, as slices of a fused projection are.
            k, v = (torch.cat([torch.cat(x)] * 2, dim=-1)[..., : parts[0][0].shape[-1]] for x in zip(*parts, strict=True))
            cache.write(0, k, v)
    return cache


CASES = [
    ([1], [1], 4, 4, 16),
    ([7], [7], 4, 1, 32),
    ([130], [130], 6, 2, 24),
    ([257], [257], 4, 2, 64),
    ([90], [13], 4, 2, 16),
    ([64, 3, 17], [64, 3, 17], 4, 2, 16),
    ([64, 9, 17], [2, 3, 16], 4, 1, 16),
]


@pytest.mark.parametrize(("stage", "option"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "new", "heads", "kv_heads", "dim"), CASES)
def test_attention_within_the_error_budget(
    stage: str, option: str, dtype: torch.dtype, lengths: list[int], new: list[int], heads: int, kv_heads: int, dim: int
) -> None:
    """One sequence and several, from the start and on top of what the cache holds."""
    new = new if stage == "prefill" else [1] * len(lengths)
    sequences = _sequences(lengths, new, heads, kv_heads, dim)
    truth = torch.cat([_naive(*sequence) for sequence in sequences])
    cache = _cached(sequences, new, dtype)
    q = torch.cat([q for q, _, _ in sequences]).to(dtype)
    q = torch.cat([q, q], dim=-1)[..., :dim]
    reference = (STAGES[stage]["eager"](q, cache, 0).double() - truth).abs().max()
    out = STAGES[stage][option](q, cache, 0)
    assert out.dtype == dtype
    assert out.shape == q.shape
    assert (out.double() - truth).abs().max() <= 2 * reference + 4 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        assert reference < 1e-5


def _permuted(out: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values, laid out in memory in another order of the dimensions, as kernels do that allocate their own results."""
    back = [order.index(dim) for dim in range(4)]
    return out.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 3, 2)])
@pytest.mark.parametrize(("stage", "option"), [(stage, option) for stage, option in OPTIONS if option != "eager"])
def test_a_kernel_may_lay_its_result_out_as_it_likes(
    stage: str, option: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory-efficient kernel of CUDA allocates [B, M, H, D] and returns a transposed view of it."""
    stock = F.scaled_dot_product_attention

    def laid_out(*x: torch.Tensor, attn_mask: torch.Tensor | None = None, **how: bool) -> torch.Tensor:
        if isinstance(attn_mask, CausalBias):  # which knows the function by its name, and this is another
            attn_mask = attn_mask._materialize(x[0].device)
        return _permuted(stock(*x, attn_mask=attn_mask, **how), order)

    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out)
    for lengths, new, heads, kv_heads, dim in CASES:
        new = new if stage == "prefill" else [1] * len(lengths)
        sequences = _sequences(lengths, new, heads, kv_heads, dim)
        truth = torch.cat([_naive(*sequence) for sequence in sequences])
        q = torch.cat([q for q, _, _ in sequences])
        out = STAGES[stage][option](q, _cached(sequences, new, torch.float64), 0)
        assert torch.allclose(out, truth, atol=1e-12)


@pytest.mark.parametrize("option", list(sdpa.BACKENDS))
def test_a_forward_runs_on_the_kernel_that_its_option_names(
    option: str, labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last layer does for the last token alone is on the kernel of decode."""
    flags = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    }
    enabled: list[set[SDPBackend]] = []

    def seen(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        enabled.append({kernel for kernel, is_enabled in flags.items() if is_enabled()})
        return torch.zeros_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    weights = decoder_weights(labs["tiny-qwen3-vl"].checkpoint)
    slot = Attention(prefill=option, decode="sdpa_math", last_layer="last_token")
    decoder, cache = bind_decoder(slot, weights), ConcatKv([ConcatSequence(len(weights.layers))])
    before = {kernel for kernel, is_enabled in flags.items() if is_enabled()}
    named = before if sdpa.BACKENDS[option] is None else {sdpa.BACKENDS[option]}
    with torch.inference_mode():
        hidden, n = torch.randn(5, weights.embed.shape[1]), len(weights.layers)
        prompt = Prompt(
            input_ids=torch.zeros(5, dtype=torch.int64),
            positions=torch.arange(5).expand(3, -1),
            visual_index=torch.empty(0, dtype=torch.int64),
            next_position=5,
            images=(),
        )
        cache.extend([5])
        prefill(hidden, prompt, None, decoder, cache, no_inner)
        cache.extend([1])
        decode(torch.zeros(1, dtype=torch.int64), torch.full((1,), 5), decoder, cache, no_inner)
    assert enabled == [named] * (n - 1) + [{SDPBackend.MATH}] * (1 + n)
    assert {kernel for kernel, is_enabled in flags.items() if is_enabled()} == before


@pytest.mark.parametrize("option", ["per_window", "grouped", "grouped_flash", "grouped_cudnn"])
def test_the_towers_calls_name_a_kernel_too(option: str) -> None:
    made = getattr(tower_attention, option)(torch.float32)
    assert made.kernel == {
        "grouped_flash": SDPBackend.FLASH_ATTENTION,
        "grouped_cudnn": SDPBackend.CUDNN_ATTENTION,
    }.get(option, SDPBackend.EFFICIENT_ATTENTION)
    with made.on(torch.device("cuda")):
        assert torch.backends.cuda.math_sdp_enabled() is False
        assert torch.backends.cuda.cudnn_sdp_enabled() == (option == "grouped_cudnn")
    with made.on(torch.device("cpu")):
        assert torch.backends.cuda.math_sdp_enabled()


def test_the_bias_of_a_mask_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, biases = torch.Generator().manual_seed(0), []
    layers = [tuple(torch.randn(16, 2, 8, generator=generator) for _ in range(2)) for _ in range(3)]
    stock = F.scaled_dot_product_attention

    def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor) -> torch.Tensor:
        biases.append(attn_mask)
        return stock(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    length = torch.tensor([11], dtype=torch.int32)
    store = SimpleNamespace(layers=layers)
    kv = KvTableInPlace(slot_of=torch.arange(16)[None], lengths=length, store=store, padded=True).open(1)
    q = torch.randn(1, 4, 8, generator=generator)
    out = [sdpa.decode(q, kv, layer) for layer in range(3)]
    assert len({bias.data_ptr() for bias in biases}) == 1
    assert biases[0].dtype == q.dtype
    for (keys, values), made in zip(layers, out, strict=True):
        assert torch.allclose(made, _naive(q, keys[:11], values[:11]), atol=1e-6)


def test_decode_sees_what_prefill_saw_at_its_place() -> None:
    ((q, k, v),) = _sequences([9], [9], 2, 1, 8)
    for option in STAGES["prefill"]:
        whole = STAGES["prefill"][option](q, _cached([(q, k, v)], [9], q.dtype), 0)
        for step in range(9):
            upto = (q[step : step + 1], k[: step + 1], v[: step + 1])
            one = STAGES["decode"][option](upto[0], _cached([upto], [1], q.dtype), 0)
            assert torch.allclose(one[0], whole[step], atol=1e-12)
