"""The parameters of a notebook: read from its globals, checked, and nothing unknown among them."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from fastvl_lab.errors import RequestError

# How the cell begins in which papermill assigns the parameters it was given (papermill/translators.py).
_INJECTED = "# Parameters\n"


def notebook_parameters(namespace: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The values of the `known` parameters in a notebook's `globals()`; raises `RequestError` for one it does not know.

    papermill only warns about a parameter that the notebook does not have, and assigns it all the same. So the cell it injected is
    looked up in IPython's history (`In`) and every name it assigns must be known. Call this right after the parameters cell.
    """
    for cell in namespace.get("In", ()):
        if not cell.startswith(_INJECTED):
            continue
        for name in (
            node.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise RequestError(f"parameter {name!r} is unknown{hint}; the choices are {', '.join(known)}")
    missing = [name for name in known if name not in namespace]
    if missing:
        raise RequestError(f"parameters {', '.join(missing)} have no value; run the parameters cell first")
    return {name: namespace[name] for name in known}
