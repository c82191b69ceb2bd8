"""The vision tower alone: operations counted, ceilings measured, costs fitted, and speed against the stock tower."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from fastvl_lab import Lab, Recipe, Request, photo, view
from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.random_weights import random_model, write_published_folder
from fastvl_lab.measure import tower_report
from fastvl_lab.measure.floors import matmul_ceiling, vit_flops
from fastvl_lab.measure.statistics import Interval
from fastvl_lab.measure.towers import Cost, fit_cost, grids_of, time_towers
from fastvl_lab.request import Grid
from fastvl_lab.vit import attention


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


def test_the_ceiling_is_measured_and_above_what_a_small_product_reaches() -> None:
    assert matmul_ceiling(torch.device("cpu"), torch.float32, size=1024, repeats=3) > 1e9


@pytest.mark.parametrize("cost", [(3e-3, 1e-5, 2e-9), (0, 1e-5, 2e-9), (3e-3, 1e-5, 0), (0, 0, 1e-8), (0, 2e-5, 0)])
def test_a_cost_is_found_again_in_its_own_times(cost: tuple[float, float, float]) -> None:
    sizes = [256, 1024, 2304, 4096, 9216]
    truth = Cost(fixed=cost[0], per_patch=cost[1], per_pair=cost[2])
    seconds = np.array([sum(truth.parts(n)) for n in sizes])
    assert dataclasses.astuple(fit_cost(sizes, list(seconds))) == pytest.approx(cost, abs=1e-12, rel=1e-6)
    noisy = fit_cost(sizes, list(seconds * np.random.default_rng(0).uniform(0.9, 1.1, len(sizes))))
    assert min(dataclasses.astuple(noisy)) >= 0


def test_what_the_notebook_draws(labs: dict[str, Lab]) -> None:
    lab, picture = labs["tiny-qwen2.5-vl"], photo("coffee", (300, 200))
    request = Request(images=[picture], prompt="?", max_new_tokens=1)
    (grid,) = grids_of(lab, request)
    runs = [lab.run(request, engine, trace="layers") for engine in ("transformers", "fastest")]
    bars = view.block_waterfall(runs)
    blocks = [name for name in bars.data[1].y if "block" in name]
    assert blocks == [f"vit.block.{i}" for i in range(4)]
    assert sum(x for name, x in zip(bars.data[0].y, bars.data[0].x, strict=True) if "block" in name) <= bars.data[0].x[0]

    side = lab.checkpoint.vision.window
    assert side == 4
    layout = view.window_layout(picture, grid, side, lab.checkpoint.merge_size)
    drawn = {int(trace.name.split()[2]): int(trace.name.split()[0]) for trace in layout.data[1:]}
    assert sum(length * number for length, number in drawn.items()) == grid.n_patches
    assert max(drawn) == (side * 2) ** 2
    whole = view.window_layout(picture, grid, labs["tiny-qwen3-vl"].checkpoint.vision.window, 2)
    assert whole.data[1].name.startswith(f"1 × {grid.n_patches} patches")

    rounds = time_towers(lab, request, {"stock": Recipe.baseline(), "lean": Recipe.fastest()}, repeats=2, warm_up=1)
    assert set(rounds.timings[0].steps) == {"vit"}
    parts = view.cost_parts({100: rounds, 400: rounds}, {"stock": Cost(fixed=0, per_patch=1e-5, per_pair=1e-9)})
    assert list(parts.data[-1].x) == [100, 400]
    assert parts.data[2].y[-1] == pytest.approx(1e-9 * 400**2 * 1e3)


GRIDS = [(1280, 960), (448, 448), (224, 224), (2240, 56), (640, 480)]


def _ratio(lab: Lab, size: tuple[int, int]) -> Interval:
    request = Request(images=[photo("coffee", size)], prompt="?")
    return time_towers(lab, request, {"stock": Recipe.baseline(), "lean": Recipe.fastest()}, repeats=7).ratio("lean", "stock")


@pytest.mark.benchmark
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_lean_tower_is_faster_than_the_stock_one(
    labs: dict[str, Lab], name: str, assert_reaches: Callable[[Callable[[], Interval], float], None]
) -> None:
    """And never slower on any grid. Most of these towers' time at 1280x960 is the same call of SDPA in both."""
    for size in GRIDS:
        assert_reaches(partial(_ratio, labs[name], size), 1.15 if size == GRIDS[0] else 1.0)


@pytest.mark.benchmark
def test_the_lean_tower_is_faster_at_real_width(assert_reaches: Callable[[Callable[[], Interval], float], None]) -> None:
    """Four blocks of the published 3B geometry."""
    folder = str(write_published_folder("Qwen/Qwen2.5-VL-3B-Instruct"))
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 4, [3]
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 1, 152000
    lab = Lab("tiny-qwen2.5-vl", device="cpu")
    model = random_model(lab.checkpoint.family, config, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    lab.checkpoint = dataclasses.replace(lab.checkpoint, model=model)
    assert_reaches(partial(_ratio, lab, (448, 448)), 1.1)


def test_the_report_checks_before_it_times_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_report, "TINY", tower_report.TINY | {"sizes": ((168, 140),)})
    tower_report.main(["--tiny", "--repeats", "2", "--out", str(tmp_path / "rows.json")])
    rows, printed = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert {row["checkpoint"] for row in rows} == set(tiny.NAMES)
    for row in rows:
        assert row["parity"], row
        assert row["error"] < 1e-4
        assert row["floor_ms"] / row["ms"] == pytest.approx(row["share_of_ceiling"])
        assert f"{row['ms']:.3f} ms" in printed
    assert {"stock", "lean", "attention=grouped", "positions=cached", "rope=halves", "fastest"} <= {row["recipe"] for row in rows}

    with pytest.raises(SystemExit, match="2"):
        tower_report.main(["--tiny", "--out", str(tmp_path / "nowhere" / "rows.json")])
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(tower_report, "errors", lambda lab, request, recipes: dict.fromkeys(recipes, 0.0) | {"lean": 1.0})
    with pytest.raises(SystemExit):
        tower_report.main(["--tiny", "--repeats", "1"])
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("lean ")]
    assert wrong
    assert all("parity failed: error 1.0e+00; not timed" in line for line in wrong)


def test_one_option_that_fails_or_loses_one_window_is_red_and_the_rest_are_timed(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    request = Request(images=[photo("coffee", (336, 280))], prompt="?")
    recipes = tower_report.variants(lab.device, lab.dtype, lab.checkpoint.family)
    attend = attention.grouped(torch.float32).attend

    def without_the_last_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Any) -> torch.Tensor:
        out = attend(q, k, v, prepared)
        out[-prepared.fixed[-1].length :] = 0
        return out

    broken = dataclasses.replace(attention.grouped(torch.float32), attend=without_the_last_window)
    monkeypatch.setattr(attention, "grouped", lambda dtype: broken)
    found = tower_report.errors(lab, request, {name: recipes[name] for name in ("stock", "lean", "attention=grouped")})
    assert found["attention=grouped"] > 100 * found["stock"]

    def fail(dtype: torch.dtype) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(attention, "grouped", fail)
    found = tower_report.errors(lab, request, {name: recipes[name] for name in ("stock", "attention=grouped")})
    assert found["attention=grouped"] == "RuntimeError: out of resources"


def test_the_report_needs_a_gpu_unless_it_is_tiny() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.*; on a CPU there is --tiny"):
        tower_report.main([])
