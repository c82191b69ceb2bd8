"""The algebra of recipes: one choice for every toggle of the catalogue, read, written, changed and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvl_lab.catalogue import (
    SLOTS,
    Attention,
    Cache,
    Capture,
    ImageBackend,
    Option,
    OptionValue,
    Preprocessor,
    Schedule,
    Streaming,
    Target,
    Toggle,
    Vit,
    toggle_at,
    toggles,
)
from fastvl_lab.errors import RecipeError

PRESETS = ("baseline", "fastest")  # the first words of a recipe's text


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One choice for every toggle; immutable and hashable.

    `Recipe()` is the baseline. Raises `RecipeError` on an unknown value or a combination without meaning; whether the options
    can run on a device is asked by `check`. origin: how a recipe that is called "fastest" came to be, such as "tuned here on …" or
    "a guess for cuda"; "" of any other. Recipes of other origins are equal.
    """

    preprocessor: Preprocessor = Preprocessor()
    vit: Vit = Vit()
    attention: Attention = Attention()
    cache: Cache = Cache()
    capture: Capture = Capture()
    streaming: Streaming = Streaming()
    schedule: Schedule = Schedule()
    origin: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, expected in SLOTS.items():
            if not isinstance(slot := getattr(self, name), expected):
                raise RecipeError(f"{name} is {slot!r}; it must be a {expected.__name__}")
        # All values first: a name that is mistyped is not a choice that another would not go with.
        for option, toggle in [(self.option(toggle), toggle) for toggle in toggles()]:
            for path, allowed in option.required():
                if str(self.value(path)) not in allowed:
                    needed = f"{path}={' or '.join(allowed)}"
                    raise RecipeError(f"{toggle.path}={option.value} needs {needed}, and {path} is {self.value(path)!r}")
            for other in option.decides:
                path, first = f"{toggle.slot}.{other}", toggle_at(f"{toggle.slot}.{other}").values[0]
                if self.value(path) != first:
                    raise RecipeError(
                        f"{path} is {self.value(path)!r}, but {toggle.path}={option.value} does that step itself; "
                        f"leave it at {first!r} or choose another {toggle.path}: "
                        f"{', '.join(repr(v) for v in toggle.values if v != option.value)}"
                    )

    @classmethod
    def baseline(cls) -> Recipe:
        """What a straightforward PyTorch backend does: the first option everywhere."""
        return cls()

    @classmethod
    def fastest(cls, device: Target | torch.device | str = "cpu") -> Recipe:
        """The best exact recipe known for the device type, from side-by-side measurements, that this installation can run.

        device: with a dtype, as a `Target`, where that is not float32.

        What depends on the installation: turbojpeg where simplejpeg is installed, and packed weights on a CPU whose torch has
        oneDNN. On CPU: `make sweep`, and the built-in small checkpoints. On CUDA it is a guess: torch's own kernels in any dtype,
        copies that the host does not wait for, and decode steps as graphs, since their launches take longer than their work. An
        H200 has faster ones (docs/gpu.md).
        """
        target = _target(device)
        cuda = target.device.type == "cuda"
        turbojpeg = toggle_at("preprocessor.decode").option("turbojpeg").needs.unmet(target) is None
        weights = "packed" if toggle_at("vit.weights").option("packed").needs.unmet(target) is None else "plain"
        attention = "sdpa_efficient" if cuda else "sdpa"
        return cls(
            preprocessor=Preprocessor(
                decode="turbojpeg" if turbojpeg else "pillow",
                resize="torch",
                patchify="torch",
                payload="uint8_folded",
                temporal="folded",
                upload="pinned" if cuda else "pageable",
            ),
            vit=Vit(
                tower="lean",
                patch_embed="linear",
                weights=weights,
                attention="grouped",
                positions="cached",
                norms="native",
                rope="halves",
            ),
            attention=Attention(
                prefill=attention,
                decode=attention,
                last_layer="last_token",
                projections="fused",
                weights=weights,
                norms="native" if cuda else "by_length",
                rope="rolled",
            ),
            cache=Cache(kv="static"),
            capture=Capture(decode="graph" if cuda else "eager"),
            origin="a guess for cuda" if cuda else "measured on another machine",
        )

    @classmethod
    def parse(cls, text: str, device: Target | torch.device | str | None = None, *, fastest: Recipe | None = None) -> Recipe:
        """Read "baseline" or "fastest", then changes: "fastest, vit.patch_embed=conv3d". Raises `RecipeError`.

        What the preset has and a change does not go with is at its first option: "fastest, capture.vit=compile" has plain weights.
        device: what the recipe is for; an option that cannot run on it is refused with the reason. It need not be there, and then
        this machine's packages and compilers do not count. By default "fastest" is that of a CPU, and options of any are read.
        fastest: what "fastest" means, by default `Recipe.fastest` of the device; a lab has its own (`Lab.recipe`).
        """
        if not isinstance(text, str):
            raise RecipeError(f"a recipe is given as {text!r}; give a text such as 'baseline' or 'fastest, vit.tower=lean'")
        name, *changes = [part.strip() for part in text.split(",")]
        if name not in PRESETS:
            raise RecipeError(
                f"recipe {text!r} starts with {name!r}; the choices are {', '.join(PRESETS)}, "
                f"each optionally followed by changes such as ', vit.tower=lean'"
            )
        changed: dict[str, OptionValue] = {}
        for change in changes:
            path, equals, value = change.partition("=")
            if not equals:
                raise RecipeError(f"recipe {text!r} has {change!r}; a change reads slot.toggle=value")
            toggle = toggle_at(path.strip())
            value = value.strip()
            if toggle.path in changed:
                raise RecipeError(f"recipe {text!r} sets {toggle.path} twice")
            changed[toggle.path] = next((v for v in toggle.values if str(v) == value), value)
        target = _target("cpu" if device is None else device)
        recipe = (fastest or cls.fastest(target)) if name == "fastest" else cls.baseline()
        recipe = recipe.replace(recipe._with_room(changed)) if changed else recipe
        if device is not None:
            here = target.here and (target.device.type == "cpu" or torch.cuda.is_available())
            recipe.check(dataclasses.replace(target, here=here))
        return recipe

    def value(self, path: str) -> OptionValue:
        """The value at "slot.toggle"; raises `RecipeError` naming the toggles."""
        toggle = toggle_at(path)
        value: OptionValue = getattr(getattr(self, toggle.slot), toggle.name)
        return value

    def option(self, toggle: Toggle) -> Option:
        """The option that the recipe has chosen at a toggle."""
        return toggle.option(self.value(toggle.path))

    def replace(self, path: str | Mapping[str, OptionValue], value: OptionValue | None = None) -> Recipe:
        """A new recipe with one toggle changed, or several at once: `replace({"vit.tower": "lean", …})`."""
        changes: Mapping[str, Any] = path if isinstance(path, Mapping) else {path: value}
        data = self.to_dict()
        for at, new in changes.items():
            toggle = toggle_at(at)
            data[toggle.slot][toggle.name] = new
        return Recipe.from_dict(data)

    def choose(self, path: str, value: OptionValue) -> Recipe:
        """As `replace`, and with it the changes elsewhere without which the option would mean nothing.

        What it requires is set to the first choice that will do; what it takes over, and what could not stay with it, goes back to
        the first option; and an option that took this step over makes room for the next that does not.
        """
        changes: dict[str, OptionValue] = {}
        pending = [(path, value)]
        while pending:
            path, value = pending.pop()
            toggle, changes[path] = toggle_at(path), value
            option = toggle.option(value)
            for other, allowed in option.required():
                if str(changes.get(other, self.value(other))) not in allowed:
                    pending.append((other, next(v for v in toggle_at(other).values if str(v) == allowed[0])))
            for other_toggle in toggles():
                current = other_toggle.option(changes.get(other_toggle.path, self.value(other_toggle.path)))
                if other_toggle.slot == toggle.slot and toggle.name in current.decides and value != toggle.values[0]:
                    room = next(o for o in other_toggle.options if toggle.name not in o.decides)
                    pending.append((other_toggle.path, room.value))
            for name in option.decides:
                changes.setdefault(f"{toggle.slot}.{name}", toggle_at(f"{toggle.slot}.{name}").values[0])
        return self.replace(self._with_room(changes))

    def _with_room(self, changes: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """The changes, and the first option of each toggle whose choice here could not stay with them."""
        changes = dict(changes)
        for toggle in toggles():
            for other, allowed in self.option(toggle).required():
                if toggle.path not in changes and str(changes.get(other, self.value(other))) not in allowed:
                    changes[toggle.path] = toggle.values[0]
        return changes

    def to_dict(self) -> dict[str, dict[str, OptionValue]]:
        """Plain nested data, ready for JSON and YAML."""
        return {slot: dataclasses.asdict(getattr(self, slot)) for slot in SLOTS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, OptionValue]]) -> Recipe:
        """Read `to_dict`'s form; a toggle left out is at its baseline, an unknown key or value is a `RecipeError`."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is given as {data!r}; give a mapping with the slots {', '.join(SLOTS)}")
        values = {}
        for slot, choices in data.items():
            if slot not in SLOTS:
                raise RecipeError(f"slot {slot!r} is unknown; the choices are {', '.join(SLOTS)}")
            if not isinstance(choices, Mapping):
                raise RecipeError(f"slot {slot!r} is {choices!r}; give a mapping from its toggles to their values")
            for name in choices:
                toggle_at(f"{slot}.{name}")
            values[slot] = SLOTS[slot](**choices)
        return cls(**values)

    def changes(self) -> dict[str, OptionValue]:
        """The toggles that differ from the baseline, by path."""
        return {t.path: self.value(t.path) for t in toggles() if self.value(t.path) != t.values[0]}

    def check(self, target: Target) -> None:
        """Raise `RecipeError` for the first option that cannot run on the target, with the reason."""
        for toggle in toggles():
            toggle.check(self.value(toggle.path), target)

    @property
    def exact(self) -> bool:
        """Whether every option promises the same tokens as Transformers does with one of its image backends."""
        return all(self.option(toggle).exact for toggle in toggles())

    def oracle(self, image_backend: ImageBackend) -> str:
        """The engine whose tokens the recipe must make, where `image_backend` is Transformers' own here.

        It is "transformers" where the recipe's pixels are the stock ones; else Transformers' model on the recipe's pixels, such as
        "transformers, preprocessor.resize=torch": differing pixels are no fault of what comes after them.
        """
        decode, resize = (self.option(toggle_at(path)) for path in ("preprocessor.decode", "preprocessor.resize"))
        if {decode.pixels, resize.pixels} <= {None, image_backend}:
            return "transformers"
        on_its_pixels = Recipe.baseline().choose("preprocessor.resize", resize.value)
        if decode.pixels is not None:
            on_its_pixels = on_its_pixels.choose("preprocessor.decode", decode.value)
        return ", ".join(["transformers", *(f"{path}={value}" for path, value in on_its_pixels.changes().items())])

    def within(self, image_backend: ImageBackend) -> int | None:
        """How many levels of 255 its pixels may be from the stock ones, or None where it promises nothing of the kind."""
        bounds = [o.within for o in map(self.option, toggles()) if o.pixels not in (None, image_backend)]
        return max(bounds, default=0) if self.exact and all(bounds) else None

    def text(self, device: torch.device | str = "cpu", *, fastest: Recipe | None = None) -> str:
        """The shortest text that `parse` reads as this recipe on the device: a preset, and what is changed of it.

        fastest: as `parse` has it.
        """
        texts = []
        for name, preset in (("baseline", Recipe.baseline()), ("fastest", fastest or Recipe.fastest(device))):
            changed = [f"{t.path}={self.value(t.path)}" for t in toggles() if self.value(t.path) != preset.value(t.path)]
            texts.append(", ".join([name, *changed]))
        return min(texts, key=len)

    def __str__(self) -> str:
        """As changes of the baseline, which read the same on every device and installation."""
        return ", ".join(["baseline", *(f"{path}={value}" for path, value in self.changes().items())])


def _target(device: Target | torch.device | str) -> Target:
    """What a recipe is for; raises `RecipeError` for a device that none is for."""
    if isinstance(device, Target):
        return device
    with suppress(RuntimeError, TypeError):  # of what torch has no device
        device = torch.device(device)
    if not isinstance(device, torch.device) or device.type not in ("cpu", "cuda"):
        raise RecipeError(f"no fastest recipe is known for device {str(device)!r}; the choices are 'cpu' and 'cuda'")
    return Target(device=device)
