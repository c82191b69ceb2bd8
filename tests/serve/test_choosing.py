"""Sampling as clients ask for it: read from bodies, answered as `lab.run` answers, with logprobs in OpenAI's forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastvl_lab import EndpointError, Lab, Request, RequestError, Run, Sampling
from fastvl_lab.request import TokenLogprob
from fastvl_lab.serve.choosing import each_of, in_chat, in_text, read_n, read_sampling
from fastvl_lab.serve.settings import Settings

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
openai = pytest.importorskip("openai", reason="tests of the server need the openai client (extra dev)")

MODEL = "tiny-qwen2.5-vl"
HI = [{"role": "user", "content": "Tell me of the sea"}]


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        ({}, Sampling()),
        ({"temperature": 0, "top_p": 0.8, "seed": 5}, Sampling(top_p=0.8, seed=5)),
        ({"temperature": 0.7}, Sampling(temperature=0.7)),
        ({"top_p": 0.9}, Sampling(temperature=1, top_p=0.9)),  # OpenAI's temperature where a draw is asked for
        ({"do_sample": True}, Sampling(temperature=1)),
        ({"top_p": 1, "top_k": 0, "min_p": 0.0, "seed": 1}, Sampling(seed=1)),
        ({"top_k": 1, "top_p": 0.5}, Sampling(top_k=1, top_p=0.5)),
        ({"temperature": 0.7, "do_sample": False}, Sampling()),
        ({"stop": "a"}, Sampling(stop=("a",))),
        ({"stop": ["", "b"]}, Sampling(stop=("b",))),
        ({"stop": ""}, Sampling()),
        ({"logit_bias": {"5": 1, "7": -100}}, Sampling(logit_bias={5: 1, 7: -100})),
        ({"min_new_tokens": 3}, Sampling(min_tokens=3)),
        ({"min_tokens": 3, "min_new_tokens": 3}, Sampling(min_tokens=3)),
        ({"logprobs": True, "top_logprobs": 2}, Sampling(logprobs=True, top_logprobs=2)),
        ({"logprobs": False, "top_logprobs": 0}, Sampling()),
        ({"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.1, "min_p": 0.1}, None),
    ],
)
def test_a_body_is_read_as_it_is_meant(body: dict[str, Any], meant: Sampling | None) -> None:
    assert read_sampling(body) == (meant or Sampling(temperature=1, **body))


def test_logprobs_of_a_text_are_a_number() -> None:
    assert read_sampling({"logprobs": 0}, raw=True) == Sampling(logprobs=True)
    assert read_sampling({"logprobs": 3}, raw=True) == Sampling(logprobs=True, top_logprobs=3)
    assert read_sampling({"logprobs": False}, raw=True) == Sampling()
    with pytest.raises(RequestError, match="logprobs is True"):
        read_sampling({"logprobs": True}, raw=True)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"do_sample": "no"}, "do_sample is 'no'; it must be true or false"),
        ({"logit_bias": {"hello": 1}}, "logit_bias has the token 'hello'; tokens are named by their ids"),
        ({"logit_bias": {"²": 1}}, "logit_bias has the token"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must be an object"),
        ({"logit_bias": {"5": "1"}}, "logit_bias of token 5 is '1'"),
        ({"stop": {"a": 1}}, "stop is {'a': 1}; it must be a text or a list of texts"),
        ({"stop": ["a", 3]}, "stop is ['a', 3]"),
        ({"min_tokens": 2, "min_new_tokens": 3}, "min_tokens is 2 and min_new_tokens 3; give one of them"),
        ({"logprobs": 5}, "logprobs is 5; it must be true or false"),
        ({"top_logprobs": 5}, "top_logprobs is 5 and logprobs is false"),
        ({"seed": "x"}, "seed is 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(body: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        read_sampling(body)
    assert says in str(raised.value)


def test_each_answer_has_a_seed_of_its_own() -> None:
    assert [one.seed for one in each_of(Sampling(temperature=1, seed=2**63 - 2), 3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [one.seed for one in each_of(Sampling(temperature=1), 2)] == [None, None]
    assert read_n({}, Settings()) == 1
    assert read_n({"n": 3}, Settings(max_queue=3)) == 3
    for n, says in ((0, "n is 0"), (4, "n is 4; the limit is 3"), ("2", "n is '2'")):
        with pytest.raises(RequestError, match=says):
            read_n({"n": n}, Settings(max_queue=3))


def test_logprobs_are_written_as_openai_writes_them() -> None:
    top = tuple(
        TokenLogprob(token=token, spelt=spelt, logprob=by) for token, spelt, by in ((2, b"\xf0\x9f", -0.5), (3, b"ab", -1.5))
    )
    told = [
        TokenLogprob(token=3, spelt=b"ab", logprob=-1.5, top=top),
        TokenLogprob(token=2, spelt=b"\xf0\x9f", logprob=float("-inf")),
    ]
    assert in_chat(told) == {
        "content": [
            {
                "token": "ab",
                "logprob": -1.5,
                "bytes": [97, 98],
                "top_logprobs": [
                    {"token": "\ufffd", "logprob": -0.5, "bytes": [240, 159]},
                    {"token": "ab", "logprob": -1.5, "bytes": [97, 98]},
                ],
            },
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [240, 159], "top_logprobs": []},
        ],
        "refusal": None,
    }
    assert in_text(told, 7) == {
        "tokens": ["ab", "\ufffd"],
        "token_logprobs": [-1.5, -9999.0],
        "top_logprobs": [{"\ufffd": -0.5, "ab": -1.5}, None],
        "text_offset": [7, 9],
    }
    json.dumps(in_chat([TokenLogprob(token=1, spelt=b"", logprob=float("nan"))]), allow_nan=False)


@pytest.fixture(scope="module")
def together(serve: Callable[..., Any]) -> Iterator[Any]:
    """A server whose answers share decode steps."""
    with serve(recipe="fastest, cache.kv=paged, schedule.batching=continuous", max_queue=16) as running:
        yield running


def _client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _inside(lab: Lab, *, n: int = 12, raw: bool = False, **sampling: Any) -> Run:
    said: dict[str, Any] = {"prompt": HI[0]["content"], "raw": True} if raw else {"messages": HI}
    return lab.run(Request(**said, max_new_tokens=n, ignore_eos=True, sampling=Sampling(**sampling)), "fastest")


def test_a_sampled_answer_is_that_of_lab_run_whoever_shares_its_steps(together: Any) -> None:
    """Greedy and sampled ones at once, streamed or not: the same seed, the same text."""
    asked: list[dict[str, Any]] = [
        {"temperature": 0.7, "seed": 1},
        {},
        {"temperature": 1.2, "top_p": 0.9, "seed": 2},
        {"temperature": 0.9, "seed": 3, "extra_body": {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2}},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"9": 4}},
    ]

    def text(number: int) -> str:
        given = dict(asked[number])
        more = given.pop("extra_body", {}) | {"ignore_eos": True}
        made = _client(together).chat.completions.create(
            model=MODEL, messages=HI, max_tokens=12, extra_body=more, stream=number % 2 == 0, **given
        )
        if number % 2:
            return str(made.choices[0].message.content)
        return "".join(event.choices[0].delta.content or "" for event in made)

    with ThreadPoolExecutor(5) as clients:
        texts = list(clients.map(text, range(5)))
    for one, given in zip(texts, asked, strict=True):
        sampling = {**given, **given.get("extra_body", {})}
        sampling.pop("extra_body", None)
        sampling["logit_bias"] = {int(token): by for token, by in sampling.get("logit_bias", {}).items()}
        assert one == _inside(together.lab, **sampling).text
    assert len(set(texts)) == 5


def test_n_answers_come_each_with_its_own_draws(together: Any) -> None:
    expected = [_inside(together.lab, temperature=0.9, seed=seed).text for seed in (4, 5, 6)]
    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "max_tokens": 12, "temperature": 0.9, "seed": 4, "n": 3}
    whole = _client(together).chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert [(one.index, one.message.content, one.finish_reason) for one in whole.choices] == [
        (number, text, "length") for number, text in enumerate(expected)
    ]
    assert whole.usage.completion_tokens == 36
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 36
    texts, ended, usage = ["", "", ""], list[int](), None
    for event in _client(together).chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    ):
        usage = event.usage or usage
        for choice in event.choices:
            assert choice.index not in ended
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ended.append(choice.index)
    assert texts == expected
    assert sorted(ended) == [0, 1, 2]
    assert usage is not None
    assert usage.completion_tokens == 36
    crowd = httpx.post(f"{together.url}/v1/chat/completions", json={**asked, "n": 17}, timeout=30)
    assert (crowd.status_code, "the limit is 16" in crowd.text) == (400, True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_an_answer_and_nothing_of_it_is_sent(server: Any, stream: bool) -> None:
    plain = _inside(server.lab, n=16)
    stop = plain.text[6:9]
    asked = {"model": MODEL, "messages": HI, "max_tokens": 16, "stop": ["no such", stop], "stream": stream, "ignore_eos": True}
    sent = httpx.post(f"{server.url}/v1/chat/completions", json={**asked, "logprobs": True}, timeout=30)
    assert sent.status_code == 200, sent.text
    if stream:
        events = [json.loads(line[6:]) for line in sent.text.splitlines() if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        told = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["content"]]
    else:
        (choice,) = sent.json()["choices"]
        text, reasons, told = choice["message"]["content"], [choice["finish_reason"]], choice["logprobs"]["content"]
    assert (text, reasons) == (plain.text[: plain.text.index(stop)], ["stop"])
    assert "".join(one["token"] for one in told) == text


def test_logprobs_reach_a_client_in_either_form(server: Any) -> None:
    run = _inside(server.lab, n=4, temperature=0.8, seed=9, logprobs=True, top_logprobs=2)
    told = [one for chunk in run.chunks for one in chunk.logprobs]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0.8, "seed": 9, "extra_body": {"ignore_eos": True}}
    chat = _client(server).chat.completions.create(messages=HI, logprobs=True, top_logprobs=2, **asked).choices[0]
    assert [one.bytes for one in chat.logprobs.content] == [list(one.spelt) for one in told]
    assert [one.logprob for one in chat.logprobs.content] == pytest.approx([one.logprob for one in told], abs=1e-4)
    assert [len(one.top_logprobs) for one in chat.logprobs.content] == [2] * 4
    plain = _client(server).chat.completions.create(messages=HI, **asked).choices[0]
    assert (plain.logprobs, plain.message.content) == (None, run.text)
    raw = _inside(server.lab, n=4, raw=True, temperature=0.8, seed=9, logprobs=True, top_logprobs=2)
    text = _client(server).completions.create(prompt=HI[0]["content"], logprobs=2, **asked).choices[0]
    assert text.text == raw.text
    assert text.logprobs.token_logprobs == pytest.approx([one.logprob for c in raw.chunks for one in c.logprobs], abs=1e-4)
    assert text.logprobs.text_offset[0] == 0
    with pytest.raises(openai.BadRequestError, match="echo is true, and logprobs are asked for"):
        _client(server).completions.create(prompt="Hi", logprobs=2, echo=True, **asked)


def test_an_endpoint_is_asked_for_what_the_request_asks(together: Any, labs: dict[str, Lab]) -> None:
    asked: dict[str, Any] = {
        "temperature": 1.1,
        "top_k": 40,
        "seed": 3,
        "logit_bias": {7: 3.0},
        "min_tokens": 2,
        "frequency_penalty": 0.4,
    }
    request = Request(messages=HI, max_new_tokens=10, sampling=Sampling(**asked))
    outside, inside = labs[MODEL].run(request, f"{together.url}/v1"), labs[MODEL].run(request, "fastest")
    assert (outside.tokens, outside.text) == (inside.tokens, inside.text)
    with pytest.raises(RequestError, match="logprobs is true, and those of an endpoint name no token's id"):
        labs[MODEL].run(Request(messages=HI, sampling=Sampling(logprobs=True)), f"{together.url}/v1")
    known = labs[MODEL].checkpoint.config.get_text_config().vocab_size
    with pytest.raises(EndpointError, match=f"logit_bias has token {known}"):
        labs[MODEL].run(Request(messages=HI, sampling=Sampling(logit_bias={known: 1})), f"{together.url}/v1")
