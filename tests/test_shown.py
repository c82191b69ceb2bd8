"""Results show themselves by what is registered."""

from __future__ import annotations

import pytest

from fastvl_lab import shown


def test_what_nothing_draws_says_so() -> None:
    class Unknown:
        pass

    for way in (shown.figure, shown.frame, shown.page, shown.bundle):
        with pytest.raises(TypeError, match="nothing has registered how to show a Unknown"):
            way(Unknown())
