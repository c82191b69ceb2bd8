"""How a client wants its tokens chosen, read from a body; and the logprobs that it asked for, written as OpenAI does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastvl_lab.errors import RequestError, check_whole_number, quoted
from fastvl_lab.request import TokenLogprob
from fastvl_lab.sampling import JSON, Sampling
from fastvl_lab.schemas import read_schema
from fastvl_lab.serve.settings import Settings

# Fields that say nothing beside others: of a draw, where the likeliest token is taken.
_OF_DRAWS = ("top_p", "top_k", "min_p")
_NUMBERS = ("temperature", *_OF_DRAWS, "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")

# All that is read here of any completion: OpenAI's fields, vLLM's, and Transformers' names for some.
FIELDS = (*_NUMBERS, "logit_bias", "stop", "min_tokens", "min_new_tokens", "do_sample", "logprobs", "n", "response_format")

MAX_ANSWERS = 128  # OpenAI's limit on n

# JSON has no infinity; vLLM writes this too.
_LEAST_LOGPROB = -9999.0


def read_sampling(data: Mapping[str, Any], *, raw: bool = False) -> Sampling:
    """A body's wish, where it has no nulls; raises `RequestError`.

    Greedy without a temperature, but at 1, OpenAI's default, where something else is asked of a draw. raw: whether `logprobs` is
    the number that `top_logprobs` is else, as /v1/completions has it.
    """
    asked = {name: data[name] for name in _NUMBERS if name in data}
    if "temperature" not in asked and (data.get("do_sample") is True or _asks_for_draws(data)):
        asked["temperature"] = 1.0
    if (do_sample := data.get("do_sample", True)) is False:
        asked["temperature"] = 0.0
    elif do_sample is not True:
        raise RequestError(f"do_sample is {quoted(do_sample)}; it must be true or false")
    if "logit_bias" in data:
        asked["logit_bias"] = _bias(data["logit_bias"])
    if "stop" in data:
        asked["stop"] = _stops(data["stop"])
    least = {name: data[name] for name in ("min_tokens", "min_new_tokens") if name in data}
    if len(set(map(repr, least.values()))) > 1:
        raise RequestError(f"min_tokens is {least['min_tokens']} and min_new_tokens {least['min_new_tokens']}; give one of them")
    for value in least.values():
        asked["min_tokens"] = value
    return Sampling(**asked, **_logprobs(data, raw=raw), format=_format(data.get("response_format", {"type": "text"})))


def _format(given: Any) -> Any:
    """OpenAI's response_format as `Sampling` has it; its schema is held to whether it is strict or not."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return JSON
    if kind != "json_schema":
        choices = "its type is text, json_object or json_schema"
        raise RequestError(f"response_format is {quoted(given)}; {choices}")
    about = given.get("json_schema")
    if not isinstance(about, Mapping) or about.get("schema") is None:
        raise RequestError(f'response_format is {quoted(given)}; it must have a {{"json_schema": {{"name": …, "schema": …}}}}')
    if not isinstance(about.get("strict"), bool | None):
        raise RequestError(f"strict of response_format is {quoted(about['strict'])}; it must be true or false")
    return read_schema(about["schema"], "the schema of response_format")


def _asks_for_draws(data: Mapping[str, Any]) -> bool:
    """Whether it says what is drawn from, and not that this is one token."""
    neutral = {"top_p": (1,), "top_k": (-1, 0, 1), "min_p": (0,)}
    return data.get("top_k") != 1 and any(name in data and data[name] not in neutral[name] for name in _OF_DRAWS)


def _bias(given: Any) -> dict[int, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias is {quoted(given)}; it must be an object of token ids and numbers")
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            raise RequestError(f"logit_bias has the token {quoted(token)}; tokens are named by their ids")
    return {int(token): by for token, by in given.items()}


def _stops(given: Any) -> Any:
    """Without the empty ones, which some clients send for none."""
    stops = [given] if isinstance(given, str) else given
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _logprobs(data: Mapping[str, Any], *, raw: bool) -> dict[str, Any]:
    """`logprobs` is a flag, or where it is raw, of how many; some clients write false for none there too."""
    given = data.get("logprobs", False)
    if raw and given is not False:
        check_whole_number("logprobs", given, least=0)
        return {"logprobs": True, "top_logprobs": given}
    return {"logprobs": given, "top_logprobs": data.get("top_logprobs", 0)}


def read_n(data: Mapping[str, Any], settings: Settings) -> int:
    """How many answers are wanted; raises `RequestError` for more than may wait at once."""
    check_whole_number("n", n := data.get("n", 1))
    if n > (most := max_answers(settings)):
        raise RequestError(f"n is {n}; the limit is {most}, as each answer takes a place in the queue")
    return int(n)


def max_answers(settings: Settings) -> int:
    """How many answers a request may have."""
    return min(MAX_ANSWERS, settings.max_queue)


def each_of(sampling: Sampling, n: int) -> Iterator[Sampling]:
    """The same for n answers, each with its own draws: seed, seed + 1, and so on."""
    for number in range(n):
        if sampling.seed is None or number == 0:
            yield sampling
        else:
            yield dataclasses.replace(sampling, seed=(sampling.seed + number + 2**63) % 2**64 - 2**63)


def in_chat(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""
    content = [_token(one) | {"top_logprobs": [_token(other) for other in one.top]} for one in told]
    return {"content": content, "refusal": None}


def in_text(told: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions; offset: characters of the choice's text before these tokens."""
    offsets, pieces = [], [one.spelt.decode(errors="replace") for one in told]
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return {
        "tokens": pieces,
        "token_logprobs": [_finite(one.logprob) for one in told],
        "top_logprobs": [
            {other.spelt.decode(errors="replace"): _finite(other.logprob) for other in one.top} or None for one in told
        ],
        "text_offset": offsets,
    }


def _token(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.spelt.decode(errors="replace"), "logprob": _finite(one.logprob), "bytes": list(one.spelt)}


def _finite(logprob: float) -> float:
    return max(_LEAST_LOGPROB, logprob)  # in this order a NaN is the least, too
