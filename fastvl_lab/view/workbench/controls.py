"""The toggles as cells set them: `controls["vit.tower"].value = "lean"` is a click."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastvl_lab.catalogue import OptionValue, Target, Toggle, toggles
from fastvl_lab.recipe import Recipe


@dataclass(kw_only=True, eq=False)
class Control:
    """One toggle: `value` is the option that the recipe has, and setting it asks for another."""

    toggle: Toggle
    recipe: Callable[[], Recipe]
    choose: Callable[[str, OptionValue], None]
    target: Callable[[], Target]

    @property
    def value(self) -> OptionValue:
        return self.recipe().value(self.toggle.path)

    @value.setter
    def value(self, value: OptionValue) -> None:
        self.toggle.option(value)  # names the choices if it is none
        self.choose(self.toggle.path, value)

    @property
    def unmet(self) -> Mapping[OptionValue, str]:
        """The options that cannot run here, and why."""
        reasons = {option.value: option.needs.unmet(self.target()) for option in self.toggle.options}
        return {value: reason for value, reason in reasons.items() if reason is not None}

    def described(self) -> dict[str, Any]:
        """For the page."""
        unmet = self.unmet
        options = [
            {"value": option.value, "does": option.does, "exact": option.exact, "unmet": unmet.get(option.value)}
            for option in self.toggle.options
        ]
        return {"path": self.toggle.path, "slot": self.toggle.slot, "name": self.toggle.name, "options": options}


def controls(
    recipe: Callable[[], Recipe], choose: Callable[[str, OptionValue], None], target: Callable[[], Target]
) -> dict[str, Control]:
    """A control for every toggle of the catalogue, by path, in the order a request meets them."""
    return {toggle.path: Control(toggle=toggle, recipe=recipe, choose=choose, target=target) for toggle in toggles()}
