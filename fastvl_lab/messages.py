"""Chat messages as OpenAI's and Transformers' clients write them, read once into one form that every engine reads.

What is understood is kept, what changes nothing is passed over, and all else is refused by name: a part or a limit that vanished
without a word would change the prompt.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastvl_lab.errors import RequestError, check_whole_number, quoted
from fastvl_lab.image_input import MAX_REQUEST_BYTES, ImageInput

# One message: its own fields as they are, and a content that is a text, parts of type "text" and "image", or None.
Message = dict[str, Any]

# Where the image of a part stands: OpenAI's image_url, and what Transformers' chat templates take.
_SOURCES = ("image", "image_url", "url", "path", "base64")
_LIMITS = ("min_pixels", "max_pixels")
_SIDES = ("resized_width", "resized_height")
# Keys of a part that mean something to services, and nothing to a prompt.
_NEUTRAL = ("cache_control", "annotations", "uuid")
# OpenAI's wishes for an image that leave its size alone.
_NEUTRAL_DETAIL = (None, "auto", "high")

_DEEPEST = 64  # levels of lists and mappings inside a field


def check_limits(least: int | None, most: int | None, where: str = "") -> None:
    """Raise `RequestError` for limits on an area of which the lower is over the upper; where: how the sentence begins."""
    if least is not None and most is not None and least > most:
        raise RequestError(f"{where}min_pixels {least} is over max_pixels {most}")


def count_images(messages: Sequence[Any]) -> int:
    """Image parts of messages that may not be well-formed; what is wrong with them is said when they are read."""
    parts = (part for message in messages if isinstance(message, Mapping) for part in _parts(message.get("content")))
    return sum(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)


def _parts(content: Any) -> Sequence[Any]:
    return content if isinstance(content, list | tuple) else ()


def read_messages(messages: Sequence[Any]) -> tuple[tuple[Message, ...], tuple[ImageInput, ...]]:
    """Messages in their one form, and their images in order; raises `RequestError` and `ImageError`.

    A text stays a text and parts stay parts, since templates tell them apart. An image part becomes {"type": "image"}. An assistant
    may be without content beside a field that says something, such as tool_calls. Fields besides role and content are kept: whether
    they reach the prompt is the template's to say (`tokenizer.chat_text`).
    """
    if len(messages) == 0:
        raise RequestError("messages is empty; give at least one message with a role and a content")
    images: list[ImageInput] = []
    return tuple(_message(number, message, images) for number, message in enumerate(messages)), tuple(images)


def _message(number: int, message: Any, images: list[ImageInput]) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or ("content" not in message and _needs_content(message)):
        raise RequestError(f"message {number} must be a mapping with 'role' and 'content'")
    if message.get("content") is None and _needs_content(message):
        raise RequestError(f"message {number} has a content of type NoneType; give a text or a list of parts")
    read: Message = {}
    for name, value in message.items():
        if name == "role":
            read["role"] = _text(value, f"message {number} has a role")
        elif name == "content":
            read["content"] = _content(value, number, images)
        else:
            where = f"message {number} has in {quoted(name)}"
            read[_text(name, f"message {number} has a field name")] = plain(value, where)
    return read


def _needs_content(message: Mapping[str, Any]) -> bool:
    """An assistant may say all that it says in other fields."""
    others = (value for name, value in message.items() if name not in ("role", "content"))
    return message["role"] != "assistant" or not any(map(says_something, others))


def says_something(value: Any) -> bool:
    """Whether a field has a value at all: what clients fill in for "nothing" is null, false, or empty."""
    return value is not None and value is not False and not (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def _content(content: Any, number: int, images: list[ImageInput]) -> str | tuple[dict[str, str], ...] | None:
    if content is None:
        return None
    if isinstance(content, str):
        return _text(content, f"message {number} has a text")
    if not isinstance(content, list | tuple):
        raise RequestError(f"message {number} has a content of type {type(content).__name__}; give a text or a list of parts")
    return tuple(_part(part, number, images) for part in content)


def _part(part: Any, number: int, images: list[ImageInput]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _check_keys(part, ("type", "text"), f"message {number} has a text part", "a text part has 'type' and 'text'")
        return {"type": "text", "text": _text(part.get("text"), f"message {number} has a text")}
    if kind in ("image", "image_url"):
        images.append(_image(part, number))
        _check_bytes(images)
        return {"type": "image"}
    raise RequestError(f"message {number} has a part of type {quoted(kind)}; the choices are 'text', 'image' and 'image_url'")


def _image(part: Mapping[str, Any], number: int) -> ImageInput:
    """The image of a part with the limits and sides that stand beside it or, as servers have them, beside its url."""
    where, choices = f"message {number} has an image part", f"what is honoured beside an image is {', '.join((*_LIMITS, *_SIDES))}"
    _check_keys(part, ("type", *_SOURCES, *_LIMITS, *_SIDES, "detail"), where, choices)
    given = [name for name in _SOURCES if part.get(name) is not None]
    if not given:
        raise RequestError(f"{where} without an image; give 'image' or 'image_url'")
    if len(given) > 1:
        raise RequestError(f"{where} with {' and '.join(map(repr, given))}; give one of them")
    source, settings = part[given[0]], [part]
    if isinstance(source, Mapping):  # OpenAI: {"image_url": {"url": …}}
        _check_keys(source, ("url", *_LIMITS, *_SIDES, "detail"), where, choices)
        settings.append(source)
        source = source.get("url")
        if source is None:
            raise RequestError(f"{where} without an image; {given[0]!r} has no 'url'")
    if given[0] == "base64" and isinstance(source, str) and source.lstrip()[:5].lower() != "data:":
        source = f"data:image/*;base64,{source}"
    least, most = (_limit(name, settings, number) for name in _LIMITS)
    check_limits(least, most, f"{where} whose ")
    width, height = (_limit(name, settings, number) for name in _SIDES)
    if (width is None) != (height is None):
        raise RequestError(f"{where} with one of {' and '.join(_SIDES)}; give both, or max_pixels")
    for mapping in settings:
        if mapping.get("detail") not in _NEUTRAL_DETAIL:
            raise RequestError(
                f"{where} with detail {quoted(mapping['detail'])}; it may be 'auto' or 'high', and what makes an image small is "
                f"max_pixels beside it"
            )
    image = ImageInput.of(source)
    return dataclasses.replace(
        image,
        min_pixels=image.min_pixels if least is None else least,
        max_pixels=image.max_pixels if most is None else most,
        asked=image.asked if width is None or height is None else (width, height),
    )


def _check_bytes(images: Sequence[ImageInput]) -> None:
    """Raise `RequestError` before the files of a request fill the memory; bytes that are given twice are there once."""
    held = sum({id(image.data): len(image.data) for image in images if isinstance(image.data, bytes)}.values())
    if held > MAX_REQUEST_BYTES:
        raise RequestError(f"the first {len(images)} images of the request have {held} bytes; the limit is {MAX_REQUEST_BYTES}")


def _limit(name: str, settings: Sequence[Mapping[str, Any]], number: int) -> int | None:
    given = [mapping[name] for mapping in settings if mapping.get(name) is not None]
    for value in given:
        check_whole_number(f"{name} of an image in message {number}", value)
    if len({operator.index(value) for value in given}) > 1:
        raise RequestError(f"message {number} has an image part whose {name} is {given[0]} and {given[1]}; give one of them")
    return operator.index(given[0]) if given else None


def _check_keys(mapping: Mapping[str, Any], known: Sequence[str], where: str, choices: str) -> None:
    for key, value in mapping.items():
        if key not in known and key not in _NEUTRAL and value is not None:
            raise RequestError(f"{where} with {quoted(key)}, which changes nothing here and so is refused; {choices}")


def _text(value: Any, what: str) -> str:
    """A string that can be encoded; lone surrogates cannot."""
    if not isinstance(value, str):
        raise RequestError(f"{what} of type {type(value).__name__}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} that is no Unicode: {error.reason} at {error.start}") from None
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON's types and nothing else, since a template may write any of it."""
    if depth > _DEEPEST:
        raise RequestError(f"{where} more than {_DEEPEST} levels of lists and objects")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        return _text(value, f"{where} a text")
    if isinstance(value, Mapping):
        return {_text(key, f"{where} a key"): plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} {quoted(value)}; give what JSON can hold")


def words_of(message: Message) -> Iterator[str]:
    """Every text in a message that a template could write, in the order of templates: role, content, then the other fields."""
    content = message.get("content")
    yield message["role"]
    yield from (content,) if isinstance(content, str) else (part["text"] for part in content or () if "text" in part)
    yield from strings_in({name: value for name, value in message.items() if name not in ("role", "content")})


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON's types, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)
