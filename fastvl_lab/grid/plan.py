"""A plan of cells: read from YAML or made of a sweep's settings, and checked whole before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastvl_lab.catalogue import toggle_at
from fastvl_lab.checkpoint import resolve_device
from fastvl_lab.engine import find
from fastvl_lab.errors import FastvlError, RecipeError, RequestError, is_number, meant, quoted
from fastvl_lab.measure.publish import PHOTOGRAPHS, photo
from fastvl_lab.measure.sweep import LAUNCHERS, SweepSettings, identity, load_label, place, runs_of, size_label
from fastvl_lab.measure.under_load import Arrivals

# Keys of a plan by what they are of. A scenario may have those of cells.
_SETTINGS = tuple(found.name for found in dataclasses.fields(SweepSettings))
_OF_ALL = ("device", "output_dir", "launcher", "workers")
_OF_CELLS = (*(name for name in _SETTINGS if name not in _OF_ALL), "base", "grid", "zip")
_OF_PLAN = ("scenarios", "launcher_options", "reference", "cell_seconds", "beat", "stale")

# What decides a cell's numbers. How long it may wait for quiet, and where it is written, do not.
_DECIDES = ("checkpoints", "image_sizes", "recipes", "prompt", "max_new_tokens", "repeats", "warm_up", "seed", "device", "dtype")

# Guesses, in seconds, until a cell is done: to start a cell, and for a run of one megapixel.
_START, _RUN = 30.0, {"cpu": 2.0, "cuda": 0.3}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What every cell's process measures first, so that hosts can be compared: a recipe on a picture of `size`, (width, height)."""

    checkpoint: str = "tiny-qwen3-vl"
    recipe: str = "baseline"
    size: Sequence[int] = (224, 224)
    repeats: int = 9

    def __post_init__(self) -> None:
        if find(self.recipe).recipe is None:
            raise RequestError(f"reference: recipe is {self.recipe!r}; it must be one of the lab's own recipes")
        # Every other field is one that a sweep checks.
        SweepSettings(checkpoints=[self.checkpoint], recipes=[self.recipe], image_sizes=[self.size], repeats=self.repeats)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A checkpoint, a size and a load, with all recipes: what one fresh process measures on one device.

    id: a hash of what decides its numbers. checkpoint: as it was given. settings: fields of `SweepSettings`, checked already, with
    paths that hold from any folder.
    """

    id: str
    scenario: str
    checkpoint: str
    settings: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, int] | None:
        return next(((width, height) for width, height in self.settings["image_sizes"]), None)

    @property
    def load(self) -> str:
        """In words; "" of a request alone."""
        return "".join(load_label(load) for given in self.settings["loads"] if (load := Arrivals.of(given)) is not None)

    @property
    def image(self) -> str:
        """The size, and the load where there is one: as errors name the place."""
        return ", ".join(filter(None, (size_label(self.size), self.load)))

    @property
    def label(self) -> str:
        return " · ".join(filter(None, (self.scenario, self.checkpoint, size_label(self.size), self.load)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a grid, and how they are measured.

    settings: those of the whole, whose lists have what any cell has. cell_seconds: that a cell may take. beat, stale: seconds
    between a worker's heartbeats, and without one until it counts as gone. options: the launcher's own.
    """

    cells: tuple[Cell, ...]
    settings: SweepSettings
    reference: Reference = field(default_factory=Reference)  # when a plan is made: it asks for the device, as an import must not
    cell_seconds: float = 3600.0
    beat: float = 5.0
    stale: float = 120.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cell_seconds", "beat", "stale"):
            _check_seconds(name, getattr(self, name))
        if self.stale <= self.beat:
            raise RequestError(
                f"stale is {self.stale:g} and beat {self.beat:g}; a heartbeat must come more often than it goes stale"
            )
        if ":" in self.settings.device:
            raise RequestError(f"device is {self.settings.device!r}; a launcher gives each worker a card of its own: say 'cuda'")
        met: dict[str, Cell] = {}
        for cell in self.cells:
            if cell.id in met:
                raise RequestError(f"two cells are equal: {met[cell.id].label} and {cell.label}; leave one out")
            met[cell.id] = cell

    def to_dict(self) -> dict[str, Any]:
        """What workers and cells read, ready for JSON."""
        cells = {cell.id: {"label": cell.label, "settings": dict(cell.settings)} for cell in self.cells}
        times = {name: getattr(self, name) for name in ("cell_seconds", "beat", "stale")}
        return {"cells": cells, "reference": dataclasses.asdict(self.reference), **times}


def of_settings(settings: SweepSettings) -> Plan:
    """The plan of a sweep; its cells in the order in which one process would measure them."""
    return Plan(cells=tuple(_cells(settings, "", _pairs(settings))), settings=settings)


def read(path: Path, **changes: Any) -> Plan:
    """The plan of a YAML file, which meets in runs/ and the file's name by default; raises `FastvlError`s.

    changes: keys of it that are given elsewhere, such as on a command line.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Strict)
    except OSError as error:
        raise RequestError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"plan {str(path)!r} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        raise RequestError(f"plan {str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or not data:
        raise RequestError(f"plan {str(path)!r} is {quoted(data)}; it must be a mapping with keys such as checkpoints, recipes")
    return of_mapping({"output_dir": f"runs/{path.stem}", **data, **changes})


def of_mapping(data: Mapping[str, Any]) -> Plan:
    """The plan that a YAML file spells, by default for the launcher "local"; raises `FastvlError`s that name the key."""
    data = {**data, "launcher": data.get("launcher") or LAUNCHERS[0]}
    _check_keys("plan", data, (*_SETTINGS, "base", "grid", "zip", *_OF_PLAN))
    scenarios = _mapping("scenarios", data["scenarios"], empty=False) if "scenarios" in data else {"": {}}
    common = {name: value for name, value in data.items() if name in _SETTINGS or name in _OF_CELLS}
    cells: list[Cell] = []
    settings = []
    for name, own in scenarios.items():
        where = f"scenario {name!r}" if name else ""
        _check_keys(where, _mapping(where, own), _OF_CELLS)
        try:
            mine, pairs = _of_scenario({**common, **own})
            _check_recipes(mine)
            cells += _cells(mine, str(name), pairs)
        except FastvlError as error:
            if not name:
                raise
            raise type(error)(f"{where}: {error}") from None
        settings.append(mine)
    own_keys: dict[str, Any] = {name: data[name] for name in ("cell_seconds", "beat", "stale") if name in data}
    if "reference" in data:
        given = _mapping("reference", data["reference"])
        _check_keys("reference", given, [found.name for found in dataclasses.fields(Reference)])
        own_keys["reference"] = Reference(**given)
    if "launcher_options" in data:
        own_keys["options"] = _mapping("launcher_options", data["launcher_options"])
    lists: dict[str, Any] = {name: _union(settings, name) for name in ("checkpoints", "recipes", "image_sizes", "loads")}
    return Plan(cells=tuple(cells), settings=dataclasses.replace(settings[0], **lists), **own_keys)


def runs(settings: Mapping[str, Any]) -> int:
    """Runs of a cell, at least: disturbed ones are measured again."""
    (load,) = map(Arrivals.of, settings["loads"] or [None])
    return runs_of(SweepSettings.kept(settings), load)


def estimate(plan: Plan, taken: Mapping[str, float]) -> dict[str, float]:
    """Seconds by cell: what it has taken, of others a guess by runs and pixels, scaled by what those took that are done.

    taken: seconds by id of cells that are done.
    """
    run = _RUN[(plan.settings.device or str(resolve_device(None))).partition(":")[0]]
    guesses = {cell.id: _START + runs(cell.settings) * run * _megapixels(cell) for cell in plan.cells}
    done = [cell for cell in guesses if cell in taken]
    scale = sum(taken[cell] for cell in done) / sum(guesses[cell] for cell in done) if done else 1.0
    return {cell: taken.get(cell, scale * guess) for cell, guess in guesses.items()}


def _of_scenario(data: Mapping[str, Any]) -> tuple[SweepSettings, list[tuple[str, Any]]]:
    """The settings of a scenario, and its checkpoints with their sizes; None is the image as it is."""
    zipped, grid = _axes("zip", data.get("zip", {})), _axes("grid", data.get("grid", {}))
    together = {name: values for name, values in zipped.items() if name in ("checkpoints", "image_sizes")}
    for name in grid:
        if "." not in name:
            raise RequestError(f"grid has {name!r}; its keys are toggles such as vit.attention, and {name} is a list of its own")
    for name in together:
        if name in data:
            raise RequestError(f"{name} is given twice: of its own and under zip")
    given = {name: value for name, value in {**data, **{k: _unique(v) for k, v in together.items()}}.items() if name in _SETTINGS}
    changes = {name: values for name, values in zipped.items() if name not in together}
    if clash := next((name for name in changes if name in grid), None):
        raise RecipeError(f"{clash} is given twice: under grid and under zip")
    spelled = _spelled(data.get("base", "fastest"), grid, changes)
    if spelled:
        listed = given.get("recipes", ())
        if isinstance(listed, str) or not isinstance(listed, Sequence):
            raise RequestError(f"recipes is {listed!r}; give a list")
        given["recipes"] = [*listed, *spelled]
    elif "base" in data:
        raise RequestError("base is given, and neither grid nor zip has a toggle that would change it")
    for name in ("checkpoints", "recipes"):
        if name not in given:
            raise RequestError(f"{name} is missing; give a list of at least one")
    settings = SweepSettings(**given)
    pairs = list(zip(*(together[name] for name in ("checkpoints", "image_sizes")), strict=True)) if len(together) == 2 else None
    return settings, _pairs(settings) if pairs is None else pairs


def _axes(name: str, given: Any) -> dict[str, list[Any]]:
    """The lists of a grid or a zip by key; those of a zip are of one length."""
    axes = _mapping(name, given)
    for key, values in axes.items():
        if not isinstance(key, str):
            raise RequestError(f"{name} has {key!r}; its keys are texts such as vit.attention")
        if "." in key:
            toggle_at(key)
        elif key not in ("checkpoints", "image_sizes"):
            raise RequestError(f"{name} has {key!r}; its keys are toggles such as vit.attention, checkpoints and image_sizes")
        if not isinstance(values, list):
            raise RequestError(f"{name}: {key} is {quoted(values)}; give a list")
        if not values:
            raise RequestError(f"{name}: {key} is empty; give a list of at least one")
    if name == "zip":
        toggles = {key: len(values) for key, values in axes.items() if "." in key}
        cells = {key: len(values) for key, values in axes.items() if "." not in key}
        for lengths in (toggles, cells):
            if len(set(lengths.values())) > 1:
                said = ", ".join(f"{key} has {length}" for key, length in lengths.items())
                raise RequestError(f"zip: {said}; lists that go together are of one length")
        if len(cells) == 1:
            raise RequestError(
                f"zip has {next(iter(cells))} and nothing to go with it; give checkpoints and image_sizes, or neither"
            )
    return axes


def _spelled(base: Any, grid: Mapping[str, list[Any]], zipped: Mapping[str, list[Any]]) -> list[str]:
    """Recipe texts: `base` after each combination of the grid, with each line of the zip."""
    if not isinstance(base, str):
        raise RecipeError(f"base is {base!r}; give a recipe's text such as 'fastest'")
    if not grid and not zipped:
        return []
    lines = [dict(zip(zipped, values, strict=True)) for values in zip(*zipped.values(), strict=True)] if zipped else [{}]
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [
        ", ".join([base, *(f"{path}={_spelling(path, value)}" for path, value in {**line, **combination}.items())])
        for line in lines
        for combination in combinations
    ]


def _spelling(path: str, value: Any) -> str:
    """A value as recipes spell it: YAML reads on and off as true and false."""
    if isinstance(value, bool):
        value = "on" if value else "off"
    values = [str(known) for known in toggle_at(path).values]
    if str(value) not in values:
        raise RecipeError(f"{path} is {quoted(value)}; the choices are {', '.join(values)}")
    return str(value)


def _check_recipes(settings: SweepSettings) -> None:
    """Raise `RecipeError` for a recipe that cannot run on the device, where it is known: that of another host is not."""
    known = settings.device or ("" if settings.launcher not in ("", "local") else str(resolve_device(None)))
    for recipe in settings.recipes:
        find(recipe, known or None)


def _pairs(settings: SweepSettings) -> list[tuple[str, Any]]:
    sizes: Sequence[Any] = settings.image_sizes or [None]
    return list(itertools.product(settings.checkpoints, sizes))


def _cells(settings: SweepSettings, scenario: str, pairs: Sequence[tuple[str, Any]]) -> Iterator[Cell]:
    digest = hashlib.sha256(photo(settings.image)).hexdigest()
    image = settings.image if settings.image in PHOTOGRAPHS else os.path.abspath(os.path.expanduser(settings.image))
    common = dataclasses.asdict(settings) | {"image": image, "output_dir": "", "workers": 0}
    for checkpoint, size in pairs:
        sized = common | {"checkpoints": [place(checkpoint)], "image_sizes": [] if size is None else [list(size)]}
        for load in map(Arrivals.of, settings.loads or [None]):
            mine = sized | {"loads": [] if load is None else [dataclasses.asdict(load) | {"n": load.count}]}
            decides = {name: mine[name] for name in _DECIDES} | {"image": digest}
            decides |= {"loads": mine["loads"]} if load is not None else {}  # those of older plans keep their ids
            identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
            yield Cell(id=identity, scenario=scenario, checkpoint=checkpoint, settings=mine)


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # it has no annotations
    """YAML of which a key that stands twice is an error, as it is none of PyYAML's."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


def _check_keys(where: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in given:
        if key in known:
            continue
        if isinstance(key, str) and "." in key:
            toggle_at(key)
            raise RequestError(f"{where or 'plan'} has the toggle {key!r}; put it under grid or under zip")
        raise RequestError(f"{where or 'plan'}: key {key!r} is unknown{meant(key, known)}; the choices are {', '.join(known)}")


def _mapping(name: str, given: Any, *, empty: bool = True) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"{name} is {quoted(given)}; give a mapping")
    if not given and not empty:
        raise RequestError(f"{name} is empty; give at least one, or leave the key out")
    return dict(given)


def _check_seconds(name: str, value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise RequestError(f"{name} is {quoted(value)}; it must be a number of seconds above 0")


def _unique(values: Sequence[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def _union(settings: Sequence[SweepSettings], name: str) -> list[Any]:
    """What any of them has in that list, once however often it is spelled."""
    met: dict[Any, Any] = {}
    for value in (value for mine in settings for value in getattr(mine, name)):
        met.setdefault(identity(name, value), value)
    return list(met.values())


def _megapixels(cell: Cell) -> float:
    return math.prod(cell.size) / 1e6 if cell.size else 1.0
