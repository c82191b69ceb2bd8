"""A figure on the page that is replaced as a whole; plot.js draws it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from fastvl_lab.errors import require
from fastvl_lab.view import style

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Plot(anywidget.AnyWidget):
    """Shows one figure at a time, as wide as its room. `shown` is that figure, `dark` whether the page is a dark one.

    plotly's own widget is changed piece by piece, and a page keeps what a change says nothing of; here the page is given every
    figure whole.
    """

    _esm = Path(__file__).with_name("plot.js")
    library = traitlets.Unicode().tag(sync=True)
    figure = traitlets.Unicode().tag(sync=True)
    config = traitlets.Dict().tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)

    def __init__(self) -> None:
        plotly_js = require("plotly.offline", "notebooks").get_plotlyjs()
        self.shown: Any = style.graph_objects().Figure(layout={"height": 400})
        super().__init__(library=plotly_js, figure=self.shown.to_json(), config=style.CONFIG)

    def show(self, figure: go.Figure, about: str) -> None:
        """Replace the figure; a reader's zoom stays while `about`, what it is of, does."""
        self.shown = figure.update_layout(uirevision=about)
        self.figure = self.shown.to_json()
