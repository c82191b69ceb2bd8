"""The workbench: what a click does, and what is shown of a `Session`'s results. Its page is `page.Page`."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.catalogue import OptionValue, Target
from fastvl_lab.checkpoint.reading import DTYPES
from fastvl_lab.engine import find, find_recipe
from fastvl_lab.errors import FastvlError, RecipeError, RequestError, require, sentence
from fastvl_lab.lab import Lab, device_name
from fastvl_lab.measure.publish import PHOTOGRAPHS
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.recipe import Recipe
from fastvl_lab.view.workbench import messages, reading, rivals, showing
from fastvl_lab.view.workbench.controls import controls
from fastvl_lab.view.workbench.export import export, page_of, static_text
from fastvl_lab.view.workbench.session import News, Picture, Question, Result, Session
from fastvl_lab.view.workbench.views import View, views

_BETWEEN_NEWS = 0.08  # seconds: a page that is told more often draws no more


def workbench(
    checkpoint: str = "tiny-qwen2.5-vl",
    image: str | bytes = "astronaut",
    *,
    image_size: tuple[int, int] | None = None,
    prompt: str = "Describe this picture.",
    max_new_tokens: int = 24,
    recipe: Recipe | str = "baseline",
    repeats: int = 6,
    device: str | None = None,
    dtype: str | None = None,
) -> Workbench:
    """Open the workbench: a panel that runs a recipe at every change of a toggle and shows where its TTFT goes.

    image: a photograph's name, a path, or bytes. image_size: (width, height) that it is resized to first; None takes it as it is.
    repeats: measured rounds against Transformers after the first run; intervals need 6. The panel shows itself in a notebook, and
    a panel that the same cell showed before is closed. From a cell, `bench.controls["vit.tower"].value = "lean"` is a click, and
    `bench.wait()` waits for what it started.
    """
    question = Question(
        checkpoint=checkpoint,
        pictures=(Picture(source=image),),
        size=tuple(image_size) if image_size else None,  # type: ignore[arg-type]
        prompt=prompt,
        max_new_tokens=max_new_tokens,
    )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = find_recipe(recipe, target)
    return Workbench(question, chosen, target, repeats=repeats, dtype=dtype)


class Workbench:
    """The panel. `recipe`, `history` and `controls` are there for cells and scripts, and what its buttons do, for cells to do."""

    def __init__(self, question: Question, recipe: Recipe, device: torch.device, *, repeats: int, dtype: str | None) -> None:
        require("anywidget", "notebooks")
        from fastvl_lab.view.workbench.page import Page

        self.recipe, self.device = recipe, device
        known = torch.float32 if dtype is None and device.type == "cpu" else DTYPES.get(str(dtype))
        self._target = Target(device=device, dtype=known)  # until a checkpoint says more
        self._dtype = dtype
        self._question, self._repeats, self._rival = question, repeats, STOCK
        self._before: list[Recipe] = []
        self._moved: tuple[str, ...] = ()
        self._pictures: dict[str, Picture] = {}  # every one that was given, by name
        self._marks: dict[int, tuple[bool, str]] = {}  # of results: whether pinned, and a note
        self._rows: dict[int, tuple[Any, messages.Row]] = {}  # of the history, with what each was made of
        self._views = views()
        self._view = next(iter(self._views))
        self._shown = self._against = 0  # numbers of results; 0 is the newest, and the one before the shown one
        self._telling = threading.RLock()  # a click is answered on another thread than the session
        self._live = messages.Live(state="starting", busy=True)
        self._began_ns: int | None = None  # when the run under way began, on this clock
        self._news, self._closed, self._static = threading.Event(), False, None
        self.cell, siblings = _this_cell(), _siblings()
        for sibling in siblings:
            if self.cell and sibling.cell == self.cell:
                sibling.close()
        self._session = Session(self._hear, device=str(device), dtype=dtype, borrow=partial(_borrowed, siblings, device, dtype))
        self.controls = controls(lambda: self.recipe, self.choose, lambda: self._target)
        self.widget = Page()
        self.widget.on_msg(lambda _, content, buffers: self._guarded(self._grant, content, buffers))
        threading.Thread(target=self._pass_news_on, name="fastvl-news", daemon=True).start()
        self._tell_choices()
        self.run()

    @property
    def history(self) -> list[Result]:
        """Every result of this panel, in order."""
        return self._session.history

    @property
    def figure(self) -> Any:
        """The figure of the view that is looked at, plotly's; raises `RecipeError` before there is a result."""
        result = self.result(self._shown)
        return self._views[self._view].draw(result, self._other(result))[0]

    def result(self, number: int = 0) -> Result:
        """A result by its number, 0 being the newest; raises `RecipeError` if there is none, with what went wrong."""
        for result in reversed(self.history):
            if number in (0, result.number):
                return result
        if numbers := [result.number for result in self.history]:
            gone = ", ".join(str(one) for one in range(1, numbers[-1]) if one not in numbers)
            there_are = f"the history has {numbers[0]} to {numbers[-1]}" + (f", and {gone} was deleted" if gone else "")
        else:
            there_are = self._live.error or "nothing has run yet"
        raise RecipeError(f"there is no result{f' {number}' if number else ''}: {there_are}")

    def _ipython_display_(self) -> None:
        """The panel, and above it what is shown where no kernel lives: text, which the panel's style hides where it does."""
        display = require("IPython.display", "notebooks")
        self._static = display.display(display.HTML(self.static()), display_id=True)
        display.display(self.widget)

    def choose(self, path: str, value: OptionValue) -> None:
        """Set a toggle, with whatever it brings along, and run; raises `RecipeError` for an option that cannot run here."""
        changed = self.recipe.choose(path, value)
        changed.check(self._target)
        if changed != self.recipe:
            self._use(changed, path)

    def use(self, recipe: Recipe | str) -> None:
        """Take a whole recipe, such as a preset, and run."""
        changed = find_recipe(recipe, self.device, fastest=self._fastest)
        changed.check(self._target)
        self._use(changed, None)

    @property
    def _fastest(self) -> Recipe | None:
        """What "fastest" means on the lab, once there is one."""
        return None if (lab := self._session.lab) is None else lab.fastest

    def undo(self) -> None:
        """Back to the recipe before; nothing happens at the first."""
        if self._before:
            self.recipe, self._moved = self._before.pop(), ()
            self.run()

    def ask(self, **changes: Any) -> None:
        """Change some fields of the `Question`, such as `checkpoint`, `pictures`, `size` or `max_pixels`, and run.

        picture: a name, a path or bytes in place of all pictures. rival: the bar to beat, an engine's text; it is measured once its
        server has started, where it has one.
        """
        if "rival" in changes:
            self._rival = find(changes.pop("rival"), self.device).text(self.device)
        if "picture" in changes:
            changes["pictures"] = (Picture(source=changes.pop("picture"), name=changes.pop("name", "")),)
        self._question = dataclasses.replace(self._question, **changes)
        self._pictures |= {str(picture): picture for picture in self._question.pictures}
        self.run()

    def run(self) -> None:
        """Run the recipe; what still runs is stopped. It is measured beside that of the run before, if that was asked the same."""
        self._tell_chosen()
        self._tell_asked()
        if self._shown or self._against:
            self.look(number=0, against=0)
        last = self.history[-1] if self.history else None
        comparable = last is not None and last.question == self._question and last.recipe != self.recipe
        before = last.recipe if last is not None and comparable else None
        self._session.ask(self._question, self.recipe, repeats=self._repeats, before=before, rival=self._rival)

    def measure(self, number: int, against: int) -> None:
        """Run one recipe of the history side by side with another of it; a new result."""
        chosen, other = self.result(number), self.result(against)
        self._shown = self._against = 0
        self._session.ask(chosen.question, chosen.recipe, repeats=max(self._repeats, 1), before=other.recipe, rival=self._rival)

    def look(self, view: str | None = None, *, number: int | None = None, against: int | None = None) -> None:
        """Look at a result in another way, or at another one; what a view needs is measured first.

        number, against: of results in the history; 0 stands for the newest, and for the one before it.
        """
        if view is not None and view not in self._views:
            raise RecipeError(f"there is no view {view!r}; the choices are {', '.join(self._views)}")
        for chosen in filter(None, (number, against)):
            self.result(chosen)  # raises if there is none
        self._view = self._view if view is None else view
        self._shown = self._shown if number is None else number
        self._against = self._against if against is None else against
        if self.history:
            self._measure_for_view(self.result(self._shown))
            self._draw()

    def mark(self, number: int, *, pinned: bool = True, note: str = "") -> None:
        """Pin a result of the history, and note something about it."""
        self._marks[self.result(number).number] = (pinned, note)
        self._tell_history()

    def delete(self, number: int) -> None:
        """Take a result out of the history; raises `RecipeError` for the only one."""
        if len(self.history) == 1 and self.result(number):
            raise RecipeError(f"result {number} is the only one; run something else first")
        self._session.delete(self.result(number).number)
        self._rows.pop(number, None)
        self._marks.pop(number, None)
        if number in (self._shown, self._against):
            self._shown = self._against = 0
        self._tell_history()
        self._draw()

    def stop(self) -> None:
        """End what runs at its next stage or step."""
        open_stage = next((name for name, _, end in self._live.stages if end is None), None)
        if self._live.busy:
            self._say(state=f"stopping at the end of {open_stage}" if open_stage else "stopping")
        self._session.stop()

    def close(self) -> None:
        """Stop for good: the panel stays as it is, nothing runs any more, and its checkpoint is let go."""
        self._closed = True
        self._news.set()
        self._session.close()

    def wait(self, seconds: float | None = None) -> bool:
        """Until nothing runs that was asked for; whether that came in time."""
        return self._session.wait(seconds)

    def code(self) -> str:
        """The recipe as Python, and as YAML."""
        texts = showing.texts(self.recipe, self._question, self.device.type, fastest=self._fastest)
        return f"{texts['Python']}\n\n# fl.Recipe.from_dict(yaml.safe_load(…)) of\n{texts['YAML']}"

    def rows(self) -> list[dict[str, Any]]:
        """The history as rows: recipe, TTFT, TPOT, parity and ratios, where they have been measured."""
        found = []
        for result in self.history:
            shown = result.shown
            found.append(
                {
                    "number": result.number,
                    "checkpoint": result.question.checkpoint,
                    "recipe": result.recipe.text(self.device),
                    "ttft_ms": shown.ttft * 1e3,
                    "tpot_ms": None if shown.tpot is None else shown.tpot * 1e3,
                    "first_run_ms": result.run.trace.end_ns / 1e6,
                    "kind": shown.kind,
                    "parity": result.parity,
                    "against transformers": None if result.speedup is None else result.speedup.times(),
                    "against the run before": None if result.against_before is None else result.against_before.times(),
                }
            )
        return found

    def export(self, folder: str | Path) -> list[Path]:
        """Write the history: a page that opens offline, and of every result its run as a record, its trace for Perfetto, and its
        waterfall as PNG where kaleido and a Chrome can make one; the files written.
        """
        return export(self.history, self.rows(), self._drawn(), Path(folder), told=lambda said: self._say(progress=said))

    def page(self) -> str:
        """The history as one page of HTML that needs nothing beside it: every result in all views it was measured for."""
        return page_of(self.history, self.rows(), self._drawn())

    def static(self) -> str:
        """The newest result as text in HTML, for where no kernel lives."""
        return static_text(self.history)

    def _drawn(self) -> list[tuple[Result, Result | None, dict[str, View]]]:
        return [(result, self._other(result), self._views) for result in self.history]

    def _use(self, recipe: Recipe, chosen: str | None) -> None:
        self._before.append(self.recipe)
        moved = [path for path in self.controls if recipe.value(path) != self.recipe.value(path) and path != chosen]
        self.recipe, self._moved = recipe, tuple(moved) if chosen else ()
        self.run()

    def _other(self, result: Result) -> Result | None:
        """What it is held against: the chosen one, else the one it was measured beside, else the one before it."""
        if self._against and self._against != result.number:
            return self.result(self._against)
        earlier = [one for one in self.history if one.number < result.number][::-1]
        beside = (one for one in earlier if one.recipe == result.before and one.question == result.question)
        return next(beside, next(iter(earlier), None))

    def _measure_for_view(self, result: Result) -> None:
        view = self._views[self._view]
        if view.lacks(result):
            view.measure(self._session, result, self._repeats)

    # What the page asks for.

    def _guarded(self, action: Any, *given: Any) -> None:
        """What a click may fail with appears in the panel, because no cell would show it."""
        try:
            action(*given)
        except (FastvlError, OSError) as error:
            self._say(error=sentence(error))
            self._tell_asked()  # the fields are what is asked

    def _grant(self, content: Any, buffers: Any) -> None:
        self._say(error="")
        match messages.from_json(content):
            case messages.Choose(path=path, value=value):
                self.controls[path].value = value
            case messages.Use(recipe=recipe, number=number):
                self.use(self.result(number).recipe if number else recipe)
            case messages.Fill(field=field, text=text):
                self._fill(field, text.strip())
            case messages.Take(names=names, add=add):
                self._take([Picture(source=bytes(data), name=name) for name, data in zip(names, buffers, strict=True)], add=add)
            case messages.Look(view=view, number=number, against=against):
                self.look(view, number=number, against=against)
            case messages.Measure(number=number, against=against):
                self.measure(number, against)
            case messages.Mark(number=number, pinned=pinned, note=note):
                self.mark(number, pinned=pinned, note=note)
            case messages.Delete(number=number):
                self.delete(number)
            case messages.Press(button=button):
                self._press(button)

    def _fill(self, field: str, text: str) -> None:
        if field == "repeats":
            self._repeats = reading.whole_number(field, text, least=0)
            self.run()
        elif field == "rival":
            self.ask(rival=text)
        else:
            changes = (
                reading.pictures_named(text, self._question, self._pictures) if field == "pictures" else reading.FIELDS[field](text)
            )
            if dataclasses.replace(self._question, **changes) != self._question:
                self.ask(**changes)

    def _take(self, pictures: list[Picture], *, add: bool) -> None:
        for picture in pictures:
            if not picture.source:
                raise RequestError(f"{picture.name} is empty (0 bytes)")
        there = self._question.pictures if add else ()
        self.ask(**reading.picture_changes(self._question, (*there, *pictures)))

    def _press(self, button: str) -> None:
        if button in ("run", "stop", "undo"):
            {"run": self.run, "stop": self.stop, "undo": self.undo}[button]()
        elif button == "open":  # somebody looks on, for whom the background may work
            self._session.advise = True
            self._session.wake()
        elif button == "export":
            threading.Thread(target=self._guarded, args=(self._export_here,), name="fastvl-export", daemon=True).start()
        elif button == "plotly":
            library = require("plotly.offline", "notebooks").get_plotlyjs()
            self.widget.send({"kind": "plotly"}, buffers=[library.encode()])
        elif button == "trace":
            run = self.result(self._shown).shown
            trace = json.dumps(run.trace.to_chrome(run.title(), ours=run.recipe is not None))
            self.widget.send({"kind": "trace", "title": run.title()}, buffers=[trace.encode()])
        else:
            raise RequestError(f"there is no button {button!r}; reload the page")

    def _export_here(self) -> None:
        """On a thread of its own: pictures take seconds, and a click must not."""
        folder = Path(time.strftime("fastvl_lab-%Y%m%d-%H%M%S"))
        written = self.export(folder)
        self._say(progress=f"written: {len(written)} files in {folder.resolve()}")

    # What the page is told.

    def _hear(self, news: News) -> None:
        """Show what the session tells, on its thread. What passes within a run is passed on later, by a thread of its own: telling
        takes time, which would be the run's."""
        if news.starting is not None:
            self._hear_of_start(news.starting, news.error)
            return
        with self._telling:
            changes: dict[str, Any] = {"state": news.state, "busy": news.state not in ("idle", "stopped", "failed")}
            if news.began is not None:
                name, start = news.began
                if not self._live.stages or start < self._live.stages[-1][1]:
                    self._live = dataclasses.replace(self._live, stages=(), rounds={}, text="", expected=self._expected())
                self._began_ns = time.perf_counter_ns() - start
                changes["stages"] = (*self._live.stages, (name, start / 1e6, None))
            elif news.ended is not None:
                ended = (news.ended.name, news.ended.start_ns / 1e6, news.ended.end_ns / 1e6)
                changes["stages"] = (*(stage for stage in self._live.stages if stage[2] is not None), ended)
            elif news.progress:
                if news.sample is not None and news.sample.round >= 0:
                    label, rounds = news.sample.engine, dict(self._live.rounds)
                    changes["rounds"] = rounds | {label: (*rounds.get(label, ()), showing.dot(news.sample))}
            else:
                changes |= {"stages": (), "rounds": {}, "error": news.error or self._live.error}
                self._began_ns = None
            if news.text:
                changes["text"] = news.text
            self._live = dataclasses.replace(self._live, progress=news.progress, **changes)
            if news.began or news.ended or news.progress or (news.text and news.result is None):
                self._news.set()
                return
            if news.previews:
                self._tell_asked(news.previews)
            if news.error and self.history and self._question != self.history[-1].question:
                self._question = self.history[-1].question  # what has failed is not what is asked
                self._tell_asked()
            if news.result is not None:
                self._aim()
                self._tell_history()
                self._draw()
            if news.advice is not None or news.result is not None:
                self._tell_advised()
            self._say()
        if news.result is not None and news.state == "idle":
            self._measure_for_view(self.result(self._shown))

    def _hear_of_start(self, how_far: str, error: str) -> None:
        """On the thread that starts the bar to beat; one that fails is none."""
        with self._telling:
            self._live = dataclasses.replace(self._live, starting=how_far, error=error or self._live.error)
            if how_far:
                self._news.set()
                return
            if error:
                self._rival = STOCK
                self.run()
            self._say()

    def _expected(self) -> tuple[tuple[str, float, float], ...]:
        """The stages of the last run that was asked the same, for one that is under way to be drawn beside."""
        if not self.history or self.history[-1].question != self._question:
            return ()
        spans = self.history[-1].shown.trace.within_ttft()
        return tuple((span.name, span.start_ns / 1e6, span.end_ns / 1e6) for span in spans)

    def _pass_news_on(self) -> None:
        while not self._closed:
            self._news.wait()
            time.sleep(_BETWEEN_NEWS)
            self._news.clear()
            self._say()

    def _say(self, **changes: Any) -> None:
        """Tell the page what goes on."""
        with self._telling:
            self._live = dataclasses.replace(self._live, **changes)
            elapsed = None if self._began_ns is None else (time.perf_counter_ns() - self._began_ns) / 1e6
            self.widget.tell("live", dataclasses.replace(self._live, elapsed=elapsed))

    def _aim(self) -> None:
        """Grey what the checkpoint that is loaded now cannot run."""
        if (lab := self._session.lab) is not None and lab.checkpoint.target != self._target:
            self._target = lab.checkpoint.target
            self._tell_choices()

    def _draw(self) -> None:
        """The chosen view of the chosen result; while a view lacks what it needs, the figure stays as it was."""
        with self._telling:
            result, view = self.result(self._shown), self._views[self._view]
            other = self._other(result)
            pending = result.comparison is None and self._repeats > 0
            said = showing.shown(result, other, view=self._view, against=self._against, pending=pending)
            self.widget.tell("shown", said)
            if view is not next(iter(self._views.values())) and not view.lacks(result):
                figure, frame = view.draw(result, other)
                rows = tuple(tuple(map(str, row)) for row in frame.itertuples(index=False))
                about = f"{view.name} of {result.number}"
                drawn = messages.Figure(
                    view=view.name, about=about, figure=figure.to_json(), columns=tuple(frame.columns), rows=rows
                )
                self.widget.tell("figure", drawn)
            if self._static is not None:
                html = require("IPython.display", "notebooks").HTML(self.static())
                self._static.update(html)

    def _tell_choices(self) -> None:
        unmet = sum(len(control.unmet) for control in self.controls.values())
        note = f"{device_name(self.device)}: times compare engines on this machine"
        note += f"; {unmet} options cannot run here" if unmet else ""
        toggles = tuple(control.described() for control in self.controls.values())
        shown = tuple((view.name, view.about) for view in self._views.values())
        self.widget.tell(
            "choices",
            messages.Choices(
                toggles=toggles,
                views=shown,
                checkpoints=tuple(reading.known_checkpoints()),
                photographs=tuple(PHOTOGRAPHS),
                boxes=reading.BOXES,
                rivals=rivals.known_rivals(),
                note=note,
            ),
        )

    def _tell_asked(self, previews: tuple[bytes, ...] = ()) -> None:
        question = self._question
        shown = tuple(f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in previews)
        self.widget.tell(
            "asked",
            messages.Asked(
                checkpoint=question.checkpoint,
                pictures=tuple(map(str, question.pictures)),
                previews=shown or tuple(self.widget.asked.get("previews", ())),
                size=reading.size_text(question),
                max_pixels="" if question.max_pixels is None else str(question.max_pixels),
                prompt=question.prompt,
                tokens=question.max_new_tokens,
                repeats=self._repeats,
                rival=self._rival,
            ),
        )

    def _tell_chosen(self) -> None:
        values = {path: control.value for path, control in self.controls.items()}
        texts = showing.texts(self.recipe, self._question, self.device.type, fastest=self._fastest)
        self.widget.tell("chosen", messages.Chosen(values=values, moved=self._moved, undoable=bool(self._before), texts=texts))
        self._tell_advised()

    def _tell_advised(self) -> None:
        last = self.history[-1] if self.history else None
        said = showing.advised(self._session.advice, last, self.recipe, self._question, self._target)
        self.widget.tell("advised", said)

    def _tell_history(self) -> None:
        for before, result in zip([None, *self.history], self.history, strict=False):
            of = (result, before, self._marks.get(result.number, (False, "")))
            if self._rows.get(result.number, (None,))[0] != of:  # a line takes milliseconds, and there may be hundreds
                self._rows[result.number] = (of, showing.row(result, before, pinned=of[2][0], note=of[2][1]))
        self.widget.tell("history", tuple(row for _, row in self._rows.values()))


def _this_cell() -> str | None:
    """The notebook's cell that runs, by the id that JupyterLab gives it."""
    shell = require("IPython", "notebooks").get_ipython()
    header = getattr(shell, "parent_header", None) or {}
    return (header.get("metadata") or {}).get("cellId")


def _siblings() -> list[Workbench]:
    """The workbenches that the notebook's names stand for."""
    shell = require("IPython", "notebooks").get_ipython()
    names = {} if shell is None else shell.user_ns
    return list({id(one): one for one in names.values() if isinstance(one, Workbench) and not one._closed}.values())


def _borrowed(siblings: list[Workbench], device: torch.device, dtype: str | None, checkpoint: str) -> Lab | None:
    """The weights that another panel has loaded already, with caches of one's own."""
    for sibling in siblings:
        lab = sibling._session.lab
        alike = lab is not None and lab.checkpoint.name == checkpoint and (sibling.device, sibling._dtype) == (device, dtype)
        if lab is not None and alike and not sibling._closed:
            return lab.apart()
    return None
