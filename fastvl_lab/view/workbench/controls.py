"""Controls made from the catalogue: a row of buttons a toggle, whose greyed ones say why they cannot run here."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from fastvl_lab.catalogue import OptionValue, Target, Toggle, toggles
from fastvl_lab.errors import require
from fastvl_lab.recipe import Recipe

# Sets the toggle at a path to a value.
Choose = Callable[[str, OptionValue], None]


class Choice:
    """The control of one toggle: `value` is the chosen option's, and setting it is a click.

    Setting `value` asks `choose` for the change, and a button's click asks `clicked`, which may not raise; what is shown changes
    with `show`, once the recipe has.
    """

    def __init__(self, toggle: Toggle, target: Target, choose: Choose, clicked: Choose) -> None:
        widgets = require("ipywidgets", "notebooks")
        self.toggle, self._choose = toggle, choose
        self._value = toggle.values[0]
        auto = {"width": "auto", "height": "24px", "padding": "0 7px", "margin": "1px"}
        self.buttons = {
            option.value: widgets.Button(
                description=str(option.value) if option.exact else f"≈ {option.value}", layout=widgets.Layout(**auto)
            )
            for option in toggle.options
        }
        self.aim(target)
        for value, button in self.buttons.items():
            button.on_click(lambda _, value=value: clicked(toggle.path, value))
        label = widgets.HTML(f"<span class='fl-toggle'>{toggle.name}</span>")
        self.widget = widgets.HBox([label, widgets.HBox(list(self.buttons.values()))]).add_class("fl-row")

    @property
    def value(self) -> OptionValue:
        return self._value

    @value.setter
    def value(self, value: OptionValue) -> None:
        self.toggle.option(value)  # names the choices if it is none
        self._choose(self.toggle.path, value)

    def aim(self, target: Target) -> None:
        """Grey the options that cannot run on the target, and let them say why."""
        for option in self.toggle.options:
            reason, button = option.needs.unmet(target), self.buttons[option.value]
            about = option.does if reason is None else f"cannot run here: {reason}. {option.does}"
            button.tooltip, button.disabled = f"{about} ({'exact' if option.exact else 'approximate'})", reason is not None

    def show(self, value: OptionValue, *, moved: bool) -> None:
        """Mark an option as the chosen one; moved: another choice has brought it along."""
        self._value = value
        for option, button in self.buttons.items():
            button.button_style = "primary" if option == value else ""
            button.icon = "arrow-right" if moved and option == value else ""


def choices(target: Target, *, choose: Choose, clicked: Choose) -> dict[str, Choice]:
    """A control for every toggle of the catalogue, by path, in the order a request meets them."""
    return {toggle.path: Choice(toggle, target, choose, clicked) for toggle in toggles()}


def show_recipe(controls: dict[str, Choice], recipe: Recipe, chosen: str | None = None) -> None:
    """Show a recipe; chosen: the toggle whose change it came from, so that those it moved can be told."""
    for path, control in controls.items():
        value = recipe.value(path)
        control.show(value, moved=chosen is not None and path != chosen and value != control.value)


def by_slot(controls: dict[str, Choice]) -> Any:
    """All controls in boxes by slot, in the order of the corridor."""
    widgets = require("ipywidgets", "notebooks")
    boxes = []
    for slot in dict.fromkeys(control.toggle.slot for control in controls.values()):
        rows = [control.widget for control in controls.values() if control.toggle.slot == slot]
        boxes.append(widgets.VBox([widgets.HTML(f"<h4 class='fl-slot'>{html.escape(slot)}</h4>"), *rows]).add_class("fl-slotbox"))
    return widgets.VBox(boxes).add_class("fl-controls")
