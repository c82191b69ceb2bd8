"""What a machine has learnt of itself: the best recipe that `fl.tune` found here, in a file that "fastest" is read from.

A record is one JSON file in `tuned/` of the cache folder, for one device with its processor and threads, one geometry and one
dtype. What was found for goodput, of many requests at once, has a file beside it and is never "fastest", which is of one. It is a
plain file: it may be copied to another machine of the same kind. The package ships records too, in its own `tuned/`: each is what a
tune wrote on a machine with that device, and counts on others with it, where they have learnt nothing themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.checkpoint.memory import available_bytes, gigabytes
from fastvl_lab.checkpoint.user_cache import cache_root
from fastvl_lab.errors import RecipeError, sentence
from fastvl_lab.machine import processor_name
from fastvl_lab.recipe import Recipe
from fastvl_lab.whole import write_whole

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tuned"

# What a recipe's times depend on beside the machine.
_PACKAGES = ("fastvl-lab", "torch", "transformers", "triton")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a record is of. device: the GPU's name, or "CPU". threads: of torch's. geometry: a digest of all weights' shapes."""

    device: str
    processor: str
    threads: int
    geometry: str
    dtype: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Site:
        """Where a checkpoint is, and what it is like; two of one geometry are alike."""
        device, target = checkpoint.device, checkpoint.target
        shapes = sorted((name, tuple(weight.shape)) for name, weight in checkpoint.model.named_parameters())
        widths = (target.tower_head_dim, target.decoder_head_dim)
        digest = hashlib.sha256(repr((shapes, widths)).encode()).hexdigest()[:16]
        return cls(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            processor=processor_name(),
            threads=torch.get_num_threads(),
            geometry=f"{checkpoint.family.model_type} {digest}",
            dtype=str(checkpoint.dtype).removeprefix("torch."),
        )

    @property
    def path(self) -> Path:
        """The file of its record."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        words = re.sub(r"\W+", "-", f"{self.device} {self.geometry.partition(' ')[0]} {self.dtype}".lower())
        return folder() / f"{words}-{digest}.json"

    def alike(self, other: Site) -> bool:
        """Whether a recipe that was the best there is a good one here: the same GPU, geometry and dtype.

        Of CPUs, processor and threads must be the same as well.
        """
        names = ("device", "geometry", "dtype", *(("processor", "threads") if self.device == "CPU" else ()))
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one tune found.

    versions: package -> version. ratio: how many times as fast as `over` the recipe is, with the ends of the 95% interval. goal:
    what was weighed, such as {"ttft": 1}. workload: of each request what it is, and its weight. parity: what its check said. date:
    as ISO 8601 has it.
    """

    site: Site
    versions: Mapping[str, str]
    checkpoint: str
    recipe: Recipe
    over: Recipe
    ratio: tuple[float, float, float]
    goal: Mapping[str, float]
    workload: Sequence[Mapping[str, Any]]
    parity: Sequence[str]
    date: str

    @property
    def under_load(self) -> bool:
        """Whether it is of many requests at once, and so says nothing of what is fastest for one."""
        return "goodput" in self.goal

    def write(self) -> Path:
        """Keep it in the place of an earlier one, whole or not at all; raises `OSError`."""
        path = _under_load(self.site) if self.under_load else self.site.path
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own |= {"site": dataclasses.asdict(self.site), "recipe": self.recipe.to_dict(), "over": self.over.to_dict()}
        own |= {"ratio": [end if math.isfinite(end) else str(end) for end in self.ratio]}  # over what had no goodput
        write_whole(path, json.dumps({"schema": SCHEMA, **own}, indent=1).encode())
        return path

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises `OSError`, and `ValueError` for a file that is no whole record."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        try:
            data |= {"site": Site(**data["site"]), "ratio": tuple(map(float, data["ratio"])), "versions": dict(data["versions"])}
            data |= {"goal": {name: float(weight) for name, weight in data["goal"].items()}}
            record = cls(**data | {name: Recipe.from_dict(data[name]) for name in ("recipe", "over")})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete or has what is unknown ({sentence(error)})") from None
        if len(record.ratio) != 3 or not record.recipe.exact:
            raise ValueError("its ratio has no interval" if record.recipe.exact else "its recipe is not exact")
        return record

    @property
    def origin(self) -> str:
        """Where its recipe is from, in words."""
        goal = (
            " and ".join(self.goal) if len(set(self.goal.values())) <= 1 else " + ".join(f"{w:g}·{g}" for g, w in self.goal.items())
        )
        before = "what it started from" if self.under_load else "what fastest was before"
        return f"tuned here on {self.date} for {goal}: {self.ratio[0]:.2f}× {before}"

    @property
    def shipped(self) -> str:
        """The same of a record that came with the package."""
        of = ", ".join(f"{package} {version}" for package, version in self.versions.items() if package != "fastvl-lab")
        return f"shipped: {self.origin.replace('tuned here', f'tuned on another {self.site.device}')} ({of})"


def folder() -> Path:
    """Where records of this machine are."""
    return cache_root() / "tuned"


def versions() -> dict[str, str]:
    """Of the packages that a recipe's times depend on; one that is not installed is absent."""
    found = {"torch": str(torch.__version__)}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.setdefault(package, importlib.metadata.version(package))
    return found


def fastest(checkpoint: Checkpoint) -> Recipe:
    """What was tuned for just this machine, geometry, dtype and these versions, else `otherwise`; its `origin` says which.

    Without a record, weights are packed where memory has room for them twice. A record of other versions is named there and not
    used. One that is damaged, of another machine under this one's name, or whose recipe cannot run here, is ignored with a warning.
    """
    site = Site.of(checkpoint)
    own, why = _own(checkpoint, site, site.path)
    if own is not None:
        return own
    guess = otherwise(checkpoint, site)
    return dataclasses.replace(guess, origin=f"{guess.origin}; {why}") if why else guess


def best_under_load(checkpoint: Checkpoint) -> Recipe | None:
    """What was tuned for goodput in just this place, by these versions; warns as `fastest`."""
    site = Site.of(checkpoint)
    return _own(checkpoint, site, _under_load(site))[0]


def _under_load(site: Site) -> Path:
    """The file of its record of goodput."""
    return site.path.with_stem(f"{site.path.stem}-goodput")


def _own(checkpoint: Checkpoint, site: Site, path: Path) -> tuple[Recipe | None, str]:
    """The recipe of a record of this very place, if it is of these versions, else why not, where there is one."""
    try:
        record = Record.read(path)
        if record.site != site:
            other = next(f.name for f in dataclasses.fields(Site) if getattr(record.site, f.name) != getattr(site, f.name))
            raise ValueError(f"its {other} is {getattr(record.site, other)!r}, and here it is {getattr(site, other)!r}")
        if record.under_load != (path != site.path):
            raise ValueError(f"its goal is {' and '.join(record.goal)}")
        now = versions()
        for package in {**record.versions, **now}:
            if (old := record.versions.get(package)) != (new := now.get(package)):
                return None, f"what was tuned here on {record.date} is of {package} {old or 'absent'}, and here is {new or 'none'}"
        record.recipe.check(checkpoint.target)
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {sentence(error)}", stacklevel=3)
        return None, ""
    return dataclasses.replace(record.recipe, origin=record.origin), ""


def otherwise(checkpoint: Checkpoint, site: Site) -> Recipe:
    """Where a machine has learnt nothing itself: what is shipped for such a device, geometry and dtype, else the guess.

    A shipped record is used whatever the versions, which its origin names: it was measured, and the guess was not. One whose recipe
    cannot run here is passed over.
    """
    for path in sorted(SHIPPED.glob("*.json")):
        record = Record.read(path)
        if site.alike(record.site) and not record.under_load:
            with suppress(RecipeError):
                record.recipe.check(checkpoint.target)
                return dataclasses.replace(record.recipe, origin=record.shipped)
    return _guess(checkpoint)


def _guess(checkpoint: Checkpoint) -> Recipe:
    """`Recipe.fastest`, with plain weights where a second copy of all would take more than half of what is free."""
    guess = Recipe.fastest(checkpoint.target)
    n_bytes = sum(weight.nbytes for weight in checkpoint.model.parameters())
    free = available_bytes(checkpoint.device)
    if guess.vit.weights == "plain" or free is None or 2 * n_bytes <= free:
        return guess
    plain = guess.replace({"vit.weights": "plain", "attention.weights": "plain"})
    why = f"its weights stay plain: packed ones would take {gigabytes(n_bytes)} more, and {gigabytes(free)} are free"
    return dataclasses.replace(plain, origin=f"{guess.origin}; {why}")
