"""What an answer must be, token by token: grammars of JSON and of calls, by llguidance (vLLM's and SGLang's backend "guidance").

It computes each mask from the grammar when it is asked for, within limits: a schema is ready in milliseconds, and none takes
minutes, as a bounded text does where automata are compiled first. What it cannot hold an answer to, it refuses.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from fastvl_lab.channels import THOUGHT_CLOSE
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RequestError, require, shortened
from fastvl_lab.request import Request
from fastvl_lab.streaming.text import TokenBytes
from fastvl_lab.tokenizer import opens_thought
from fastvl_lab.tools import CLOSE, OPEN, Tool, is_strict, name_of, schema_of, with_any_arguments

# Grammars that are kept ready; each takes some kilobytes, and the states that its answers have seen.
MAX_GRAMMARS = 64

# What stands over any schema: white space is bounded, or an answer might be nothing else; no escape spells a key in a second way;
# nothing is passed over that is not held to.
_OPTIONS = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}",
    "json_allowed_escapes": '"\\bfnrt',
    "lenient": False,
    "coerce_one_of": False,
}


def grammar_of(request: Request, *, thinks: bool) -> str | None:
    """A request's grammar in llguidance's Lark, or None where its tokens are free.

    thinks: whether its prompt opens a thought, which comes before, and is free.
    """
    offered: Sequence[Tool] = request.offered
    schema = request.sampling.schema
    rules: list[str] = []
    if request.must_call:
        called = [tool for tool in offered if name_of(tool) in request.must_call]
        start = _calls(called, rules, several=request.parallel_tool_calls)
    elif schema is not None:
        rules.append(f"json: {_json(schema)}")
        start = f"(json | {_calls(offered, rules, several=request.parallel_tool_calls)})" if offered else "json"
    elif any(map(is_strict, offered)):
        times = "*" if request.parallel_tool_calls else "?"
        offered = [tool if is_strict(tool) else with_any_arguments(tool) for tool in offered]
        start = f"(opened {_bodies(offered, rules)} {_text(CLOSE)}){times} free"
        rules += [rf"opened[lazy]: /(.|\n)*{OPEN}/", r"free: /(.|\n)*/"]
    else:
        return None
    if thinks:
        rules += [rf"thought[lazy]: /(.|\n)*{_in_regex(THOUGHT_CLOSE)}/", r"gap: /\n{1,2}/"]
        start = f"thought gap? {start}"
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _calls(tools: Sequence[Tool], rules: list[str], *, several: bool) -> str:
    rules.append(f"call: {_text(OPEN)} {_bodies(tools, rules)} {_text(CLOSE)}")
    return r'call ("\n" call)*' if several else "call"


def _bodies(tools: Sequence[Tool], rules: list[str]) -> str:
    """What stands between the marks of a call: of each tool as its template has shown it to the model."""
    names, end = [], "}\n"
    for number, tool in enumerate(tools):
        head = _text(f'\n{{"name": "{name_of(tool)}", "arguments": ')
        rules.append(f"body_{number}: {head} {_json(schema_of(tool))} {_text(end)}")
        names.append(f"body_{number}")
    return f"({' | '.join(names)})"


def _text(text: str) -> str:
    return json.dumps(text)


def _in_regex(text: str) -> str:
    """A slash would end a regular expression of Lark."""
    return text.replace("/", r"\/")


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": _OPTIONS})


# Where in a grammar an error is, as llguidance begins to say it.
_PLACE = re.compile(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?")


class Grammars:
    """The grammars of a checkpoint's answers, each made once; the last `MAX_GRAMMARS` are kept. For any thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._made: OrderedDict[str, Any] = OrderedDict()
        self._changing = threading.Lock()

    def of(self, request: Request) -> Held | None:
        """What holds a request's answer to what it asks, or None where nothing does.

        Raises `RequestError` for what no answer can be held to, and `MissingExtraError` without llguidance.
        """
        text = grammar_of(request, thinks=not request.raw and self.thinks)
        if text is None:
            return None
        if not self._checkpoint.eos_token_ids:
            raise RequestError(
                "the checkpoint has no token that ends an answer, and a format or a call that must be made needs one"
            )
        with self._changing:
            if text not in self._made:
                self._made[text] = self._make(text)
            self._made.move_to_end(text)
            while len(self._made) > MAX_GRAMMARS:
                self._made.popitem(last=False)
            return Held(self._made[text].deep_copy(), self._checkpoint.eos_token_ids)

    @cached_property
    def thinks(self) -> bool:
        """Whether the checkpoint's prompts open a thought."""
        return opens_thought(self._checkpoint)

    @cached_property
    def _library(self) -> Any:
        return require("llguidance", "structured")

    @cached_property
    def _tokenizer(self) -> Any:
        """The bytes of every token that the model has; one of which none are known is never allowed."""
        table = TokenBytes.of(self._checkpoint.tokenizer).table
        n_tokens = self._checkpoint.config.get_text_config().vocab_size
        wrapped = self._library.TokenizerWrapper(
            _Vocabulary([table.get(token, b"") for token in range(n_tokens)], self._checkpoint)
        )
        return self._library.LLTokenizer(wrapped, n_vocab=n_tokens, eos_token=list(self._checkpoint.eos_token_ids))

    def _make(self, text: str) -> Any:
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        trial = matcher.deep_copy()
        trial.compute_bitmask()  # a schema that means itself alone fails here
        if trial.is_error():
            raise RequestError(f"no answer can be held to the format or the tools: {_why(trial)}")
        return matcher


class Held:
    """One answer that is held to a grammar, and how far it has come."""

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self._matcher, self._ends = matcher, ends
        self._over = False

    def allowed(self, token: int | None) -> torch.Tensor | None:
        """Which tokens may follow the answer's last one (None: the first): int32 [ceil(vocab / 32)] of bits, on the host.

        None once an end token was taken, behind which nothing counts. Raises `RequestError` where a schema is too large for a step.
        """
        if token is not None and not self._over:
            self._matcher.consume_token(token)
            self._over = token in self._ends
        if self._over:
            return None
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(f"the answer cannot be held to its format or tools any further: {_why(self._matcher)}")
        return torch.frombuffer(bytearray(bits), dtype=torch.int32)


class _Vocabulary:
    """A tokenizer as llguidance wants to be given one: it needs the bytes of tokens, and a way to spell a text."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], checkpoint: Checkpoint) -> None:
        self.tokens, self._tokenizer = tokens, checkpoint.tokenizer
        self.special_token_ids = [token for token, spelt in enumerate(tokens) if not spelt]
        self.eos_token_id = checkpoint.eos_token_ids[0]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("a text, whose bytes a tokenizer of Transformers takes for none")
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def _why(matcher: Any) -> str:
    """What llguidance says in its first line, without the place in a grammar that nobody has written."""
    return shortened(_PLACE.sub("", matcher.get_error().partition("\n")[0]), 300)
