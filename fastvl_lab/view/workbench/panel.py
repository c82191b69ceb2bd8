"""The workbench as a panel of widgets over a `Session`: what a click does, and what is shown of its results."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import time
from pathlib import Path
from typing import Any

import torch

from fastvl_lab.checkpoint import tiny
from fastvl_lab.errors import FastvlError, require, sentence
from fastvl_lab.measure.photo import PHOTOGRAPHS
from fastvl_lab.recipe import OptionValue, Recipe
from fastvl_lab.view.streaming import chunk_timeline
from fastvl_lab.view.style import CONFIG
from fastvl_lab.view.tables import stage_frame
from fastvl_lab.view.workbench.controls import by_slot, choices, show_recipe
from fastvl_lab.view.workbench.figures import replace, themed, with_ghost
from fastvl_lab.view.workbench.session import News, Question, Result, Session

_BETWEEN_TEXTS = 0.1  # seconds: a browser draws no more often than this

_CSS = """<style>
.fl-bench .fl-controls { flex: 0 0 405px; border-right: 1px solid #8884; }
.fl-bench .fl-slot { margin: 8px 0 2px; font-size: 13px; letter-spacing: .04em; text-transform: uppercase; opacity: .75; }
.fl-bench .fl-row { align-items: flex-start; height: auto; overflow: visible; }
.fl-bench .fl-row .widget-hbox { flex-flow: row wrap; width: 290px; height: auto; overflow: visible; }
.fl-bench .fl-toggle { display: inline-block; width: 106px; font-size: 12px; line-height: 26px; }
.fl-bench .widget-tab .widget-tab-contents, .fl-bench .jupyter-widget-tab-contents { overflow-x: auto; padding: 4px; }
.fl-bench .js-plotly-plot, .fl-bench .plot-container { width: 100%; }
.fl-bench .jupyter-button { font-size: 11px; line-height: 22px; }
.fl-bench .jupyter-button:disabled { opacity: .45; text-decoration: line-through; }
.fl-bench .jupyter-button:focus-visible { outline: 2px solid #E69F00; }
.fl-bench .fl-badge { display: inline-block; padding: 1px 9px; margin: 0 6px 4px 0; border-radius: 9px; border: 1px solid; }
.fl-bench .fl-good { color: #00794f; } .fl-bench .fl-bad { color: #b83e00; font-weight: bold; }
.fl-bench .fl-big { font-size: 22px; margin-right: 14px; }
.fl-bench table { border-collapse: collapse; font-size: 12px; } .fl-bench td, .fl-bench th { padding: 2px 9px; text-align: left; }
.fl-bench pre { white-space: pre-wrap; font-size: 12px; margin: 0; }
.fl-bench.fl-dark { background: #111418; color: #E8E8E8; }
.fl-bench.fl-dark .widget-label, .fl-bench.fl-dark .widget-html-content { color: #E8E8E8; }
.fl-bench.fl-dark .fl-good { color: #35c795; } .fl-bench.fl-dark .fl-bad { color: #ff9060; }
</style>"""


def workbench(
    checkpoint: str = "tiny-qwen2.5-vl",
    image: str | bytes = "astronaut",
    *,
    image_size: tuple[int, int] | None = (640, 480),
    prompt: str = "Describe this picture.",
    max_new_tokens: int = 24,
    recipe: Recipe | str = "fastest",
    repeats: int = 5,
    device: str | None = None,
    dtype: str | None = None,
) -> Workbench:
    """Open the workbench: a panel that runs a recipe at every change of a toggle and shows where its TTFT goes.

    image: a photograph's name, a path, or bytes. repeats: measured rounds against Transformers after the first run; intervals need
    5. The panel shows itself in a notebook. From a cell, `bench.controls["vit.tower"].value = "lean"` is a click, and
    `bench.wait()` waits for what it started.
    """
    question = Question(
        checkpoint=checkpoint,
        picture=image,
        size=tuple(image_size) if image_size else None,  # type: ignore[arg-type]
        prompt=prompt,
        max_new_tokens=max_new_tokens,
    )
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe, target)
    return Workbench(question, chosen, target, repeats=repeats, dtype=dtype)


class Workbench:
    """The panel. `recipe`, `history` and `controls` are there for cells and scripts; `run`, `stop`, `undo` are its buttons."""

    def __init__(self, question: Question, recipe: Recipe, device: torch.device, *, repeats: int, dtype: str | None) -> None:
        self._widgets = widgets = require("ipywidgets", "notebooks")
        self._plots = require("plotly.graph_objects", "notebooks")
        self.recipe, self.device = recipe, device
        self._question, self._repeats = question, repeats
        self._before: list[Recipe] = []
        self._told = 0.0
        self._result: Result | None = None
        self._session = Session(self._hear, device=str(device), dtype=dtype)
        self.controls = choices(device, choose=self.choose, clicked=lambda *change: self._guarded(lambda: self.choose(*change)))
        self._waterfall, self._arrivals = self._plots.FigureWidget(), self._plots.FigureWidget()
        for figure in (self._waterfall, self._arrivals):
            figure._config = figure._config | CONFIG | {"responsive": True}
        self._summary, self._status, self._text, self._preview = (widgets.HTML() for _ in range(4))
        self._stages, self._history, self._code = widgets.HTML(), widgets.HTML().add_class("fl-history"), widgets.Textarea()
        self._status.add_class("fl-status")
        self.widget = self._layout()
        show_recipe(self.controls, recipe)
        self.run()

    @property
    def history(self) -> list[Result]:
        """Every result of this panel, in order."""
        return self._session.history

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return self.widget._repr_mimebundle_(include=include, exclude=exclude)

    def choose(self, path: str, value: OptionValue) -> None:
        """Set a toggle, with whatever it brings along, and run; raises `RecipeError` for an option that cannot run here."""
        changed = self.recipe.choose(path, value)
        changed.check(self.device)
        if changed != self.recipe:
            self._use(changed, path)

    def use(self, recipe: Recipe | str) -> None:
        """Take a whole recipe, such as a preset, and run."""
        changed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe, self.device)
        changed.check(self.device)
        self._use(changed, None)

    def undo(self) -> None:
        """Back to the recipe before; nothing happens at the first."""
        if self._before:
            self.recipe = self._before.pop()
            show_recipe(self.controls, self.recipe)
            self.run()

    def ask(self, **changes: Any) -> None:
        """Change the question (`checkpoint`, `picture`, `size`, `prompt`, `max_new_tokens`), and run."""
        self._question = dataclasses.replace(self._question, **changes)
        self.run()

    def run(self) -> None:
        """Run the recipe; what still runs is stopped."""
        self._code.value = self.code()
        self._session.ask(self._question, self.recipe, repeats=self._repeats)

    def stop(self) -> None:
        """End what runs at its next stage or step."""
        self._session.stop()

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
        """The history as rows: recipe, TTFT, TPOT, parity and ratio to Transformers, where they have been measured."""
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
                    "kind": shown.kind,
                    "parity": result.parity,
                    "against transformers": None if result.speedup is None else result.speedup.times(),
                }
            )
        return found

    def export(self, folder: str | Path) -> list[Path]:
        """Write every result's run as a record and as a trace for Perfetto; the files written."""
        written = []
        Path(folder).mkdir(parents=True, exist_ok=True)
        for result in self.history:
            for name, data in (("run", result.shown.to_record()), ("trace", result.shown.trace.to_chrome(result.shown.title()))):
                path = Path(folder) / f"{result.number:03d}-{name}.json"
                path.write_text(json.dumps(data), encoding="utf-8")
                written.append(path)
        return written

    def _use(self, recipe: Recipe, chosen: str | None) -> None:
        self._before.append(self.recipe)
        self.recipe = recipe
        show_recipe(self.controls, recipe, chosen)
        self.run()

    def _layout(self) -> Any:
        widgets, question = self._widgets, self._question
        wide = widgets.Layout(width="auto")
        checkpoint = widgets.Combobox(
            value=question.checkpoint, options=list(tiny.NAMES), ensure_option=False, description="checkpoint"
        )
        picture = widgets.Combobox(
            value=question.picture if isinstance(question.picture, str) else "", options=list(PHOTOGRAPHS), description="picture"
        )
        upload = widgets.FileUpload(accept="image/*", description="upload", layout=wide)
        prompt = widgets.Text(value=question.prompt, description="prompt", continuous_update=False)
        tokens = widgets.BoundedIntText(value=question.max_new_tokens, min=1, max=4096, description="tokens")
        checkpoint.observe(lambda change: self.ask(checkpoint=change["new"]), "value")
        picture.observe(lambda change: self._take_picture(change["new"]), "value")
        upload.observe(lambda change: self._take_picture(bytes(change["new"][0]["content"]) if change["new"] else b""), "value")
        prompt.observe(lambda change: self.ask(prompt=change["new"]), "value")
        tokens.observe(lambda change: self.ask(max_new_tokens=change["new"]), "value")
        dark = widgets.ToggleButton(description="dark", tooltip="a dark page", layout=wide)
        dark.observe(self._darken, "value")
        self._dark = dark
        buttons = [
            self._button("run", lambda: self.run(), "run the recipe once more"),
            self._button("stop", self.stop, "end what runs, at its next stage or step"),
            self._button("undo", self.undo, "back to the recipe before"),
            *(self._button(name, lambda name=name: self.use(name), f"the preset {name}") for name in ("baseline", "fastest")),
        ]
        self._code.layout, self._code.disabled = widgets.Layout(width="99%", height="260px"), False
        top = widgets.HBox([checkpoint, picture, upload, prompt, tokens, dark], layout=widgets.Layout(flex_flow="row wrap"))
        tabs = widgets.Tab([self._waterfall, self._arrivals, self._stages, self._history, self._code])
        tabs.titles = ("waterfall", "tokens over time", "stages", "history", "copy recipe")
        answer = widgets.HBox([self._preview, self._text])
        shown = widgets.VBox([widgets.HBox(buttons), self._summary, self._status, answer, tabs])
        shown.layout = widgets.Layout(flex="1 1 640px", min_width="0", padding="0 0 0 12px")
        both = widgets.HBox([by_slot(self.controls), shown])
        return widgets.VBox([widgets.HTML(_CSS), top, both]).add_class("fl-bench")

    def _button(self, name: str, action: Any, about: str) -> Any:
        button = self._widgets.Button(description=name, tooltip=about, layout=self._widgets.Layout(width="auto"))
        button.on_click(lambda _: self._guarded(action))
        return button

    def _guarded(self, action: Any) -> None:
        """What a click may fail with appears in the panel, because no cell would show it."""
        try:
            action()
        except FastvlError as error:
            self._hear(News(state="failed", error=sentence(error)))

    def _take_picture(self, picture: str | bytes) -> None:
        if picture:  # a field that is being cleared asks for nothing
            self.ask(picture=picture)

    def _darken(self, _: Any) -> None:
        (self.widget.add_class if self._dark.value else self.widget.remove_class)("fl-dark")
        if self._result is not None:
            self._draw(self._result)

    def _hear(self, news: News) -> None:
        """Show what the session tells, on its thread; texts no more often than a browser draws."""
        if news.result is None and not news.error and news.text and time.monotonic() - self._told < _BETWEEN_TEXTS:
            return
        self._told = time.monotonic()
        said = f" <span class='fl-bad'>{html.escape(news.error)}</span>" if news.error else ""
        self._status.value = f"<span class='fl-badge'>{html.escape(news.state)}</span>{said}"
        if news.text:
            self._text.value = f"<pre>{html.escape(news.text)}</pre>"
        if news.preview:
            data = base64.b64encode(news.preview).decode()
            self._preview.value = f"<img alt='the picture' src='data:image/jpeg;base64,{data}'>"
        if news.result is not None:
            self._result = news.result
            self._draw(news.result)

    def _draw(self, result: Result) -> None:
        shown, dark = result.shown, bool(self._dark.value)
        before = self.history[result.number - 2].shown if result.number > 1 else None
        replace(self._waterfall, themed(with_ghost(result.reference, shown, before), dark=dark))
        every = {"transformers": result.reference, "this recipe": shown, "the run before": before}
        runs = {label: run for label, run in every.items() if run is not None}
        replace(self._arrivals, themed(chunk_timeline(runs), dark=dark))
        self._stages.value = stage_frame(list(runs.values())).to_html(index=False, border=0)
        self._summary.value = self._badges(result)
        pandas = require("pandas", "notebooks")
        self._history.value = pandas.DataFrame(self.rows()).to_html(index=False, border=0, float_format="%.2f", na_rep="")

    def _badges(self, result: Result) -> str:
        shown = result.shown
        big = f"<span class='fl-big'>TTFT {shown.ttft * 1e3:.1f} ms</span>"
        if shown.tpot is not None:
            big += f"<span class='fl-big'>TPOT {shown.tpot * 1e3:.2f} ms</span>"
        badges = [("", shown.kind.replace("_", " "))]
        if result.parity is None:
            badges.append(("", "one run"))
        elif result.parity:
            badges.append(("fl-good", "parity ✓ same tokens"))
            badges.append(("", f"{result.speedup.times()} as fast as Transformers" if result.speedup else "no warm rounds"))
        else:
            badges.append(("fl-bad", "parity ✗ other tokens than Transformers: its time is not compared"))
        found = result.audit
        gravest = found.findings[0].sentence if not found.ok else ""
        badges.append(("fl-good", "audit ✓") if found.ok else ("fl-bad", f"audit ✗ {gravest}"))
        said = "".join(f"<span class='fl-badge {kind}'>{html.escape(text)}</span>" for kind, text in badges)
        return f"<div>{big}</div><div>{said}</div><div>{html.escape(shown.subtitle())}</div>"
