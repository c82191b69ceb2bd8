"""What the page knows and the panel must: how wide a figure may be, and whether JupyterLab's theme is a dark one.

plotly's widget measures its room once, before it is on the page, and never again.
"""

from __future__ import annotations

import anywidget
import traitlets

_REPORT = """
export default {
  render({ model, el }) {
    const report = (name, value) => {
      if (value !== model.get(name)) {
        model.set(name, value);
        model.save_changes();
      }
    };
    const sized = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width > 0) report("width", width);
    });
    sized.observe(el);
    // JupyterLab and Voila say of their theme on the body whether it is light; a page that says nothing is.
    const themed = () => report("dark", document.body.dataset.jpThemeLight === "false");
    const changed = new MutationObserver(themed);
    changed.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
    themed();
    return () => { sized.disconnect(); changed.disconnect(); };
  },
};
"""


class Room(anywidget.AnyWidget):
    """An empty line that reports, when they change, its `width` in pixels (0 before it is seen) and whether the page is `dark`."""

    _esm = _REPORT
    width = traitlets.Int(0).tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)
