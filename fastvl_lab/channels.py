"""What an answer says, by channel: a thinking model's reasoning, the content, and calls of tools, as each piece of text comes.

A Qwen model thinks up to `</think>`, where its prompt has opened the thought, and writes a call as `tools` has it. Tokens may cut
these marks anywhere: what may begin one is held back, and nothing of one is given.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvl_lab.tools import CLOSE, OPEN

THOUGHT_OPEN, THOUGHT_CLOSE = "<think>", "</think>"

# A call up to its arguments, in the order in which models are told to write it.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(kw_only=True)
class Call:
    """A call, or what came of one. number: its place among the answer's. name, id: None where it had begun before."""

    number: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(kw_only=True)
class Said:
    """What an answer says, or what a piece of it adds."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class Channels:
    """Splits one answer's text, piece by piece. thinks: whether its prompt has opened a thought; calls: whether it may have any.

    White space around marks is given to no channel. What stands between the marks of a call and is none is content, as it is.
    """

    def __init__(self, *, thinks: bool, calls: bool) -> None:
        self._calls = calls
        self._read = self._thought if thinks else self._content
        self._held = ""
        self._begun = not thinks  # whether white space counts: behind a mark it waits for something else
        self._n_calls = 0
        self._depth, self._quoted, self._escaped = 0, False, False  # where the arguments are
        self._said = Said()

    @property
    def n_calls(self) -> int:
        """Calls that have begun."""
        return self._n_calls

    def push(self, text: str) -> Said:
        """What can be given now."""
        self._held += text
        while self._read():
            pass
        return self._given()

    def end(self, *, cut: bool) -> Said:
        """What remains when no more text comes; cut: the answer is not whole, and the beginning of a call is nothing."""
        if self._read == self._thought:
            self._said.reasoning += self._held
        elif self._read == self._content:
            self._said.content += self._held
        elif self._read == self._call and not self._take_whole(self._held) and not cut:
            self._said.content += OPEN + self._held
        self._held = ""
        return self._given()

    def _given(self) -> Said:
        said, self._said = self._said, Said()
        return said

    def _up_to(self, mark: str) -> tuple[str, bool]:
        """The text before a mark, taken, and whether the mark is there; what may be white space before one is held."""
        if not self._begun:
            self._held = self._held.lstrip()
        at = self._held.find(mark)
        if at >= 0:
            text, self._held, self._begun = self._held[:at].rstrip(), self._held[at + len(mark) :], False
            return text, True
        held = self._held
        begins = max((n for n in range(1, len(mark)) if held.endswith(mark[:n])), default=0)
        n = len(held[: len(held) - begins].rstrip())
        text, self._held = held[:n], held[n:]
        self._begun = self._begun or n > 0
        return text, False

    def _thought(self) -> bool:
        text, closed = self._up_to(THOUGHT_CLOSE)
        self._said.reasoning += text
        if closed:
            self._read = self._content
        return closed

    def _content(self) -> bool:
        if not self._calls:
            text = self._held if self._begun else self._held.lstrip()
            self._said.content += text
            self._held, self._begun = "", self._begun or bool(text)
            return False
        text, opened = self._up_to(OPEN)
        self._said.content += text
        if opened:
            self._read = self._call
        return opened

    def _call(self) -> bool:
        """Up to its arguments."""
        if (head := _HEAD.match(self._held)) is not None:
            self._begin(head[1])
            self._held = self._held[head.end() :]
            self._read = self._arguments
            return True
        body, mark, rest = self._held.partition(CLOSE)
        if not mark:
            return False
        if not self._take_whole(body):
            self._said.content += OPEN + body + CLOSE
        self._held, self._read = rest, self._content
        return True

    def _take_whole(self, body: str) -> bool:
        """A call that is written in another way than most; whether it is one."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments", {}), dict):
            return False
        self._begin(call["name"])
        self._said.calls[-1].arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
        return True

    def _begin(self, name: str) -> None:
        self._said.calls.append(Call(number=self._n_calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))
        self._n_calls += 1
        self._depth, self._quoted, self._escaped = 0, False, False

    def _arguments(self) -> bool:
        """Its arguments, character by character: they end where their braces do. Outside of a text, no JSON has a "<"."""
        n = 0
        for character in self._held:
            if character == "<" and not self._quoted:
                self._depth = 0
                break
            n += 1
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    break
        over = self._depth == 0 and bool(self._held)
        text, self._held = self._held[:n], self._held[n:]
        if text:
            if not self._said.calls:
                self._said.calls.append(Call(number=self._n_calls - 1))
            self._said.calls[-1].arguments += text
        if over:
            self._read = self._rest
        return over

    def _rest(self) -> bool:
        """What stands behind its arguments, which is nothing: up to its end."""
        at = self._held.find(CLOSE)
        if at < 0:
            self._held = self._held[-len(CLOSE) + 1 :]
            return False
        self._held, self._read = self._held[at + len(CLOSE) :], self._content
        return True


def said_in(text: str, *, thinks: bool, calls: bool, cut: bool) -> Said:
    """All that a whole answer says."""
    channels = Channels(thinks=thinks, calls=calls)
    first, last = channels.push(text), channels.end(cut=cut)
    return Said(reasoning=first.reasoning + last.reasoning, content=first.content + last.content, calls=[*first.calls, *last.calls])


def as_message(said: Said) -> dict[str, Any]:
    """An answer as OpenAI's message of an assistant, which can be sent back as it is; reasoning_content where there is any."""
    message: dict[str, Any] = {"role": "assistant", "content": said.content or (None if said.calls else "")}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = as_tool_calls(said.calls)
    return message


def as_tool_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
