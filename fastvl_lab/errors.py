"""The errors a user can cause: each is a ValueError whose one sentence says what, which limit, and which choices."""

from __future__ import annotations

import importlib
from typing import Any


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


class MissingExtraError(FastvlError, ImportError):
    """A feature whose optional packages are not installed; names the extra that brings them."""


def sentence(error: BaseException) -> str:
    """One line about an error: ours say what, limit and choices; of others the type comes first, since it was not foreseen."""
    text = " ".join(str(error).split()) or "no detail"
    return text if isinstance(error, FastvlError) else f"{type(error).__name__}: {text[:400]}"


def require(module: str, extra: str) -> Any:
    """Import an optional package, or raise `MissingExtraError` naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtraError(
            f"this needs the package {name}, which cannot be imported ({error}); pip install 'fastvl-lab[{extra}]'"
        ) from error
