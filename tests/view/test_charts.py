"""Panels have one layout, whatever is drawn in them."""

from __future__ import annotations

from fastvl_lab.view.charts import Axis, Panel, bars, decades, line, panels


def _lines(*names: str) -> list[object]:
    return [line(name, [1, 2], [3, 4], {"mode": "lines"}, told="%{y}") for name in names]


def test_a_name_has_one_entry_in_the_legend_and_hides_in_every_panel() -> None:
    x = Axis(title="x")
    figure = panels([Panel(title="1", traces=_lines("<a>", "b"), x=x), Panel(title="2", traces=_lines("<a>", "c", ""), x=x)])
    assert [(trace.name, trace.showlegend) for trace in figure.data] == [
        ("&lt;a&gt;", True),
        ("b", True),
        ("&lt;a&gt;", False),
        ("c", True),
        ("", False),
    ]
    assert figure.data[0].legendgroup == figure.data[2].legendgroup == "&lt;a&gt;"


def test_rows_run_down_and_have_room_for_their_labels() -> None:
    short, long = (
        panels([Panel(traces=[bars(rows, [1, 2], "red", texts=["1", "2"])], x=Axis(until=3), rows=rows)])
        for rows in (["a", "b"], ["a", "the longest\nof <all> labels"])
    )
    assert list(long.layout.yaxis.categoryarray) == ["a", "the longest<br>of &lt;all&gt; labels"]
    assert long.layout.yaxis.range == (1.5, -0.5)
    assert long.layout.margin.l > short.layout.margin.l
    assert long.layout.height == short.layout.height
    assert short.layout.xaxis.range == (0, 3)


def test_titles_of_shared_axes_are_written_once() -> None:
    parts = [Panel(traces=_lines("a"), x=Axis(title="x"), y=Axis(title="y", ticks=decades(1, 5), number_format=".0%"))] * 2
    side, down = panels(parts).layout, panels(parts, down=True).layout
    assert [axis.title.text for axis in (side.xaxis, side.xaxis2, side.yaxis, side.yaxis2)] == ["x", "x", "y", None]
    assert [axis.title.text for axis in (down.xaxis, down.xaxis2, down.yaxis, down.yaxis2)] == [None, "x", "y", "y"]
    assert side.yaxis.type == "log"
    assert side.yaxis.ticktext[:2] == ("0.0001", "0.0005")
    assert side.yaxis.tickformat == ".0%"
