"""Launch settings of Triton kernels, chosen by measurement once a device and kept from process to process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triton import Config, knobs
from triton.runtime.autotuner import Autotuner

# (keys of one step, warps, stages of the pipeline). Operands of exact products of float32 lie in registers: few keys at a time.
_HALF = ((64, 4, 3), (64, 4, 2), (64, 8, 3), (64, 8, 2), (128, 4, 2), (128, 8, 2), (128, 8, 3))
_FLOAT32 = ((32, 4, 2), (32, 8, 2))


def attention_launches() -> list[Config]:
    """What may be best for a loop over blocks of keys, by device, dtype and head dim; the first is what the interpreter takes."""
    return [
        Config({"block_k": block_k}, num_warps=num_warps, num_stages=num_stages)
        for block_k, num_warps, num_stages in (*_HALF, *_FLOAT32)
    ]


def _of_dtype(launches: Sequence[Config], arguments: Mapping[str, Any], **_: Any) -> list[Config]:
    """Those that are for queries of this dtype."""
    sizes = {block_k for block_k, *_ in (_FLOAT32 if arguments["q"].dtype == torch.float32 else _HALF)}
    return [launch for launch in launches if launch.kwargs["block_k"] in sizes]


class Tuned(Autotuner):
    """Triton's autotuner for attention kernels, which a damaged record does not stop, and whose later launches cost a look-up.

    The kernel's first argument is `q`, and it takes `block_k`; what the key names is given by name. Settings are measured at the
    first launch of a dtype and values of the key, which waits for the device: that is warm-up, or a cold run.
    """

    def __init__(self, kernel: Any, key: list[str]) -> None:
        launches = attention_launches()
        if knobs.runtime.interpret:  # no device to measure
            launches = launches[:1]
        super().__init__(
            kernel,
            kernel.arg_names,
            launches,
            key,
            reset_to_zero=None,
            restore_value=None,
            prune_configs_by={"early_config_prune": _of_dtype},
            cache_results=True,
        )
        self.configs = tuple(launches)  # torch 2.11 compiles no second launch of a kernel whose settings are a list
        self.chosen: dict[tuple[Any, ...], dict[str, Any]] = {}

    def run(self, q: torch.Tensor, *arguments: Any, **constants: Any) -> Any:
        """Launch with the best settings; their look-up takes a third of the time of Triton's own, by all arguments."""
        key = (q.dtype, *(constants[name] for name in self.keys))
        launch = self.chosen.get(key)
        if launch is not None:
            return self.fn.run(q, *arguments, **constants, **launch)
        launched = super().run(q, *arguments, **constants)
        self.chosen[key] = self.best_config.all_kwargs()
        return launched

    def launches(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What this process has launched: for which dtype and values of the key, and with which settings."""
        names = ("dtype", *self.keys)
        return [
            ({name: str(value).removeprefix("torch.") for name, value in zip(names, key, strict=True)}, launch)
            for key, launch in self.chosen.items()
        ]

    def check_disk_cache(self, tuning_key: Any, configs: list[Config], bench_fn: Callable[[], None]) -> bool:
        """Take what another process measured, or measure; a record that is damaged, or of other settings, is removed."""
        try:
            found: bool = super().check_disk_cache(tuning_key, configs, bench_fn)
            if found and self.cache[tuning_key] not in configs:
                raise ValueError("other settings")
        except (ValueError, KeyError, TypeError, AttributeError):
            for record in Path(knobs.cache.dir).glob(f"*/{self.base_fn.__name__}.autotune.json"):
                with contextlib.suppress(OSError):
                    record.unlink()  # the next process measures and records again
            bench_fn()
            return False
        return found


def tuned(key: list[str]) -> Callable[[Any], Tuned]:
    """Decorate an attention kernel: it is tuned for each dtype of `q` and values of the arguments that key names."""
    return lambda kernel: Tuned(kernel, key)
