"""What is drawn over pictures: where pixels differ, and where the windows of attention lie."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastvl_lab.errors import require
from fastvl_lab.measure.parity import PixelDifference
from fastvl_lab.request import Grid
from fastvl_lab.view import style
from fastvl_lab.view.charts import line, said

if TYPE_CHECKING:
    import plotly.graph_objects as go


def difference_maps(picture: np.ndarray, differences: Mapping[str, PixelDifference]) -> go.Figure:
    """The reference's picture, then where each variant's pixels differ from it.

    Variants with the same map share a panel, and those that are equal to the reference have none. A pixel shows the largest
    difference of its three channels: black for none, grey for one level, and up to white on a logarithmic scale.
    """
    alike: dict[bytes, list[str]] = {}
    for label, difference in differences.items():
        if difference.largest > 0:
            alike.setdefault(difference.levels.tobytes(), []).append(label)
    titles, images = ["the picture, as the reference resizes it"], [picture]
    for labels in alike.values():
        shown = differences[labels[0]]
        titles.append(f"{'; '.join(labels)}:\nat most {shown.largest} of 255, mean {shown.mean:.3f}")
        levels = shown.levels.max(2, keepdims=True).astype(float)
        grey = np.where(levels > 0, 96 + 159 * np.log2(np.maximum(levels, 1)) / 8, 0)
        images.append(np.broadcast_to(np.rint(grey).astype(np.uint8), shown.levels.shape))
    columns = min(len(images), 3)
    rows = -(-len(images) // columns)
    grid: dict[str, Any] = {"rows": rows, "cols": columns, "horizontal_spacing": 0.02, "vertical_spacing": 0.2 / rows}
    figure = require("plotly.subplots", "notebooks").make_subplots(**grid, subplot_titles=[said(title) for title in titles])
    for number, image in enumerate(images):
        figure.add_trace(_image(image, np.max if number else np.mean), row=number // columns + 1, col=number % columns + 1)
    figure.update_annotations(font_size=12)
    scale = "black: equal; grey: 1 of 255; white: 255; each step of brightness between them doubles the difference"
    figure.add_annotation(text=scale, x=0, y=0, xref="paper", yref="paper", yshift=-6, yanchor="top", showarrow=False)
    height, width = picture.shape[:2]
    return _bare(figure, height=round(rows * (1060 / columns * height / width + 70)) + 20, top=60, bottom=30)


def window_layout(picture: bytes, grid: Grid, window: int | None, merge_size: int) -> go.Figure:
    """The windows of windowed attention over the picture; window: visual tokens along a side, or None where a tower has none."""
    rows, columns = grid.h // merge_size, grid.w // merge_size
    token = max(1, 900 // columns)  # pixels of a visual token in the drawing
    shown = Image.open(io.BytesIO(picture)).convert("RGB").resize((columns * token, rows * token))
    faded = np.asarray(Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.45))
    figure = style.graph_objects().Figure(_image(faded, np.mean, largest_side=max(faded.shape)))
    kinds: dict[int, list[tuple[int, int, int, int]]] = {}
    for top in range(0, rows, window or rows):
        for left in range(0, columns, window or columns):
            height, width = min(window or rows, rows - top), min(window or columns, columns - left)
            kinds.setdefault(height * width, []).append((top, left, height, width))
    for number, (tokens, places) in enumerate(sorted(kinds.items(), reverse=True)):
        xs: list[Any] = []
        ys: list[Any] = []
        for top, left, height, width in places:
            xs += [(left + dx * width) * token + inset for dx, inset in ((0, 1), (1, -1), (1, -1), (0, 1), (0, 1))] + [None]
            ys += [(top + dy * height) * token + inset for dy, inset in ((0, 1), (0, 1), (1, -1), (1, -1), (0, 1))] + [None]
        drawn = style.series(number)["line"] | {"width": 2.5, "dash": ("solid", "dash", "dot", "dashdot")[number % 4]}
        name = f"{len(places)} × {tokens * merge_size**2} patches ({tokens} visual tokens)"
        figure.add_trace(line(name, xs, ys, {"mode": "lines", "line": drawn, "hoverinfo": "skip"}))
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return _bare(figure, height=round(800 * rows / columns) + 90, top=70, width=860, legend=legend)


def _bare(figure: go.Figure, *, height: int, top: int, bottom: int = 10, **layout: Any) -> go.Figure:
    """Without axes, up to the edges."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.update_layout(**style.layout(height=height, margin={"l": 10, "r": 10, "t": top, "b": bottom}, **layout))


def _image(image: np.ndarray, reduce: Callable[..., np.ndarray], largest_side: int = 700) -> Any:
    """A picture, shrunk by whole steps: to the mean for a picture, to the largest for differences, so that none is lost."""
    step = -(-max(image.shape[:2]) // largest_side)
    height, width = (side // step * step for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // step, step, width // step, step, 3)
    small = reduce(blocks, axis=(1, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).save(out, "PNG")
    source = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return style.graph_objects().Image(source=source, hoverinfo="skip")
