"""How results show themselves: who draws registers here and a result asks here, so that no result imports what draws it."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

_DRAWERS: list[Callable[[], object]] = []


def drawn_by(load: Callable[[], object]) -> None:
    """What to call when a result is first shown; it registers ways to show results."""
    _DRAWERS.append(load)


@singledispatch
def figure(result: Any) -> Any:
    """A result as a plotly figure; raises `MissingExtraError` without plotly."""
    return _once_loaded(figure, result)


@singledispatch
def frame(result: Any) -> Any:
    """A result as a pandas DataFrame; raises `MissingExtraError` without pandas."""
    return _once_loaded(frame, result)


@singledispatch
def page(result: Any) -> str:
    """A result as one page of HTML that needs nothing beside it; raises `MissingExtraError` without plotly or pandas."""
    return str(_once_loaded(page, result))


@singledispatch
def bundle(result: Any) -> dict[str, Any]:
    """A result by MIME type, as Jupyter asks for it."""
    return dict(_once_loaded(bundle, result))


def _once_loaded(way: Any, result: object) -> Any:
    unknown = way.dispatch(object)
    for load in _DRAWERS:
        load()
    known = way.dispatch(type(result))
    if known is unknown:
        raise TypeError(f"nothing has registered how to show a {type(result).__name__}")
    return known(result)
