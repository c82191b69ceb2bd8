"""The fields that say what every recipe is asked: the checkpoint, the picture and its size, the prompt, how many tokens and rounds.

What is typed counts once it is whole: at Enter, or when the field is left.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.random_weights import RANDOM_PREFIX, published
from fastvl_lab.errors import RequestError, require
from fastvl_lab.families import family_of
from fastvl_lab.measure.photo import PHOTOGRAPHS
from fastvl_lab.view.workbench.session import Question

_BOXES = ((448, 448), (640, 480), (1280, 960))
_AS_IT_IS, _EXACTLY = "as it is", "exactly W×H"


def known_checkpoints() -> list[str]:
    """What can be loaded by its name and no network: built in, random:<hub id>, and what the hub's cache holds of the families."""
    return [*tiny.NAMES, *(RANDOM_PREFIX + name for name in published()), *sorted(_cached())]


def _cached() -> Iterator[str]:
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in repositories:
        if repository.repo_type == "model" and any(_can_be_loaded(revision) for revision in repository.revisions):
            yield repository.repo_id


def _can_be_loaded(revision: Any) -> bool:
    """Whether a cached revision has weights, and a config of one of the families."""
    files = {file.file_name: Path(file.file_path) for file in revision.files}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        return False
    try:
        config = json.loads(files["config.json"].read_text(encoding="utf-8"))
        return family_of(config.get("model_type")) is not None
    except (OSError, ValueError, AttributeError):  # a download that was broken off
        return False


def number_field(name: str, least: int, most: int) -> Any:
    """For a whole number."""
    widgets = require("ipywidgets", "notebooks")
    return widgets.BoundedIntText(min=least, max=most, description=name, **_look(widgets, 105))


def select_among(field: Any, options: Iterable[Any], value: Any) -> None:
    """Give a drop-down new options, its present one among them, and choose one."""
    with field.hold_trait_notifications():  # new options alone would choose the first of them
        field.options, field.value = tuple(options), field.value
    field.value = value


class Asking:
    """The fields. `ask` is called with what changes of the question, and may not raise: `guarded` runs what may.

    `show` sets every field to a question that was asked from elsewhere, which asks for nothing. others: fields beside these.
    """

    def __init__(
        self,
        question: Question,
        *,
        ask: Callable[..., None],
        guarded: Callable[[Callable[[], None]], None],
        others: Sequence[Any],
    ) -> None:
        self._widgets = require("ipywidgets", "notebooks")
        self._question, self._ask, self._guarded = question, ask, guarded
        self._uploads: dict[str, bytes] = {}
        self._boxes = {_within(box): box for box in _BOXES}
        self._checkpoint = self._choice("checkpoint", known_checkpoints(), 285, self._take_checkpoint)
        self._picture = self._choice("picture", list(PHOTOGRAPHS), 170, self._take_picture)
        self._size = self._choice("size", [_AS_IT_IS, *self._boxes, _EXACTLY], 165, self._take_size)
        self._other_checkpoint = self._entry("a folder or hub id", 130, self._take_checkpoint)
        self._path = self._entry("a path", 75, self._take_picture)
        self._exact = self._entry("W×H", 75, self._take_exact_size)
        self._pixels = self._entry("as the checkpoint's", 205, self._take_max_pixels, "max_pixels")
        self._prompt = self._entry("", 260, self._take_prompt, "prompt")
        self._upload = self._widgets.FileUpload(accept="image/*", description="upload", layout=self._widgets.Layout(width="auto"))
        self._upload.observe(lambda change: self._guarded(lambda: self._take_upload(change["new"])), "value")
        self._tokens = number_field("tokens", 1, 4096)
        self._tokens.tooltip = "tokens to make; the end-of-text token is ignored"
        self._tokens.observe(lambda change: self._guarded(lambda: self._change(max_new_tokens=change["new"])), "value")
        rows = (
            [self._checkpoint, self._other_checkpoint, self._picture, self._path, self._upload, self._size, self._exact],
            [self._pixels, self._prompt, self._tokens, *others],
        )
        wrapped = self._widgets.Layout(flex_flow="row wrap")
        self.widget = self._widgets.VBox([self._widgets.HBox(row, layout=wrapped) for row in rows])
        self.show(question)

    def show(self, question: Question) -> None:
        """Set every field to what is asked."""
        self._question = question
        name = question.name or str(question.picture)
        if isinstance(question.picture, bytes):
            name = question.name or "the bytes given"
            self._uploads[name] = question.picture
        _select(self._checkpoint, question.checkpoint)
        _select(self._picture, name)
        self._exact.value = "×".join(map(str, question.size)) if question.size and not question.within else ""
        if question.size is None:
            self._size.value = _AS_IT_IS
        elif question.within:
            self._boxes[_within(question.size)] = question.size
            _select(self._size, _within(question.size))
        else:
            self._size.value = _EXACTLY
        self._pixels.value = "" if question.max_pixels is None else str(question.max_pixels)
        self._prompt.value, self._tokens.value = question.prompt, question.max_new_tokens

    def _choice(self, name: str, options: list[str], width: int, take: Callable[[str], None]) -> Any:
        field = self._widgets.Dropdown(options=options, description=name, **_look(self._widgets, width))
        field.observe(lambda change: self._guarded(lambda: take(change["new"])), "value")
        return field

    def _entry(self, placeholder: str, width: int, take: Callable[[str], None], name: str = "") -> Any:
        field = self._widgets.Text(
            placeholder=placeholder, description=name, continuous_update=False, **_look(self._widgets, width)
        )
        field.observe(lambda change: self._guarded(lambda: take(change["new"].strip())), "value")
        return field

    def _change(self, **changes: Any) -> None:
        """Ask, unless the fields show what is asked already."""
        if dataclasses.replace(self._question, **changes) != self._question:
            self._ask(**changes)

    def _take_checkpoint(self, name: str) -> None:
        if name:
            self._other_checkpoint.value = ""
            self._change(checkpoint=name)

    def _take_picture(self, name: str) -> None:
        if name:
            self._path.value = ""
            given = self._uploads.get(name)
            changes: dict[str, Any] = {"picture": name, "name": ""} if given is None else {"picture": given, "name": name}
            if changes["picture"] != self._question.picture and not self._question.within:
                changes["size"] = None  # one that was given exactly was meant for the picture before
            self._change(**changes)

    def _take_prompt(self, text: str) -> None:
        self._change(prompt=text)

    def _take_upload(self, files: Sequence[Any]) -> None:
        if files:
            (file,) = files
            self._uploads[file["name"]] = bytes(file["content"])
            self._upload.value = ()  # so that the same file can be given again
            self._take_picture(file["name"])

    def _take_size(self, choice: str) -> None:
        if choice == _AS_IT_IS:
            self._change(size=None, within=False)
        elif choice != _EXACTLY:
            self._change(size=self._boxes[choice], within=True)
        elif not self._exact.value:
            raise RequestError("no size is given; write it into the field beside, such as 800×600")

    def _take_exact_size(self, text: str) -> None:
        if text:
            sides = re.fullmatch(r"(\d{1,5})\s*[x×*, ]\s*(\d{1,5})", text)
            if sides is None:
                raise RequestError(f"size is {text!r}; write width and height in pixels, such as 800×600")
            self._change(size=(int(sides[1]), int(sides[2])), within=False)

    def _take_max_pixels(self, text: str) -> None:
        if text and not (text.isascii() and text.isdigit() and int(text) > 0):
            raise RequestError(f"max_pixels is {text!r}; write a whole number of pixels, or nothing for the checkpoint's own")
        self._change(max_pixels=int(text) if text else None)


def _within(box: Sequence[int]) -> str:
    return f"within {box[0]}×{box[1]}"


def _look(widgets: Any, width: int) -> dict[str, Any]:
    return {"layout": widgets.Layout(width=f"{width}px"), "style": {"description_width": "initial"}}


def _select(field: Any, name: str) -> None:
    """Choose in a drop-down what may not be in it yet."""
    select_among(field, dict.fromkeys((*field.options, name)), name)
