"""What a notebook takes and what it gives: its parameters, real photographs, and one JSON document as its result."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvl_lab.errors import ImageError, MissingExtraError, RequestError, quoted, require
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.samples import json_value
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import ImageInput

MIME_TYPE = "application/vnd.fastvl.result+json"
SCHEMA = 1

# How the cell begins in which papermill assigns the parameters it was given (papermill/translators.py).
_INJECTED = "# Parameters\n"

# scikit-image ships these photographs inside its wheel (skimage/data/README.txt has their licences).
PHOTOGRAPHS = {"coffee": "coffee.png", "astronaut": "astronaut.png", "rocket": "rocket.jpg", "cat": "chelsea.png"}


def notebook_parameters(namespace: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The values of the `known` parameters among a notebook's variables; raises `RequestError` for one it does not know.

    papermill only warns about a parameter that the notebook does not have, and assigns it all the same. So every name that its cell
    assigns, which IPython's history (`In`) has, must be known. Call this right after the parameters cell.
    """
    injected = [ast.parse(cell) for cell in namespace.get("In", ()) if cell.startswith(_INJECTED)]
    for node in (node for cell in injected for node in ast.walk(cell)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in known:
            close = difflib.get_close_matches(node.id, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise RequestError(f"parameter {node.id!r} is unknown{hint}; the choices are {', '.join(known)}")
    missing = [name for name in known if name not in namespace]
    if missing:
        raise RequestError(f"parameters {', '.join(missing)} have no value; run the parameters cell first")
    return {name: namespace[name] for name in known}


def photo(image: str | Path | bytes, size: tuple[int, int] | None = None) -> bytes:
    """Encoded bytes of a built-in photograph ("coffee", "astronaut", "rocket", "cat"), a file, or bytes.

    size: (width, height) to resize to; the result is then a JPEG of quality 92. Without it, the bytes are untouched. Raises
    `ImageError`.
    """
    data = _photograph(image) if image in PHOTOGRAPHS else ImageInput.of(image).data
    assert isinstance(data, bytes)
    if size is None:
        return data
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(side, Integral) and side > 0 for side in size):
        raise ImageError(f"size is {quoted(size)}; it must be (width, height) in whole pixels from 1 up")
    width, height = size
    picture, encoded = rgb_of(ImageInput(data=data, label=str(image)[:80])), io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=92)
    return encoded.getvalue()


def picture(width: int, height: int) -> bytes:
    """A JPEG with edges, gradients and noise, for machines without photographs."""
    row, column = np.linspace(0, 6, height)[:, None], np.linspace(0, 8, width)
    waves = np.stack([np.sin(row * column), np.cos(row + column), np.sin(row) * np.cos(3 * column)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 8, waves.shape)
    out = io.BytesIO()
    Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def _photograph(name: object) -> bytes:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise MissingExtraError(
            f"the photograph {name!r} comes with scikit-image, which is not installed; pip install 'fastvl-lab[notebooks]', "
            f"or give the path of an image"
        )
    return (Path(package.origin).parent / "data" / PHOTOGRAPHS[str(name)]).read_bytes()


def published_point(
    checkpoint: str, image: str, comparison: Comparison, environment: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One checkpoint and image: per engine the summary, the tokens, and the stages of its representative run (ms).

    environment: where it was measured, if that is the point's own.
    """
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
    point = {"checkpoint": checkpoint, "image": image, "reference": comparison.reference, "engines": engines}
    return point | ({"environment": dict(environment)} if environment else {})


def document(points: Sequence[dict[str, Any]], *, errors: Sequence[dict[str, str]] = (), **context: Any) -> dict[str, Any]:
    """The whole document: schema number, points, errors, and whatever context the notebook adds."""
    return {"schema": SCHEMA, **context, "points": list(points), "errors": list(errors)}


def publish(result: dict[str, Any]) -> None:
    """Show the document in the notebook as one display of type `MIME_TYPE`; needs the extra "notebooks"."""
    points, errors = (f"{len(result[of])} {of[:-1] if len(result[of]) == 1 else of}" for of in ("points", "errors"))
    text = f"result: {points}, {errors}"
    require("IPython.display", "notebooks").display({MIME_TYPE: result, "text/plain": text}, raw=True)
