"""Have workers measure a plan: start them, watch the folder, merge what came of it; a Ctrl-C ends all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from fastvl_lab.checkpoint import resolve_device
from fastvl_lab.errors import FastvlError, RequestError
from fastvl_lab.grid import launchers
from fastvl_lab.grid.merge import GridResult, Merger
from fastvl_lab.grid.plan import Plan, of_settings
from fastvl_lab.grid.rendezvous import Rendezvous, prepare
from fastvl_lab.measure import sweep as alone
from fastvl_lab.measure.sweep import SweepResult, SweepSettings

# Seconds between two looks at the folder.
_LOOK_UP = 0.2

# Seconds for workers to leave by themselves once all is done.
_LEAVING = 5.0

Tell = Callable[[GridResult], object]


def sweep(
    settings: SweepSettings,
    *,
    launcher: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    on_cell: Tell | None = None,
) -> SweepResult:
    """Run the grid: in this process, or where a launcher is named, cell by cell in fresh processes of its workers (docs/grids.md).

    launcher, workers: in place of the settings' own. With one, cells that are done in `output_dir` are not measured again. on_cell:
    given what there is after each cell of a launcher's workers. What fails is recorded in `errors`, and the sweep goes on; without
    an `output_dir`, workers meet in a folder for temporary files, which stays only where something failed, with its logs. Raises
    `FastvlError`s for what can be known before any work, and where all workers ended early.
    """
    if not isinstance(settings, SweepSettings):
        raise RequestError(f"the settings are a {type(settings).__name__}; give fastvl_lab.SweepSettings")
    if launcher is not None or workers is not None:
        wanted = settings.workers if workers is None else workers
        settings = dataclasses.replace(settings, launcher=launcher or settings.launcher, workers=wanted)
    if not settings.launcher:
        return alone.sweep(settings, progress=progress)
    if settings.output_dir:
        return run(of_settings(settings), progress=progress, on_cell=on_cell)
    if settings.launcher != "local":
        raise RequestError(f"output_dir is empty; launcher {settings.launcher!r} needs a folder that all hosts share")
    folder, named = tempfile.mkdtemp(prefix="fastvl-lab-grid-"), False  # whether an error names a log in it
    try:
        made = run(of_settings(dataclasses.replace(settings, output_dir=folder)), progress=progress, on_cell=on_cell)
        named = bool(made.errors)
        return dataclasses.replace(made, settings=settings)
    except FastvlError:
        named = True
        raise
    finally:
        if not named:
            shutil.rmtree(folder, ignore_errors=True)


def run(
    plan: Plan, *, program: Sequence[str] = (), again: bool = False, progress: bool = True, on_cell: Tell | None = None
) -> GridResult:
    """Have the plan's launcher measure the cells that have no result yet, and merge all.

    program: what measures a cell, by default the lab. again: whether cells that failed are measured again.
    """
    folder, merger = check(plan), merger_of(plan)
    settings = plan.settings
    prepare(folder, plan.to_dict())
    if again:
        for row in merger.merge().cells:
            if row["state"] not in ("done", "not measured"):
                merger.rendezvous.forget(row["cell"])
        merger = merger_of(plan)
    n_missing = len({cell.id for cell in plan.cells} - merger.rendezvous.results())
    if n_missing:
        cuda = _cuda(settings)
        count = launchers.how_many(settings.launcher, settings.workers, cuda, n_missing)
        names = [f"{settings.launcher}-{secrets.token_hex(3)}-{number}" for number in range(count)]
        order = launchers.Order(folder=folder, names=names, cuda=cuda, program=program, options=plan.options)
        launched = launchers.start(settings.launcher, order)
        try:
            _watch(plan, merger, names, launched, progress, on_cell)
        finally:
            launched.stop()
    return merger.merge()


def check(plan: Plan) -> Path:
    """The plan's folder; raises `FastvlError`s for one that cannot be written, and for workers that there is no room for."""
    settings = plan.settings
    folder = Path(settings.output_dir).absolute()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"output_dir {settings.output_dir!r} cannot be written")
    launchers.how_many(settings.launcher, settings.workers, _cuda(settings), len(plan.cells))
    return folder


def merger_of(plan: Plan) -> Merger:
    return Merger(plan, Rendezvous(folder=Path(plan.settings.output_dir).absolute(), stale=plan.stale))


def _watch(
    plan: Plan,
    merger: Merger,
    names: Sequence[str],
    launched: launchers.Launched,
    progress: bool,
    on_cell: Tell | None,
) -> None:
    """Until every cell has a result; raises `FastvlError` where no worker is left to measure one."""
    labels = {cell.id: cell.label for cell in plan.cells}
    before, done_at = -1, math.inf
    with _bars(len(labels), names, progress) as (whole, bars):
        while True:
            alive = launched.alive()
            results = merger.rendezvous.results() & labels.keys()
            whole.n = len(results)
            whole.refresh()
            for name, bar in bars.items():
                if (beat := merger.rendezvous.beat(name)) is not None:
                    bar.set_description_str(
                        f"{name}: {labels.get(beat.doing, 'has left' if beat.ended else 'waits')}", refresh=False
                    )
                    bar.total, bar.n = beat.of, beat.done
                    bar.refresh()
            if on_cell is not None and len(results) > max(before, 0):
                on_cell(merger.merge())
            before = len(results)
            if before == len(labels):
                done_at = min(done_at, time.monotonic())
                if not alive or time.monotonic() - done_at > _LEAVING:
                    return
            elif not alive:
                raise FastvlError(
                    f"all workers ended, and {len(labels) - before} of {len(labels)} cells are not measured; what they said is in "
                    f"{merger.rendezvous.folder / 'logs'}; running again goes on"
                )
            time.sleep(_LOOK_UP)


@contextlib.contextmanager
def _bars(cells: int, names: Sequence[str], progress: bool) -> Iterator[tuple[tqdm, dict[str, tqdm]]]:
    """A bar for the cells, and one for the runs of each worker's cell."""
    with contextlib.ExitStack() as open_bars:
        whole = open_bars.enter_context(tqdm(total=cells, disable=not progress, unit="cell"))
        yield (
            whole,
            {name: open_bars.enter_context(tqdm(disable=not progress, unit="run", desc=name, leave=False)) for name in names},
        )


def _cuda(settings: SweepSettings) -> bool:
    """Whether a worker needs a card: as the settings say, else as this machine has one."""
    return (settings.device or str(resolve_device(None))).startswith("cuda")
