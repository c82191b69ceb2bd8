"""Launch settings of attention kernels: measured once a card, dtype and size of work, and kept from process to process.

The settings that may be best are few and written here; what they were measured for is the key of a record, a small JSON file of its
own beside Triton's compiled kernels. Nothing is measured inside compiled code: it has what was measured before it was compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from fastvl_lab.whole import write_whole

_LEAST_LENGTH = 64


class Launch(NamedTuple):
    """How an attention kernel is launched: keys of one step, warps, and stages of the pipeline."""

    block_k: int
    num_warps: int
    num_stages: int


class _Key(NamedTuple):
    """What a process knows settings for; lengths are buckets."""

    device: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    lengths: tuple[int, ...]


# Operands of exact products of float32 lie in registers: few keys at a time. The first of each needs least, and fits every card.
_HALF = ((64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3))
_FLOAT32 = ((32, 4, 2), (32, 8, 2))


def launches_of(dtype: torch.dtype) -> tuple[Launch, ...]:
    """What may be best for a loop over blocks of keys in that dtype; the first is what runs where nothing can be measured."""
    return tuple(Launch(*launch) for launch in (_FLOAT32 if dtype == torch.float32 else _HALF))


def bucket(length: int) -> int:
    """The least power of 4 that is not below a length, from 64 on: lengths that share launch settings."""
    return int(max(_LEAST_LENGTH, 4 ** -(-(length - 1).bit_length() // 2)))


def card_of(device: torch.device) -> str:
    """Which GPU it is: cards of one architecture differ in clocks and memory, and slices of one card in multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


class Tuned:
    """An attention kernel that is launched with the settings measured to be the fastest for the card, the dtype and the sizes.

    kernel: takes `q` first, and `block_k`. sizes: the names of what the settings depend on as it is. lengths: of what they depend
    on up to its bucket. The first launch of a key measures, for which it waits for the device, or finds what another process has
    measured: that is warm-up, or a cold run.
    """

    def __init__(self, kernel: Any, *, sizes: tuple[str, ...], lengths: tuple[str, ...]) -> None:
        self.kernel, self._names = kernel, ("dtype", *sizes, *lengths)
        self._chosen: dict[_Key, Launch] = {}

        # torch.compile calls this as it is, while it compiles, and looks into nothing; it takes no more than a number for constant.
        @torch.compiler.assume_constant_result
        def settled(dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
            """Of `launches_of`, the one for the longest lengths that these sizes were measured for, or the first."""
            known = [(key.lengths, launch) for key, launch in self._chosen.items() if (key.dtype, key.sizes) == (dtype, sizes)]
            return launches_of(dtype).index(max(known)[1]) if known else 0

        self._settled: Callable[[torch.dtype, tuple[int, ...]], int] = settled

    def launch(
        self,
        grid: tuple[int, ...],
        q: torch.Tensor,
        *arguments: Any,
        sizes: tuple[int, ...],
        lengths: tuple[int, ...],
        **constants: Any,
    ) -> None:
        """Launch the kernel on q and the other arguments, with the settings for the values of its sizes and lengths."""

        def run(launch: Launch) -> None:
            block_k, num_warps, num_stages = launch
            self.kernel[grid](q, *arguments, **constants, block_k=block_k, num_warps=num_warps, num_stages=num_stages)

        if torch.compiler.is_compiling():  # a program for any length has one setting
            run(launches_of(q.dtype)[self._settled(q.dtype, sizes)])
            return
        key = _Key(q.get_device(), q.dtype, sizes, tuple(map(bucket, lengths)))
        launch = self._chosen.get(key)
        if launch is None:
            launch = self._chosen[key] = self._choose(q, key, run)
        run(launch)

    def launches(self) -> list[tuple[dict[str, str], dict[str, int]]]:
        """What this process has launched: for which dtype, sizes and buckets of lengths, and with which settings."""
        return [(self._in_words(key), launch._asdict()) for key, launch in self._chosen.items()]

    def _in_words(self, key: _Key) -> dict[str, str]:
        values = (str(key.dtype).removeprefix("torch."), *map(str, (*key.sizes, *key.lengths)))
        return dict(zip(self._names, values, strict=True))

    def _choose(self, q: torch.Tensor, key: _Key, run: Callable[[Launch], None]) -> Launch:
        candidates = launches_of(q.dtype)
        if knobs.runtime.interpret or len(candidates) == 1:  # no device to measure, or nothing to choose from
            return candidates[0]
        asked = {
            "kernel": self.kernel.fn.__name__,
            "source": hashlib.sha256(inspect.getsource(self.kernel.fn).encode()).hexdigest(),
            "triton": triton.__version__,
            "card": card_of(q.device),
            "for": self._in_words(key),
        }
        launch = _recorded(asked, candidates)
        if launch is None:
            times = measured(candidates, run)
            launch = min(times, key=times.__getitem__)
            _record(asked, launch, times)
        return launch


def tuned(*, sizes: tuple[str, ...], lengths: tuple[str, ...]) -> Callable[[Any], Tuned]:
    """Decorate an attention kernel: its launch settings depend on these sizes, and on lengths like these."""
    return lambda kernel: Tuned(kernel, sizes=sizes, lengths=lengths)


def measured(candidates: Iterable[Launch], run: Callable[[Launch], None]) -> dict[Launch, float]:
    """The milliseconds of a launch with each of the settings; those that the card has no room for are left out.

    Raises what a launch raises, and the last reason where none has room.
    """
    times, failure = {}, None
    for launch in candidates:
        try:
            times[launch] = do_bench(partial(run, launch), return_mode="median")
        except (OutOfResources, CompileTimeAssertionFailure, PTXASError) as error:
            failure = error
    if failure is not None and not times:
        raise failure
    return times


def _path(asked: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    return Path(knobs.cache.dir) / "fastvl_lab" / f"{asked['kernel']}-{digest}.json"


def _recorded(asked: Mapping[str, Any], candidates: Iterable[Launch]) -> Launch | None:
    """What a process has measured for exactly this; a record that cannot be understood is removed, and no other."""
    path = _path(asked)
    try:
        record = json.loads(path.read_text())
        launch = Launch(**record["launch"])
        if record["asked"] == asked and launch in candidates:
            return launch
    except OSError:  # there is none, or none that this process may read
        return None
    except (ValueError, KeyError, TypeError):
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _record(asked: Mapping[str, Any], launch: Launch, times: Mapping[Launch, float]) -> None:
    """Keep it, whole or not at all; where the folder cannot be written, this process alone knows it."""
    tried = [each._asdict() | {"milliseconds": time} for each, time in times.items()]
    with contextlib.suppress(OSError):
        write_whole(_path(asked), json.dumps({"asked": asked, "launch": launch._asdict(), "tried": tried}, indent=1).encode())
