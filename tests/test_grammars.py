"""Answers are what was asked for: JSON of a schema from a model that knows nothing, and calls; what cannot be is refused."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from calling import TEMPLATE, THINKING, TIME, WEATHER, with_template

from fastvl_lab import Lab, MissingExtraError, Request, RequestError, Sampling, load
from fastvl_lab.grammars import MAX_GRAMMARS, Grammars
from fastvl_lab.schemas import MAX_KEYS

pytest.importorskip("llguidance", reason="formats need llguidance (extra structured)")
jsonschema = pytest.importorskip("jsonschema", reason="answers are checked by jsonschema (extra dev)")

SIDE_BY_SIDE = "fastest, cache.kv=paged, schedule.batching=continuous"
ENGINES = ("baseline", "fastest", "fastest, streaming.steps_per_round=16, streaming.gate=round", SIDE_BY_SIDE, "transformers")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def lab(shallow_labs: dict[str, Lab]) -> Lab:
    return with_template(shallow_labs["tiny-qwen3-vl"], TEMPLATE)


@pytest.fixture(scope="module")
def thinking(shallow_labs: dict[str, Lab]) -> Lab:
    return with_template(shallow_labs["tiny-qwen3-vl"], THINKING)


def _schema(chance: random.Random, depth: int = 3) -> dict[str, Any]:
    """Any schema whose answers end, whoever writes them."""
    leaves = (_string, _number, _integer, _choice, lambda _: {"type": "boolean"}, lambda _: {"type": "null"})
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(leaves)(chance)
    return chance.choice((_object, _object, _array, _tuple, _any_of, _reference))(chance, depth - 1)


def _string(chance: random.Random) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"type": "string", "format": chance.choice(["date", "time", "date-time", "uuid", "ipv4", "email", "hostname"])}
    if chance.random() < 0.4:
        return {
            "type": "string",
            "pattern": chance.choice(["^[a-z]{2,5}$", r"^\d{3}-\d{4}$", "^(ab|c)+d$", '^[^a]{1,4}"?$', r"^\w\s\\$"]),
        }
    return {"type": "string", "minLength": chance.randint(0, 3), "maxLength": chance.randint(3, 9)}


def _number(chance: random.Random) -> dict[str, Any]:
    least = chance.randint(-50, 50) / 4
    limits = [
        {"minimum": least},
        {"exclusiveMaximum": least},
        {"minimum": least, "maximum": least + chance.randint(1, 900) / 8},
        {},
    ]
    return {"type": "number", **chance.choice(limits)}


def _integer(chance: random.Random) -> dict[str, Any]:
    least = chance.randint(-500, 500)
    limits = [{"minimum": least}, {"exclusiveMinimum": least, "maximum": least + chance.randint(1, 5000)}, {"multipleOf": 7}, {}]
    return {"type": "integer", **chance.choice(limits)}


def _choice(chance: random.Random) -> dict[str, Any]:
    values = [1, -2.5, 'é"\n\\', None, True, [1, {"a": []}], {"x": "y"}, "plain", ""]
    return {"enum": chance.sample(values, 3)} if chance.random() < 0.7 else {"const": chance.choice(values)}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(["a", "b b", "c\"'", "é", "type", "longer_name", "$ref"], chance.randint(1, 4))
    made = {"type": "object", "properties": {name: _schema(chance, depth) for name in names}}
    made["required"] = [name for name in names if chance.random() < 0.6]
    made["additionalProperties"] = False if chance.random() < 0.8 else {"type": "boolean"}
    return made


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    return {"type": "array", "items": _schema(chance, depth), "minItems": least, "maxItems": least + chance.randint(0, 2)}


def _tuple(chance: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "array",
        "prefixItems": [_schema(chance, depth) for _ in range(2)],
        "items": False,
        "minItems": chance.randint(0, 2),
    }


def _any_of(chance: random.Random, depth: int) -> dict[str, Any]:
    choices = [_schema(chance, depth) for _ in range(2)]
    return {"anyOf": choices} if chance.random() < 0.7 else {"allOf": [{"title": "one"}, choices[0]]}


def _reference(chance: random.Random, depth: int) -> dict[str, Any]:
    """A definition by its name; one that contains itself might never end, and stands below."""
    name = f"d{chance.randint(0, 10**9)}"
    node = {"type": "object", "properties": {"value": _schema(chance, 0), "next": {"type": ["null", "boolean"]}}}
    node |= {"required": ["value", "next"], "additionalProperties": False}
    return {"$ref": f"#/$defs/{name}", "$defs": {name: node}}


def _lifted(schema: Any, found: dict[str, Any]) -> Any:
    """With all definitions at the top, where references look for them."""
    if isinstance(schema, list):
        return [_lifted(one, found) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema and "$defs" in schema:
        for name, one in schema["$defs"].items():
            found[name] = _lifted(one, found)
        return {"$ref": schema["$ref"]}
    return {key: value if key in ("enum", "const") else _lifted(value, found) for key, value in schema.items()}


@pytest.mark.parametrize("n", [25, pytest.param(200, marks=pytest.mark.nightly)])
def test_random_schemas_get_valid_answers_from_a_random_model(lab: Lab, n: int) -> None:
    """The words of a model that has learnt nothing are any. A penalty keeps it from one digit without end."""
    kinds = set()
    for number in range(n):
        defs: dict[str, Any] = {}
        schema = _lifted(_schema(random.Random(number)), defs) | ({"$defs": defs} if defs else {})
        jsonschema.Draft202012Validator.check_schema(schema)
        sampling = Sampling(temperature=1, seed=number, format=schema, frequency_penalty=1)
        run = lab.run(Request(prompt="Hi", max_new_tokens=1500, sampling=sampling), SIDE_BY_SIDE if number % 2 else "fastest")
        assert run.finish_reason == "stop", (number, schema, run.text)
        jsonschema.validate(json.loads(run.text), schema, cls=jsonschema.Draft202012Validator)
        kinds.add(type(json.loads(run.text)))
    assert kinds >= {dict, list, str, int}


@pytest.mark.parametrize("sampled", [False, True])
def test_every_engine_makes_the_tokens_that_transformers_makes_of_a_format(lab: Lab, picture: bytes, sampled: bool) -> None:
    """Launched ahead, in rounds behind a gate, and among others: what a grammar allows is known before each choice."""
    draws: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "seed": 5, "frequency_penalty": 0.5} if sampled else {}
    sampling = Sampling(format=PERSON, repetition_penalty=1.3, **draws)
    request = Request(images=[picture], prompt="Who is this?", max_new_tokens=120, sampling=sampling)
    theirs = lab.run(request, "transformers")
    assert theirs.finish_reason == "stop"
    jsonschema.validate(json.loads(theirs.text), PERSON)
    for engine in ENGINES[:-1]:
        run = lab.run(request, engine)
        assert (run.tokens, run.text, run.finish_reason) == (theirs.tokens, theirs.text, "stop"), engine
        assert "".join(map(str, lab.stream(request, engine))) == theirs.text
    assert "grammar" in run.trace.stages()


def test_those_who_share_steps_are_each_held_to_their_own(lab: Lab) -> None:
    """A format, a call, a greedy text and a sampled one at once; the greedy one is what it is alone."""
    asked: list[dict[str, Any]] = [
        {"sampling": Sampling(format=PERSON, temperature=1, seed=1, frequency_penalty=1)},
        {
            "tools": [WEATHER],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "sampling": Sampling(temperature=1, seed=2, frequency_penalty=1),
        },
        {},
        {"sampling": Sampling(temperature=1, seed=3)},
    ]
    requests = [Request(prompt="Hi", max_new_tokens=120, **one) for one in asked]
    runs = load(lab, requests, SIDE_BY_SIDE, concurrency=4).runs
    assert [run.tokens for run in runs] == [lab.run(request, "fastest").tokens for request in requests]
    jsonschema.validate(json.loads(runs[0].text), PERSON)
    (call,) = lab.message(requests[1], runs[1])["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


def test_a_format_changes_no_logprob_and_is_cut_where_an_answer_is(lab: Lab) -> None:
    request = Request(prompt="Hi", max_new_tokens=6, sampling=Sampling(format=PERSON, logprobs=True, top_logprobs=1))
    run = lab.run(request, "fastest")
    assert (run.finish_reason, run.text[:1]) == ("length", "{")
    (told,) = run.chunks[0].logprobs
    raw = run.logits.log_softmax(dim=-1)
    assert told.logprob == pytest.approx(float(raw[told.token]), abs=1e-4)
    assert told.top[0].token == int(raw.argmax()), "what the model would have said, whether it may or not"


def _allows(grammars: Grammars, request: Request, text: str) -> bool:
    """Whether an answer may be this text, a byte a token, and then end."""
    held, last = grammars.of(request), None
    assert held is not None
    for token in [*grammars._checkpoint.tokenizer(text).input_ids, *grammars._checkpoint.eos_token_ids[:1]]:
        words = held.allowed(last)
        assert words is not None
        if not int(words[token // 32]) >> token % 32 & 1:
            return False
        last = token
    return held.allowed(last) is None


def test_no_key_comes_twice_and_no_text_holds_what_json_has_not(lab: Lab) -> None:
    request = Request(
        prompt="Hi", sampling=Sampling(format={"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}})
    )
    for text in ('{"a": "x", "b": [1]}', '{"a":"\\n\\""}', '{\n  "b": null\n}', "{}"):
        assert _allows(lab.grammars, request, text), text
    for text in ('{"a": "x", "a": 1}', '{"a": "x", "\\u0061": 1}', '{"a": 1}', '{"a": "\t"}', '{"a": ""}', "{" + " " * 65 + "}"):
        assert not _allows(lab.grammars, request, text), text


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
STRICT = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
LIST = {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["next"]}
NAMED = {"type": "function", "function": {"name": "get_time"}}


@pytest.mark.parametrize(
    ("asked", "allowed", "forbidden"),
    [
        (
            {"tool_choice": "required"},
            [CALL, NOW, f"{CALL}\n{NOW}"],
            ["", "Hi", f"Hi {CALL}", CALL.replace("Oslo", "Oslo in Norway")],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{NOW}"]),
        ({"tool_choice": NAMED}, [NOW], [CALL, NOW.replace("{}", '{"a": 1}')]),
        ({"sampling": Sampling(format="json")}, ["{}", '{"a": [1]}', CALL], ["[]", "1", "Hi", f"{{}}{CALL}"]),
        ({"tools": [], "sampling": Sampling(format=PERSON)}, ['{"name": "Al", "age": 20}'], [CALL, '{"name": "Al", "age": 2}']),
        ({"tools": [], "sampling": Sampling(format=LIST)}, ['{"next": {"next": null}}'], ["{}", '{"next": {"next": 1}}', "null"]),
        ({"tools": [STRICT]}, ["Hi", CALL, f"Hi\n{CALL}\n{CALL}", "<tool_cal"], [NOW, CALL.replace("Oslo", "Oslo in Norway")]),
    ],
)
def test_a_request_allows_what_it_asks_for(lab: Lab, asked: dict[str, Any], allowed: list[str], forbidden: list[str]) -> None:
    request = Request(**{"prompt": "Hi", "tools": [WEATHER, TIME]} | asked)
    for text in allowed:
        assert _allows(lab.grammars, request, text), text
    for text in forbidden:
        assert not _allows(lab.grammars, request, text), text


def test_a_thinking_model_thinks_before_its_format(thinking: Lab, lab: Lab) -> None:
    request = Request(prompt="Hi", sampling=Sampling(format=PERSON))
    good = '{"name": "Al", "age": 20}'
    assert thinking.grammars.thinks
    assert not lab.grammars.thinks
    for text in (f"Hm. </thin \n</think>\n\n{good}", f"</think>{good}"):
        assert _allows(thinking.grammars, request, text)
    assert not _allows(thinking.grammars, request, good)
    assert not _allows(thinking.grammars, request, "Hm.</think>\n\nSo.")
    raw = Request(prompt="Hi", raw=True, sampling=Sampling(format=PERSON))
    assert _allows(thinking.grammars, raw, good)
    run = thinking.run(Request(prompt="Hi", max_new_tokens=8, ignore_eos=True), "fastest")
    assert thinking.message(Request(prompt="Hi"), run) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": run.text.lstrip(),
    }


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"$ref": "https://example.com/schema.json"}, "example.com"),
        ({"$ref": "#"}, "no answer can be held to"),
        ({"enum": []}, "Unsatisfiable"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "no answer can be held to"),
        ({"type": "string", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    ],
)
def test_a_schema_that_nothing_can_be_held_to_is_refused_in_a_sentence(lab: Lab, schema: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match="no answer can be held to the format or the tools") as raised:
        lab.run(Request(prompt="Hi", sampling=Sampling(format=schema)), "fastest")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def _deep(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"format": "xml"}, "format is 'xml'; it must be 'json' or a JSON schema"),
        ({"format": 3}, "format is 3; it must be a JSON schema, an object"),
        ({"format": _deep(80)}, "format has more than 64 levels"),
        ({"format": {"enum": ["x" * 70_000]}}, "characters; the limit is 65536"),
        ({"format": {"properties": {str(n): {} for n in range(MAX_KEYS + 1)}}}, f"an object of {MAX_KEYS + 1} keys; the limit is"),
        ({"format": {"const": object()}}, "give what JSON can hold"),
        ({"format": "json", "min_tokens": 2}, "min_tokens is 2 beside a format"),
    ],
)
def test_a_format_that_cannot_be_is_refused_where_it_is_made(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        Sampling(**asked)
    assert says in str(raised.value)


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "long texts": lambda: {"type": "object", "properties": {f"k{n}": {"type": "string", "maxLength": 1000} for n in range(100)}},
    "a huge text": lambda: {"type": "string", "minLength": 10**6, "maxLength": 10**7},
    "a huge list": lambda: {"type": "array", "items": {"type": "integer"}, "minItems": 10**5, "maxItems": 10**6},
    "many optional keys": lambda: {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(MAX_KEYS)}},
    "repeats of repeats": lambda: {"type": "string", "pattern": "^((a?){1,50}b?){1,50}$"},
    "an ambiguous pattern": lambda: {"type": "string", "pattern": "(a|b)*a(a|b){25}c"},
    "doubling references": lambda: {
        "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)} | {"d30": {"type": "integer"}},
        "$ref": "#/$defs/d0",
    },
    "all of any of": lambda: {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": -n}, {"type": "string"}]} for n in range(20)]},
    "no end": lambda: {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_no_time_or_are_refused(lab: Lab, name: str) -> None:
    """Milliseconds where others take minutes, and a sentence where there are limits. The bar leaves room for a busy machine."""
    request = Request(prompt="Hi", max_new_tokens=12, sampling=Sampling(format=HOSTILE[name](), temperature=1, seed=0))
    began = time.perf_counter()
    with suppress(RequestError):
        lab.run(request, "fastest")
    assert time.perf_counter() - began < 20


def test_grammars_are_made_once_and_not_kept_for_ever(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, made = Grammars(lab.checkpoint), []
    make = Grammars._make
    monkeypatch.setattr(Grammars, "_make", lambda self, text: made.append(text) or make(self, text))  # type: ignore[func-returns-value]
    for n in [*range(MAX_GRAMMARS + 1), MAX_GRAMMARS, 0]:
        assert grammars.of(Request(prompt="Hi", sampling=Sampling(format={"const": n}))) is not None
    assert len(made) == MAX_GRAMMARS + 2, "the first was let go"
    assert len(grammars._made) == MAX_GRAMMARS
    assert grammars.of(Request(prompt="Hi", sampling=Sampling(temperature=1))) is None


def test_what_asks_for_no_format_needs_no_extra(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    fresh = lab.apart()
    fresh.run(Request(prompt="Hi", max_new_tokens=2, sampling=Sampling(temperature=1)), "fastest")
    fresh.run(Request(prompt="Hi", max_new_tokens=2, tools=[WEATHER]), "fastest")
    for asked in ({"sampling": Sampling(format="json")}, {"tools": [WEATHER], "tool_choice": "required"}):
        with pytest.raises(MissingExtraError, match=r"pip install 'fastvl-lab\[structured\]'"):
            fresh.run(Request(prompt="Hi", **asked), "fastest")


def test_behind_its_end_nothing_is_forbidden(lab: Lab) -> None:
    """Rounds launch steps behind the end token, whose tokens nobody reads."""
    held, end = lab.grammars.of(Request(prompt="Hi", sampling=Sampling(format={"const": 1}))), lab.checkpoint.eos_token_ids[0]
    assert held is not None
    first = held.allowed(None)
    assert isinstance(first, torch.Tensor)
    (one,) = lab.checkpoint.tokenizer("1").input_ids
    assert held.allowed(one) is not None
    assert held.allowed(end) is None
    assert held.allowed(7) is None
