"""The history on paper: a folder of records, traces and pictures, a page that opens offline, and text for where no kernel lives."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from fastvl_lab.view.report import figure_html, page, table_html
from fastvl_lab.view.tables import frame
from fastvl_lab.view.workbench import showing
from fastvl_lab.view.workbench.messages import Row
from fastvl_lab.view.workbench.session import Result
from fastvl_lab.view.workbench.views import View

# A result, what it is held against, and the views there are.
Drawn = tuple[Result, Result | None, Mapping[str, View]]

# The columns of the history, and what stands in them of a line.
_COLUMNS = {
    "#": "number",
    "what changed": "changed",
    "TTFT": "ttft",
    "against the bar to beat": "ratio",
    "parity": "parity",
    "note": "note",
    "question": "question",
    "recipe": "recipe",
}


def export(rows: Sequence[Row], drawn: Sequence[Drawn], into: Path, told: Callable[[str], None]) -> list[Path]:
    """Write everything; rows: the lines of the history; told: what is being written. Returns the files."""
    into.mkdir(parents=True, exist_ok=True)
    written = []
    for result, *_ in drawn:
        samples = [] if result.comparison is None else [sample.to_record() for sample in result.comparison.samples]
        trace = result.shown.trace.to_chrome(result.shown.title())
        for name, data in (("run", result.shown.to_record()), ("trace", trace), ("rounds", samples)):
            written.append(into / f"{result.number:03d}-{name}.json")
            written[-1].write_text(json.dumps(data), encoding="utf-8")
    written.append(into / "workbench.html")
    written[-1].write_text(page_of(rows, drawn), encoding="utf-8")
    for number, (result, other, views) in enumerate(drawn, start=1):
        told(f"writing picture {number} of {len(drawn)}")
        path = into / f"{result.number:03d}-waterfall.png"
        try:
            next(iter(views.values())).draw(result, other)[0].write_image(path, width=1100, scale=1.5)
        except (RuntimeError, ValueError, ImportError):  # no kaleido, or no browser for it
            break
        written.append(path)
    return written


def page_of(rows: Sequence[Row], drawn: Sequence[Drawn]) -> str:
    """One page of HTML that needs nothing beside it: every result in all views it was measured for."""
    history = frame(rows, {heading: attrgetter(name) for heading, name in _COLUMNS.items()})
    body = [f"<h1>Workbench</h1>{table_html(history)}"]
    for result, other, views in drawn:
        said = [showing.about_question(result.question), showing.learnt(result), *(pill.text for pill in showing.pills(result))]
        title = f"{result.number}: {result.recipe.text(showing.run_device(result.run))}"
        body.append(f"<h2>{html.escape(title)}</h2>{''.join(f'<p>{html.escape(text)}</p>' for text in said if text)}")
        for view in views.values():
            if not view.lacks(result):
                figure, table = view.draw(result, other)
                figures = "".join(map(figure_html, (figure, *view.more(result, other))))
                body.append(f"<h3>{view.name}</h3>{figures}{table_html(table)}")
    return page("workbench", body)


def static_text(history: Sequence[Result]) -> str:
    """The newest result as text in HTML, which a live panel's style hides: its waterfall, and its table of stages."""
    if not history:
        return "<pre class='fl-static'>The workbench: run this cell.</pre>"
    result = history[-1]
    lines = [showing.about_question(result.question), *(pill.text for pill in showing.pills(result)), showing.learnt(result)]
    runs = [repr(run) for run in (result.reference, result.shown) if run is not None]
    return f"<pre class='fl-static'>{html.escape(chr(10).join([*filter(None, lines), '', *runs]))}</pre>"
