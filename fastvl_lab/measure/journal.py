"""What a search asked of its bench and what came of it, written down as it comes, so that a search that is killed goes on.

A file of JSON, a line each: what the search is of, then every answer. A search is a function of these answers: a second one asks
the same, is answered from the file as far as it goes, time included, and by the bench from there on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from fastvl_lab.errors import sentence
from fastvl_lab.measure.quiet import Use
from fastvl_lab.measure.samples import StageSample
from fastvl_lab.measure.search import Bench, CastOutError
from fastvl_lab.recipe import Recipe
from fastvl_lab.whole import write_whole

MOST_UNFINISHED = 20  # files beside one another, of which the newest stay

_FORMAT = "fastvl_lab unfinished tune 1"


class Journalled:
    """A bench whose answers are kept: `search.Bench`.

    path: of the file, which is gone on with where it is of the same `key`, and begun anew where it is not; of others of its suffix
    beside it, the newest stay. Where it cannot be written, the search goes on without, and `notes` say so.
    """

    def __init__(self, bench: Bench, path: Path, key: Mapping[str, Any]) -> None:
        self._bench, self._path = bench, path
        self._head: dict[str, Any] = {"format": _FORMAT, "key": json.loads(json.dumps(key)), "left": bench.left()}
        self._answers, self._next, self._why = self._read(), 0, ""
        self._left: float = self._head["left"]
        self.found = len(self._answers)  # answers of an earlier search
        self._write_all()
        with suppress(OSError):  # another process tidies too
            self._tidy()

    def notes(self) -> tuple[str, ...]:
        """How much of an earlier search was there, and what could not be kept, in sentences."""
        samples = sum(len(answer["made"]) for answer in self._answers[: self.found] if answer["asked"] == "measure")
        went_on = [f"it went on with an earlier search that was cut off, and its {samples} samples"] if self.found else []
        return (*went_on, *([f"samples were not kept as they came: {self._why}"] if self._why else []))

    def finish(self) -> None:
        """The search is over: nothing is left to go on with."""
        self._path.unlink(missing_ok=True)

    def left(self) -> float:
        """Seconds, as they were after the last answer: what a search decides by them it decides again."""
        return self._left

    def hold(self, recipes: Iterable[Recipe]) -> AbstractContextManager[None]:
        return self._bench.hold(recipes)

    def admit(self, recipe: Recipe) -> None:
        def admitted() -> list[Any]:
            self._bench.admit(recipe)
            return []

        self._answer({"asked": "admit", "recipe": recipe.to_dict()}, admitted)

    def measure(self, recipe: Recipe, label: str, number: int) -> list[StageSample]:
        def measured() -> list[Any]:
            made = self._bench.measure(recipe, label, number)
            return [{"steps": dict(s.steps), "use": None if s.use is None else dataclasses.asdict(s.use)} for s in made]

        made = self._answer({"asked": "measure", "recipe": recipe.to_dict(), "label": label, "round": number}, measured)
        return [
            StageSample(engine=label, round=number, steps=one["steps"], use=None if one["use"] is None else Use(**one["use"]))
            for one in made
        ]

    def ordered(self, order: Callable[[Recipe], Sequence[str]]) -> Callable[[Recipe], Sequence[str]]:
        """The same order of toggles, kept too: it comes of times."""
        return lambda recipe: self._answer({"asked": "order", "recipe": recipe.to_dict()}, lambda: list(order(recipe)))

    def _answer(self, asked: Mapping[str, Any], work: Callable[[], list[Any]]) -> list[Any]:
        if self._next < len(self._answers):
            known = self._answers[self._next]
            if all(known[name] == value for name, value in asked.items()):
                self._next += 1
                return self._given(known)
            del self._answers[self._next :]  # it asks otherwise than the earlier one did
            self.found = self._next
            self._write_all()
        before, ends, why, made = self._bench.left(), False, None, []
        try:
            made = work()
        except CastOutError as error:
            why, ends = str(error), error.ends
        self._left -= before - self._bench.left()
        answer = {**asked, "made": made, "why": why, "left": self._left}
        self._keep(answer)
        return self._given(answer, ends=ends)

    def _given(self, answer: Mapping[str, Any], *, ends: bool = False) -> list[Any]:
        self._left = answer["left"]
        if answer["why"] is not None:
            raise CastOutError(answer["why"], ends=ends)  # what ended one process ends no other
        made: list[Any] = answer["made"]
        return made

    def _read(self) -> list[dict[str, Any]]:
        """The answers that are there, up to the first line that is not whole; none of another search."""
        try:
            head, *lines = self._path.read_bytes().split(b"\n")[:-1]  # what stands behind the last line's end is half a line
            told = json.loads(head)
            if {name: told[name] for name in ("format", "key")} != {name: self._head[name] for name in ("format", "key")}:
                return []
            self._head["left"] = float(told["left"])
        except (OSError, ValueError, LookupError, TypeError):
            return []
        answers = []
        for line in lines:
            try:
                answer = json.loads(line)
                assert {"asked", "recipe", "made", "why", "left"} <= answer.keys()
            except (ValueError, AttributeError, AssertionError):
                break
            answers.append(answer)
        return answers

    def _write_all(self) -> None:
        """Begin the file, or leave of it what is gone on with."""
        lines = [self._head, *self._answers]
        self._trying(lambda: write_whole(self._path, "".join(f"{json.dumps(line)}\n" for line in lines).encode()))

    def _tidy(self) -> None:
        """Remove the files of searches that nobody has gone on with, but for the newest."""
        others = sorted(self._path.parent.glob(f"*{self._path.suffix}"), key=lambda path: path.stat().st_mtime)
        for old in others[:-MOST_UNFINISHED]:
            old.unlink(missing_ok=True)

    def _keep(self, answer: dict[str, Any]) -> None:
        self._answers.append(answer)
        self._next += 1

        def append() -> None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer) + "\n")

        if not self._why:
            self._trying(append)

    def _trying(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._why = sentence(error)
