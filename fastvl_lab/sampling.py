"""How the tokens of an answer are chosen, and which texts end it: what a client asks, checked once."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from fastvl_lab.errors import RequestError, check_whole_number, quoted
from fastvl_lab.schemas import read_schema

# A lower temperature is taken for 0, as vLLM does (vllm/sampling_params.py).
GREEDY_BELOW = 1e-5

# Of each number, the least and the most that it may be: OpenAI's limits where it has the field, else vLLM's.
_LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
_BIAS = 100.0  # either way

# What `format` may be besides a schema, and the schema that it means: OpenAI's json_object.
JSON = "json"
_ANY_OBJECT = {"type": "object"}

MAX_TOP_LOGPROBS = 20  # as OpenAI and vLLM

# Each token's text is held against all of them.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; by default the likeliest of the model's own logits.

    temperature: 0 takes the likeliest, others are drawn from the softmax of logits divided by it. top_k: of so many, 0 or -1 for
    all. top_p: of the likeliest that together have this probability. min_p: of those with this share of the likeliest one's
    probability. repetition_penalty: divides positive logits of tokens in prompt and answer, and multiplies negative ones (CTRL,
    arXiv 1909.05858). frequency_penalty, presence_penalty: taken off a token's logit for each time that it is in the answer, and
    once if it is (OpenAI). logit_bias: token id to what is added to its logit.

    seed: of the draws, None for another one each time; the same seed draws the same, whoever shares a step. stop: texts that end
    the answer before them; of these none is sent. min_tokens: before so many neither an end token nor a stop ends it. logprobs,
    top_logprobs: whether each token comes with its logprob, and those of how many of the likeliest; of the model's own logits,
    before any of the above (as vLLM's raw_logprobs).

    format: "json" for any JSON object, or the JSON schema that the answer must keep to; tokens that do not are not chosen, and the
    end comes when it is whole, or cut at its length. Of a thinking model's answer, what is behind the thought. Raises
    `RequestError`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: Sequence[str] = ()
    min_tokens: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    format: str | Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), least, most))
        for name, least in (("top_k", -1), ("min_tokens", 0), ("top_logprobs", 0)):
            check_whole_number(name, getattr(self, name), least=least)
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.seed is not None:
            check_whole_number("seed", self.seed, least=-(2**63))
            object.__setattr__(self, "seed", operator.index(self.seed))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "stop", _stops(self.stop))
        if not isinstance(self.logprobs, bool):
            raise RequestError(f"logprobs is {quoted(self.logprobs)}; it must be true or false; top_logprobs says how many")
        if self.top_logprobs > MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs is {self.top_logprobs}; the limit is {MAX_TOP_LOGPROBS}")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs} and logprobs is false; ask for both")
        if isinstance(self.format, str) and self.format != JSON:
            raise RequestError(f"format is {quoted(self.format)}; it must be {JSON!r} or a JSON schema")
        if self.format is not None and not isinstance(self.format, str):
            object.__setattr__(self, "format", read_schema(self.format, "format"))
        if self.format is not None and self.min_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} beside a format, which alone says when an answer is whole; give one"
            )

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.temperature >= GREEDY_BELOW

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest one of the model's own logits."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return not (self.draws or self.logit_bias or self.min_tokens or penalties != (1, 0, 0) or self.format is not None)

    @property
    def schema(self) -> dict[str, Any] | None:
        """What the answer must keep to, if anything."""
        return _ANY_OBJECT if isinstance(self.format, str) else None if self.format is None else dict(self.format)


def _number(name: str, value: Any, least: float, most: float) -> float:
    good = isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most  # type: ignore[operator]
    if not good:
        raise RequestError(f"{name} is {quoted(value)}; it must be a number from {least:g} to {most:g}")
    return float(value)


def _bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias is {quoted(given)}; it must map token ids to numbers from {-_BIAS:g} to {_BIAS:g}")
    for token in given:
        check_whole_number("a token of logit_bias", token, least=0)
    biases = {operator.index(token): _number(f"logit_bias of token {token}", by, -_BIAS, _BIAS) for token, by in given.items()}
    return {token: by for token, by in sorted(biases.items()) if by}


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError(f"stop is {quoted(given)}; it must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; the limit is {MAX_STOPS}")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise RequestError(f"a stop has {len(stop)} characters; it must have from 1 to {MAX_STOP_LENGTH}")
    return tuple(stops)
