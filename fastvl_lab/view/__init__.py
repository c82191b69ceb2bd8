"""Figures, tables and reports, drawn from finished runs; needs the extra "notebooks"."""

from fastvl_lab.measure.recipes import undone_alone
from fastvl_lab.measure.samples import gains, saves
from fastvl_lab.view.breakdown import attribution_frame, floor_bars, floor_frame, memory_bars, memory_frame, step_down
from fastvl_lab.view.capture import break_even_frame, capture_frame, operation_frame, operation_timeline, padding_by_size
from fastvl_lab.view.charts import ttft_against_visual_tokens
from fastvl_lab.view.decoder import bytes_over_steps, step_frame, step_panels, steps_against_length, turn_bars, turn_frame
from fastvl_lab.view.slots import (
    block_waterfall,
    cost_against_size,
    cost_parts,
    difference_maps,
    rounds_frame,
    step_bars,
    window_layout,
)
from fastvl_lab.view.streaming import (
    chunk_timeline,
    launches_and_steps,
    reported_frame,
    reported_rates,
    streaming_frame,
)
from fastvl_lab.view.tables import catalogue_frame, layer_frame, show, stage_frame, summary_frame
from fastvl_lab.view.waterfall import waterfall

__all__ = [
    "attribution_frame",
    "block_waterfall",
    "break_even_frame",
    "bytes_over_steps",
    "capture_frame",
    "catalogue_frame",
    "chunk_timeline",
    "cost_against_size",
    "cost_parts",
    "difference_maps",
    "floor_bars",
    "floor_frame",
    "gains",
    "launches_and_steps",
    "layer_frame",
    "memory_bars",
    "memory_frame",
    "operation_frame",
    "operation_timeline",
    "padding_by_size",
    "reported_frame",
    "reported_rates",
    "rounds_frame",
    "saves",
    "show",
    "stage_frame",
    "step_bars",
    "step_down",
    "step_frame",
    "step_panels",
    "steps_against_length",
    "streaming_frame",
    "summary_frame",
    "ttft_against_visual_tokens",
    "turn_bars",
    "turn_frame",
    "undone_alone",
    "waterfall",
    "window_layout",
]
