"""What the kernel and the page say to each other: frozen dataclasses, and here alone their JSON.

Each record that goes to the page fills a trait, so that a page that is opened later knows all of them; from the page come wishes.
Times are in ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvl_lab.catalogue import OptionValue
from fastvl_lab.errors import RequestError

# TTFT of a round, and where others disturbed it how, else "".
Dot = tuple[float, str]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A bar to beat. text: that of its engine; unmet: why it cannot run here, None if it can."""

    text: str
    about: str
    unmet: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What there is to choose from. toggles: slot, name, path, and options, each with why it cannot run here (None if it can)."""

    toggles: tuple[dict[str, Any], ...]
    views: tuple[tuple[str, str], ...]
    checkpoints: tuple[str, ...]
    photographs: tuple[str, ...]
    boxes: tuple[str, ...]
    rivals: tuple[Rival, ...]
    note: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The question as its fields have it. previews: data URLs of the pictures, once they have been read."""

    checkpoint: str
    pictures: tuple[str, ...]
    previews: tuple[str, ...]
    size: str
    max_pixels: str
    prompt: str
    tokens: int
    repeats: int
    rival: str


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The recipe. values: by path; moved: paths that another choice has brought along; texts: to copy."""

    values: Mapping[str, OptionValue]
    moved: tuple[str, ...]
    undoable: bool
    texts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Live:
    """What goes on. elapsed: since the run began, when this was said. stages: name, start, and end unless it runs still; expected:
    those of the last run that was asked the same. rounds: label -> `Dot`s so far. starting: how far a start is."""

    state: str
    busy: bool
    progress: str = ""
    text: str = ""
    elapsed: float | None = None
    stages: tuple[tuple[str, float, float | None], ...] = ()
    expected: tuple[tuple[str, float, float], ...] = ()
    rounds: Mapping[str, tuple[Dot, ...]] = field(default_factory=dict)
    starting: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One run to draw. bars: stage, lane, start, length; host, device: what stages took there; rounds: a `Dot` each.

    Parts of `wait` that an endpoint's engine tells of are on the lane "own", and in `host`. files: where to look for a stage's
    work, or whose clock timed it.
    """

    label: str
    ttft: float
    bars: tuple[tuple[str, str, float, float], ...]
    host: Mapping[str, float]
    device: Mapping[str, float]
    files: Mapping[str, str]
    rounds: tuple[Dot, ...]


@dataclass(frozen=True, kw_only=True)
class Pill:
    """A few words about a result, "good", "bad" or "plain", and what they mean."""

    text: str
    state: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The result that is looked at. rival, before: what it is held against; no_before: why there is none; floors: by stage.

    earlier: what is to be said of a result of an earlier session, "" of any other; lacks: why its view cannot be measured. What
    opens it again: link, to a page of its own, "" where the panel is none, and line, of Python.
    """

    number: int
    against: int
    view: str
    heading: str
    detail: str
    headline: str
    spread: str
    tpot: str
    cold: str
    learnt: str
    answer: str
    pills: tuple[Pill, ...]
    recipe: Series
    rival: Series | None
    before: Series | None
    no_before: str
    floors: Mapping[str, float]
    earlier: str
    lacks: str
    link: str
    line: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A view that is not the waterfall: plotly's figure as JSON, those below it, and the table that says the same."""

    view: str
    about: str
    figure: str
    more: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What the load view has besides its figures. at_once, rate, n, against: its fields; others: the choices of the last.

    unmet: why the shown result cannot be put under load, "" if it can. said: what its loads have shown, a sentence each, and their
    percentiles as a table.
    """

    at_once: str
    rate: str
    n: str
    against: str
    others: tuple[Rival, ...]
    unmet: str = ""
    said: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Requests of a load under way that have ended, of a result's. rows: number, and bars: stage, start, length."""

    result: int = 0
    label: str = ""
    rows: tuple[tuple[int, tuple[tuple[str, float, float], ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the history. when, spread, elsewhere: only of an earlier session's, the last being what is other here."""

    number: int
    changed: str
    ttft: str
    milliseconds: float
    ratio: str
    parity: str
    question: str
    recipe: str
    pinned: bool
    note: str
    when: str = ""
    spread: str = ""
    elsewhere: str = ""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Results of earlier sessions, which have numbers below 0. skipped: a sentence about files that are none."""

    rows: tuple[Row, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, kw_only=True)
class Advised:
    """What each toggle would save: path -> value, saving, and its interval; and in a sentence the one to try next."""

    savings: Mapping[str, tuple[OptionValue, float, float, float]] = field(default_factory=dict)
    sentence: str = ""
    path: str = ""
    value: OptionValue | None = None


def to_json(said: Any) -> Any:
    """A record, or a sequence of them, as the page reads it; what is not a number is null."""
    if dataclasses.is_dataclass(said) and not isinstance(said, type):
        return {name.name: to_json(getattr(said, name.name)) for name in dataclasses.fields(said)}
    if isinstance(said, Mapping):
        return {key: to_json(value) for key, value in said.items()}
    if isinstance(said, tuple | list):
        return [to_json(value) for value in said]
    return None if isinstance(said, float) and said != said else said


@dataclass(frozen=True, kw_only=True)
class Choose:
    """A toggle is set."""

    path: str
    value: OptionValue


@dataclass(frozen=True, kw_only=True)
class Use:
    """A preset, or the recipe of a result, is taken whole."""

    recipe: str = ""
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A field of the question is filled in."""

    field: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Take:
    """Files are given, whose bytes come beside the message; add: beside the pictures there are."""

    names: tuple[str, ...]
    add: bool = False


@dataclass(frozen=True, kw_only=True)
class Look:
    """A view, or a result, is looked at."""

    view: str | None = None
    number: int | None = None
    against: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Two results are measured side by side."""

    number: int
    against: int


@dataclass(frozen=True, kw_only=True)
class Send:
    """Many requests are sent: what the load view's fields say."""

    at_once: str
    rate: str
    n: str
    against: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A result is pinned or not, and has a note."""

    number: int
    pinned: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Delete:
    """A result is taken out of the history, or one of an earlier session forgotten."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Press:
    """A button without a value; "open" says that a page is there, "plotly" and "trace" ask for what it lacks."""

    button: str


Wish = Choose | Use | Fill | Take | Look | Measure | Send | Mark | Delete | Press
_WISHES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Choose, Use, Fill, Take, Look, Measure, Send, Mark, Delete, Press)
}


def from_json(content: Any) -> Wish:
    """What the page says: `{"kind": "Choose", "path": …}`; raises `RequestError` for what is no wish."""
    try:
        fields = dict(content)
        wish: Wish = _WISHES[fields.pop("kind")](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"the page says {content!r:.200}, which is no wish ({error}); reload it") from None
    return wish
