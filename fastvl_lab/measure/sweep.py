"""A grid of checkpoints, image sizes and loads, every engine side by side at each point, kept on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastvl_lab import shown
from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.loading import resolve_device, resolve_dtype
from fastvl_lab.engine import find
from fastvl_lab.errors import (
    CheckpointError,
    FastvlError,
    RecipeError,
    RequestError,
    check_whole_number,
    counted,
    is_number,
    require,
    sentence,
)
from fastvl_lab.lab import Lab
from fastvl_lab.lasting import About, Lasting
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.publish import document, notebook_parameters, photo, published_point
from fastvl_lab.measure.quiet import QUIET
from fastvl_lab.measure.samples import json_value
from fastvl_lab.measure.under_load import Arrivals, UnderLoad, requests_of, under_load
from fastvl_lab.request import Request
from fastvl_lab.whole import write_whole

# JPEG has no larger.
_LARGEST_SIDE = 65500

# Who may start a sweep's workers, beside this process itself (""); `grid.launchers` does.
LAUNCHERS = ("local", "ray", "submitit")


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep runs; its fields are the parameters of notebooks/ttft_sweep.ipynb.

    recipes: recipe texts and peers, such as "transformers", "baseline", "fastest, vit.tower=lean". image: a path or a built-in
    photograph. image_sizes: [width, height] pairs the image is resized to; empty leaves it as it is. loads: under which each is
    measured, as `Arrivals` has them; None, or an empty list, is the request alone. quiet: seconds that a point may wait for a quiet
    machine. device, dtype: "" is the default. output_dir: "" keeps nothing on disk. launcher: "" measures in
    this process, another has workers measure cells in processes of their own (docs/grids.md); workers: how many, 0 as many as
    there are devices. Raises `FastvlError`s for what can be known before any work, one of a list twice included: its samples could
    not be told apart.
    """

    checkpoints: Sequence[str]
    recipes: Sequence[str]
    image: str = "coffee"
    image_sizes: Sequence[Sequence[int]] = ()
    loads: Sequence[Mapping[str, Any] | None] = field(default_factory=list)
    prompt: str = "What is in this picture?"
    max_new_tokens: int = 16
    repeats: int = 6
    warm_up: int = 1
    device: str = ""
    dtype: str = ""
    seed: int = 0
    output_dir: str = ""
    quiet: float = QUIET.total
    launcher: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoints", "recipes", "image_sizes", "loads"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise RequestError(f"{name} is {values!r}; give a list")
            if len(values) == 0 and name not in ("image_sizes", "loads"):
                raise RequestError(f"{name} is empty; give a list of at least one")
        for checkpoint in self.checkpoints:
            if not isinstance(checkpoint, str):
                raise CheckpointError(f"checkpoints has {checkpoint!r}; each is a text: a folder, a hub id or a built-in name")
        for recipe in self.recipes:
            find(recipe)
        for size in self.image_sizes:
            whole = isinstance(size, Sequence) and all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in size)
            if not whole or len(size) != 2:
                raise RequestError(f"image_sizes has {size!r}; each is [width, height] in whole pixels from 1 to {_LARGEST_SIDE}")
        _refuse_twice("recipes", self.recipes, RecipeError)
        _refuse_twice("checkpoints", self.checkpoints, CheckpointError)
        _refuse_twice("image_sizes", self.image_sizes, RequestError)
        _refuse_twice("loads", self.loads, RequestError)
        for name, least in (("repeats", 1), ("warm_up", 0), ("max_new_tokens", 1), ("seed", 0), ("workers", 0)):
            check_whole_number(name, getattr(self, name), least=least)
        if not is_number(self.quiet) or self.quiet < 0:
            raise RequestError(f"quiet is {self.quiet!r}; it must be a number of seconds from 0 up")
        for name in ("image", "prompt", "device", "dtype", "output_dir", "launcher"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be a text (papermill: -r {name} …)")
        if self.launcher and self.launcher not in LAUNCHERS:
            raise RequestError(f"launcher is {self.launcher!r}; the choices are {', '.join(LAUNCHERS)}, or empty for this process")
        if self.workers and not self.launcher:
            raise RequestError(f"workers is {self.workers}, and launcher is empty; the launchers are {', '.join(LAUNCHERS)}")
        if self.launcher in ("", "local"):  # another's hosts may have other devices
            resolve_device(self.device or None)
        resolve_dtype(self.dtype or None)
        if self.output_dir:
            try:
                Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RequestError(f"output_dir {self.output_dir!r} cannot be made: {error.strerror}") from None

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> SweepSettings:
        """Read a notebook's variables; an unknown parameter or recipe is an error before any work."""
        return cls(**notebook_parameters(namespace, [field.name for field in dataclasses.fields(cls)]))

    @classmethod
    def kept(cls, record: Mapping[str, Any]) -> SweepSettings:
        """Those of a sweep that was made elsewhere, perhaps: what they name need not be here, and no folder is made."""
        made = object.__new__(cls)
        for own in dataclasses.fields(cls):
            default = [] if own.default is dataclasses.MISSING else own.default
            object.__setattr__(made, own.name, record.get(own.name, default))  # an older record lacks what is newer
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class SweptPoint:
    """One checkpoint with one image size, and what was measured there; `size` is None for the image as it is.

    environment: where it was measured, if that is its own: points of a grid come from many hosts.
    """

    checkpoint: str
    size: tuple[int, int] | None
    comparison: Comparison
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.checkpoint} · {size_label(self.size)}"


def told_failure(error: Mapping[str, str]) -> str:
    """A row of a sweep's `errors` as a line."""
    return f"failed: {' · '.join(v for k, v in error.items() if v and k != 'error')}: {error['error']}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPoint:
    """One checkpoint with one image size under one load; the rest as `SweptPoint` has it."""

    checkpoint: str
    size: tuple[int, int] | None
    load: str
    found: UnderLoad
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.checkpoint} · {size_label(self.size)} · {self.load}"


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult(Lasting):
    """Every point of a sweep, of the request alone and under `loaded` those under a load.

    errors: a row {checkpoint, image, engine, error} for each point or engine that failed; under a load, `image` names that too.
    """

    settings: SweepSettings
    environment: dict[str, str]
    points: tuple[SweptPoint, ...]
    errors: tuple[dict[str, str], ...]
    loaded: tuple[LoadedPoint, ...] = ()

    def summary(self) -> list[dict[str, Any]]:
        """One row a point and engine."""
        return [
            {"checkpoint": point.checkpoint, "image": size_label(point.size), **row, **point.environment}
            for point in self.points
            for row in point.comparison.summary()
        ]

    def load_rows(self) -> list[dict[str, Any]]:
        """One row a point under a load and engine: throughput and percentiles, as `UnderLoad.summary` has them."""
        return [
            {"checkpoint": point.checkpoint, "image": size_label(point.size), "load": point.load, **row, **point.environment}
            for point in self.loaded
            for row in point.found.summary()
        ]

    def samples(self) -> list[dict[str, Any]]:
        """One row a run, as `Comparison.sample_rows` has it, with its point and where it was measured."""
        return [
            {"checkpoint": point.checkpoint, "image": size_label(point.size), **row, **self.environment, **point.environment}
            for point in self.points
            for row in point.comparison.sample_rows()
        ]

    def load_samples(self) -> list[dict[str, Any]]:
        """One row a round of a load, and where it was measured; `ttft_s` and its like have the seconds of each request."""
        return [
            {
                "checkpoint": point.checkpoint,
                "image": size_label(point.size),
                "load": point.load,
                **{name: value for name, value in vars(made).items() if name != "values"},
                **{f"{of}_s": list(values) for of, values in made.values.items()},
                **self.environment,
                **point.environment,
            }
            for point in self.loaded
            for made in point.found.rounds
        ]

    def published(self) -> dict[str, Any]:
        """The result as one JSON document, for programs that read an executed notebook."""
        points = [
            published_point(point.checkpoint, size_label(point.size), point.comparison, point.environment) for point in self.points
        ]
        rows = [{key: json_value(value) for key, value in row.items()} for row in self.load_rows()]
        context = {"settings": dataclasses.asdict(self.settings), "environment": self.environment}
        return document(points, **context, errors=self.errors, **({"loads": rows} if rows else {}))

    def findings(self) -> list[str]:
        """What was learnt on this machine, one sentence a point and engine."""
        under = [f"{point.label}: {line}" for point in self.loaded for line in point.found.findings()]
        return [*(f"{point.label}: {line}" for point in self.points for line in point.comparison.findings()), *under]

    def __repr__(self) -> str:
        return "\n".join([counted(len(self.points), "point"), *self.findings(), *map(told_failure, self.errors)])

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready data; `from_record` reads it back."""
        points = [
            {**vars(point), "environment": dict(point.environment), "comparison": point.comparison.to_record()}
            for point in self.points
        ]
        loaded = [
            {**vars(point), "environment": dict(point.environment), "found": point.found.to_record()} for point in self.loaded
        ]
        settings = dataclasses.asdict(self.settings)
        whole = {"settings": settings, "environment": self.environment, "points": points, "errors": list(self.errors)}
        return whole | {"loaded": loaded}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SweepResult:
        """Read `to_record`'s form."""
        points = [
            SweptPoint(
                checkpoint=point["checkpoint"],
                size=None if point["size"] is None else tuple(point["size"]),
                comparison=Comparison.from_record(point["comparison"]),
                environment=point["environment"],
            )
            for point in record["points"]
        ]
        loaded = [
            LoadedPoint(
                checkpoint=point["checkpoint"],
                size=None if point["size"] is None else tuple(point["size"]),
                load=point["load"],
                found=UnderLoad.from_record(point["found"]),
                environment=point["environment"],
            )
            for point in record.get("loaded", ())  # absent in older records
        ]
        return cls(
            settings=SweepSettings.kept(record["settings"]),
            environment=record["environment"],
            points=tuple(points),
            errors=tuple(record["errors"]),
            loaded=tuple(loaded),
        )

    def about(self) -> About:
        of_loads = [engine for point in self.loaded for engine in point.found.engines]
        engines = dict.fromkeys([*(engine for point in self.points for engine in point.comparison.engines), *of_loads])
        labels = [*(point.label for point in self.points), *(point.label for point in self.loaded)]
        return About(
            title=f"{', '.join(labels) or 'no point'}: {' against '.join(engines) or 'no engine'}",
            findings=[*self.findings(), *(f"{' · '.join(part for part in error.values() if part)}" for error in self.errors)],
            environment=self.environment,
            samples=self.samples(),
            traces=[
                point.comparison.representative(engine).traced(f"{point.label} · {engine}")
                for point in self.points
                for engine in point.comparison.engines
            ],
        )

    def write_samples(self) -> list[Path]:
        """Write results.parquet and loads.parquet, the raw samples, into the settings' `output_dir`; needs the extra "notebooks".

        A file that would have no sample is not written, and an older one of its name is removed.
        """
        pandas, written = _pandas(), []
        for name, rows in (("results.parquet", self.samples()), ("loads.parquet", self.load_samples())):
            path = Path(self.settings.output_dir) / name
            if rows:
                write_whole(path, pandas.DataFrame(rows).to_parquet())  # a sweep that dies while it writes keeps what was there
                written.append(path)
            else:
                path.unlink(missing_ok=True)
        return written

    def write(self) -> list[Path]:
        """Write the raw samples, result.json, report.html and a Perfetto trace a run into the settings' `output_dir`.

        The samples are in the files of `write_samples`; result.json has what is published, and `record/` is what `fl.open` reads.
        Needs the extra "notebooks".
        """
        if not self.settings.output_dir:
            raise RequestError("output_dir is empty; name the folder to write into")
        traces, written = Path(self.settings.output_dir) / "traces", self._write_all_but_traces()
        traces.mkdir(exist_ok=True)
        runs = [(point, sample) for point in self.points for sample in point.comparison.samples]
        for old in traces.glob("[0-9][0-9][0-9][0-9]-*.json"):  # of an earlier sweep
            old.unlink()
        for number, (point, sample) in enumerate(runs):
            title = f"{point.label} · {sample.engine} · round {sample.round} · {sample.run.kind}"
            title += " · disturbed" if sample.disturbed else ""
            path = traces / f"{number:04d}-{_file_name(title)}.json"
            events = sample.run.trace.to_chrome(title, ours=sample.run.recipe is not None)
            path.write_text(json.dumps(events), encoding="utf-8")
            written.append(path)
        return written

    def _write_all_but_traces(self) -> list[Path]:
        """The report comes last."""
        folder = Path(self.settings.output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # a sweep that was kept may be from elsewhere
        result, report = folder / "result.json", folder / "report.html"
        result.write_text(json.dumps(self.published(), indent=1), encoding="utf-8")
        report.write_text(shown.page(self), encoding="utf-8")
        record = self.save(folder / "record", replace=True)
        return [*self.write_samples(), *record.iterdir(), result, report]


def sweep(settings: SweepSettings, *, progress: bool = True, on_run: Callable[[], object] | None = None) -> SweepResult:
    """Run the grid in this process. A checkpoint, image or engine that fails is recorded in `errors`, and the sweep goes on.

    on_run: called after each run. Raises `MissingExtraError` where there is an `output_dir` and no pandas or pyarrow.
    """
    if settings.output_dir:
        _pandas()  # rather than after the first point
    sizes: list[tuple[int, int] | None] = [(size[0], size[1]) for size in settings.image_sizes] or [None]
    loads = [Arrivals.of(load) for load in settings.loads or [None]]
    per_size = sum(runs_of(settings, load) for load in loads)
    points: list[SweptPoint] = []
    loaded: list[LoadedPoint] = []
    errors: list[dict[str, str]] = []
    where: dict[str, str] = {}

    def ran(_: str) -> None:
        bar.update(1)
        if on_run is not None:
            on_run()

    def failed(error: Exception | str, checkpoint: str, image: str = "", engine: str = "") -> None:
        said = error if isinstance(error, str) else sentence(error)
        errors.append({"checkpoint": checkpoint, "image": image, "engine": engine, "error": said})

    with tqdm(total=per_size * len(sizes) * len(settings.checkpoints), disable=not progress, unit="run") as bar:
        for name in settings.checkpoints:
            bar.set_description(f"loading {name}")
            try:
                lab = Lab(name, device=settings.device or None, dtype=settings.dtype or None)
            except Exception as error:  # whatever it is, the other points are still worth measuring
                failed(error, name)
                bar.update(per_size * len(sizes))
                continue
            where = environment(lab)
            for size, load in itertools.product(sizes, loads):
                image, done_before = size_label(size), bar.n
                at = image if load is None else f"{image}, {load.label}"
                bar.set_description(f"{name} {at}")
                try:
                    found = _measured_at(lab, settings, size, load, ran)
                except Exception as error:  # as above
                    failed(error, name, at)
                else:
                    for engine, text in found.failures.items():
                        failed(text, name, at, engine)
                    if isinstance(found, UnderLoad) and load is not None and found.rounds:
                        loaded.append(LoadedPoint(checkpoint=name, size=size, load=load.label, found=found))
                    elif isinstance(found, Comparison) and found.samples:
                        points.append(SweptPoint(checkpoint=name, size=size, comparison=found))
                bar.update(done_before + runs_of(settings, load) - bar.n)
                if settings.output_dir:  # so that a sweep that dies keeps what it measured
                    so_far = SweepResult(
                        settings=settings, environment=where, points=tuple(points), errors=(), loaded=tuple(loaded)
                    )
                    try:
                        so_far.write_samples()
                    except Exception as error:  # a full disk now may have room at the end
                        failed(error, name, at)
            del lab
    return SweepResult(settings=settings, environment=where, points=tuple(points), errors=tuple(errors), loaded=tuple(loaded))


def _pandas() -> Any:
    """The package that writes samples, by pyarrow."""
    require("pyarrow", "notebooks")
    return require("pandas", "notebooks")


def runs_of(settings: SweepSettings, load: Arrivals | None) -> int:
    """Runs of one checkpoint with one size, at least: disturbed ones are measured again."""
    engines, rounds = len(settings.recipes), settings.warm_up + settings.repeats
    if load is None:
        return engines * rounds
    return requests_of(engines, load, repeats=settings.repeats, warm_up=settings.warm_up)


def _measured_at(
    lab: Lab, settings: SweepSettings, size: tuple[int, int] | None, load: Arrivals | None, on_run: Callable[..., object]
) -> Comparison | UnderLoad:
    image = photo(settings.image, size)
    request = Request(images=[image], prompt=settings.prompt, max_new_tokens=settings.max_new_tokens, ignore_eos=True)
    rounds: dict[str, Any] = {"repeats": settings.repeats, "warm_up": settings.warm_up, "seed": settings.seed}
    rounds["quiet"] = dataclasses.replace(QUIET, total=settings.quiet)
    engines = {recipe: recipe for recipe in settings.recipes}
    if load is not None:
        return under_load(lab, request, engines, load, **rounds, on_run=lambda: on_run(""))
    return compare(lab, request, engines, **rounds, on_run=on_run, keep_going=True)


def identity(name: str, value: Any) -> Any:
    """What two spellings of one thing share; name: the list of the settings that has it."""
    if name == "recipes":
        return "".join(value.split())
    if name == "checkpoints":
        return place(value)
    return tuple(value) if name == "image_sizes" else load_label(Arrivals.of(value))


def _refuse_twice(name: str, given: Sequence[Any], error: type[FastvlError]) -> None:
    """Raise for a list that has one thing twice, also where it is spelled in two ways."""
    met: dict[Any, Any] = {}
    for value in given:
        key = identity(name, value)
        if key in met:
            raise error(f"{name} names one twice: {met[key]!r} and {value!r}")
        met[key] = value


def place(checkpoint: str) -> str:
    """A folder's one path; any other name as it is."""
    folder = os.path.expanduser(checkpoint)
    return os.path.realpath(folder) if checkpoint not in tiny.NAMES and os.path.isdir(folder) else checkpoint


def load_label(load: Arrivals | None) -> str:
    return "alone" if load is None else load.label


def size_label(size: tuple[int, int] | None) -> str:
    return "as given" if size is None else f"{size[0]}×{size[1]}"


def _file_name(label: str) -> str:
    """Readable, and short enough for any file system; the number before it makes it unique."""
    return re.sub(r"[^\w.=-]+", "-", label).strip("-")[:120]


if __name__ == "__main__":  # the command is that of grids, of which this module knows nothing
    runpy.run_module("fastvl_lab.grid", run_name="__main__")
