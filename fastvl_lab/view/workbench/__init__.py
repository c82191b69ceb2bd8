"""The workbench: flip a toggle, watch the waterfall move. `session` runs and remembers, `controls` choose, `panel` shows."""

from fastvl_lab.view.workbench.panel import Workbench, workbench

__all__ = ["Workbench", "workbench"]
