"""The errors a user can cause: each is a ValueError whose one sentence says what, which limit, and which choices."""

from __future__ import annotations

import difflib
import importlib
import math
import operator
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any, TypeGuard


class FastvlError(ValueError):
    """Base of every error the lab raises about what it was given."""


class RequestError(FastvlError):
    """A request that no engine can serve: its messages, its limits or its length."""


class ImageError(RequestError):
    """An image that is missing, broken, of an unsupported type, or of an impossible shape."""


class RecipeError(FastvlError):
    """A recipe with an unknown name or value, a combination without meaning, or one that cannot run here."""


class CheckpointError(FastvlError):
    """A checkpoint that is unknown, incomplete, or not of a supported family."""


class CaptureError(FastvlError):
    """A stage that cannot be compiled or captured here."""


class EndpointError(FastvlError):
    """An HTTP endpoint that cannot be reached, or that refuses a request."""


class DeviceError(FastvlError):
    """A device that is absent, or that has too little memory for what was asked."""


class RequestCancelledError(FastvlError):
    """A request that was given up before its answer was complete."""


class TimeLimitError(FastvlError):
    """Work that took longer than it was allowed; stuck: it still holds its device's thread, which serves nobody any more."""

    def __init__(self, text: str, *, stuck: bool = False) -> None:
        super().__init__(text)
        self.stuck = stuck


class MissingExtraError(FastvlError, ImportError):
    """A feature whose optional packages are not installed; names the extra that brings them."""


def shortened(text: str, most: int = 200) -> str:
    """A text on one line, cut where it is longer than `most` characters."""
    cut = text[: 4 * most]
    line = " ".join(cut.split())
    return line if len(text) == len(cut) and len(line) <= most else f"{line[:most]}…"


def counted(n: int, thing: str) -> str:
    """Such as "1 cell" and "2 cells"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def quoted(value: object, most: int = 80) -> str:
    """A value as an error quotes it: its `repr`, on one line and cut where it is long; of a long text, with its length."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}… ({len(value)} characters)"
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = most
    try:
        return shortened(short.repr(value), most)
    except ValueError:  # Python writes no integer of more than some thousand digits
        return f"a {type(value).__name__} that is too long to write"


def meant(name: object, known: Iterable[str]) -> str:
    """The known name that is nearest to one that is not, as an error asks for it; nothing where none is near."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite real number, of any type; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]


def check_whole_number(name: str, value: Any, *, least: int = 1) -> None:
    """Raise `RequestError` for all but an integer from `least` up, of any type, that has 64 bits; a bool is none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise RequestError(f"{name} is {quoted(value)}; it must be a whole number of at least {least}")
    if number >= 2**63:
        raise RequestError(f"{name} is {quoted(value)}; it must be a whole number below 2**63")


def sentence(error: BaseException) -> str:
    """One line about an error: ours say what, limit and choices; of others the type comes first, since it was not foreseen."""
    text = " ".join(str(error).split()) or "no detail"
    return text if isinstance(error, FastvlError) else f"{type(error).__name__}: {shortened(text, 400)}"


def require(module: str, extra: str) -> Any:
    """Import an optional package, or raise `MissingExtraError` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"this needs the package {name}, which cannot be imported ({error}); pip install 'fastvl-lab[{extra}]'"
        ) from error
