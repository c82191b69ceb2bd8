"""JSON schemas as clients give them, within bounds: what a schema means is read by the library that holds answers to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastvl_lab.errors import RequestError, quoted
from fastvl_lab.messages import plain

# Characters of a schema as JSON, and keys of one object in it. Time and memory of a grammar grow with the square of the second:
# 400 optional properties take a tenth of a second, 5,000 half a minute.
MAX_SCHEMA, MAX_KEYS = 65_536, 400


def read_schema(given: Any, where: str) -> dict[str, Any]:
    """A copy of a schema, of JSON's types; where: how an error names it. Raises `RequestError`."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{where} is {quoted(given)}; it must be a JSON schema, an object")
    schema: dict[str, Any] = plain(given, f"{where} has")
    if (n := len(json.dumps(schema))) > MAX_SCHEMA:
        raise RequestError(f"{where} has {n} characters; the limit is {MAX_SCHEMA}")
    for inner in _objects(schema):
        if len(inner) > MAX_KEYS:
            raise RequestError(f"{where} has an object of {len(inner)} keys; the limit is {MAX_KEYS}")
    return schema


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)
