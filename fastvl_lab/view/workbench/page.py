"""The one widget of a workbench: bench.js and bench.css draw what its traits say, and send back what is clicked and typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from fastvl_lab.view.workbench.messages import to_json


class Page(anywidget.AnyWidget):
    """A trait for each record of `messages`, as JSON."""

    _esm = Path(__file__).with_name("bench.js")
    _css = Path(__file__).with_name("bench.css")
    choices = traitlets.Dict().tag(sync=True)
    asked = traitlets.Dict().tag(sync=True)
    chosen = traitlets.Dict().tag(sync=True)
    live = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    figure = traitlets.Dict().tag(sync=True)
    loaded = traitlets.Dict().tag(sync=True)
    arrived = traitlets.Dict().tag(sync=True)
    history: traitlets.List[Any] = traitlets.List().tag(sync=True)
    earlier = traitlets.Dict().tag(sync=True)
    advised = traitlets.Dict().tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        # JupyterLab sends what a widget says to a subshell, a thread beside that of the cells, so that clicks are answered while a
        # cell runs; ipykernel 7.4 takes it to the thread that updated the widget last, which is most often that of the cells.
        if hasattr(self.comm, "_reply_subshell_for"):
            self.comm._reply_subshell_for = lambda _, as_sent: as_sent

    def tell(self, name: str, said: Any) -> None:
        """Show another record in place of the one of that name."""
        setattr(self, name, to_json(said))
