"""Figures, tables and reports, drawn from finished runs; needs the extra "notebooks"."""

from fastvl_lab.measure.recipes import undone_alone as undone_alone
from fastvl_lab.measure.samples import gains as gains, saves as saves
from fastvl_lab.view.figures import (
    bytes_over_steps as bytes_over_steps,
    cost_against_size as cost_against_size,
    cost_parts as cost_parts,
    floor_bars as floor_bars,
    memory_bars as memory_bars,
    padding_by_size as padding_by_size,
    reported_rates as reported_rates,
    sample_dots as sample_dots,
    step_bars as step_bars,
    step_down as step_down,
    step_panels as step_panels,
    steps_against_length as steps_against_length,
    ttft_against_visual_tokens as ttft_against_visual_tokens,
    turn_bars as turn_bars,
)
from fastvl_lab.view.grid_report import grid_html as grid_html
from fastvl_lab.view.loads import load_curves as load_curves, load_rates as load_rates, load_timeline as load_timeline
from fastvl_lab.view.pictures import difference_maps as difference_maps, window_layout as window_layout
from fastvl_lab.view.records import records_frame as records_frame, regressions_frame as regressions_frame
from fastvl_lab.view.report import report_html as report_html
from fastvl_lab.view.shares import interaction_frame as interaction_frame, share_bars as share_bars, shares_frame as shares_frame
from fastvl_lab.view.tables import (
    attribution_frame as attribution_frame,
    break_even_frame as break_even_frame,
    called_frame as called_frame,
    capture_frame as capture_frame,
    catalogue_frame as catalogue_frame,
    floor_frame as floor_frame,
    frame as frame,
    layer_frame as layer_frame,
    load_frame as load_frame,
    load_percentile_frame as load_percentile_frame,
    loaded_frame as loaded_frame,
    made_of_frame as made_of_frame,
    memory_frame as memory_frame,
    operation_frame as operation_frame,
    reported_frame as reported_frame,
    rounds_frame as rounds_frame,
    settings_frame as settings_frame,
    show as show,
    stage_frame as stage_frame,
    step_frame as step_frame,
    streaming_frame as streaming_frame,
    summary_frame as summary_frame,
    turn_frame as turn_frame,
)
from fastvl_lab.view.timelines import (
    block_waterfall as block_waterfall,
    chunk_timeline as chunk_timeline,
    launches_and_steps as launches_and_steps,
    operation_timeline as operation_timeline,
)
from fastvl_lab.view.tunes import tuned_bars as tuned_bars, tuned_frame as tuned_frame
from fastvl_lab.view.waterfall import waterfall as waterfall
