"""How much of the machine others use while something is timed, and waiting until they use next to nothing.

On Linux the cores' idle time (/proc/stat) less this process's own leaves what others used, time stolen by a virtual machine's host
included; /proc/<pid>/task/*/schedstat says how long a thread waited for a core. On CUDA, NVML says how busy others kept the card.
Elsewhere nothing is known, and nothing is called quiet or disturbed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastvl_lab.errors import RequestError

T = TypeVar("T")

VARIABLE = "FASTVL_LAB_QUIET"  # "off": nothing is watched and nothing waited for, on machines that are shared on purpose
PROC = Path("/proc")
_GPU_SECONDS = 1.0  # how far back NVML's samples of a process may lie: it takes one to six a second


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """What counts as quiet, and how long to wait for it; times in seconds.

    share: of the cores (or of a GPU) that others may use, and of a run that a thread may wait for a core. window: that must be
    quiet before a run. wait: at most before one run, beyond that window. total: at most in a comparison, for waiting and for
    measuring again together; 0 neither waits nor measures again. again: how often a disturbed run is measured again.
    """

    share: float = 0.125
    window: float = 0.05
    wait: float = 10.0
    total: float = 120.0
    again: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 < self.window < float("inf"):
            raise RequestError(f"share is {self.share} and window {self.window}; share is above 0 and at most 1, window above 0")
        if not (self.wait >= 0 and self.total >= 0 and self.again >= 0):
            raise RequestError(f"wait is {self.wait}, total {self.total} and again {self.again}; none may be negative")


QUIET = Quiet()


@dataclass(frozen=True, kw_only=True)
class Use:
    """What others used of the machine for so many seconds; None is unknown.

    others: cores, of the `cores` that this process may use. waited: the share of the time that a thread of ours waited for a core
    which others had. gpu: the share of the card that others used. disturbed: whether that is more than `Quiet.share` allows.
    """

    seconds: float
    cores: int
    others: float | None = None
    waited: float | None = None
    gpu: float | None = None
    disturbed: bool | None = None

    @property
    def why(self) -> str:
        """In words."""
        said = "" if self.others is None else f"others used {self.others:.1f} of {self.cores} cores"
        if self.waited is not None and self.waited >= 0.01:
            said += f", and a thread waited for a core for {self.waited:.0%} of the time"
        if self.gpu:
            said += f"{'; ' if said else ''}others used {self.gpu:.0%} of the GPU"
        return said or "what others used is not known"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The clocks at one moment, in seconds. idle: of all cores together, None where the system does not tell; grain: its error.

    own: what the watched processes have computed. waited: by thread, how long it has waited for a core.
    """

    at: float
    cores: int
    idle: float | None
    grain: float
    own: float
    waited: Mapping[str, float] = field(default_factory=dict)


def reading(processes: Sequence[int] = ()) -> Reading:
    """The clocks now, with this process and those of these ids as ours."""
    (cores, idle, grain), at = _idle(), time.perf_counter()
    own, waited = time.process_time(), {}
    for process in ("self", *map(str, processes)):
        for ran, behind, thread in _threads(process):
            waited[thread] = behind
            own += 0.0 if process == "self" else ran  # the process's own clock knows threads that have ended, too
    return Reading(at=at, cores=cores, idle=idle, grain=grain, own=own, waited=waited)


def _idle() -> tuple[int, float | None, float]:
    """The cores that we may use, how long they have been idle, and how far that may be off."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    try:
        lines = [line.split() for line in (PROC / "stat").read_text().splitlines() if line.startswith("cpu")]
        clock = os.sysconf("SC_CLK_TCK")
        idle = {name: int(fields[3]) + int(fields[4]) for name, *fields in lines}  # waiting for a disk is idle
        if not idle["cpu"]:  # a sandbox that has the file and tells nothing
            return len(allowed), None, 0.0
        if len(allowed) == len(idle) - 1:
            return len(allowed), idle["cpu"] / clock, 1 / clock
        return len(allowed), sum(idle[f"cpu{core}"] for core in allowed) / clock, len(allowed) / clock
    except (OSError, ValueError, IndexError, KeyError):
        return len(allowed), None, 0.0


def _threads(process: str) -> Iterator[tuple[float, float, str]]:
    """Of each thread how long it has run and waited, and its name; none of a process that has ended, or where it is not told."""
    with contextlib.suppress(OSError):
        for thread in (PROC / process / "task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (thread / "schedstat").read_text().split()
                yield int(fields[0]) / 1e9, int(fields[1]) / 1e9, thread.name


def between(before: Reading, after: Reading, share: float, *, gpu: float | None = None) -> Use:
    """What others used between two readings, and whether it is more than the share.

    Threads of ours that wait for one another are not disturbed: a thread waited for others at most as long as they computed.
    """
    seconds = after.at - before.at
    if before.idle is None or after.idle is None:
        return Use(seconds=seconds, cores=after.cores, gpu=gpu, disturbed=True if gpu is not None and gpu > share else None)
    used = max(after.cores * seconds - (after.idle - before.idle) - (after.own - before.own), 0.0)
    sure = max(used - after.grain, 0.0)
    longest = max((waited - before.waited.get(thread, 0.0) for thread, waited in after.waited.items()), default=0.0)
    waited = min(longest, sure)
    disturbed = sure > share * after.cores * seconds or waited > share * seconds or (gpu is not None and gpu > share)
    return Use(seconds=seconds, cores=after.cores, others=used / seconds, waited=waited / seconds, gpu=gpu, disturbed=disturbed)


def others_on_gpu(device: torch.device, processes: Sequence[int] = ()) -> float | None:
    """The share of a card's time that others used in about the last second, by NVML; None where it does not say.

    It does not without the package nvidia-ml-py, nor where it does not see this very process, as in a container.
    """
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        ours = {os.getpid(), *processes}
        if os.getpid() not in running:
            return None
        if running <= ours:
            return 0.0
        since = int((time.time() - _GPU_SECONDS) * 1e6)
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(handle, since)
        except nvml.NVMLError_NotFound:  # none of them did anything
            return 0.0
        used = {s.pid: s for s in sorted(samples, key=lambda s: s.timeStamp)}
        return float(sum(used[pid].smUtil for pid in running - ours if pid in used)) / 100
    except nvml.NVMLError:
        return None


class Watch:
    """Over one comparison: waits for quiet before each run, judges it, and has a disturbed one measured again.

    quiet: None watches nothing, as does "off" in the environment variable `VARIABLE`. Raises `RequestError` for another text there,
    and for what is no `Quiet`.
    """

    def __init__(self, quiet: Quiet | None, device: torch.device | None = None) -> None:
        said = os.environ.get(VARIABLE, "").strip() or "on"
        if said not in ("on", "off"):
            raise RequestError(f"{VARIABLE} is {said!r}; the choices are on, off")
        if quiet is not None and not isinstance(quiet, Quiet):
            raise RequestError(f"quiet is {quiet!r}; give a fastvl_lab.Quiet, such as Quiet(total=60), or None")
        self._quiet = quiet if said == "on" else None
        self._device = device if device is not None and device.type == "cuda" else None
        self._left = self._quiet.total if self._quiet else 0.0
        self._in_vain: list[Use] = []
        self._gpu_unknown = False

    def measured(
        self,
        work: Callable[[], T],
        processes: Sequence[int] | None = (),
        *,
        again: bool = True,
        stop: threading.Event | None = None,
    ) -> Iterator[tuple[T, Use | None]]:
        """Do the work once, and again while it is disturbed: what it gave each time, and what others used meanwhile.

        processes: that compute for it beside this one; None where they are not known, so that their work cannot be told from
        others'. again: whether it may be done again. stop: once it is set, nothing is waited for.
        """
        if self._quiet is None:
            yield work(), None
            return
        for more in range(self._quiet.again if again else 0, -1, -1):
            self._wait(stop)
            before = reading(processes or ())
            result = work()
            use = self._judged(before, processes)
            yield result, use
            if not use.disturbed or not more or self._left <= 0:
                return
            self._left -= use.seconds

    def notes(self) -> tuple[str, ...]:
        """What the waiting came to, in sentences, where there is something to say."""
        said = []
        if self._in_vain and self._quiet is not None:
            most = max(self._in_vain, key=lambda use: (use.others or 0.0, use.gpu or 0.0))
            spent = self._quiet.total - max(self._left, 0.0)
            said.append(f"quiet never came in {spent:.0f} s of waiting before {len(self._in_vain)} of the runs: {most.why}")
        if self._gpu_unknown:
            said.append("what others used of the GPU is not known: it takes the package nvidia-ml-py, outside of a container")
        return tuple(said)

    def _wait(self, stop: threading.Event | None) -> None:
        assert self._quiet is not None
        limit, first = min(self._quiet.wait, self._left), reading()
        if limit <= 0 or first.idle is None:
            return
        before, spent = first, 0.0
        while not pause(self._quiet.window, stop):
            use = self._judged(before, ())
            spent += use.seconds
            if not use.disturbed:
                break
            if spent >= limit:
                self._in_vain.append(use)
                break
            before = reading()
        self._left -= max(spent - self._quiet.window, 0.0)

    def _judged(self, before: Reading, processes: Sequence[int] | None) -> Use:
        assert self._quiet is not None
        after = reading(processes or ())
        gpu = None if self._device is None else others_on_gpu(self._device, processes or ())
        self._gpu_unknown |= self._device is not None and gpu is None
        if processes is None:
            return Use(seconds=after.at - before.at, cores=after.cores)
        return between(before, after, self._quiet.share, gpu=gpu)


def pause(seconds: float, stop: threading.Event | None) -> bool:
    """Whether it is to stop, after so long or at once."""
    if stop is not None:
        return stop.wait(seconds)
    time.sleep(seconds)
    return False
