"""A recipe in the words of another engine: its flags and environment variables, from `elsewhere`."""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastvl_lab.catalogue import OptionValue, Toggle, toggles
from fastvl_lab.elsewhere import ELSEWHERE, RELEASES, Counterpart, Kind, Release, Way
from fastvl_lab.engine import find_recipe
from fastvl_lab.errors import RecipeError, require
from fastvl_lab.recipe import Recipe

_SAID: dict[Kind, str] = {
    "default": "{} by default",
    "flag": "{} by a flag",
    "variable": "{} by an environment variable",
    "none": "{} have no counterpart",
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What in an engine does as a toggle's value does. source: the files of the engine's release that say so."""

    toggle: str
    value: OptionValue
    way: Way
    source: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A recipe in the words of an engine, a row a toggle; it shows itself as a table."""

    recipe: Recipe
    engine: str
    rows: tuple[Flag, ...]

    @property
    def release(self) -> Release:
        """The engine in the version that was read."""
        return RELEASES[self.engine]

    @property
    def command(self) -> str:
        """The command line of a server that does as the recipe does, as far as the engine can; MODEL is the checkpoint."""
        variables, flags = (
            dict.fromkeys(row.way.how for row in self.rows if row.way.kind == kind) for kind in ("variable", "flag")
        )
        return " ".join([*variables, self.release.serve, *flags])

    @property
    def title(self) -> str:
        """The engine, and how many toggles it has in which way."""
        counts = Counter(row.way.kind for row in self.rows)
        said = [text.format(counts[kind]) for kind, text in _SAID.items() if counts[kind]]
        return f"{self.release.name} {self.release.version}; of {len(self.rows)} toggles {', '.join(said)}"

    def frame(self) -> Any:
        """The rows as a pandas DataFrame; needs the extra "notebooks"."""
        columns = ("toggle", "value", "kind", "how", "note", "source")
        table = [(row.toggle, row.value, row.way.kind, row.way.how, row.way.note, row.source) for row in self.rows]
        return require("pandas", "notebooks").DataFrame(table, columns=columns)

    def __repr__(self) -> str:
        rows = [(f"{row.toggle}={row.value}", str(row.way)) for row in self.rows]
        width = max(len(choice) for choice, _ in rows)
        return "\n".join([self.title, *(f"{choice:<{width}}  {way}" for choice, way in rows), self.command])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'>{row.toggle}={row.value}</td><td style='text-align:left' title='{row.source}'>"
            f"{html.escape(str(row.way))}</td></tr>"
            for row in self.rows
        )
        return f"<p>{self.title}</p><table><tbody>{rows}</tbody></table><pre>{html.escape(self.command)}</pre>"


def flags(recipe: Recipe | str, engine: str, device: torch.device | str | None = None) -> Flags:
    """What in an engine does the same as a recipe: a flag, an environment variable, its default, or nothing.

    engine: "vllm", "sglang" or "lmdeploy". device: what a text such as "fastest" is read for, as `Recipe.parse` reads it. Raises
    `RecipeError` naming the choices.
    """
    if not isinstance(engine, str) or engine not in RELEASES:
        raise RecipeError(f"flags are known of no engine {engine!r}; the choices are {', '.join(RELEASES)}")
    chosen = find_recipe(recipe, device)
    rows: list[Flag] = []
    taken: dict[str, tuple[str, Flag]] = {}  # a flag or variable -> its value, and for which toggle
    for toggle in toggles():
        there, value = _counterpart(toggle, engine), chosen.value(toggle.path)
        way = Way(kind="none", note="it means nothing here") if _is_idle(toggle, chosen) else there.way(value)
        row = Flag(toggle=toggle.path, value=value, way=way, source=there.source)
        if row.way.kind in ("flag", "variable"):
            name, given = row.way.setting
            before, by = taken.setdefault(name, (given, row))
            if before != given:
                row = replace(row, way=Way(kind="none", note=f"{name} is {before} already, for {by.toggle}={by.value}"))
        rows.append(row)
    return Flags(recipe=chosen, engine=engine, rows=tuple(rows))


def _is_idle(toggle: Toggle, recipe: Recipe) -> bool:
    """Whether a toggle is a number that means nothing beside the recipe's other choices, without which it could not be another."""
    if not all(isinstance(value, int) for value in toggle.values):
        return False
    return all(any(str(recipe.value(path)) not in can for path, can in option.required()) for option in toggle.options[1:])


def _counterpart(toggle: Toggle, engine: str) -> Counterpart:
    counterpart: Counterpart = getattr(ELSEWHERE[toggle.path], engine)
    return counterpart


_PAGE = """\
# Every option in the words of other engines

What {} have where the lab has an option, read in the released wheels,
for Qwen2.5-VL and Qwen3-VL on CUDA. Of LMDeploy it is the PyTorch backend, since TurboMind's kernels are compiled, without flags.
A first option stands here where a flag or a variable chooses it. `fl.flags("fastest", "vllm")` writes a recipe's command line.
`make toggles` writes this page from `fastvl_lab/elsewhere.py`, which also names the files that say so.
"""


def flags_markdown() -> str:
    """The equivalents as docs/flags.md has them: a Markdown table, a row an option, a column an engine."""
    names = [f"{release.name} {release.version}" for release in RELEASES.values()]
    lines = [_PAGE.format(f"{', '.join(names[:-1])} and {names[-1]}")]
    lines += [f"| toggle | option | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for toggle in toggles():
        first = f"`{toggle.path}`"
        for option in toggle.options:
            ways = [_counterpart(toggle, engine).way(option.value) for engine in RELEASES]
            if option is toggle.options[0] and not any(way.kind in ("flag", "variable") for way in ways):
                continue
            lines.append(f"| {first} | `{option.value}` | {' | '.join(map(_cell, ways))} |")
            first = ""
    return "\n".join(lines)


def _cell(way: Way) -> str:
    if way.kind not in ("flag", "variable"):
        return str(way)
    return f"`{way.how}`" + (f"; {way.note}" if way.note else "")
