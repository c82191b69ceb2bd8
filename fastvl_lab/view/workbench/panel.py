"""The workbench as a panel of widgets over a `Session`: what a click does, and what is shown of its results."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.catalogue import OptionValue, Target
from fastvl_lab.checkpoint.reading import DTYPES
from fastvl_lab.engine import find_recipe
from fastvl_lab.errors import FastvlError, RecipeError, require, sentence
from fastvl_lab.recipe import Recipe
from fastvl_lab.run import Run, in_words
from fastvl_lab.view.report import figure_html, page, table_html
from fastvl_lab.view.workbench.asking import Asking, number_field, select_among
from fastvl_lab.view.workbench.controls import by_slot, choices, show_recipe
from fastvl_lab.view.workbench.figures import so_far, themed
from fastvl_lab.view.workbench.session import BEFORE, News, Question, Result, Session
from fastvl_lab.view.workbench.views import views

_BETWEEN_TEXTS = 0.1  # seconds: a browser draws no more often than this
_BETWEEN_STAGES = 0.5  # seconds: a drawing takes part of one from the run that it shows

_CSS = """<style>
.fl-bench .fl-controls { flex: 0 0 365px; align-self: flex-start; border-right: 1px solid #8884; }
.fl-bench .fl-controls { max-height: 88vh; overflow-y: auto; }
.fl-bench .fl-controls > * { flex: 0 0 auto; }
.fl-bench .widget-html-content { line-height: 20px; }
.fl-bench .fl-slot { margin: 8px 0 2px; font-size: 13px; letter-spacing: .04em; text-transform: uppercase; opacity: .75; }
.fl-bench .fl-row { align-items: flex-start; height: auto; overflow: visible; }
.fl-bench .fl-row .widget-hbox { flex-flow: row wrap; width: 250px; height: auto; overflow: visible; }
.fl-bench .fl-toggle { display: inline-block; width: 100px; font-size: 12px; line-height: 26px; }
.fl-bench .widget-tab .widget-tab-contents, .fl-bench .jupyter-widget-tab-contents { overflow-x: auto; padding: 4px; }
.fl-bench .fl-seen, .fl-bench .fl-seen > * { width: 100%; min-width: 0; }
.fl-bench .fl-table { overflow: auto; max-height: 320px; }
.fl-bench .fl-status { margin: 3px 0 0 10px; }
.fl-bench .fl-text { max-height: 64px; overflow-y: auto; }
.fl-bench .widget-toggle-buttons .widget-toggle-button { width: auto; }
.fl-bench .jupyter-button { font-size: 11px; line-height: 22px; }
.fl-bench .jupyter-button:disabled { opacity: .45; text-decoration: line-through; }
.fl-bench .jupyter-button:focus-visible { outline: 2px solid #E69F00; }
.fl-bench .fl-badge { display: inline-block; padding: 0 8px; margin: 0 5px 4px 0; border-radius: 9px; border: 1px solid; }
.fl-bench .fl-badge { font-size: 12px; line-height: 18px; }
.fl-bench .fl-good { color: #00794f; } .fl-bench .fl-bad { color: #b83e00; font-weight: bold; }
.fl-bench .fl-big { font-size: 22px; line-height: 30px; margin-right: 14px; white-space: nowrap; }
.fl-bench table { border-collapse: collapse; font-size: 12px; } .fl-bench td, .fl-bench th { padding: 2px 9px; text-align: left; }
.fl-bench pre { white-space: pre-wrap; font-size: 12px; margin: 0; }
.fl-bench.fl-dark { background: #111418; color: #E8E8E8; }
.fl-bench.fl-dark .widget-label, .fl-bench.fl-dark .widget-html-content { color: #E8E8E8; }
.fl-bench.fl-dark .fl-good { color: #35c795; } .fl-bench.fl-dark .fl-bad { color: #ff9060; }
.fl-bench.fl-dark .jupyter-button:not(.mod-primary) { background: #2a3038; color: #E8E8E8; }
.fl-bench.fl-dark .jupyter-button.mod-active { background: #55606d; }
.fl-bench.fl-dark :is(.widget-tab-contents, .jupyter-widget-tab-contents) { background: #111418; border-color: #55606d; }
.fl-bench.fl-dark .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab { background: #2a3038; color: #E8E8E8; border-color: #55606d; }
.fl-bench.fl-dark .jupyter-widget-tab > .lm-TabBar .lm-TabBar-tab.lm-mod-current { background: #55606d; }
.fl-bench.fl-dark :is(input, textarea, select) { background: #1b2026; color: #E8E8E8; border-color: #55606d; }
</style>"""


def workbench(
    checkpoint: str = "tiny-qwen2.5-vl",
    image: str | bytes = "astronaut",
    *,
    image_size: tuple[int, int] | None = None,
    prompt: str = "Describe this picture.",
    max_new_tokens: int = 24,
    recipe: Recipe | str = "fastest",
    repeats: int = 6,
    device: str | None = None,
    dtype: str | None = None,
) -> Workbench:
    """Open the workbench: a panel that runs a recipe at every change of a toggle and shows where its TTFT goes.

    image: a photograph's name, a path, or bytes. image_size: (width, height) that it is resized to first; None takes it as it is.
    repeats: measured rounds against Transformers after the first run; intervals need 6. The panel shows itself in a notebook. From
    a cell, `bench.controls["vit.tower"].value = "lean"` is a click, and `bench.wait()` waits for what it started.
    """
    question = Question(
        checkpoint=checkpoint,
        picture=image,
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
        self._widgets = require("ipywidgets", "notebooks")
        self.recipe, self.device = recipe, device
        known = torch.float32 if dtype is None and device.type == "cpu" else DTYPES.get(str(dtype))
        self._target = Target(device=device, dtype=known)  # until a checkpoint says more
        self._question, self._repeats = question, repeats
        self._before: list[Recipe] = []
        self._told = self._drawn = 0.0
        self._error = ""
        self._views = views()
        self._view = next(iter(self._views))
        self._shown = self._against = 0  # numbers of results; 0 is the newest, and the one before the shown one
        self._drawing = threading.RLock()  # a click draws on another thread than the session
        self._session = Session(self._hear, device=str(device), dtype=dtype)
        self.controls = choices(self._target, choose=self.choose, clicked=partial(self._guarded, self.choose))
        require("anywidget", "notebooks")
        from fastvl_lab.view.workbench.plot import Plot

        self._plot = Plot()
        self._plot.observe(lambda change: setattr(self._dark, "value", change["new"]), "dark")
        self.widget = self._layout()
        _answer_while_cells_run(self.widget)
        show_recipe(self.controls, recipe)
        self.run()

    @property
    def history(self) -> list[Result]:
        """Every result of this panel, in order."""
        return self._session.history

    @property
    def figure(self) -> Any:
        """The figure that is shown, plotly's."""
        return self._plot.shown

    def result(self, number: int = 0) -> Result:
        """A result by its number, 0 being the newest; raises `RecipeError` if there is none, with what went wrong."""
        if not self.history or not 0 <= number <= len(self.history):
            there_are = f"the history has 1 to {len(self.history)}" if self.history else self._error or "nothing has run yet"
            raise RecipeError(f"there is no result{f' {number}' if number else ''}: {there_are}")
        return self.history[number - 1]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return self.widget._repr_mimebundle_(include=include, exclude=exclude)

    def choose(self, path: str, value: OptionValue) -> None:
        """Set a toggle, with whatever it brings along, and run; raises `RecipeError` for an option that cannot run here."""
        changed = self.recipe.choose(path, value)
        changed.check(self._target)
        if changed != self.recipe:
            self._use(changed, path)

    def use(self, recipe: Recipe | str) -> None:
        """Take a whole recipe, such as a preset, and run."""
        changed = find_recipe(recipe, self.device)
        changed.check(self._target)
        self._use(changed, None)

    def undo(self) -> None:
        """Back to the recipe before; nothing happens at the first."""
        if self._before:
            self.recipe = self._before.pop()
            show_recipe(self.controls, self.recipe)
            self.run()

    def ask(self, **changes: Any) -> None:
        """Change some fields of the `Question`, such as `checkpoint`, `picture`, `size` or `max_pixels`, and run."""
        if "picture" in changes:  # the name is that of bytes
            changes = {"name": ""} | changes
        self._question = dataclasses.replace(self._question, **changes)
        self._asking.show(self._question)
        self.run()

    def run(self) -> None:
        """Run the recipe; what still runs is stopped. It is measured beside that of the run before, if that was asked the same."""
        self._code.value = self.code()
        if self._shown:
            self.look(number=0)
        last = self.history[-1] if self.history else None
        comparable = last is not None and last.question == self._question and last.recipe != self.recipe
        before = last.recipe if last is not None and comparable else None
        self._session.ask(self._question, self.recipe, repeats=self._repeats, before=before)

    def measure(self, number: int, against: int) -> None:
        """Run one recipe of the history side by side with another of it; a new result."""
        chosen, other = self.result(number), self.result(against)
        self._session.ask(chosen.question, chosen.recipe, repeats=max(self._repeats, 1), before=other.recipe)

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
        self._looks.value = self._view
        if self.history:
            self._list_history()
            self._measure_for_view(self.result(self._shown))
            self._draw()

    def stop(self) -> None:
        """End what runs at its next stage or step."""
        self._session.stop()

    def close(self) -> None:
        """Stop for good: the panel stays as it is, and nothing runs any more."""
        self._session.close()

    def wait(self, seconds: float | None = None) -> bool:
        """Until nothing runs; whether that came in time."""
        return self._session.wait(seconds)

    def code(self) -> str:
        """The recipe as Python, and as YAML."""
        text = self.recipe.text(self.device)
        yaml = "\n".join(
            f"{slot}:\n" + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in toggles.items())
            for slot, toggles in self.recipe.to_dict().items()
        )
        return f'recipe = fl.Recipe.parse("{text}", "{self.device.type}")\n\n# fl.Recipe.from_dict(yaml.safe_load(…)) of\n{yaml}'

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
        into = Path(folder)
        into.mkdir(parents=True, exist_ok=True)
        written = []
        for result in self.history:
            for name, data in (("run", result.shown.to_record()), ("trace", result.shown.trace.to_chrome(result.shown.title()))):
                written.append(into / f"{result.number:03d}-{name}.json")
                written[-1].write_text(json.dumps(data), encoding="utf-8")
        written.append(into / "workbench.html")
        written[-1].write_text(self.page(), encoding="utf-8")
        for result in self.history:
            path = into / f"{result.number:03d}-waterfall.png"
            try:
                self._views["waterfall"].draw(result, self._run_before(result))[0].write_image(path, width=1100, scale=1.5)
            except (RuntimeError, ValueError, ImportError):  # no kaleido, or no browser for it
                break
            written.append(path)
        return written

    def page(self) -> str:
        """The history as one page of HTML that needs nothing beside it: every result in all views it was measured for."""
        body = [f"<h1>Workbench</h1>{table_html(self._history_frame())}"]
        for result in self.history:
            body.append(f"<h2>{result.number}: {html.escape(result.recipe.text(self.device))}</h2>{self._badges(result)}")
            for view in self._views.values():
                if not view.lacks(result):
                    figure, frame = view.draw(result, self._run_before(result))
                    body.append(f"<h3>{view.name}</h3>{figure_html(figure)}{table_html(frame)}")
        return page("workbench", [_CSS, "<div class='fl-bench'>", *body, "</div>"])

    def _use(self, recipe: Recipe, chosen: str | None) -> None:
        self._before.append(self.recipe)
        self.recipe = recipe
        show_recipe(self.controls, recipe, chosen)
        self.run()

    def _layout(self) -> Any:
        widgets = self._widgets
        self._summary, self._status, self._text, self._preview, self._table = (widgets.HTML() for _ in range(5))
        self._status.add_class("fl-status")
        self._history, self._code = widgets.HTML().add_class("fl-history"), widgets.Textarea()
        self._code.layout = widgets.Layout(width="99%", height="260px")
        buttons = [
            self._button("run", lambda: self.run(), "run the recipe once more"),
            self._button("stop", self.stop, "end what runs, at its next stage or step"),
            self._button("undo", self.undo, "back to the recipe before"),
            *(self._button(name, lambda name=name: self.use(name), f"the preset {name}") for name in ("baseline", "fastest")),
        ]
        self._looks = widgets.ToggleButtons(options=list(self._views), tooltips=[view.about for view in self._views.values()])
        self._looks.style.button_width = "auto"
        self._looks.observe(lambda change: self._look_anew("_view", view=change["new"]), "value")
        tabs = widgets.Tab([self._history_box(), self._code])
        tabs.titles = ("history", "copy recipe")
        said = widgets.VBox([self._summary, self._text.add_class("fl-text")])
        said.layout = widgets.Layout(flex="1 1 0", min_width="0")
        seen = widgets.VBox([self._looks, self._plot, self._table.add_class("fl-table")]).add_class("fl-seen")
        shown = widgets.VBox([widgets.HBox([*buttons, self._status]), widgets.HBox([said, self._preview]), seen, tabs])
        shown.layout = widgets.Layout(flex="1 1 640px", min_width="0", padding="0 0 0 12px")
        both = widgets.HBox([by_slot(self.controls), shown])
        return widgets.VBox([widgets.HTML(_CSS), self._question_box(), both]).add_class("fl-bench")

    def _question_box(self) -> Any:
        self._dark = self._widgets.ToggleButton(
            description="dark",
            tooltip="a dark page, as JupyterLab's theme is or as you like",
            layout=self._widgets.Layout(width="auto"),
        )
        self._dark.observe(self._darken, "value")
        rounds = number_field("repeats", 0, 1000)
        rounds.value, rounds.tooltip = self._repeats, "measured rounds; intervals need 6"
        rounds.observe(lambda change: self._repeat(change["new"]), "value")
        self._asking = Asking(self._question, ask=self.ask, guarded=self._guarded, others=[rounds, self._dark])
        return self._asking.widget

    def _history_box(self) -> Any:
        widgets = self._widgets
        self._pick = widgets.Dropdown(options=[("the newest", 0)], description="show")
        self._pick_against = widgets.Dropdown(options=[("the one before", 0)], description="against")
        self._pick.observe(lambda change: self._look_anew("_shown", number=change["new"]), "value")
        self._pick_against.observe(lambda change: self._look_anew("_against", against=change["new"]), "value")
        beside = self._button("measure side by side", self._measure_picked, "the two recipes and Transformers, in shuffled rounds")
        export = self._button("export", self._export_here, "page, records, Perfetto traces and PNG, into a new folder here")
        line = widgets.HBox([self._pick, self._pick_against, beside, export], layout=widgets.Layout(flex_flow="row wrap"))
        return widgets.VBox([line, self._history])

    def _button(self, name: str, action: Any, about: str) -> Any:
        button = self._widgets.Button(description=name, tooltip=about, layout=self._widgets.Layout(width="auto"))
        button.on_click(lambda _: self._guarded(action))
        return button

    def _look_anew(self, what: str, **choice: Any) -> None:
        """A choice made on the page; one that `look` has set is looked at already."""
        if getattr(self, what) not in choice.values():
            self._guarded(lambda: self.look(**choice))

    def _guarded(self, action: Any, *given: Any) -> None:
        """What a click may fail with appears in the panel, because no cell would show it."""
        try:
            action(*given)
        except (FastvlError, OSError) as error:
            self._hear(News(state="failed", error=sentence(error)))

    def _repeat(self, repeats: int) -> None:
        self._repeats = repeats
        self.run()

    def _measure_picked(self) -> None:
        chosen = self.result(self._shown)
        other = self._before_of(chosen)
        if other is not None:
            self.look(number=0, against=0)
            self.measure(chosen.number, other.number)

    def _export_here(self) -> None:
        """On a thread of its own: pictures take seconds, and a click must not."""
        threading.Thread(target=self._guarded, args=(self._write_here,), name="fastvl-export", daemon=True).start()

    def _write_here(self) -> None:
        folder = Path(time.strftime("fastvl_lab-%Y%m%d-%H%M%S"))
        written = self.export(folder)
        self._status.value = f"<span class='fl-badge'>written</span> {len(written)} files in {html.escape(str(folder.resolve()))}"

    def _darken(self, _: Any) -> None:
        (self.widget.add_class if self._dark.value else self.widget.remove_class)("fl-dark")
        self._draw()

    def _before_of(self, result: Result) -> Result | None:
        """What it is held against: the chosen one, else the one before it."""
        if self._against and self._against != result.number:
            return self.result(self._against)
        return self.history[result.number - 2] if result.number > 1 else None

    def _run_before(self, result: Result) -> Run | None:
        """The run behind: one measured side by side, where that is the recipe it is held against."""
        other = self._before_of(result)
        if other is not None and result.comparison is not None and result.before == other.recipe:
            return result.comparison.representative(BEFORE)
        return None if other is None else other.shown

    def _hear(self, news: News) -> None:
        """Show what the session tells, on its thread; texts no more often than a browser draws."""
        with self._drawing:
            passing = news.result is None and not news.error and (news.text or news.stages)
            if passing and time.monotonic() - self._told < _BETWEEN_TEXTS:
                return
            self._told, self._error = time.monotonic(), news.error
            if news.text:
                self._text.value = f"<pre>{html.escape(news.text)}</pre>"
            if news.preview:
                data = base64.b64encode(news.preview).decode()
                self._preview.value = f"<img alt='the picture' src='data:image/jpeg;base64,{data}'>"
            if news.stages:
                self._draw_progress(news)
            if news.result is not None:
                self._aim()
                self._list_history()
                self._draw()
            said = f" <span class='fl-bad'>{html.escape(news.error)}</span>" if news.error else ""
            self._status.value = f"<span class='fl-badge'>{html.escape(news.state)}</span>{said}"
        if news.result is not None and news.state == "idle":
            self._measure_for_view(news.result)

    def _aim(self) -> None:
        """Grey what the checkpoint that is loaded now cannot run."""
        if (lab := self._session.lab) is not None and lab.checkpoint.target != self._target:
            self._target = lab.checkpoint.target
            for control in self.controls.values():
                control.aim(self._target)

    def _draw_progress(self, news: News) -> None:
        """The stages that have ended, of a run that takes long enough to be watched: drawing is in the time of what is drawn."""
        lasted = news.stages[-1].end_ns / 1e9
        if self._view == "waterfall" and min(lasted, time.monotonic() - self._drawn) > _BETWEEN_STAGES:
            self._drawn = time.monotonic()
            self._show(so_far(news.stages), "under way")

    def _measure_for_view(self, result: Result) -> None:
        view = self._views[self._view]
        if view.lacks(result):
            view.measure(self._session, result, self._repeats)

    def _draw(self) -> None:
        """The chosen view of the chosen result; while a view lacks what it needs, the figure stays as it was."""
        with self._drawing:
            if not self.history:
                return
            result, view = self.result(self._shown), self._views[self._view]
            self._summary.value = self._badges(result)
            if not view.lacks(result):
                figure, frame = view.draw(result, self._run_before(result))
                self._show(figure, f"{view.name} of {result.number}")
                self._table.value = frame.to_html(index=False, border=0)

    def _show(self, figure: Any, about: str) -> None:
        self._plot.show(themed(figure, dark=bool(self._dark.value)), about)

    def _history_frame(self) -> Any:
        return require("pandas", "notebooks").DataFrame(self.rows())

    def _list_history(self) -> None:
        self._history.value = self._history_frame().to_html(index=False, border=0, float_format="%.2f", na_rep="")
        names = [(f"{row['number']}: {row['recipe']}", row["number"]) for row in self.rows()]
        pickers = ((self._pick, "the newest", self._shown), (self._pick_against, "the one before", self._against))
        for picker, first, chosen in pickers:
            select_among(picker, [(first, 0), *names], chosen)

    def _badges(self, result: Result) -> str:
        shown = result.shown
        big = f"<span class='fl-big'>TTFT {shown.ttft * 1e3:.1f} ms</span>"
        if shown.tpot is not None:
            big += f"<span class='fl-big'>TPOT {shown.tpot * 1e3:.2f} ms</span>"
        badges = [("", in_words(shown.kind))]
        if result.checked is None:
            badges.append(("", "one run"))
        elif result.checked.holds:
            badges.append(("fl-good", f"parity ✓ {result.checked.sentence}"))
            badges.append(("", f"{result.speedup.times()} as fast as Transformers" if result.speedup else "no warm rounds"))
        else:
            badges.append(("fl-bad", f"parity ✗ {result.checked.sentence}"))
        if result.against_before is not None:
            badges.append(("", f"{result.against_before.times()} as fast as the run before"))
        found = result.audit
        gravest = found.findings[0].sentence if not found.ok else ""
        badges.append(("fl-good", "audit ✓") if found.ok else ("fl-bad", f"audit ✗ {gravest}"))
        about = f"{result.question.about_picture()} · {shown.subtitle()} · {shown.device} {shown.dtype}"
        said = "".join(f"<span class='fl-badge {kind}'>{html.escape(text)}</span>" for kind, text in badges)
        return f"<div>{big}</div><div>{said}</div><div>{html.escape(about)}</div>"


def _answer_while_cells_run(widget: Any) -> None:
    """Let clicks be answered while a cell of the notebook runs, where the page can send them past it.

    JupyterLab sends what widgets say to a subshell, a thread of the kernel beside that of the cells; ipykernel 7.4 takes it to the
    thread that updated the widget last, which is most often that of the cells.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = lambda _, as_sent: as_sent
    for part in getattr(widget, "children", ()):
        _answer_while_cells_run(part)
