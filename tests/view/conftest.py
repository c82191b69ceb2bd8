"""What tests of panels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fastvl_lab import Lab


@pytest.fixture(scope="module")
def quick_panels(quick_lab: Callable[..., Lab]) -> Iterator[None]:
    """Panels open on shallow models that are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvl_lab.view.workbench.session.Lab", quick_lab)
        yield
