"""What is true of one model family and not of the others: a file each, chosen by a checkpoint's model_type.

A new family is a new file, and one word in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastvl_lab.families import qwen2_5_vl, qwen3_vl
from fastvl_lab.families.family import Family, Fault, Geometry, Patches

__all__ = ["FAMILIES", "Family", "Fault", "Geometry", "Patches", "family_of", "names"]

# Those of the package; `Lab` takes others beside them.
FAMILIES = (qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)


def family_of(model_type: object, families: Sequence[Family] = FAMILIES) -> Family | None:
    """The family of config.json's model_type, or None."""
    return next((family for family in families if family.model_type == model_type), None)


def names(families: Sequence[Family] = FAMILIES) -> str:
    """Their model types, as errors list them."""
    return " and ".join(family.model_type for family in families)
