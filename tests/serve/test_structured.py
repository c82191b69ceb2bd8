"""Formats, tools and thoughts over HTTP: as the openai client asks for them, whole and streamed, and as OpenAI would answer."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from calling import TEMPLATE, THINKING, TIME, WEATHER, with_template

from fastvl_lab import Lab, Request, RequestError, Run, Sampling
from fastvl_lab.request import Chunk
from fastvl_lab.serve import chat
from fastvl_lab.serve.chat import Draft, Reply, Served
from fastvl_lab.serve.choosing import read_sampling
from fastvl_lab.serve.settings import Settings

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
openai = pytest.importorskip("openai", reason="tests of the server need the openai client (extra dev)")
pytest.importorskip("llguidance", reason="formats need llguidance (extra structured)")
pydantic = pytest.importorskip("pydantic")
jsonschema = pytest.importorskip("jsonschema", reason="answers are checked by jsonschema (extra dev)")

MODEL = "tiny-qwen3-vl"
HI = [{"role": "user", "content": "How is the weather in Oslo?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "cold": {"type": "boolean"}},
    "required": ["city", "cold"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
# A model that has learnt nothing repeats itself, unless that costs.
VARIED: dict[str, Any] = {"temperature": 1, "seed": 4, "frequency_penalty": 1}


@pytest.fixture(scope="module")
def calling(serve: Callable[..., Any], shallow_labs: dict[str, Lab]) -> Iterator[Any]:
    with serve(lab=with_template(shallow_labs[MODEL], TEMPLATE), served_name=MODEL) as running:
        yield running


def _client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _ask(server: Any, **asked: Any) -> Any:
    return _client(server).chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 300} | VARIED | asked)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"type": "text"}, None),
        ({"type": "text", "strict": None}, None),
        ({"type": "json_object"}, "json"),
        (FORMAT, CITY),
        ({"type": "json_schema", "json_schema": {"name": "x", "description": None, "schema": {}, "strict": False}}, {}),
    ],
)
def test_a_response_format_is_read_as_it_is_meant(given: Any, meant: Any) -> None:
    assert read_sampling({"response_format": given}) == Sampling(format=meant)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "json_schema"}, "it must have a"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}, "the schema of response_format is [1]"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}, "strict of response_format is 'yes'"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "strict of response_format is 1"),
        ({"type": "regex"}, "its type is text, json_object or json_schema"),
        ("json", "response_format is 'json'"),
    ],
)
def test_a_response_format_that_cannot_be_is_refused(given: Any, says: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_sampling({"response_format": given})
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tools": {"a": 1}}, "tools is {'a': 1}; it must be a list"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tool 0 is"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool 0 has the name 'a b'; it must be 1 to 64"),
        ({"tools": [WEATHER, WEATHER]}, "two functions of one name"),
        ({"tools": [TIME] * 129}, "tools has 129 functions; the limit is 128"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "parameters of tool 'f' is 3"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1.5}}]}, "strict of tool 'f' is 1.5"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 0}}]}, "strict of tool 'f' is 0"),
        ({"tools": [TIME], "tool_choice": "get_time"}, "the choices are none, auto, required, the function get_time"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice is"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TIME], "parallel_tool_calls": "no"}, "parallel_tool_calls is 'no'"),
        ({"tools": [TIME], "tool_choice": "required", "ignore_eos": True}, "ignore_eos is true"),
        ({"response_format": FORMAT, "ignore_eos": True}, "ignore_eos is true, and a format"),
        ({"tools": [TIME], "tool_choice": "required", "min_tokens": 2}, "min_tokens is 2"),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        _draft({"messages": HI, "max_tokens": 9} | asked).chat({})
    assert says in str(raised.value)


def _draft(body: dict[str, Any], *, thinks: bool = False) -> Draft:
    served = Served(model=MODEL, ends=(7,), session_len=4096, thinks=thinks)
    return chat.read(chat.json_object(json.dumps(body).encode()), served, Settings())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_its_format(calling: Any, stream: bool) -> None:
    made = _ask(calling, response_format=FORMAT, stream=stream)
    if stream:
        events = list(made)
        text = "".join(event.choices[0].delta.content or "" for event in events)
        reason = events[-1].choices[0].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    jsonschema.validate(json.loads(text), CITY)
    assert reason == "stop"
    request = Request(messages=HI, max_new_tokens=300, sampling=Sampling(format=CITY, **VARIED))
    assert text == calling.lab.run(request, "fastest").text


def test_a_text_is_completed_in_a_format_and_cut_at_its_length(calling: Any) -> None:
    asked = {"model": MODEL, "prompt": "A city:", "max_tokens": 5, "extra_body": {"response_format": FORMAT}, **VARIED}
    (choice,) = _client(calling).completions.create(**asked).choices
    assert (choice.text[0], choice.finish_reason) == ("{", "length")


def test_any_json_object_is_an_object(calling: Any) -> None:
    made = _ask(calling, response_format={"type": "json_object"}, n=2)
    for choice in made.choices:
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


class City(pydantic.BaseModel):
    """A city."""

    name: Annotated[str, pydantic.Field(max_length=6)]
    cold: bool | None
    near: Annotated[list[Annotated[str, pydantic.Field(max_length=3)]], pydantic.Field(max_length=2)]


def test_the_openai_client_parses_what_it_asked_for(calling: Any) -> None:
    """A pydantic model as a strict format, and as a strict function that must be called: the client checks both itself."""
    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 400, **VARIED}
    made = _client(calling).chat.completions.parse(**asked, response_format=City)
    assert isinstance(made.choices[0].message.parsed, City)
    tool = openai.pydantic_function_tool(City)
    made = _client(calling).chat.completions.parse(**asked, tools=[tool], tool_choice="required", parallel_tool_calls=False)
    (call,) = made.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, City)
    with _client(calling).chat.completions.stream(**asked, response_format=City) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


def test_the_pages_example_runs(calling: Any, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (repository / "docs" / "serving.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "response_format" in block)
    exec(compile(example, "docs/serving.md", "exec"), {"client": _client(calling), "model": MODEL, "messages": HI})
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "no answer can be held to",
        ),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice is"),
    ],
)
def test_what_cannot_be_made_is_a_400_in_a_sentence(calling: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        _ask(calling, **asked)
    assert calling.queue.failure is None


@pytest.mark.parametrize("said", ["How is the weather in Oslo?", "Ask get_weather for Oslo's."])
def test_a_template_that_shows_no_tools_is_not_given_any(server: Any, said: str) -> None:
    """Also where the conversation itself has their names."""
    messages = [{"role": "user", "content": said}]
    with pytest.raises(openai.BadRequestError, match=r"the chat template of 'tiny-qwen2\.5-vl' does not show tools to the model"):
        _ask(server, model="tiny-qwen2.5-vl", messages=messages, tools=[WEATHER])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made(calling: Any, stream: bool) -> None:
    """By its name or any; streamed as OpenAI does, and sent back with its answer for the next turn."""
    made = _ask(calling, tools=[WEATHER, TIME], tool_choice=NAMED, parallel_tool_calls=False, stream=stream)
    if stream:
        events = [event.choices[0] for event in made]
        deltas = [call for event in events for call in event.delta.tool_calls or []]
        assert events[0].delta.role == "assistant"
        assert not any(event.delta.content for event in events)
        assert [call.index for call in deltas] == [0] * len(deltas)
        assert [(call.id is not None, call.function.name) for call in deltas] == [
            (True, "get_weather"),
            *[(False, None)] * (len(deltas) - 1),
        ]
        assert len(deltas) > 5, "arguments come as they are made"
        call_id, arguments = deltas[0].id, "".join(call.function.arguments for call in deltas)
        reason = events[-1].finish_reason
    else:
        (choice,) = made.choices
        (call,) = choice.message.tool_calls
        assert (choice.message.content, call.type, call.function.name) == (None, "function", "get_weather")
        call_id, arguments, reason = call.id, call.function.arguments, choice.finish_reason
    assert reason == "tool_calls"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
    function = {"name": "get_weather", "arguments": arguments}
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": call_id, "type": "function", "function": function}]}
    answer = {"role": "tool", "tool_call_id": call_id, "content": "Snow"}
    again = _ask(calling, messages=[*HI, asked, answer], tools=[WEATHER], max_tokens=3, extra_body={"ignore_eos": True})
    assert again.usage.completion_tokens == 3
    told = httpx.post(f"{calling.url}/tokenize", json={"messages": [*HI, asked, answer], "tools": [WEATHER]}).json()
    prompt = calling.lab.checkpoint.tokenizer.decode(told["tokens"])
    assert f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(json.loads(arguments), ensure_ascii=False)}}}' in prompt
    assert "<tool_response>\nSnow\n</tool_response>" in prompt
    assert '"description": "The weather of a city"' in prompt


def test_tools_that_are_not_to_be_called_are_not_shown(calling: Any) -> None:
    plain = _ask(calling, max_tokens=4)
    unseen = _ask(calling, max_tokens=4, tools=[WEATHER], tool_choice="none")
    assert (unseen.usage.prompt_tokens, unseen.choices[0].message.content) == (
        plain.usage.prompt_tokens,
        plain.choices[0].message.content,
    )
    assert _ask(calling, max_tokens=4, tools=[WEATHER]).usage.prompt_tokens > plain.usage.prompt_tokens + 100


def _streamed(draft: Draft, run: Run, pieces: list[str]) -> list[dict[str, Any]]:
    reply = Reply(draft.chat({}))
    events = [event for piece in pieces for event in reply.piece(Chunk(text=piece, tokens=(1,), time=0.0))]
    return [event["choices"][0] for event in [*events, *reply.end(run)]]


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _run(run_of: Callable[..., Run], text: str, reason: str) -> Run:
    run = run_of(("prefill", 0, 1))
    return dataclasses.replace(run, chunks=(Chunk(text=text, tokens=(1,), time=0.01),), finish_reason=reason)


def test_a_streamed_answer_says_by_channel_what_the_whole_one_does(run_of: Callable[..., Run]) -> None:
    """A thought, a text and two calls, a character a token: deltas add up to the message, and none holds a mark."""
    calls = "\n".join(_call(name, arguments) for name, arguments in (("get_weather", '{"city": "Oslo"}'), ("get_time", "{}")))
    text = f"\nOslo?\n</think>\n\nLet me see.\n{calls}"
    draft, run = _draft({"messages": HI, "tools": [WEATHER, TIME], "stream": True}, thinks=True), _run(run_of, text, "stop")
    message: dict[str, Any] = Reply(draft.chat({})).whole([run])["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "Oslo?")
    functions = [call["function"] for call in message["tool_calls"]]
    assert functions == [{"name": "get_weather", "arguments": '{"city": "Oslo"}'}, {"name": "get_time", "arguments": "{}"}]
    choices = _streamed(draft, run, list(text))
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    for name in ("content", "reasoning_content"):
        assert "".join(choice["delta"].get(name, "") for choice in choices) == message[name]
    added: dict[int, dict[str, Any]] = {}
    for delta in (call for choice in choices for call in choice["delta"].get("tool_calls", ())):
        if "id" in delta:
            added[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
        added[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert [added[0], added[1]] == functions
    assert all(choice["delta"] for choice in choices[:-1]), "no event says nothing"


def test_an_answer_that_is_cut_says_so_though_it_calls(run_of: Callable[..., Run]) -> None:
    text = 'Hm\n<tool_call>\n{"name": "get_weather", "arguments": {"ci'
    draft, run = _draft({"messages": HI, "tools": [WEATHER]}), _run(run_of, text, "length")
    (choice,) = Reply(draft.chat({})).whole([run])["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "Hm")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'
    (early,) = Reply(draft.chat({})).whole([_run(run_of, text[:20], "length")])["choices"]
    assert early["message"] == {"role": "assistant", "content": "Hm"}


def test_what_is_held_back_comes_with_the_end_and_tokens_with_their_chunk(run_of: Callable[..., Run]) -> None:
    draft = _draft({"messages": HI, "tools": [WEATHER], "stream": True, "return_token_ids": True})
    choices = _streamed(draft, _run(run_of, "a <tool", "length"), ["a", " <to", "ol"])
    assert [choice["delta"].get("content") for choice in choices] == ["a", None, None, " <tool", None]
    assert [choice.get("token_ids") for choice in choices] == [[1], [1], [1], None, None]


@pytest.mark.parametrize("text", ["", "<tool"])
def test_the_first_delta_says_who_speaks_though_all_was_held_back(run_of: Callable[..., Run], text: str) -> None:
    draft = _draft({"messages": HI, "tools": [TIME], "stream": True})
    deltas = [choice["delta"] for choice in _streamed(draft, _run(run_of, text, "stop"), [text])]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_the_first_call_alone_ends_an_answer_that_may_have_one(run_of: Callable[..., Run]) -> None:
    body = {"messages": HI, "tools": [WEATHER], "parallel_tool_calls": False}
    request = _draft(body).chat({}).request
    assert request.stops == ("</tool_call>",)
    assert _draft(body | {"stop": ["x"], "tool_choice": "required"}).chat({}).request.stops == ("x",)
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n'  # before the stop, which is not sent
    (choice,) = Reply(_draft(body).chat({})).whole([_run(run_of, text, "stop")])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


def test_a_thinking_models_part_is_no_content(serve: Callable[..., Any], shallow_labs: dict[str, Lab]) -> None:
    with serve(lab=with_template(shallow_labs[MODEL], THINKING), served_name=MODEL) as server:
        run = server.lab.run(Request(messages=HI, max_new_tokens=8, ignore_eos=True), "fastest")
        asked = {"model": MODEL, "messages": HI, "max_tokens": 8, "ignore_eos": True}
        whole = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()["choices"][0]
        assert whole["message"] == {"role": "assistant", "content": "", "reasoning_content": run.text.lstrip()}
        sent = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"stream": True}, timeout=60).text
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in sent.splitlines() if line.startswith("data: {")]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == run.text.lstrip()
        assert not any(delta.get("content") for delta in deltas)
        outside = server.lab.run(Request(messages=HI, max_new_tokens=8, ignore_eos=True), f"{server.url}/v1")
        assert outside.tokens == run.tokens
        raw = {"model": MODEL, "prompt": "Hi", "max_tokens": 4, "ignore_eos": True}
        text = httpx.post(f"{server.url}/v1/completions", json=raw, timeout=60).json()["choices"][0]["text"]
        assert text == server.lab.run(Request(prompt="Hi", raw=True, max_new_tokens=4, ignore_eos=True), "fastest").text


def test_an_endpoint_is_asked_for_the_format_and_the_tools_of_a_request(calling: Any) -> None:
    asked = Request(messages=HI, max_new_tokens=200, sampling=Sampling(format=CITY, **VARIED))
    inside = calling.lab.run(asked, "fastest")
    outside = calling.lab.run(asked, f"{calling.url}/v1")
    assert (outside.tokens, outside.text) == (inside.tokens, inside.text)
    call = Request(messages=HI, max_new_tokens=200, tools=[WEATHER], tool_choice="required", sampling=Sampling(**VARIED))
    assert calling.lab.run(call, f"{calling.url}/v1").tokens == calling.lab.run(call, "fastest").tokens
