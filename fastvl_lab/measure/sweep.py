"""A grid of checkpoints and image sizes, every engine side by side at each point, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from fastvl_lab.errors import FastvlError, RecipeError, RequestError, require
from fastvl_lab.lab import EngineName, Lab, device_name, parse_engine
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.parameters import notebook_parameters
from fastvl_lab.measure.photo import photo
from fastvl_lab.measure.publish import document, published_point
from fastvl_lab.request import Request


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep runs; its fields are the parameters of notebooks/ttft_sweep.ipynb.

    recipes: recipe texts and peers, such as "transformers", "baseline", "fastest, vit.tower=lean". image: a path or a built-in
    photograph. image_sizes: [width, height] pairs the image is resized to; empty leaves it as it is. device, dtype: "" is the
    default. output_dir: "" keeps nothing on disk. Raises `FastvlError`s for what can be known before any work.
    """

    checkpoints: Sequence[str]
    recipes: Sequence[str]
    image: str
    image_sizes: Sequence[Sequence[int]]
    prompt: str
    max_new_tokens: int
    repeats: int
    warm_up: int
    device: str
    dtype: str
    seed: int
    output_dir: str

    def __post_init__(self) -> None:
        for name in ("checkpoints", "recipes"):
            values = getattr(self, name)
            if isinstance(values, str) or len(values) == 0:
                raise RequestError(f"{name} is {values!r}; give a list of at least one")
        if len(set(self.recipes)) != len(self.recipes):
            raise RecipeError(f"recipes names one twice: {', '.join(self.recipes)}")
        for recipe in self.recipes:
            parse_engine(recipe)
        for size in self.image_sizes:
            if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
                raise RequestError(f"image_sizes has {size!r}; each is [width, height] in whole pixels")
        if self.repeats < 1 or self.warm_up < 0:
            raise RequestError(f"repeats is {self.repeats} and warm_up {self.warm_up}; at least 1 and 0")

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> SweepSettings:
        """Read a notebook's `globals()`; an unknown parameter or recipe is an error before any work."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**notebook_parameters(namespace, names))


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One checkpoint with one image size, and what was measured there; `size` is None for the image as it is."""

    checkpoint: str
    size: tuple[int, int] | None
    comparison: Comparison

    @property
    def label(self) -> str:
        return f"{self.checkpoint} · {size_label(self.size)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """Every point of a sweep; `errors` has a row {checkpoint, size, engine, error} for each point or engine that failed."""

    settings: SweepSettings
    environment: dict[str, str]
    points: tuple[Point, ...]
    errors: tuple[dict[str, str], ...]

    def summary(self) -> list[dict[str, Any]]:
        """One row a point and engine."""
        return [
            {"checkpoint": point.checkpoint, "image": size_label(point.size), **row}
            for point in self.points
            for row in point.comparison.summary()
        ]

    def samples(self) -> list[dict[str, Any]]:
        """One row a run, raw: percentiles are derived from these, never stored instead of them."""
        return [
            {
                "checkpoint": point.checkpoint,
                "image": size_label(point.size),
                "engine": sample.engine,
                "round": sample.round,
                "kind": sample.run.kind,
                "visual_tokens": sample.run.visual_tokens,
                "prompt_tokens": sample.run.n_prompt,
                "new_tokens": len(sample.run.tokens),
                "ttft_ms": sample.run.ttft * 1e3,
                "tpot_ms": None if sample.run.tpot is None else sample.run.tpot * 1e3,
                "unaccounted_ms": sample.run.trace.unaccounted_ns / 1e6,
                **{f"{stage}_ms": ns / 1e6 for stage, ns in sample.run.trace.stages().items()},
                "tokens_equal": sample.run.tokens == point.comparison.representative(point.comparison.reference).tokens,
                **self.environment,
            }
            for point in self.points
            for sample in point.comparison.samples
        ]

    def published(self) -> dict[str, Any]:
        """The result as one JSON document, for programs that read an executed notebook."""
        points = [published_point(point.checkpoint, size_label(point.size), point.comparison) for point in self.points]
        return document(points, settings=dataclasses.asdict(self.settings), environment=self.environment, errors=self.errors)

    def findings(self) -> list[str]:
        """What was learnt on this machine, one sentence a point and engine."""
        return [f"{point.label}: {line}" for point in self.points for line in point.comparison.findings()]

    def write(self, folder: str | Path) -> list[Path]:
        """Write results.parquet (raw samples), result.json (`published`), report.html and a Perfetto trace a point and engine.

        Needs the extra "notebooks".
        """
        from fastvl_lab.view.report import report_html

        pandas = require("pandas", "notebooks")
        folder = Path(folder)
        (folder / "traces").mkdir(parents=True, exist_ok=True)
        parquet, result, report = folder / "results.parquet", folder / "result.json", folder / "report.html"
        pandas.DataFrame(self.samples()).to_parquet(parquet)
        result.write_text(json.dumps(self.published(), indent=1), encoding="utf-8")
        report.write_text(report_html(self), encoding="utf-8")
        written = [parquet, result, report]
        for point in self.points:
            for engine in point.comparison.engines:
                run = point.comparison.representative(engine)
                path = folder / "traces" / f"{_file_name(f'{point.label} {engine}')}.json"
                path.write_text(json.dumps(run.trace.to_chrome(run.title())), encoding="utf-8")
                written.append(path)
        return written


def sweep(settings: SweepSettings, *, progress: bool = True) -> SweepResult:
    """Run the grid. A checkpoint, image or engine that fails is recorded in `errors`, and the sweep goes on with the next."""
    sizes: list[tuple[int, int] | None] = [(size[0], size[1]) for size in settings.image_sizes]
    sizes = sizes or [None]
    per_point = len(settings.recipes) * (settings.warm_up + settings.repeats)
    points: list[Point] = []
    errors: list[dict[str, str]] = []
    environment: dict[str, str] = {}

    def failed(error: FastvlError | str, checkpoint: str, size: tuple[int, int] | None, engine: str = "") -> None:
        errors.append({"checkpoint": checkpoint, "image": size_label(size), "engine": engine, "error": str(error)})

    with tqdm(total=per_point * len(sizes) * len(settings.checkpoints), disable=not progress, unit="run") as bar:
        for name in settings.checkpoints:
            bar.set_description(f"loading {name}")
            try:
                lab = Lab(name, device=settings.device or None, dtype=settings.dtype or None)
            except FastvlError as error:
                failed(error, name, None)
                bar.update(per_point * len(sizes))
                continue
            environment = _environment(lab)
            engines: dict[str, EngineName] = {recipe: parse_engine(recipe, lab.device) for recipe in settings.recipes}
            for size in sizes:
                bar.set_description(f"{name} {size_label(size)}")
                done_before = bar.n
                try:
                    request = Request(
                        images=[photo(settings.image, size)],
                        prompt=settings.prompt,
                        max_new_tokens=settings.max_new_tokens,
                        ignore_eos=True,
                    )
                    comparison = compare(
                        lab,
                        request,
                        engines,
                        repeats=settings.repeats,
                        warm_up=settings.warm_up,
                        seed=settings.seed,
                        on_run=lambda _: bar.update(1),
                        keep_going=True,
                    )
                except FastvlError as error:
                    failed(error, name, size)
                else:
                    for engine, sentence in comparison.failures.items():
                        failed(sentence, name, size, engine)
                    if comparison.samples:
                        points.append(Point(checkpoint=name, size=size, comparison=comparison))
                bar.update(done_before + per_point - bar.n)
            del lab, engines
    return SweepResult(settings=settings, environment=environment, points=tuple(points), errors=tuple(errors))


def size_label(size: tuple[int, int] | None) -> str:
    return "as given" if size is None else f"{size[0]}×{size[1]}"


def _environment(lab: Lab) -> dict[str, str]:
    return {
        "device": device_name(lab.device),
        "dtype": str(lab.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", label).strip("-")
