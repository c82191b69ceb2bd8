"""What a stage must cost at least, against what torch counts and what tensors hold; ceilings on a clock of our own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvl_lab import DeviceError, Lab, Request, RequestError, floor, photo
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.shape import without_weights
from fastvl_lab.measure import floors
from fastvl_lab.measure.floors import (
    Ceilings,
    Cost,
    Work,
    copy_ceiling,
    decode_bytes,
    fit_cost,
    matmul_ceiling,
    prefill_flops,
    stage_works,
    vit_flops,
)
from fastvl_lab.request import Grid

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_operations_are_those_that_torch_counts_in_the_stock_tower(labs: dict[str, Lab], name: str) -> None:
    checkpoint = labs[name].checkpoint
    visual, grids = checkpoint.model.model.visual, [Grid(1, 10, 14), Grid(1, 18, 26)]
    patches = torch.zeros(sum(g.n_patches for g in grids), visual.patch_embed.proj.weight[0].numel())
    # Written out, attention is two batched products; torch does not count its fused kernel on a CPU.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        visual(patches, grid_thw=torch.tensor(grids))
    flops = vit_flops(checkpoint, grids)
    counted = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counted.items() if "bmm" in str(op))
    assert flops.attention == attention
    assert flops.linear == sum(counted.values()) - attention
    once = vit_flops(checkpoint, grids, frames=1)
    assert once.attention == flops.attention
    assert flops.linear - once.linear == visual.patch_embed.proj.weight.numel() * len(patches)


@pytest.mark.parametrize("length", [1, 50])
def test_operations_are_those_that_torch_counts_in_the_stock_decoder(lab: Lab, length: int) -> None:
    model, width = lab.checkpoint.model, lab.checkpoint.config.text_config.hidden_size
    embeds, positions = torch.zeros(1, length, width), torch.arange(length).expand(3, 1, -1)
    # Written out, attention is two batched products, of every query with every key.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model.lm_head(model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[:, -1:])
    counted = counter.get_flop_counts()["Global"]
    square = sum(n for op, n in counted.items() if "bmm" in str(op))
    flops = prefill_flops(lab.checkpoint, length)
    assert flops.linear == sum(counted.values()) - square
    assert flops.attention * 2 * length == square * (length + 1)  # the half that is causal, with the diagonal


def test_operations_by_hand(labs: dict[str, Lab]) -> None:
    """tiny-qwen2.5-vl: 4 layers, 4 heads and 1 key head of 64, widths 256 and 704, a vocabulary of 320."""
    checkpoint, layer, keys_values = labs["tiny-qwen2.5-vl"].checkpoint, 2 * 256 * 256 + 3 * 256 * 704, 2 * 256 * 64
    flops = prefill_flops(checkpoint, 3)
    assert flops.linear == 2 * (3 * 4 * (layer + keys_values) + 256 * 320)
    assert flops.attention == 4 * 4 * 4 * 64 * (1 + 2 + 3)
    alone = prefill_flops(checkpoint, 3, last_token_alone=True)
    assert alone.linear == 2 * (3 * 3 * layer + layer + 3 * 4 * keys_values + 256 * 320)
    assert alone.attention == 4 * 4 * 64 * (3 * (1 + 2 + 3) + 3)
    assert prefill_flops(checkpoint, 1, last_token_alone=True) == prefill_flops(checkpoint, 1)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_bytes_are_those_of_the_tensors(labs: dict[str, Lab], other_checkpoint: Callable[..., Checkpoint], name: str) -> None:
    tied, untied = labs[name].checkpoint, other_checkpoint(name, tie_word_embeddings=False)
    config, text = tied.config.text_config, tied.model.model.language_model
    row, head_dim = config.hidden_size * 4, text.layers[0].self_attn.head_dim
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    assert decode_bytes(tied, 7) == sum(p.nbytes for p in text.parameters()) + row + 7 * a_token  # the table is the head
    assert decode_bytes(untied, 7) == decode_bytes(tied, 7)  # of two tables, one is read
    assert decode_bytes(other_checkpoint(name, dtype=torch.bfloat16), 7) * 2 == decode_bytes(tied, 7)


def test_ceilings_count_what_is_done_between_two_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(floors, "now", lambda device: next(ticks) / 4)
    assert copy_ceiling(CPU, n_bytes=4096) == 4 * 2 * 4096  # read and written
    assert matmul_ceiling(CPU, torch.float32, size=8) == 4 * 2 * 8**3  # a multiply and an add each


def test_a_copy_and_a_product_take_time() -> None:
    assert matmul_ceiling(CPU, torch.float32, size=1024, repeats=3) > 1e9
    assert 1e8 < copy_ceiling(CPU, n_bytes=2**26, repeats=3) < 1e13


@pytest.mark.parametrize(
    ("hub_id", "first_token_ms", "tokens_per_second"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", {Grid(1, 32, 32): 3.7, Grid(1, 68, 92): 22.7}, 486),
        ("Qwen/Qwen3-VL-4B-Instruct", {Grid(1, 28, 28): 3.4, Grid(1, 60, 80): 18.6}, 373),
    ],
)
def test_floors_are_those_that_others_have_worked_out(
    hub_id: str, first_token_ms: dict[Grid, float], tokens_per_second: int
) -> None:
    """For 448x448 and 1280x960 with 32 tokens of text, on an H100 with 798 TFLOP/s and 3.0 TB/s.

    They count the last layer for every token, and no keys and values in a decode step.
    """
    checkpoint, ceilings = without_weights(hub_id, "bfloat16"), Ceilings(matmul=798e12, copied=3e12, uploaded=None)
    for grid, known in first_token_ms.items():
        length, ms = grid.visual_tokens(2) + 32, {}
        for alone in (False, True):
            works = stage_works(checkpoint, [grid], length, last_token_alone=alone)
            ms[alone] = 1e3 * (works["vit"].seconds(ceilings) + works["prefill"].seconds(ceilings))
        assert round(ms[False], 1) == known
        assert 0.98 * ms[False] < ms[True] <= ms[False]
        assert 0.97 * tokens_per_second < 1 / works["decode"].seconds(ceilings) < tokens_per_second
    assert round(ceilings.copied / decode_bytes(checkpoint, 0)) == tokens_per_second


def test_the_floor_is_the_time_of_what_takes_longest() -> None:
    ceilings = Ceilings(matmul=100.0, copied=10.0, uploaded=1.0)
    assert Work(flops=100, moved=5, uploaded=0).seconds(ceilings) == 1.0
    assert Work(flops=100, moved=50, uploaded=2).seconds(ceilings) == 5.0
    assert Work(flops=100, moved=50, uploaded=7).seconds(ceilings) == 7.0
    assert Work(uploaded=7).seconds(Ceilings(matmul=1.0, copied=1.0, uploaded=None)) == 0.0


def test_a_stage_has_the_work_that_cannot_be_spared(lab: Lab) -> None:
    checkpoint, grids, length = lab.checkpoint, [Grid(1, 8, 6), Grid(1, 4, 4)], 40
    visual, text = checkpoint.model.model.visual, checkpoint.model.model.language_model
    patch, row = visual.patch_embed.proj.weight[0, :, 0].numel(), text.embed_tokens.weight[0].nbytes
    works = stage_works(checkpoint, grids, length)
    assert works["upload"] == Work(uploaded=64 * patch)  # a byte a channel, one frame
    levels = 1 + len(getattr(visual, "deepstack_merger_list", ()))
    assert works["vit"].flops == vit_flops(checkpoint, grids, frames=1).total
    assert works["vit"].moved == sum(p.nbytes for p in visual.parameters()) + 64 * patch + 16 * levels * row
    assert works["prefill"].flops == prefill_flops(checkpoint, length, last_token_alone=True).total
    assert works["prefill"].moved == decode_bytes(checkpoint, length) + 39 * row
    assert works["decode"].moved == decode_bytes(checkpoint, 41)
    longer, shorter = (prefill_flops(checkpoint, n) for n in (length + 1, length))
    head = 2 * checkpoint.model.lm_head.weight.numel()  # which both count once
    assert works["decode"].flops == longer.total - shorter.total + head


def test_the_floor_of_a_request_is_that_of_its_stages(lab: Lab) -> None:
    request = Request(images=[photo("coffee", (224, 168)), photo("rocket", (97, 310))], prompt="Compare.", max_new_tokens=1)
    run = lab.run(request, "baseline")
    ceilings = Ceilings(matmul=1e11, copied=1e10, uploaded=None)
    found = floor(lab, request, ceilings=ceilings)
    works = stage_works(lab.checkpoint, [shape.grid for shape in run.shapes], run.n_prompt)
    assert (found.works, found.n_prompt) == (works, run.n_prompt)
    assert found.n_visual == sum(shape.grid.visual_tokens(lab.checkpoint.merge_size) for shape in run.shapes)
    assert found.seconds == {stage: work.seconds(ceilings) for stage, work in works.items()}
    assert found.patches == found.seconds["vit"] + found.seconds["prefill"]
    assert found.tokens_per_second * found.seconds["decode"] == pytest.approx(1)
    printed = str(found).splitlines()
    assert "matmul 0.10 TFLOP/s, memory 10 GB/s" in printed[0]
    assert [line.split()[0] for line in printed[2:-1]] == ["vit", "prefill", "decode"]  # nothing is uploaded to a CPU
    assert printed[-2].endswith("memory")
    assert f"{found.seconds['vit'] * 1e3:.3f}  operations" in printed[2]


def test_a_text_alone_has_no_floor_in_the_tower(lab: Lab) -> None:
    found = floor(lab, Request(prompt="Hello.", max_new_tokens=1), ceilings=Ceilings(matmul=1e11, copied=1e10, uploaded=None))
    assert found.seconds["vit"] == found.n_visual == 0
    assert found.patches == found.seconds["prefill"] > 0
    assert "vit" not in str(found)


def test_a_gpu_that_is_not_here_has_the_floor_that_its_vendor_publishes(labs: dict[str, Lab]) -> None:
    request = Request(images=[photo("coffee", (224, 168))], prompt="What?", max_new_tokens=1)
    half = Lab("tiny-qwen3-vl", device="cpu", dtype="bfloat16")
    found = floor(half, request, hardware="H100 SXM")
    assert found.ceilings == Ceilings(matmul=989.5e12, copied=3350e9, uploaded=None)
    assert "H100 SXM as published" in str(found)
    with pytest.raises(DeviceError, match="float16, and the lab is in"):
        floor(labs["tiny-qwen3-vl"], request, hardware="H100 SXM")
    with pytest.raises(DeviceError, match="unknown"):
        floor(half, request, hardware="abacus")
    with pytest.raises(RequestError, match="the request is a NoneType"):
        floor(half, None)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="give one of them"):
        floor(half, request, hardware="H100 SXM", ceilings=found.ceilings)


@pytest.mark.parametrize("cost", [(3e-3, 1e-5, 2e-9), (0, 1e-5, 2e-9), (3e-3, 1e-5, 0), (0, 0, 1e-8), (0, 2e-5, 0)])
def test_a_cost_is_found_again_in_its_own_times(cost: tuple[float, float, float]) -> None:
    sizes = [256, 1024, 2304, 4096, 9216]
    truth = Cost(fixed=cost[0], per_patch=cost[1], per_pair=cost[2])
    seconds = np.array([sum(truth.parts(n)) for n in sizes])
    assert dataclasses.astuple(fit_cost(sizes, list(seconds))) == pytest.approx(cost, abs=1e-12, rel=1e-6)
    assert truth.off([*sizes, 9], [*seconds, float("nan")]) == pytest.approx(0, abs=1e-9)
    assert truth.off(sizes, [seconds[0] / 2, *seconds[1:]]) == pytest.approx(1)
    noisy = fit_cost(sizes, list(seconds * np.random.default_rng(0).uniform(0.9, 1.1, len(sizes))))
    assert min(dataclasses.astuple(noisy)) >= 0
