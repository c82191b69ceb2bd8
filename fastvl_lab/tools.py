"""Functions that a model may call, as OpenAI's clients describe them, checked once; and whether it must."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastvl_lab.errors import RequestError, quoted
from fastvl_lab.messages import plain
from fastvl_lab.schemas import read_schema

# A function's description in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters", "strict"}}.
Tool = dict[str, Any]

MAX_TOOLS = 128  # OpenAI's limit

CHOICES = ("none", "auto", "required")

# How a Qwen model writes a call: {"name": …, "arguments": …} between these (its chat template says so to the model).
OPEN, CLOSE = "<tool_call>", "</tool_call>"

_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")  # OpenAI's


def read_tools(given: Any) -> tuple[Tool, ...]:
    """Copies of tools, of JSON's types; raises `RequestError`."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise RequestError(f"tools is {quoted(given)}; it must be a list of functions")
    if len(given) > MAX_TOOLS:
        raise RequestError(f"tools has {len(given)} functions; the limit is {MAX_TOOLS}")
    tools = tuple(_read_tool(number, tool) for number, tool in enumerate(given))
    if len(set(map(name_of, tools))) < len(tools):
        raise RequestError("tools has two functions of one name; each call must name one of them")
    return tools


def _read_tool(number: int, given: Any) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or given.get("type") != "function":
        raise RequestError(f'tool {number} is {quoted(given)}; it must be {{"type": "function", "function": {{"name": …}}}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"tool {number} has the name {quoted(name)}; it must be 1 to 64 letters, digits, _ and -")
    if parameters is not None:
        read_schema(parameters, f"parameters of tool {name!r}")
    if not isinstance(function.get("strict"), bool | None):
        raise RequestError(f"strict of tool {name!r} is {quoted(function['strict'])}; it must be true or false")
    tool: Tool = plain({key: value for key, value in given.items() if value is not None}, f"tool {number} has")
    tool["function"] = {key: value for key, value in tool["function"].items() if value is not None}
    return tool


def check_choice(given: Any, tools: Sequence[Tool]) -> None:
    """Raise `RequestError` for what is none of `CHOICES`, nor OpenAI's name of one of the tools."""
    function = given.get("function") if isinstance(given, Mapping) and given.get("type") == "function" else None
    named = function.get("name") if isinstance(function, Mapping) else None
    names = [name_of(tool) for tool in tools]
    if named not in names and not (isinstance(given, str) and given in CHOICES):
        choices = ", ".join((*CHOICES, *(f"the function {name}" for name in names)))
        raise RequestError(f"tool_choice is {quoted(given)}; the choices are {choices}")
    if given == "required" and not tools:
        raise RequestError("tool_choice is 'required', and there are no tools; give some, or leave it out")


def name_of(tool: Tool) -> str:
    return str(tool["function"]["name"])


def schema_of(tool: Tool) -> dict[str, Any]:
    """Of the arguments of a call: those of a function without parameters are an object with nothing in it."""
    parameters: dict[str, Any] = tool["function"].get("parameters", {})
    return {"type": "object", **parameters} if parameters else {"type": "object", "additionalProperties": False}


def with_any_arguments(tool: Tool) -> Tool:
    """The same, called with any object."""
    return {**tool, "function": {"name": name_of(tool), "parameters": {"type": "object"}}}


def is_strict(tool: Tool) -> bool:
    """Whether the arguments of every call of it must be as its schema says."""
    return bool(tool["function"].get("strict"))
