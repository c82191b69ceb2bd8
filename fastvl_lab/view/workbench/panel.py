"""The workbench: what a click does, and what is shown of a `Session`'s results. Its page is `page.Page`."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fastvl_lab.catalogue import OptionValue, Target
from fastvl_lab.checkpoint.reading import DTYPES
from fastvl_lab.checkpoint.user_cache import cache_root
from fastvl_lab.engine import EngineLike, find, find_recipe
from fastvl_lab.errors import FastvlError, RecipeError, RequestError, quoted, require, sentence
from fastvl_lab.lab import Lab, device_name
from fastvl_lab.measure.load import check_arrivals, usual_number
from fastvl_lab.measure.publish import PHOTOGRAPHS
from fastvl_lab.measure.recipes import STOCK
from fastvl_lab.recipe import Recipe
from fastvl_lab.view.workbench import kept, link, messages, reading, rivals, showing
from fastvl_lab.view.workbench.controls import controls
from fastvl_lab.view.workbench.export import export, page_of, static_text
from fastvl_lab.view.workbench.session import BEFORE, Arrivals, News, Picture, Question, Result, Served, Session
from fastvl_lab.view.workbench.views import LOAD, View, views

_OPEN_AGAIN = 4  # results of earlier sessions that are held in memory
NOTHING = "nothing"  # that a load is held against
_BETWEEN_NEWS = 0.08  # seconds: a page that is told more often draws no more
_BETWEEN_ROWS = 0.5  # seconds between tellings of a load under way: all its rows are told each time


def workbench(
    checkpoint: str = "tiny-qwen2.5-vl",
    image: str | bytes | Sequence[str | bytes] = "astronaut",
    *,
    image_size: tuple[int, int] | str | None = None,
    max_pixels: int | None = None,
    prompt: str = "Describe this picture.",
    max_new_tokens: int = 24,
    recipe: Recipe | str = "baseline",
    repeats: int = 6,
    device: str | None = None,
    dtype: str | None = None,
    folder: str | Path | None = None,
    result: str = "",
    query: str | None = None,
) -> Workbench:
    """Open the workbench: a panel that runs a recipe at every change of a toggle and shows where its TTFT goes.

    image: a photograph's name, a path, or bytes; or several. image_size: (width, height) that it is resized to first, or a box such
    as "within 448×448"; None takes it as it is. max_pixels: the request's. repeats: measured rounds against Transformers after the
    first run; intervals need 6. folder: where results are kept, by default in the user's cache folder. result: the name of one that
    is kept, which is shown with its question and recipe in place of the others, and nothing is run; where it is not kept any more,
    they are. query: what a link to a page of its own asks for, in place of all these; one that cannot be read is said on the panel.

    The panel shows itself in a notebook, and a panel that the same cell showed before is closed. From a cell,
    `bench.controls["vit.tower"].value = "lean"` is a click, and `bench.wait()` waits for what it started.
    """
    images = [image] if isinstance(image, str | bytes) else image
    size = (
        reading.FIELDS["size"](image_size) if isinstance(image_size, str) else {"size": tuple(image_size) if image_size else None}
    )
    question = Question(
        checkpoint=checkpoint,
        pictures=tuple(Picture(source=source) for source in images),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        max_pixels=max_pixels,
        **size,
    )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    first = chosen = find_recipe(recipe, target)
    error = ""
    try:
        if query:
            question, chosen, result = link.read(query, question, chosen, target)
    except FastvlError as unread:
        error = sentence(unread)
    kept_in = _default_folder() if folder is None else Path(folder).expanduser().resolve()
    return Workbench(
        question,
        chosen,
        target,
        meant=recipe if chosen is first and _means_the_labs(recipe) else "",
        repeats=repeats,
        dtype=dtype,
        folder=kept_in,
        result=result,
        own_page=query is not None,
        error=error,
    )


class Workbench:
    """The panel. `recipe`, `history` and `controls` are there for cells and scripts, and what its buttons do, for cells to do."""

    def __init__(
        self,
        question: Question,
        recipe: Recipe,
        device: torch.device,
        *,
        repeats: int,
        dtype: str | None,
        folder: Path,
        meant: str = "",
        result: str = "",
        own_page: bool = False,
        error: str = "",
    ) -> None:
        require("anywidget", "notebooks")
        from fastvl_lab.view.workbench.page import Page

        self.recipe, self.device = recipe, device
        self._meant = meant  # the recipe's text while there is no lab that says what "fastest" means
        known = torch.float32 if dtype is None and device.type == "cpu" else DTYPES.get(str(dtype))
        self._target = Target(device=device, dtype=known)  # until a checkpoint says more
        self._dtype = dtype
        self._question, self._repeats, self._rival = question, repeats, STOCK
        self._before: list[Recipe] = []
        self._moved: tuple[str, ...] = ()
        self._marks: dict[int, tuple[bool, str]] = {}  # of results: whether pinned, and a note
        self._rows: dict[int, tuple[Any, messages.Row]] = {}  # of the history, with what each was made of
        self._views = views()
        self._view = next(iter(self._views))
        self._arrivals, self._against_load = Arrivals(concurrency=8, rate=None, n=usual_number(8)), NOTHING
        self._shown = self._against = 0  # numbers of results; 0 is the newest, and the one before the shown one
        self._telling = threading.RLock()  # a click is answered on another thread than the session
        self._live = messages.Live(state="starting", busy=True, error=error)
        self._began_ns: int | None = None  # when the run under way began, on this clock
        self._served: list[Served] = []  # what has ended of the load under way, or of the last
        self._loading = self._told_rows = 0  # the result that is under load; how many of them the page knows
        self._news, self._closed, self._static = threading.Event(), False, None
        self.cell, siblings = _this_cell(), _siblings()
        for sibling in siblings:
            if self.cell and sibling.cell == self.cell:
                sibling.close()
        self._folder, self._own_page, self._name = folder, own_page, kept.new_session()
        self._keeping, self._is_kept = threading.Lock(), True
        self._where: Mapping[str, str] = {}  # where this session measured last, as the rows of earlier ones were told
        listed, self._skipped = kept.listed(folder)
        self._earlier = {-number: one for number, one in enumerate(listed, start=1)}  # results of other sessions
        self._read = lru_cache(_OPEN_AGAIN)(lambda number: kept.read(self._earlier[number], number))
        borrow = partial(_borrowed, siblings, device, dtype)
        self._session = Session(self._hear, device=str(device), dtype=dtype, borrow=borrow, keep=self._keep)
        self.controls = controls(lambda: self.recipe, self.choose, lambda: self._target)
        self.widget = Page()
        self.widget.on_msg(lambda _, content, buffers: self._guarded(self._grant, content, buffers))
        threading.Thread(target=self._pass_news_on, name="fastvl-news", daemon=True).start()
        self._tell_choices()
        self._tell_earlier()
        self._say()
        if not result or not self._open(result):
            self.run()

    def _open(self, name: str) -> bool:
        """Show a result that is kept, with its question and recipe; whether it could be, which is said where not."""
        number = next((number for number, one in self._earlier.items() if one.name == name), 0)
        try:
            if not number:
                raise RequestError(f"the result {quoted(name)} is not kept in {self._folder}")
            opened = self.result(number)
        except RequestError as error:
            self._say(error=f"{sentence(error)}; what was asked for with it is measured anew")
            return False
        self._question, self._shown = opened.question, number
        try:
            opened.recipe.check(self._target)
            self.recipe, self._meant = opened.recipe, ""
        except RecipeError as error:
            self._say(error=f"the recipe of this result cannot run here: {sentence(error)}")
        self._tell_chosen()
        self._tell_asked()
        self._say(state="idle", busy=False)
        self._draw()
        return True

    @property
    def history(self) -> list[Result]:
        """The results of this panel, in order: the newest 200, and those that are pinned."""
        return self._session.history

    @property
    def figure(self) -> Any:
        """The figure of the view that is looked at, plotly's; raises `RecipeError` before there is a result."""
        result = self.result(self._shown)
        return self._views[self._view].draw(result, self._other(result))[0]

    def result(self, number: int = 0) -> Result:
        """A result by its number, 0 being the newest, and below 0 those of earlier sessions, -1 the newest of them.

        Raises `RecipeError` if there is none, with what went wrong, and `RequestError` for one of an earlier session whose file is
        damaged or gone.
        """
        if number < 0:
            if number not in self._earlier:
                raise RecipeError(
                    f"there is no result {number} of an earlier session: {len(self._earlier)} are kept in {self._folder}"
                )
            return self._read(number)
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
        fastest = self._fastest  # once: the lab may come at any moment
        changed = find_recipe(recipe, self.device, fastest=fastest)
        changed.check(self._target)
        self._use(changed, None, meant=recipe if fastest is None and _means_the_labs(recipe) else "")

    @property
    def _fastest(self) -> Recipe | None:
        """What "fastest" means on the lab, once there is one."""
        return None if (lab := self._session.lab) is None else lab.fastest

    def undo(self) -> None:
        """Back to the recipe before; nothing happens at the first."""
        if self._before:
            self.recipe, self._moved, self._meant = self._before.pop(), (), ""
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
        self._say(error="")
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
        self._session.ask(self._question, self._meant or self.recipe, repeats=self._repeats, before=before, rival=self._rival)

    def measure(self, number: int, against: int) -> None:
        """Run one recipe of the history side by side with another of it; a new result."""
        chosen, other = self.result(number), self.result(against)
        self._shown = self._against = 0
        self._session.ask(chosen.question, chosen.recipe, repeats=max(self._repeats, 1), before=other.recipe, rival=self._rival)

    def load(
        self,
        *,
        concurrency: int | None = None,
        rate: float | None = None,
        n: int | None = None,
        against: EngineLike | None = None,
        number: int = 0,
    ) -> None:
        """Send many requests of a result's question to its recipe, each with pictures of its own, and look at what becomes of them.

        concurrency, rate, n: as `fl.load` has them; by default 8 at once. against: a recipe or an engine's text, to which the same
        requests are sent afterwards. number: of a result of this session, whose `loads` it is, once nothing runs. Raises
        `RequestError`, and `RecipeError` for what cannot be put under load.
        """
        result = self.result(number)
        concurrency = 8 if concurrency is None and rate is None else concurrency
        check_arrivals(concurrency=concurrency, rate=rate, n=n)
        if unmet := self._no_load(result):
            raise RecipeError(unmet)
        self._arrivals = Arrivals(concurrency=concurrency, rate=rate, n=n or usual_number(concurrency))
        beside = {} if against is None else {self._named(against, result): against}
        self._session.load(result, self._arrivals, beside)
        with self._telling:
            self._loading = result.number
            self._served.clear()
        self._tell_arrived()
        self.look(LOAD, number=number)

    def look(self, view: str | None = None, *, number: int | None = None, against: int | None = None) -> None:
        """Look at a result in another way, or at another one; what a view needs is measured first.

        number, against: of results as `result` has them; 0 stands for the newest, and for the one before it.
        """
        if view is not None and view not in self._views:
            raise RecipeError(f"there is no view {view!r}; the choices are {', '.join(self._views)}")
        for chosen in filter(None, (number, against)):
            self.result(chosen)  # raises if there is none
        self._view = self._view if view is None else view
        self._shown = self._shown if number is None else number
        self._against = self._against if against is None else against
        if self.history or self._shown:
            self._measure_for_view(self.result(self._shown))
            self._draw()

    def mark(self, number: int, *, pinned: bool = True, note: str = "") -> None:
        """Pin a result, and note something about it."""
        number = self.result(number).number
        with self._keeping:
            if number > 0:
                self._marks[number] = (pinned, note)
            if (path := self._path(number)).exists():
                kept.mark(path, pinned=pinned, note=note)
        if number > 0:
            self._tell_history()
        else:
            self._earlier[number] = dataclasses.replace(self._earlier[number], pinned=pinned, note=note)
            self._tell_earlier()

    def delete(self, number: int) -> None:
        """Take a result out of the history, and forget what is kept of it; raises `RecipeError` for this session's only one."""
        if number < 0:
            self.forget(number)
            return
        number = self.result(number).number
        if len(self.history) == 1:
            raise RecipeError(f"result {number} is the only one; run something else first")
        self._session.delete(number)
        self._marks.pop(number, None)
        with self._keeping:
            kept.forget(self._path(number))
        self._tell_history()
        self._look_elsewhere(number)

    def forget(self, *numbers: int) -> None:
        """Forget results of earlier sessions, by their numbers below 0; without any, all that are not pinned."""
        gone = numbers or tuple(number for number, one in self._earlier.items() if not one.pinned)
        for number in gone:
            if number >= 0:
                raise RequestError(f"result {number} is of this session: delete it")
            if number not in self._earlier:
                self.result(number)  # raises
            kept.forget(self._path(number))
            with self._telling:
                del self._earlier[number]
        self._read.cache_clear()
        self._tell_earlier()
        self._look_elsewhere(*gone)

    def _look_elsewhere(self, *gone: int) -> None:
        """Show the newest result where one that is gone was shown; before there is any, the page stays as it is."""
        if {self._shown, self._against} & set(gone):
            self._shown = self._against = 0
        if self.history:
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
        return export(self._listed(), self._drawn(), Path(folder), told=lambda said: self._say(progress=said))

    def page(self) -> str:
        """The history as one page of HTML that needs nothing beside it: every result in all views it was measured for."""
        return page_of(self._listed(), self._drawn())

    def static(self) -> str:
        """The newest result as text in HTML, for where no kernel lives."""
        return static_text(self.history or ([self.result(self._shown)] if self._shown else []))

    def _drawn(self) -> list[tuple[Result, Result | None, dict[str, View]]]:
        return [(result, self._other(result), self._views) for result in self.history]

    def _use(self, recipe: Recipe, chosen: str | None, *, meant: str = "") -> None:
        self._before.append(self.recipe)
        self._meant = meant
        moved = [path for path in self.controls if recipe.value(path) != self.recipe.value(path) and path != chosen]
        self.recipe, self._moved = recipe, tuple(moved) if chosen else ()
        self._say(error="")
        self.run()

    def _other(self, result: Result) -> Result | None:
        """What it is held against: the chosen one, else the one it was measured beside, else the one before it."""
        if self._against and self._against != result.number:
            return self.result(self._against)
        earlier = [one for one in self.history if one.number < result.number][::-1]  # none, of a result of an earlier session
        beside = (one for one in earlier if one.recipe == result.before and one.question == result.question)
        return next(beside, next(iter(earlier), None))

    def _no_load(self, result: Result) -> str:
        """Why a result cannot be put under load, "" if it can."""
        if result.number < 0:
            return f"{showing.called(result)} is of an earlier session: take its recipe, which runs it here"
        return _cannot_run(result.recipe, self._target)

    def _named(self, engine: EngineLike, result: Result) -> str:
        """What an engine is called beside a result's recipe; raises `RecipeError` for one that cannot be put under load with it."""
        found = find(engine, self.device, fastest=self._fastest)
        if found.recipe is None:
            if not self._session.has_started(engine):
                raise RecipeError(f"the server of {found.name} has not been started: run the recipe with it as the bar to beat")
            return found.name
        if found.recipe == result.recipe:
            raise RecipeError(f"it has the recipe of {showing.called(result)}: there is nothing to hold against it")
        found.recipe.check(self._target)
        changes = showing.recipe_changes(result.recipe, found.recipe)
        return changes[0] if changes == ["baseline"] else f"the one with {showing.few(changes, 3)}"

    def _besides(self, result: Result) -> dict[str, tuple[EngineLike | None, messages.Rival]]:
        """What a load of a result can be held against, as the page names it."""
        other = self._other(result)
        before = (BEFORE, None if other is None else other.recipe, "" if other is None else showing.called(other))
        found: dict[str, tuple[EngineLike | None, messages.Rival]] = {
            NOTHING: (None, messages.Rival(text=NOTHING, about="this recipe alone"))
        }
        for text, engine, about in (before, (str(self._rival), self._rival, "the bar to beat")):
            unmet = None
            try:
                about += "" if engine is None else f": {self._named(engine, result)}"
            except RecipeError as error:
                unmet = sentence(error)
            found[text] = engine, messages.Rival(text=text, about=about, unmet="there is none" if engine is None else unmet)
        return found

    def _measure_for_view(self, result: Result) -> None:
        view = self._views[self._view]
        if result.number > 0 and view.lacks(result):
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
        wish = messages.from_json(content)
        if wish not in (messages.Press(button="open"), messages.Press(button="plotly")):  # nobody has clicked: it may be unread
            self._say(error="")
        match wish:
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
                other = self._other(self.result(number)) if against in (0, number) else self.result(against)
                if other is None:
                    raise RequestError("there is no other result to measure beside this one; shift-click one")
                self.measure(number, other.number)
            case messages.Send(at_once=at_once, rate=rate, n=n, against=against):
                self._send(reading.arrivals(at_once, rate, n), against)
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
            taken = {str(picture): picture for result in self.history for picture in result.question.pictures}
            changes = reading.pictures_named(text, self._question, taken) if field == "pictures" else reading.FIELDS[field](text)
            if dataclasses.replace(self._question, **changes) != self._question:
                self.ask(**changes)

    def _send(self, arrivals: Arrivals, against: str) -> None:
        found = self._besides(self.result(self._shown))
        if against not in found:
            raise RequestError(f"there is no {against!r} to hold the load against; the choices are {', '.join(found)}")
        if found[against][1].unmet:
            raise RequestError(f"the load cannot be held against {against!r}: {found[against][1].unmet}")
        self._against_load = against
        self.load(**vars(arrivals), against=found[against][0], number=self._shown)

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
        elif button == "forget":
            self.forget()
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
                self._served.clear()
            if news.served is not None:
                if self._served and self._served[-1].label != news.served.label:
                    self._served.clear()
                self._served.append(news.served)
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
                if self._meant and self._fastest is not None:
                    self.recipe, self._meant = find_recipe(self._meant, self.device, fastest=self._fastest), ""
                    self._tell_chosen()
                self._aim()
                self._let_go()
                self._tell_history()
                if news.result.where != self._where:
                    self._tell_earlier()  # now it is known where this session measures
                self._draw()
            if news.advice is not None or news.result is not None:
                self._tell_advised()
            self._say()
        if news.result is not None and news.state == "idle" and not self._closed:
            self._measure_for_view(self.result(self._shown))

    def _let_go(self) -> None:
        """Take the oldest results out of memory where there are more than are kept: none that is pinned or looked at."""
        needed = {self._shown, self._against, *(number for number, (pinned, _) in self._marks.items() if pinned)}
        can = [result.number for result in self.history[:-2] if result.number not in needed]
        for number in can[: max(0, len(self.history) - kept.MOST)]:
            self._session.delete(number)

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
        told = 0.0
        while not self._closed:
            self._news.wait()
            time.sleep(_BETWEEN_NEWS)
            self._news.clear()
            self._say()
            if len(self._served) != self._told_rows and time.monotonic() - told > _BETWEEN_ROWS:
                told = time.monotonic()
                self._tell_arrived()

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
            name = self._path(result.number).name.partition(".")[0]
            earlier = result.number < 0
            said = showing.shown(
                result,
                other,
                view=self._view,
                against=self._against,
                pending=pending and not earlier,
                apart=self._apart(result.question, result.where),
                lacks=_lacking(view, result),
                link=link.write(result.question, result.recipe, name) if self._own_page else "",
                line=link.python(result.question, result.recipe, name, None if self._folder == _default_folder() else self._folder),
            )
            self.widget.tell("shown", said)
            self._tell_loaded(result)
            if view is not next(iter(self._views.values())) and not view.lacks(result):
                figure, frame = view.draw(result, other)
                rows = tuple(tuple(map(str, row)) for row in frame.itertuples(index=False))
                about = f"{view.name} of {result.number}"
                drawn = messages.Figure(
                    view=view.name,
                    about=about,
                    figure=figure.to_json(),
                    more=tuple(one.to_json() for one in view.more(result, other)),
                    columns=tuple(frame.columns),
                    rows=rows,
                )
                self.widget.tell("figure", drawn)
            if self._static is not None:
                html = require("IPython.display", "notebooks").HTML(self.static())
                self._static.update(html)

    def _tell_loaded(self, result: Result) -> None:
        others = [rival for _, rival in self._besides(result).values()]
        against = self._against_load if any(one.text == self._against_load and one.unmet is None for one in others) else NOTHING
        self.widget.tell("loaded", showing.loaded(result, self._arrivals, against, others, self._no_load(result)))

    def _tell_arrived(self) -> None:
        with self._telling:
            served = tuple(self._served)
            self._told_rows = len(served)
        self.widget.tell("arrived", showing.arrived(self._loading, served))

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
                previews=shown or (tuple(self.widget.asked.get("previews", ())) if question.pictures else ()),
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
        fastest = self._fastest or Recipe.fastest(self.device)
        said = showing.advised(self._session.advice, last, self.recipe, self._question, self._target, fastest)
        self.widget.tell("advised", said)

    def _tell_history(self) -> None:
        with self._telling:
            self.widget.tell("history", self._listed())

    def _listed(self) -> tuple[messages.Row, ...]:
        """A line for each result of the history, made anew only where it changes: one takes milliseconds, of maybe hundreds."""
        with self._telling:
            history, known, self._rows = list(self.history), self._rows, {}
            for before, result in zip([None, *history], history, strict=False):
                of = (result, before, self._marks.get(result.number, (False, "")))
                of_then, row = known.get(result.number, (None, None))
                if row is None or of_then != of:
                    row = showing.row(result, before, pinned=of[2][0], note=of[2][1])
                self._rows[result.number] = (of, row)
            return tuple(row for _, row in self._rows.values())

    def _tell_earlier(self) -> None:
        with self._telling:
            self._where = self.history[-1].where if self.history else {}
            rows = tuple(kept.row(one, number, self._apart(one.question, one.where)) for number, one in self._earlier.items())
            self.widget.tell("earlier", messages.Earlier(rows=rows, skipped=self._skipped))

    # What is kept.

    def _apart(self, question: Question, where: Mapping[str, str]) -> str:
        """What is other here than where a result was measured, as far as that is known."""
        last = self.history[-1] if self.history else None
        ours = {"device": device_name(self.device)} if last is None else last.where
        return showing.elsewhere(where, ours, checkpoint=last is not None and question.checkpoint == last.question.checkpoint)

    def _path(self, number: int) -> Path:
        return self._earlier[number].path if number < 0 else kept.path_of(self._folder, self._name, number)

    def _keep(self, result: Result) -> None:
        """On the session's thread, between runs. A folder that cannot be written is said once."""
        with self._keeping:
            if not self._is_kept or all(one.number != result.number for one in self.history):
                return
            pinned, note = self._marks.get(result.number, (False, ""))
            try:
                kept.write(self._path(result.number), result, pinned=pinned, note=note)
            except OSError as error:
                self._is_kept = False
                self._say(error=f"results are not kept: the folder {self._folder} cannot be written ({error.strerror})")
            except FastvlError as error:
                self._say(error=sentence(error))


def _lacking(view: View, result: Result) -> str:
    """What to say where a view was not measured and is not about to be."""
    if not view.lacks(result):
        return ""
    return view.by_hand if result.number > 0 else f"{view.name} was not measured in that session"


def _means_the_labs(recipe: Recipe | str) -> TypeGuard[str]:
    """Whether it is the text of what a lab knows to be fastest."""
    return isinstance(recipe, str) and recipe.partition(",")[0].strip() == "fastest"


def _cannot_run(recipe: Recipe, target: Target) -> str:
    try:
        recipe.check(target)
    except RecipeError as error:
        return sentence(error)
    return ""


def _default_folder() -> Path:
    return cache_root() / "workbench"


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
