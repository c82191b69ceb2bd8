"""The fields of the question: what there is to choose from, and what a text in a field means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.random_weights import RANDOM_PREFIX, published
from fastvl_lab.errors import RequestError, quoted
from fastvl_lab.families import family_of
from fastvl_lab.view.workbench.session import Arrivals, Picture, Question

AS_IT_IS, WITHIN = "as it is", "within "
BOXES = (AS_IT_IS, "within 448×448", "within 640×480", "within 1280×960")


def known_checkpoints() -> list[str]:
    """What can be loaded by its name and no network: built in, random:<hub id>, and what the hub's cache holds of the families."""
    return [*tiny.names(), *(RANDOM_PREFIX + name for name in published()), *sorted(_cached())]


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


def size_text(question: Question) -> str:
    """The size as its field shows it."""
    if question.size is None:
        return AS_IT_IS
    return (WITHIN if question.within else "") + "×".join(map(str, question.size))


def _size(text: str) -> dict[str, Any]:
    if text in (AS_IT_IS, ""):
        return {"size": None, "within": False}
    sides = re.fullmatch(r"([1-9]\d{0,4})(?:\s*[x×*, ]\s*([1-9]\d{0,4})|²)", text.removeprefix(WITHIN))
    if sides is None:
        raise RequestError(
            f"size is {text!r}; write width and height in pixels, such as 800×600 or within 800×600, or {AS_IT_IS!r}"
        )
    return {"size": (int(sides[1]), int(sides[2] or sides[1])), "within": text.startswith(WITHIN)}


def _max_pixels(text: str) -> dict[str, Any]:
    return {"max_pixels": whole_number("max_pixels", text, least=1) if text else None}


def pictures_named(text: str, question: Question, taken: Mapping[str, Picture]) -> dict[str, Any]:
    """Photographs, paths, and pictures that were taken before, separated by commas."""
    names = [text] if Path(text).is_file() else filter(None, map(str.strip, text.split(",")))
    known = dict(taken) | {str(picture): picture for picture in question.pictures}
    return picture_changes(question, tuple(known.get(name, Picture(source=name)) for name in names))


def picture_changes(question: Question, pictures: tuple[Picture, ...]) -> dict[str, Any]:
    """Other pictures; a size that was given exactly was meant for those before."""
    return {"pictures": pictures} | ({} if question.within or pictures == question.pictures else {"size": None})


def _tokens(text: str) -> dict[str, Any]:
    return {"max_new_tokens": whole_number("tokens", text, least=1)}


def whole_number(name: str, text: str, *, least: int) -> int:
    """Raises `RequestError` for what is none, is less, or has more than 9 digits."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
        raise RequestError(f"{name} is {quoted(text)}; write a whole number of at least {least}, of 9 digits at most")
    return int(text)


def arrivals(at_once: str, rate: str, n: str) -> Arrivals:
    """How a load's requests arrive; at_once is "" where a rate says so."""
    if at_once:
        return Arrivals(concurrency=whole_number("at once", at_once, least=1), rate=None, n=whole_number("requests", n, least=1))
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", rate, re.ASCII) or not float(rate):
        raise RequestError(f"rate is {rate!r}; write how many requests arrive a second on average, such as 2.5")
    return Arrivals(concurrency=None, rate=float(rate), n=whole_number("requests", n, least=1))


# A field of the page -> what its text changes of the question.
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "checkpoint": lambda text: {"checkpoint": text} if text else {},
    "size": _size,
    "max_pixels": _max_pixels,
    "prompt": lambda text: {"prompt": text},
    "tokens": _tokens,
}
