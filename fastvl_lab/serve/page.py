"""The OpenAPI description as a page for people, which loads nothing from anywhere: no script, no style sheet, no font."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-family:ui-monospace,monospace}summary{cursor:pointer;padding:.3rem 0}ul{padding-left:1.4rem}"
)
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "{} or more characters",
    "maxLength": "at most {} characters",
    "minItems": "{} or more items",
    "maxItems": "at most {} items",
}


def page(description: Mapping[str, Any]) -> str:
    """An OpenAPI description, as FastAPI makes it, as HTML: each path with what it takes, and what it answers by status."""
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    places = "".join(
        _place(f"{method.upper()} {path}", place)
        for path, methods in description["paths"].items()
        for method, place in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
        f'<body><h1>{title}</h1><p>What <a href="openapi.json">openapi.json</a> says.</p>{places}</body></html>'
    )


def _place(name: str, place: Mapping[str, Any]) -> str:
    takes = "".join(f"<h3>Takes {escape(kind)}</h3>{_schema(schema)}" for kind, schema in _contents(place.get("requestBody", {})))
    gives = "".join(
        f"<details><summary><code>{status}</code> {escape(answer['description'])}</summary>"
        + "".join(f"<p>{escape(kind)}</p>{_schema(schema)}" for kind, schema in _contents(answer))
        + "</details>"
        for status, answer in place["responses"].items()
    )
    return f"<section><h2><code>{escape(name)}</code></h2>{takes}<h3>Answers</h3>{gives}</section>"


def _contents(told: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind, content in told.get("content", {}).items():
        yield kind, content.get("schema", {})


def _schema(schema: Mapping[str, Any]) -> str:
    """A schema as a line, and a list below it of what it is made of."""
    parts = [f"<li>{_schema(one)}</li>" for one in schema.get("anyOf", ())]
    if "items" in schema:
        parts.append(f"<li>each {_schema(schema['items'])}</li>")
    for name, one in schema.get("properties", {}).items():
        needed = ", required" if name in schema.get("required", ()) else ""
        parts.append(f"<li><code>{escape(name)}</code>{needed}: {_schema(one)}</li>")
    if isinstance(values := schema.get("additionalProperties"), dict):
        parts.append(f"<li>each value {_schema(values)}</li>")
    return escape(_line(schema)) + (f"<ul>{''.join(parts)}</ul>" if parts else "")


def _line(schema: Mapping[str, Any]) -> str:
    """Its kind, its bounds, and its description."""
    kinds = schema.get("type", [])
    said = [" or ".join([kinds] if isinstance(kinds, str) else kinds)]
    if "anyOf" in schema:
        said.append("one of")
    if (choices := schema.get("enum") or ([schema["const"]] if "const" in schema else None)) is not None:
        said.append(" or ".join(map(repr, choices)))
    said += [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    said.append(schema.get("description", ""))
    return ", ".join(text for text in said if text)
