"""A sweep as one HTML page that needs nothing beside it: open it offline, mail it, archive it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from fastvl_lab import shown
from fastvl_lab.errors import MissingExtraError, require
from fastvl_lab.measure.load import Load
from fastvl_lab.measure.sweep import SweepResult
from fastvl_lab.run import Run
from fastvl_lab.view import style
from fastvl_lab.view.figures import sample_dots, ttft_against_visual_tokens
from fastvl_lab.view.tables import html_of, loaded_frame, made_of_frame, settings_frame, stage_frame, summary_frame

_CSS = """
body { font: 15px/1.5 "DejaVu Sans", Arial, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9em; margin: 1em 0; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th, td:not(:last-child) { white-space: nowrap; }
th { background: #f4f4f4; } .error { color: #a00; }
"""


@shown.page.register(SweepResult)
def report_html(result: SweepResult) -> str:
    """The page: what was learnt, what failed, what each engine is, the summary, TTFT against visual tokens, each point's waterfalls
    with their tables, and the settings.
    """
    environment = " · ".join(f"{key} {value}" for key, value in result.environment.items())
    body = [f"<h1>TTFT sweep</h1><p>{html.escape(environment)}</p>", errors_html(result)]
    if result.points:
        rows = result.summary()
        comparisons = [point.comparison for point in result.points]
        engines = {engine: each.representative(engine) for each in comparisons for engine in each.engines}
        body += [
            "<h2>What was learnt on this machine</h2>",
            f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in result.findings())}</ul>",
            "<h2>Engines</h2>",
            table_html(made_of_frame(list(engines.values()))),
            "<h2>Summary</h2>",
            "<p>Medians over warm runs, and over all runs of endpoints that do not say whether they reused anything (reuse "
            "unknown), measured in interleaved rounds, without those that others disturbed; a speed-up is the median of ratios "
            "paired by round, and is shown only where an engine computes what Transformers' model computes on the same pixels.</p>",
            table_html(summary_frame(rows)),
            "<h2>TTFT against visual tokens</h2>",
            figure_html(ttft_against_visual_tokens(rows)),
        ]
    if result.loaded:
        lines = [] if result.points else result.findings()
        learnt = f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>" if lines else ""
        body += ["<h2>Under load</h2>", learnt, table_html(loaded_frame(result.load_rows()))]
    for point in result.points:
        runs = [point.comparison.representative(engine) for engine in point.comparison.engines]
        figures = (point.comparison.waterfall(), sample_dots(point.comparison))
        body += [f"<h2>{html.escape(point.label)}</h2>", *map(figure_html, figures), table_html(stage_frame(runs))]
    body.append(f"<h2>Settings</h2>{table_html(settings_frame(result.settings))}")
    return page("TTFT sweep", body)


def page(title: str, body: Sequence[str]) -> str:
    """A whole page of pieces of HTML, some of them made by `figure_html`."""
    plotly_js = require("plotly.offline", "notebooks").get_plotlyjs()
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>fastvl_lab: {title}</title>"
        f"<style>{_CSS}</style><script>{plotly_js}</script></head><body>{''.join(body)}</body></html>"
    )


def errors_html(result: SweepResult) -> str:
    """What failed, as a piece of a `page`; empty where nothing did."""
    if not result.errors:
        return ""
    rows = "".join(
        f"<li>{html.escape(' · '.join(part for part in (e['checkpoint'], e['image'], e['engine']) if part))}: "
        f"{html.escape(e['error'])}</li>"
        for e in result.errors
    )
    return f"<h2 class='error'>What failed</h2><ul class='error'>{rows}</ul>"


def table_html(frame: Any) -> str:
    """A DataFrame as a piece of a `page`."""
    return f"<div class='scroll'>{html_of(frame)}</div>"


def figure_html(figure: Any) -> str:
    """A figure as a piece of a `page`."""
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=style.CONFIG)
    return text


@shown.bundle.register(Run)
def run_bundle(run: Run) -> dict[str, Any]:
    """A run as a figure, a table and text; without plotly, as the latter two."""
    return _with_figure(run, {"text/plain": repr(run), "text/html": run_html(run)})


@shown.bundle.register(Load)
def load_bundle(load: Load) -> dict[str, Any]:
    """A load as a figure and text; without plotly, as text."""
    return _with_figure(load, {"text/plain": repr(load)})


def _with_figure(result: Run | Load, made: dict[str, Any]) -> dict[str, Any]:
    try:
        figure = shown.figure(result)
    except MissingExtraError:
        return made
    return made | {"application/vnd.plotly.v1+json": json.loads(figure.to_json()) | {"config": style.CONFIG}}


def run_html(run: Run) -> str:
    """A run's stages as a table below its title."""
    rows = "".join(
        f"<tr><td>{stage}</td><td align='right'>{ms:.3f}</td><td align='right'>{share:.1%}</td><td><code>"
        f"{bar.replace(' ', '&nbsp;')}</code></td></tr>"
        for stage, ms, share, bar in run.stage_bars()
    )
    heading = "<br>".join(html.escape(line) for line in (run.title(), run.subtitle(), run.summary()))
    return (
        f"<p>{heading}</p><table><thead><tr><th>stage</th><th>ms</th><th>share</th><th>when</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
