"""One JSON document a notebook shows as its result, for programs that read the executed notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvl_lab.errors import require
from fastvl_lab.measure.compare import Comparison

MIME_TYPE = "application/vnd.fastvl.result+json"
SCHEMA = 1


def published_point(checkpoint: str, image: str, comparison: Comparison) -> dict[str, Any]:
    """One checkpoint and image: per engine the summary, the tokens, and the stages of its representative run (ms)."""
    engines = {}
    for row in comparison.summary():
        run = comparison.representative(row["engine"])
        engines[row["engine"]] = {
            **{key: json_value(value) for key, value in row.items() if key != "engine"},
            "kind": run.kind,
            "tokens": list(run.tokens),
            "text": run.text,
            "stages": [{key: r[key] for key in ("stage", "host_ms", "device_ms")} for r in run.stage_table()],
        }
    return {"checkpoint": checkpoint, "image": image, "reference": comparison.reference, "engines": engines}


def document(points: Sequence[dict[str, Any]], *, errors: Sequence[dict[str, str]] = (), **context: Any) -> dict[str, Any]:
    """The whole document: schema number, points, errors, and whatever context the notebook adds."""
    return {"schema": SCHEMA, **context, "points": list(points), "errors": list(errors)}


def publish(result: dict[str, Any]) -> None:
    """Show the document in the notebook as one display of type `MIME_TYPE`; needs the extra "notebooks"."""
    text = f"result: {len(result['points'])} points, {len(result['errors'])} errors"
    require("IPython.display", "notebooks").display({MIME_TYPE: result, "text/plain": text}, raw=True)


def json_value(value: Any) -> Any:
    """NaN has no JSON form; an interval that does not exist is null."""
    return None if isinstance(value, float) and value != value else value
