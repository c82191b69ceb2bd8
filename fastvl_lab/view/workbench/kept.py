"""Results on disk, for the sessions after: a file each, written whole or not at all, of which the oldest go first.

A file is two lines of JSON, packed by gzip: what a list tells of the result, and all else. Of pictures that were given as files,
names and SHA-256 are written, and nothing else.
"""

from __future__ import annotations

import gzip
import json
import re
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvl_lab.errors import ImageError, RequestError, sentence
from fastvl_lab.measure.compare import Attribution, Comparison
from fastvl_lab.measure.load import Load
from fastvl_lab.measure.profile import Profile
from fastvl_lab.measure.publish import photo
from fastvl_lab.recipe import Recipe
from fastvl_lab.run import Run
from fastvl_lab.view.workbench import showing
from fastvl_lab.view.workbench.messages import Row
from fastvl_lab.view.workbench.session import Picture, Question, Result
from fastvl_lab.whole import ASIDE, write_whole

MOST, MOST_BYTES = 200, 64 * 2**20  # of all results of a folder
_LARGEST = 4 * 2**20  # bytes of one
_LONGEST = 256 * 2**20  # bytes of one, unpacked
_FORMAT = "fastvl_lab workbench result 1"
_SUFFIX = ".json.gz"
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}-\d{3,9}", re.ASCII)
_OLD = 3600.0  # seconds after which a file that was never finished goes

# What reading a file may fail with that is damaged, or another program's.
_DAMAGED = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a list tells of a result that is kept; the times are in the words of `showing`, but for milliseconds."""

    path: Path
    when: float
    where: Mapping[str, str]
    question: Question
    recipe: Recipe
    ttft: str
    milliseconds: float
    spread: str
    ratio: str
    parity: str
    pinned: bool
    note: str

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(_SUFFIX)


def new_session() -> str:
    """A name for the results of a session, which sorts by its beginning."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def path_of(folder: Path, session: str, number: int) -> Path:
    """Where a result is, or would be."""
    return folder / f"{session}-{number:03d}{_SUFFIX}"


def write(path: Path, result: Result, *, pinned: bool, note: str) -> None:
    """Keep a result in place of what was known of it before; the oldest of its folder go, pinned ones last.

    Raises `OSError`, and `RequestError` for a result that is too large.
    """
    row = showing.row(result, None, pinned=pinned, note=note)
    head = {
        "format": _FORMAT,
        "when": result.when,
        "where": dict(result.where),
        "question": _question_record(result.question),
        "recipe": result.recipe.to_dict(),
        **{name: getattr(row, name) for name in ("ttft", "milliseconds", "ratio", "parity", "pinned", "note")},
        "spread": showing.spread(result),
    }
    body = {
        "run": result.run.to_record(),
        "held": dict(result.held),
        "before": None if result.before is None else result.before.to_dict(),
        "comparison": None if result.comparison is None else result.comparison.to_record(),
        "layers": None if result.layers is None else {name: run.to_record() for name, run in result.layers.items()},
        "floors": None if result.floors is None else dict(result.floors),
        "attribution": None if result.attribution is None else result.attribution.to_record(),
        "profile": None if result.profile is None else result.profile.to_record(),
        "loads": None if result.loads is None else {label: load.to_record() for label, load in result.loads.items()},
    }
    _replace(path, json.dumps(head).encode(), json.dumps(body).encode())
    _keep_within_bounds(path.parent)


def mark(path: Path, *, pinned: bool, note: str) -> None:
    """Pin a result that is kept, or not, and note something about it; raises as `read`."""
    head, body = _lines(path)
    _replace(path, json.dumps(json.loads(head) | {"pinned": pinned, "note": note}).encode(), body)


def forget(path: Path) -> None:
    """Raises `OSError`."""
    path.unlink(missing_ok=True)


def listed(folder: Path) -> tuple[list[Kept], str]:
    """All results of a folder, the newest first, and a sentence about files that are none, or ""."""
    found, skipped = [], []
    digest = lru_cache(maxsize=None)(_digest)
    for path in sorted(folder.glob(f"[!.]*{_SUFFIX}"), reverse=True):
        try:
            with gzip.open(path) as file:
                found.append(_told(path, json.loads(file.readline(_LARGEST)), digest))
        except FileNotFoundError:  # another process forgot it meanwhile
            continue
        except _DAMAGED as error:
            skipped.append(f"{path.name} ({sentence(error)})")
    found.sort(key=lambda kept: -kept.when)
    several = f" and {len(skipped) - 1} more" if skipped[1:] else ""
    return found, f"skipped, not a result that can be read: {skipped[0]}{several}" if skipped else ""


def read(kept: Kept, number: int) -> Result:
    """All of a result, under a number; raises `RequestError` for a file that is damaged, or gone."""
    _, line = _lines(kept.path)
    try:
        body = json.loads(line)
        layers, before = body["layers"], body["before"]
        profile, loads = body.get("profile"), body.get("loads")  # absent in older files
        return Result(
            number=number,
            when=kept.when,
            where=kept.where,
            question=kept.question,
            recipe=kept.recipe,
            run=Run.from_record(body["run"]),
            held=dict(body["held"]),
            before=None if before is None else Recipe.from_dict(before),
            comparison=None if body["comparison"] is None else Comparison.from_record(body["comparison"]),
            layers=None if layers is None else {name: Run.from_record(run) for name, run in layers.items()},
            floors=body["floors"],
            attribution=None if body["attribution"] is None else Attribution.from_record(body["attribution"]),
            profile=None if profile is None else Profile.from_record(profile),
            loads=None if loads is None else {label: Load.from_record(record) for label, record in loads.items()},
        )
    except _DAMAGED as error:
        raise RequestError(f"{kept.path} is damaged ({sentence(error)}); forget it") from None


def row(kept: Kept, number: int, apart: str) -> Row:
    """Its line of the list of earlier results. apart: what was other where it was measured, "" if nothing was."""
    return Row(
        number=number,
        changed=str(kept.recipe),
        ttft=kept.ttft,
        spread=kept.spread,
        milliseconds=kept.milliseconds,
        ratio=kept.ratio,
        parity=kept.parity,
        question=showing.about_question(kept.question),
        recipe=str(kept.recipe),
        pinned=kept.pinned,
        note=kept.note,
        when=showing.date(kept.when),
        elsewhere=apart,
    )


def _lines(path: Path) -> tuple[bytes, bytes]:
    """What a list tells, and all else; raises `RequestError` for a file that is damaged, or gone."""
    try:
        with gzip.open(path) as file:
            head, body = file.readline(_LARGEST), file.read(_LONGEST)
    except _DAMAGED as error:
        raise RequestError(f"{path} cannot be read ({sentence(error)})") from None
    return head.removesuffix(b"\n"), body


def _replace(path: Path, head: bytes, body: bytes) -> None:
    packed = gzip.compress(head + b"\n" + body, compresslevel=1)
    if len(packed) > _LARGEST:
        raise RequestError(f"a result of {len(packed) / 2**20:.1f} MiB is not kept: the limit is {_LARGEST / 2**20:.0f} MiB")
    write_whole(path, packed)


def _keep_within_bounds(folder: Path) -> None:
    """Take the oldest away, by their names, while there are too many or they are too large; pinned ones where no other is left."""
    for aside in folder.glob(f".*{ASIDE}"):
        with suppress(FileNotFoundError):
            if time.time() - aside.stat().st_mtime > _OLD:
                aside.unlink()
    sizes = {}
    for path in folder.glob(f"*{_SUFFIX}"):
        if _NAME.fullmatch(path.name.removesuffix(_SUFFIX)):  # never a file that is not the workbench's
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
    pinned = []
    for path in sorted(sizes):
        if not _is_over(sizes):
            return
        is_pinned = _is_pinned(path)
        if is_pinned:
            pinned.append(path)
            continue
        if is_pinned is not None:
            forget(path)
        del sizes[path]
    for path in pinned:
        if _is_over(sizes):
            forget(path)
            del sizes[path]


def _is_over(sizes: Mapping[Path, int]) -> bool:
    return len(sizes) > MOST or sum(sizes.values()) > MOST_BYTES


def _is_pinned(path: Path) -> bool | None:
    """None for a file that is damaged, which is nobody's to delete."""
    with suppress(*_DAMAGED), gzip.open(path) as file:
        return bool(json.loads(file.readline(_LARGEST))["pinned"])
    return None


def _told(path: Path, head: dict[str, Any], digest: Callable[[str], str]) -> Kept:
    """Read the first line of a file; digest: SHA-256 of a photograph or a path as it is now."""
    if head["format"] != _FORMAT:
        raise ValueError(f"its format is {head['format']!r:.60}, not {_FORMAT!r}")
    fields = {name: head[name] for name in ("when", "where", "ttft", "milliseconds", "spread", "ratio", "parity", "pinned", "note")}
    kinds = {"when": float, "where": dict, "milliseconds": float, "pinned": bool}
    for name, value in fields.items():
        if not isinstance(value, kinds.get(name, str)):
            raise TypeError(f"{name} is {value!r:.60}")
    question = _question_of(head["question"], digest)
    return Kept(path=path, question=question, recipe=Recipe.from_dict(head["recipe"]), **fields)


def _digest(source: str | bytes) -> str:
    """SHA-256 of a picture's bytes, "" where it is none any more."""
    try:
        return sha256(photo(source)).hexdigest()
    except ImageError:
        return ""


def _question_record(question: Question) -> dict[str, Any]:
    pictures = [
        {
            "source": picture.source if isinstance(picture.source, str) else None,
            "name": picture.name,
            "digest": picture.digest or _digest(picture.source),
        }
        for picture in question.pictures
    ]
    return {**vars(question), "pictures": pictures}


def _question_of(record: Mapping[str, Any], digest: Callable[[str], str]) -> Question:
    size = record["size"]
    pictures = []
    for picture in record["pictures"]:
        source, name, seen = picture["source"], picture["name"], picture["digest"]
        if source is not None and digest(source) == seen:
            pictures.append(Picture(source=source, name=name))
        else:  # only its name is left
            pictures.append(Picture(source=b"", name=name or str(source), digest=seen or "unknown"))
    return Question(**{**record, "pictures": tuple(pictures), "size": None if size is None else tuple(size)})
