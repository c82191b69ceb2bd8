"""Completions of a text, and the tokens of prompts, as OpenAI's and vLLM's clients meet them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastvl_lab import Lab, Request, RequestError
from fastvl_lab.checkpoint import tiny
from fastvl_lab.serve import chat, completions, openapi

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
jsonschema = pytest.importorskip("jsonschema", reason="answers are checked by jsonschema (extra dev)")
openai = pytest.importorskip("openai", reason="tests of the server need the openai client (extra dev)")

MODEL = "tiny-qwen2.5-vl"
TEXT = "<|im_start|>user\nOnce upon a time,"


def _post(server: Any, path: str, **body: Any) -> Any:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def _events(answer: Any) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_raw_prompt_is_read_as_it_is(lab: Lab) -> None:
    """With its special tokens; and Transformers, whose prompt is the same, answers it with the same tokens."""
    request = Request(prompt=TEXT, raw=True, max_new_tokens=8, ignore_eos=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder(lab.checkpoint.name))
    run = lab.run(request, "fastest")
    assert run.n_prompt == len(tokenizer(TEXT, add_special_tokens=False).input_ids)
    assert run.tokens == lab.run(request, "transformers").tokens


@pytest.mark.parametrize(
    "given", [{"prompt": ""}, {"prompt": "a", "images": [b"x"]}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_a_raw_request_is_a_text_alone(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a raw request has a prompt that is not empty and no images"):
        Request(raw=True, **given)


def test_a_raw_prompt_holds_no_place_of_an_image(lab: Lab) -> None:
    with pytest.raises(RequestError, match="the prompt contains the placeholder"):
        lab.run(Request(prompt="What is <|image_pad|>?", raw=True), "fastest")


@pytest.mark.parametrize("echo", [False, True])
def test_the_openai_client_completes_a_text(server: Any, echo: bool) -> None:
    expected = server.lab.run(Request(prompt=TEXT, raw=True, max_new_tokens=9, ignore_eos=True), "fastest")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = {"model": MODEL, "prompt": TEXT, "max_tokens": 9, "echo": echo, "extra_body": {"ignore_eos": True}}
    before = TEXT if echo else ""
    whole = client.completions.create(**asked)
    assert (whole.object, whole.choices[0].text, whole.choices[0].finish_reason) == (
        "text_completion",
        before + expected.text,
        "length",
    )
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.n_prompt, 9)
    pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == before + expected.text
    assert [piece.choices[0].finish_reason for piece in pieces[:-1] if piece.choices[0].finish_reason] == ["length"]
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens == expected.n_prompt + 9
    assert len({piece.id for piece in pieces}) == 1


def test_the_lab_asks_an_endpoint_to_complete_a_text(server: Any, labs: dict[str, Lab]) -> None:
    request = Request(prompt=TEXT, raw=True, max_new_tokens=6, ignore_eos=True)
    run, inside = labs[MODEL].run(request, f"{server.url}/v1"), labs[MODEL].run(request, "fastest")
    assert (run.tokens, run.text, run.n_prompt) == (inside.tokens, inside.text, inside.n_prompt)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "prompt is None; it must be a text that is not empty, or a list of such texts"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": ["a", ""]}, r"prompt is \['a', ''\]"),
        ({"prompt": ["a"] * 5, "n": 2}, "5 prompts with 2 answers each are over 8, the limit"),
        ({"prompt": ["a", "b"], "return_trace": True}, "return_trace is true and there are 2 prompts"),
        ({"prompt": [1, 2]}, r"prompt is \[1, 2\]"),
        ({"suffix": "end"}, "suffix is 'end'"),
        ({"logprobs": 21}, "top_logprobs is 21; the limit is 20"),
        ({"best_of": 2}, "best_of is 2"),
        ({"messages": []}, "the field 'messages' is unknown; the choices are prompt, echo, suffix, model"),
        ({"max_pixels": 3136}, "the field 'max_pixels' is unknown"),
        ({"echo": "yes"}, 'echo is "yes"'),
        ({"echo": ""}, 'echo is ""'),
        ({"stream_options": {"continuous_usage_stats": ""}}, 'continuous_usage_stats is ""'),
    ],
)
def test_a_text_that_cannot_be_completed_is_refused_by_name(server: Any, change: dict[str, Any], says: str) -> None:
    answer = _post(server, "/v1/completions", **{"prompt": "a", "max_tokens": 2} | change)
    assert answer.status_code == 400
    with pytest.raises(RequestError, match=says):
        raise RequestError(answer.json()["error"]["message"])


def test_a_whole_number_may_be_written_as_a_float(server: Any) -> None:
    """JSON has one kind of number, and its schemas call 3.0 an integer."""
    whole, written = (_post(server, "/v1/completions", prompt="a", max_tokens=n, ignore_eos=True).json() for n in (3, 3.0))
    assert whole["choices"] == written["choices"]
    answer = _post(server, "/v1/completions", prompt="a", max_tokens=3.5)
    assert answer.json()["error"]["message"].startswith("max_tokens is 3.5; it must be a whole number")


def test_a_prompt_may_stand_in_a_list(server: Any) -> None:
    one, listed = (_post(server, "/v1/completions", prompt=prompt, max_tokens=3).json() for prompt in ("a", ["a"]))
    assert one["choices"] == listed["choices"]


@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts_are_answered_each_as_alone(server: Any, n: int) -> None:
    """OpenAI's order, choice prompt * n + i for a prompt's answer i, streamed and whole; usage counts each prompt once."""
    prompts = ["Once upon a time,", "Tell me of whales. They are"]
    more = {"max_tokens": 5, "ignore_eos": True, "echo": True, "n": n, "temperature": 0.8, "seed": 3}
    alone = [_post(server, "/v1/completions", prompt=prompt, **more).json() for prompt in prompts]
    expected = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert len(set(expected)) == 2 * n
    whole = _post(server, "/v1/completions", prompt=prompts, **more).json()
    assert [choice["index"] for choice in whole["choices"]] == list(range(2 * n))
    assert [choice["text"] for choice in whole["choices"]] == expected
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = _events(_post(server, "/v1/completions", prompt=prompts, **more, stream=True, stream_options=options))
    texts = dict.fromkeys(range(2 * n), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == expected
    for name in ("prompt_tokens", "completion_tokens"):
        total = sum(answer["usage"][name] for answer in alone)
        assert total == whole["usage"][name] == events[-1]["usage"][name]
    assert events[0]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_each_chunk_may_carry_the_usage_so_far(server: Any, path: str) -> None:
    """As vLLM's continuous_usage_stats, of which guidellm counts the tokens of an answer that it leaves."""
    asked = {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    more = {"max_tokens": 5, "ignore_eos": True, "stream": True, "return_token_ids": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = _events(_post(server, path, **asked, **more, stream_options=options))
    made = 0
    for event in events:
        made += sum(len(choice.get("token_ids", ())) for choice in event["choices"])
        assert event["usage"]["completion_tokens"] == made
        assert event["usage"]["prompt_tokens"] == events[-1]["usage"]["prompt_tokens"]
    assert made == 5
    assert "usage" not in _events(_post(server, path, **asked, **more, stream_options=options | {"include_usage": False}))[0]


def test_the_tokens_of_prompts_are_those_that_the_model_reads(server: Any, picture: bytes, data_uri: Any) -> None:
    text = _post(server, "/tokenize", prompt="Hello", return_token_strs=True).json()
    assert text["tokens"] == server.lab.checkpoint.tokenizer("Hello").input_ids
    assert (text["count"], len(text["token_strs"]), text["max_model_len"]) == (len(text["tokens"]),) * 2 + (
        server.lab.checkpoint.session_len,
    )
    assert _post(server, "/detokenize", tokens=text["tokens"]).json() == {"prompt": "Hello"}
    messages = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(picture)}}, {"type": "text", "text": "?"}]}
    ]
    chat_tokens = _post(server, "/tokenize", messages=messages, max_pixels=3136).json()
    run = server.lab.run(Request(messages=messages, max_new_tokens=1, max_pixels=3136), "fastest")
    assert chat_tokens["count"] == run.n_prompt
    assert chat_tokens["tokens"].count(server.lab.checkpoint.image_token_id) == run.visual_tokens
    assert chat_tokens["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/tokenize", {}, 400, "prompt is None"),
        ("/tokenize", {"prompt": ["a", "b"]}, 400, "tokens are told of one text at a time"),
        ("/tokenize", {"prompt": "a", "max_tokens": 3}, 400, "the field 'max_tokens' is unknown"),
        ("/tokenize", {"messages": [], "add_generation_prompt": False}, 400, "add_generation_prompt is false"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model 'other' is not served here"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens is 'abc'"),
        ("/detokenize", {"tokens": [-1]}, 400, "a token is -1"),
        ("/detokenize", {"tokens": [10**9]}, 400, "a token is 1000000000; the model has"),
        ("/detokenize", {"tokens": [10**30]}, 400, "a token is 1"),
    ],
)
def test_tokens_that_cannot_be_told_are_refused(server: Any, path: str, body: dict[str, Any], status: int, says: str) -> None:
    answer = _post(server, path, **body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_small_endpoints_say_what_they_are(server: Any) -> None:
    ping, version = httpx.get(f"{server.url}/ping"), httpx.get(f"{server.url}/version")
    assert ping.json() == {"status": "ok"}
    assert version.json()["version"].count(".") == 2
    for path in ("/health", "/ping", "/version", "/metrics", "/v1/models"):
        assert httpx.head(f"{server.url}{path}").status_code == 200, path
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["max_model_len"] == server.lab.checkpoint.session_len


def test_what_is_answered_at_once_is_counted_as_its_refusals_are(server: Any) -> None:
    def counted(status: int) -> float:
        name = f'fastvl_lab_requests_total{{status="{status}"}} '
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = counted(200), counted(400)
    for path, good in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert httpx.post(f"{server.url}{path}", json=good).status_code == 200
        assert httpx.post(f"{server.url}{path}", json={}).status_code == 400
    assert httpx.get(f"{server.url}/v1/models").status_code == 200
    assert (counted(200) - before[0], counted(400) - before[1]) == (3, 2)


def test_the_page_of_the_description_loads_nothing(server: Any) -> None:
    """It has all that is described, and no address from which a browser would fetch more than the description itself."""
    described, answer = httpx.get(f"{server.url}/openapi.json").json(), httpx.get(f"{server.url}/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert re.findall(r"<script|<link|<img|@import|//[a-z]|url\(", answer.text) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', answer.text) == ["openapi.json"]
    for path, methods in described["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in answer.text
    for name in (*chat.OWN, *completions.OWN, *chat.READ):
        assert f"<code>{name}</code>" in answer.text


@pytest.mark.parametrize(
    ("path", "asks"), [("completions", {"prompt": "Hi"}), ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})]
)
def test_each_event_is_what_is_described(server: Any, path: str, asks: dict[str, Any]) -> None:
    """The schema is of one event and its fields, not of the text of all of them."""
    of_200 = httpx.get(f"{server.url}/openapi.json").json()["paths"][f"/v1/{path}"]["post"]["responses"]["200"]["content"]
    sent = _post(server, f"/v1/{path}", **asks, max_tokens=3, stream=True)
    assert sent.headers["content-type"].split(";")[0] == "text/event-stream"
    events = [dict([line.split(": ", 1) for line in event.splitlines()]) for event in sent.text.strip().split("\n\n")]
    assert len(events) > 3
    for event in events:
        jsonschema.validate(event, of_200["text/event-stream"]["schema"])


def test_the_description_knows_the_fields_that_are_read(server: Any) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    bodies = {
        path: place["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path, place in described["paths"].items()
        if "post" in place
    }
    assert set(bodies["/v1/chat/completions"]["properties"]) == {*chat.OWN, *chat.READ, *chat.PASSING}
    assert set(bodies["/v1/completions"]["properties"]) == {*completions.OWN, *chat.READ, *chat.PASSING}
    assert bodies["/v1/completions"]["properties"]["model"]["enum"] == [MODEL, None]
    text, of_chat = bodies["/tokenize"]["anyOf"]
    assert set(text["properties"]) == set(completions.OF_TEXT)
    assert set(of_chat["properties"]) == set(completions.OF_CHAT)
    assert set(bodies["/detokenize"]["properties"]) == set(completions.OF_TOKENS)
    assert (
        described["paths"]["/v1/models/{name}"]["get"]["responses"]["200"]["content"]["application/json"]["schema"] == openapi.MODEL
    )
