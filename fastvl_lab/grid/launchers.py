"""Launchers start and end workers, on this machine, on a Ray cluster, or by SLURM; they know no cell."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastvl_lab.errors import DeviceError, FastvlError, RequestError, require, sentence
from fastvl_lab.grid.worker import command, environment, work
from fastvl_lab.measure.sweep import LAUNCHERS
from fastvl_lab.processes.kept import Kept

# Seconds that workers may take to end: the keeper of a cell waits for three before it kills; and between two looks at that.
_ENDING = 15.0
_LOOK_UP = 0.2

# Minutes that SLURM allows a worker, unless launcher_options says otherwise; submitit's own five are for functions, not for grids.
_MINUTES = 24 * 60


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a launcher is to start: a worker for each of the `names`, over the folder.

    cuda: whether each needs a card of its own. program: as `worker.command` has it. options: the launcher's own, from the plan.
    """

    folder: Path
    names: Sequence[str]
    cuda: bool
    program: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Launched(Protocol):
    """Workers that were started."""

    def alive(self) -> int:
        """How many have not ended."""

    def stop(self) -> None:
        """End them all, with their cells, and wait until they have, for some seconds at most."""


class _Local:
    """A worker a card, each in the care of a keeper; each has its own share of the cores."""

    def __init__(self, order: Order) -> None:
        _no_options("local", order.options)
        cards, cores = _cards() if order.cuda else (), sorted(os.sched_getaffinity(0))
        share = len(cores) // len(order.names)
        self._kept: list[Kept] = []
        for number, name in enumerate(order.names):
            own = cores[number * share : (number + 1) * share] if len(order.names) > 1 else ()
            line = command(order.folder, name, cores=own, program=order.program)
            card = {"CUDA_VISIBLE_DEVICES": cards[number]} if order.cuda else {}
            self._kept.append(Kept(line, env={**environment(), **card}, log=order.folder / "logs" / f"{name}.log"))

    def alive(self) -> int:
        return sum(kept.exit_code is None for kept in self._kept)

    def stop(self) -> None:
        for kept in self._kept:
            kept.let_go()
        for kept in self._kept:
            kept.wait(_ENDING)


class _Ray:
    """A Ray task a worker, on the cluster that RAY_ADDRESS names or that runs here, else on one that is started here."""

    def __init__(self, order: Order) -> None:
        self._ray = require("ray", "ray")
        wanted = {"num_cpus": 1, "num_gpus": int(order.cuda), "scheduling_strategy": "SPREAD", "max_retries": 0}
        with _of_options():
            task = self._ray.remote(work).options(**(wanted | dict(order.options)))
        self._started = not self._ray.is_initialized()
        if self._started:
            try:
                self._ray.init(log_to_driver=False, include_dashboard=None if "RAY_ADDRESS" in os.environ else False)
            except Exception as error:  # of many kinds, and none of Ray's own
                raise FastvlError(f"Ray neither has a cluster that can be joined nor starts one: {sentence(error)}") from error
        self._tasks = [task.remote(str(order.folder), name, tuple(order.program)) for name in order.names]

    def alive(self) -> int:
        return len(self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)[1])

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)
        self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=_ENDING)
        if self._started:
            self._ray.shutdown()


class _Submitit:
    """An array of SLURM jobs, one a worker; with the option `cluster: local`, processes of this machine in their place."""

    def __init__(self, order: Order) -> None:
        submitit = require("submitit", "slurm")
        options = {"cluster": "slurm", "name": "fastvl-lab", "timeout_min": _MINUTES, "cpus_per_task": 4}
        options |= {"gpus_per_node": 1} if order.cuda else {}
        options |= dict(order.options)
        cluster = options.pop("cluster")
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise RequestError(
                "launcher 'submitit' needs SLURM's sbatch, which is not found; start it where it is, or give launcher_options: "
                "{cluster: local} for processes of this machine"
            )
        with _of_options():
            executor = submitit.AutoExecutor(folder=order.folder / "logs" / "submitit", cluster=cluster)
            executor.update_parameters(**options)
        folders, programs = [str(order.folder)] * len(order.names), [tuple(order.program)] * len(order.names)
        self._jobs = executor.map_array(work, folders, list(order.names), programs)

    def alive(self) -> int:
        return sum(not job.done() for job in self._jobs)

    def stop(self) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel(check=False)  # one that cannot be cancelled keeps no other
        deadline = time.monotonic() + _ENDING
        while self.alive() and time.monotonic() < deadline:
            time.sleep(_LOOK_UP)


_START: dict[str, Callable[[Order], Launched]] = dict(zip(LAUNCHERS, (_Local, _Ray, _Submitit), strict=True))


def start(launcher: str, order: Order) -> Launched:
    """Have the launcher start the workers; raises `FastvlError`s for what it lacks."""
    return _START[launcher](order)


def how_many(launcher: str, workers: int, cuda: bool, cells: int) -> int:
    """How many workers to start of the `workers` asked for, 0 for as many as fit; never more than cells.

    Raises `FastvlError`s where this machine is to have more than it has cards or cores, and where a cluster is not told how many.
    """
    if launcher != "local":
        if not workers:
            raise RequestError(f"workers is 0; say how many launcher {launcher!r} shall start")
        return min(workers, cells)
    room = len(_cards()) if cuda else len(os.sched_getaffinity(0))
    if workers > room:
        what = "CUDA devices, of which each worker takes one" if cuda else "cores"
        raise DeviceError(f"workers is {workers}, and this machine has {room} {what}")
    return min(workers or (room if cuda else 1), cells)


def _cards() -> tuple[str, ...]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES", "").strip():
        return tuple(part.strip() for part in given.split(",") if part.strip())
    return tuple(map(str, range(torch.cuda.device_count())))


def _no_options(launcher: str, options: Mapping[str, Any]) -> None:
    if options:
        raise RequestError(f"launcher_options has {', '.join(map(str, options))}, and launcher {launcher!r} takes none")


@contextlib.contextmanager
def _of_options() -> Iterator[None]:
    """What a launcher's package says of options that it does not take, as one sentence."""
    try:
        yield
    except Exception as error:  # of many kinds
        raise RequestError(f"launcher_options: {sentence(error)}") from error
