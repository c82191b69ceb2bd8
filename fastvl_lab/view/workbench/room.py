"""How wide the panel's figure may be: plotly's widget measures its room once, before it is on the page, and never again."""

from __future__ import annotations

import anywidget
import traitlets

_REPORT_WIDTH = """
export default {
  render({ model, el }) {
    const observer = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width > 0 && width !== model.get("width")) {
        model.set("width", width);
        model.save_changes();
      }
    });
    observer.observe(el);
    return () => observer.disconnect();
  },
};
"""


class Room(anywidget.AnyWidget):
    """An empty line that reports its `width` in pixels whenever the page gives it another one; 0 before it is on a page."""

    _esm = _REPORT_WIDTH
    width = traitlets.Int(0).tag(sync=True)
