"""What opens a question, a recipe and a result again: a link to a page of its own, and a line of Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import torch

from fastvl_lab.engine import find_recipe
from fastvl_lab.errors import RequestError, quoted
from fastvl_lab.recipe import Recipe
from fastvl_lab.view.workbench import reading
from fastvl_lab.view.workbench.session import Picture, Question

_NAMES = (*reading.FIELDS, "picture", "recipe", "result")
_OF_VOILA = ("token", "theme", "template")
_MOST = 64  # fields of a link


def write(question: Question, recipe: Recipe, result: str) -> str:
    """The query of a link, with its "?". result: the name under which a result is kept."""
    fields = {
        "checkpoint": question.checkpoint,
        "size": reading.size_text(question),
        "max_pixels": "" if question.max_pixels is None else str(question.max_pixels),
        "prompt": question.prompt,
        "tokens": str(question.max_new_tokens),
        "recipe": str(recipe),
        "result": result,
    }
    pictures = [("picture", str(picture)) for picture in question.pictures] or [("picture", "")]
    return f"?{urlencode([*fields.items(), *pictures])}"  # with what is empty: left out, it would be the page's own


def read(query: str, question: Question, recipe: Recipe, device: torch.device) -> tuple[Question, Recipe, str]:
    """The question and the recipe with what a link asks for in their place, and the name of its result or "".

    Raises `RequestError` or `RecipeError` for what cannot be read. A link loads nothing from a network: the checkpoint must be the
    question's, or one that is known here.
    """
    try:
        fields = parse_qs(query, keep_blank_values=True, max_num_fields=_MOST)
    except ValueError as error:
        raise RequestError(f"the link cannot be read: {error}") from None
    changes: dict[str, Any] = {}
    for name, texts in fields.items():
        if name not in (*_NAMES, *_OF_VOILA):
            raise RequestError(f"the link has {quoted(name)}; the choices are {', '.join(_NAMES)}")
        if name != "picture" and len(texts) > 1:
            raise RequestError(f"the link has {name} {len(texts)} times")
        if name in reading.FIELDS:
            changes |= reading.FIELDS[name](texts[0])
    if "picture" in fields:
        changes["pictures"] = tuple(Picture(source=name) for name in fields["picture"] if name)
    asked = dataclasses.replace(question, **changes)
    if asked.checkpoint != question.checkpoint and asked.checkpoint not in (known := reading.known_checkpoints()):
        raise RequestError(
            f"the link asks for checkpoint {quoted(asked.checkpoint)}, which is not here; the choices are {', '.join(known)}"
        )
    chosen = find_recipe(fields["recipe"][0], device) if "recipe" in fields else recipe
    return asked, chosen, fields.get("result", [""])[0]


def python(question: Question, recipe: Recipe, result: str, folder: Path | None) -> str:
    """The call that opens the same in a notebook. folder: where it is kept, None for the user's cache folder."""
    pictures = [str(picture) for picture in question.pictures]
    size = reading.size_text(question) if question.within else question.size
    given = {
        "image_size": size,
        "max_pixels": question.max_pixels,
        "prompt": question.prompt,
        "max_new_tokens": question.max_new_tokens,
        "recipe": str(recipe),
        "folder": None if folder is None else str(folder),
        "result": result,
    }
    images = pictures[0] if len(pictures) == 1 else pictures
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    return f"bench = fl.workbench({', '.join([repr(question.checkpoint), repr(images), *named])})\nbench"
