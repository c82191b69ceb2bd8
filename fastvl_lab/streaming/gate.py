"""The gate between finished tokens and their consumer, as the reported engine had it."""

from __future__ import annotations

import threading


class CountingGate:
    """Open while its count is zero.

    It is raised when a round is uploaded and half-way through a round's results, and lowered when a round's results begin and when
    all its steps have been launched: so it opens within a round if the host launches ahead of the device, and not before the end of
    the answer if the two go in lockstep (LMDeploy 0.9.0 to 0.11.1, lmdeploy/pytorch/engine; removed by its PR 4265).
    """

    def __init__(self) -> None:
        self._count = self._openings = 0
        self._stays_open = False
        self._changed = threading.Condition()

    def raise_(self) -> None:
        with self._changed:
            self._count += 1

    def lower(self) -> None:
        with self._changed:
            self._count -= 1
            if self._count <= 0:
                self._open()

    def stay_open(self) -> None:
        """Nothing is left to wait for: whoever raises it from now on holds nobody."""
        with self._changed:
            self._stays_open = True
            self._open()

    def wait(self) -> None:
        """Until it is open; to have been open for an instant is enough."""
        with self._changed:
            seen = self._openings
            self._changed.wait_for(lambda: self._count == 0 or self._stays_open or self._openings != seen)

    def _open(self) -> None:
        self._count = 0
        self._openings += 1
        self._changed.notify_all()
