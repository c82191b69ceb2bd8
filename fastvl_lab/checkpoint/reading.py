"""Values of a checkpoint's JSON files, read by their form: JSON from outside has no schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from fastvl_lab.errors import CheckpointError, quoted, shortened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a checkpoint, as errors name it."""

    checkpoint: str
    name: str

    def refused(self, key: str, value: Any, taken: str) -> CheckpointError:
        """The error for a value that cannot be used: where it stands, what it is, and what is taken."""
        return CheckpointError(f"checkpoint {quoted(self.checkpoint)} has {key}={quoted(value)} in {self.name}; it must be {taken}")

    def fails(self, what: str) -> CheckpointError:
        """The error for a file with which something goes wrong."""
        return CheckpointError(f"checkpoint {quoted(self.checkpoint)} has a {self.name} {what}")

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Turn whatever Transformers raises for values that it does not understand into an error that names the file."""
        try:
            yield
        except OSError:  # it is not there, or cannot be reached
            raise
        except Exception as error:
            raise self.fails(f"that Transformers cannot read: {shortened(f'{type(error).__name__}: {error}', 300)}") from None

    def count(self, key: str, value: Any) -> int:
        """A whole number of at least 1, as JSON writes it; raises `CheckpointError`."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(key, value, "a whole number of at least 1")
        return value


def read_json(source: str, name: str, checkpoint: str) -> dict[str, Any]:
    """The object in a JSON file of a folder or hub id, empty where there is no such file; raises `CheckpointError`."""
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    file = File(checkpoint=checkpoint, name=name)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise file.fails(f"that cannot be read: {shortened(str(error))}") from None
    if not isinstance(data, dict):
        raise file.fails(f"that holds {quoted(data)} and no object")
    return data
