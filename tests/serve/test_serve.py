"""The endpoint as its clients meet it: the tokens of `lab.run`, clear refusals, limits that hold, and nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gc
import http.client
import json
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port

from fastvl_lab import EndpointError, Lab, Recipe, RecipeError, Request, RequestError, Run, photo
from fastvl_lab.errors import DeviceError, FastvlError, RequestCancelledError
from fastvl_lab.measure.compare import compare
from fastvl_lab.measure.load import load, varied
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.schedule.loop import Step
from fastvl_lab.serve import serving
from fastvl_lab.serve.__main__ import main
from fastvl_lab.serve.app import _Front, create_app
from fastvl_lab.serve.chat import Reply
from fastvl_lab.serve.metrics import Metrics
from fastvl_lab.serve.request_queue import QueuedRequest, RequestQueue
from fastvl_lab.serve.settings import Settings

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
openai = pytest.importorskip("openai", reason="tests of the server need the openai client (extra dev)")

MODEL = "tiny-qwen2.5-vl"


def _uri(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _messages(picture: bytes | None, text: str = "What is this?") -> list[dict[str, Any]]:
    image = [{"type": "image_url", "image_url": {"url": _uri(picture)}}] if picture else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def _client(server: Any, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_the_openai_client_gets_what_lab_run_gives(server: Any, picture: bytes, with_image: bool) -> None:
    messages = _messages(picture if with_image else None)
    expected = server.lab.run(Request(messages=messages, max_new_tokens=24, ignore_eos=True), "fastest")
    asked = {"model": MODEL, "messages": messages, "max_tokens": 24}
    more = {"ignore_eos": True, "return_token_ids": True, "return_trace": True}

    stream = _client(server).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}, extra_body=more)
    text, tokens, reasons, last = "", [], [], None
    for event in stream:
        for choice in event.choices:
            text += choice.delta.content or ""
            tokens += (choice.model_extra or {}).get("token_ids", [])
            reasons += [choice.finish_reason] if choice.finish_reason else []
        last = event
    assert (text, tuple(tokens), reasons) == (expected.text, expected.tokens, ["length"])
    assert last.usage.prompt_tokens == expected.n_prompt
    assert last.usage.completion_tokens == 24
    run = Run.from_record(last.model_extra["fastvl_lab"]["run"])
    assert next(iter(run.trace.stages())) == "queued"
    assert {"tokenize", "prefill", "emit"} <= set(run.trace.stages())
    assert run.ttft == pytest.approx(run.chunks[0].time, abs=1e-6)
    assert sum(run.trace.stages().values()) + run.trace.unaccounted_ns == pytest.approx(run.trace.first_chunk_ns, rel=0.01)

    whole = _client(server).chat.completions.create(**asked, extra_body=more)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == expected.n_prompt + 24


def test_an_answer_that_ends_by_itself_says_so(serve: Callable[..., Any], labs: dict[str, Lab], picture: bytes) -> None:
    plain = labs[MODEL].run(Request(messages=_messages(picture), max_new_tokens=8, ignore_eos=True), "fastest")
    lab = labs[MODEL].apart()
    lab.checkpoint = dataclasses.replace(lab.checkpoint, eos_token_ids=(plain.tokens[3],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labs, MODEL, lab)
        with serve() as running:
            answer = _client(running).chat.completions.create(model=MODEL, messages=_messages(picture), max_tokens=8)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == plain.tokens.index(plain.tokens[3]) + 1


def test_the_lab_measures_the_server_from_outside(server: Any, labs: dict[str, Lab]) -> None:
    request = Request(images=[photo("rocket", (84, 112))], prompt="What is this?", max_new_tokens=20, ignore_eos=True)
    run, inside = labs[MODEL].run(request, f"{server.url}/v1/"), labs[MODEL].run(request, "fastest")
    assert (run.tokens, run.text, run.n_prompt) == (inside.tokens, inside.text, inside.n_prompt)
    assert [chunk.tokens for chunk in run.chunks] == [chunk.tokens for chunk in inside.chunks]
    assert list(run.trace.stages()) == ["encode", "connect", "upload", "wait"]
    assert sum(run.trace.stages().values()) + run.trace.unaccounted_ns == pytest.approx(run.trace.first_chunk_ns, rel=0.01)
    assert "as the endpoint counts them" in repr(run)
    assert run.account is not None
    assert [part.name for part in run.account.parts] == ["queue", "preprocess", "vit", "prefill"]  # as its own trace has them
    assert 0 < sum(part.seconds for part in run.account.parts) < run.ttft
    assert run.account.notes == ()
    assert [chunk.tokens for chunk in labs[MODEL].stream(request, f"{server.url}/v1")] == [c.tokens for c in run.chunks]
    heard: list[Run] = []  # while an endpoint answers, the lab itself is free
    labs[MODEL].run(request, f"{server.url}/v1", on_chunk=lambda chunk: heard.append(labs[MODEL].run(request, "fastest")))
    assert {other.tokens for other in heard} == {run.tokens}
    with pytest.raises(EndpointError, match="not an image of a supported type"):
        labs[MODEL].run(Request(images=[b"no image"], prompt="?"), f"{server.url}/v1")
    with pytest.raises(EndpointError, match=r"does not serve other; the choices are tiny-qwen2\.5-vl"):
        labs[MODEL].run(request, f"{server.url}/v1, model=other")
    with pytest.raises(EndpointError, match="no OpenAI-compatible endpoint"):
        labs[MODEL].run(request, "http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError, match=r"answers 404: .*; such an address ends in /v1 as a rule"):
        labs[MODEL].run(request, server.url)
    for address in ("http://", "https:///v1", "http://[bad", "http://127.0.0.1:99999/v1"):
        with pytest.raises(RecipeError, match="is no address"):
            labs[MODEL].run(request, address)
    with pytest.raises(RecipeError, match="model=<name>"):
        labs[MODEL].run(request, f"{server.url}/v1, models=other")


def test_an_endpoint_is_compared_by_its_tokens(server: Any, labs: dict[str, Lab], picture: bytes) -> None:
    """It shows no logits; as the reference too. What it serves is its own model, whatever the lab has loaded."""
    request, address = Request(images=[picture], prompt="What is this?", max_new_tokens=4, ignore_eos=True), f"{server.url}/v1"
    for engines in (
        {"served": address, "ours": "fastest", "torch": "baseline, preprocessor.resize=torch"},
        {"stock": "transformers", "served": address},
    ):
        comparison = compare(labs[MODEL], request, engines, repeats=1)
        assert not comparison.failures
        assert [row["tokens_equal"] for row in comparison.summary()] == [True] * len(engines)
    other = compare(labs["tiny-qwen3-vl"], request, {"ours": "fastest", "served": address}, repeats=1)
    assert [(other.parity(name), other.speedup(name)) for name in ("ours", "served")] == [(True, None), (False, None)]
    assert "no time is compared with served: its tokens differ from those of transformers" in other.findings()[0]
    assert [other.representative(name).checkpoint for name in ("ours", "served")] == ["tiny-qwen3-vl", MODEL]


def test_many_at_once_are_asked_of_an_endpoint(server: Any, labs: dict[str, Lab], picture: bytes) -> None:
    lab, request = labs["tiny-qwen2.5-vl"], Request(images=[picture], prompt="Hi", max_new_tokens=6, ignore_eos=True)
    made = load(lab, request, f"{server.url}/v1", concurrency=3, n=6)
    assert not made.failures
    assert made.steps == (), "nobody sees an endpoint's steps"
    assert [run.tokens for run in made.finished] == [lab.run(varied(request, n), "fastest").tokens for n in range(6)]
    assert made.begun[2] < 0.1 < made.begun[5]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number of at least 1"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
    ],
)
def test_limits_that_no_request_could_keep_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(FastvlError, match=says):
        Settings(**settings)


def test_a_port_and_a_certificate_that_cannot_be_are_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    for port in ("99999", "-1", "http"):
        with pytest.raises(SystemExit, match="2"):
            main(["--checkpoint", MODEL, f"--port={port}"])
        assert f"{port!r} is no port; it must be from 0 to 65535" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", MODEL, "--ssl-certfile=none.pem"])
    assert "there is no file 'none.pem'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"temperature": 0.7}, 200, ""),
        ({"temperature": 2.7}, 400, "temperature is 2.7; it must be a number from 0 to 2"),
        ({"n": 9}, 400, "n is 9; the limit is 8, as each answer takes a place in the queue"),
        ({"n": 2, "return_trace": True}, 400, "return_trace is true and n is 2"),
        ({"logit_bias": {"100000": 1}}, 400, "logit_bias has token 100000, and the model has"),
        ({"tools": [{"type": "function"}]}, 400, "tool 0 is"),
        ({"max_tokns": 5}, 400, "the field 'max_tokns' is unknown; the choices are messages, min_pixels"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"max_completion_tokens": 3}, 400, "max_completion_tokens is 3 and max_tokens"),
        ({"stream": "yes"}, 400, 'stream is "yes"; it must be true or false'),
        ({"messages": []}, 400, "messages is empty"),
        ({"messages": "hello"}, 400, "messages must be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/hostname"}]}]}, 400, "'text' and 'image_url'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]}]},
            400,
            "fetches",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}]}]},
            400,
            "is",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]}, 400, "not base64"),
        ({"model": "gpt-4"}, 404, "model 'gpt-4' is not served here; the choice is 'tiny-qwen2.5-vl'"),
        ({"max_tokens": 10**9}, 400, "limit"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_in_a_sentence(server: Any, change: dict, status: int, says: str) -> None:
    body = {"model": MODEL, "messages": _messages(None), "max_tokens": 2} | change
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert says in answer.json()["error"]["message"]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "limits",
    [{"max_pixels": 3136}, {"mm_processor_kwargs": {"max_pixels": 3136, "min_pixels": None}}],
)
def test_limits_of_images_are_honoured_in_either_place(server: Any, picture: bytes, limits: dict[str, Any]) -> None:
    expected = server.lab.run(Request(messages=_messages(picture), max_new_tokens=4, ignore_eos=True, max_pixels=3136), "fastest")
    asked = {"model": MODEL, "messages": _messages(picture), "max_tokens": 4, "extra_body": {"ignore_eos": True} | limits}
    answer = _client(server).chat.completions.create(**asked)
    assert (answer.usage.prompt_tokens, answer.choices[0].message.content) == (expected.n_prompt, expected.text)
    whole = server.lab.run(Request(messages=_messages(picture), max_new_tokens=4), "fastest")
    assert answer.usage.prompt_tokens < whole.n_prompt


def test_who_does_not_say_how_long_gets_what_there_is_room_for(serve: Callable[..., Any], labs: dict[str, Lab]) -> None:
    lab = labs[MODEL].apart()
    lab.checkpoint = dataclasses.replace(lab.checkpoint, session_len=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labs, MODEL, lab)
        with serve(max_tokens=40) as running:
            url = f"{running.url}/v1/chat/completions"
            for text in ("a", "a" * 110, "a" * 140):
                answer = httpx.post(url, json={"messages": _messages(None, text), "ignore_eos": True}, timeout=60).json()
                used = answer["usage"]
                assert used["completion_tokens"] == min(40, 200 - used["prompt_tokens"])
                assert answer["choices"][0]["finish_reason"] == "length"
            full = httpx.post(url, json={"messages": _messages(None, "a" * 199)}, timeout=60)
            assert "over session_len, 200" in full.json()["error"]["message"]
            wished = httpx.post(url, json={"messages": _messages(None, "a" * 110), "max_tokens": 40}, timeout=60)
            assert "max_new_tokens is 40" in wished.json()["error"]["message"]  # a wish is no default


@pytest.mark.parametrize(
    ("text", "n_messages"),
    [("word " * 300_000, 1), ("w\u00f6rd\u3000" * 150_000, 1), ("=" * 30_000, 40), (" a" * 100_000, 1), ("line\n" * 40_000, 2)],
)
def test_a_text_that_no_session_holds_does_not_reach_the_engine(server: Any, text: str, n_messages: int) -> None:
    """It is refused beside the engine's thread: by its bytes, or, where those do not decide it, by its tokens."""
    body = {"messages": [{"role": "user", "content": text}] * n_messages, "max_tokens": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.lab, "run", _raiser(AssertionError("it reached the engine")))
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "over session_len" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'"text"', b"[" * 100_000])
def test_a_malformed_body_is_refused(server: Any, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=30)
    assert answer.status_code == 400
    assert "the body is" in answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_before_it_is_read_in_full(server: Any) -> None:
    sent = 0

    def pieces() -> Any:
        nonlocal sent
        for _ in range(400):
            sent += 100_000
            yield b" " * 100_000

    try:
        status = httpx.post(f"{server.url}/v1/chat/completions", content=pieces(), timeout=30).status_code
    except httpx.TransportError:  # the server hung up on it
        status = 413
    assert status == 413
    assert sent < 40_000_000
    told = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * 2_000_001, timeout=30)
    assert told.status_code == 413
    assert "2000000 bytes, the limit" in told.json()["error"]["message"]


def test_models_health_and_metrics(server: Any, picture: bytes) -> None:
    assert [model.id for model in _client(server).models.list()] == [MODEL]
    assert _client(server).models.retrieve(MODEL).owned_by == "fastvl_lab"
    with pytest.raises(openai.NotFoundError, match="model 'Qwen/other' is not served here"):
        _client(server).models.retrieve("Qwen/other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = _metrics(server)
    _client(server).chat.completions.create(model=MODEL, messages=_messages(picture), max_tokens=3)
    after = _metrics(server)
    assert after['fastvl_lab_requests_total{status="200"}'] == before.get('fastvl_lab_requests_total{status="200"}', 0) + 1
    for name in ("ttft_seconds_count", "queued_seconds_count", 'stage_seconds_count{stage="prefill"}'):
        assert after[f"fastvl_lab_{name}"] == before.get(f"fastvl_lab_{name}", 0) + 1, name
    assert after["fastvl_lab_requests_waiting"] == after["fastvl_lab_requests_running"] == after["fastvl_lab_kv_blocks_used"] == 0
    assert after["fastvl_lab_kv_blocks"] == server.lab.memory.paged.pool.n_blocks
    assert after["process_resident_memory_bytes"] > 1e8


def _metrics(server: Any) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line and line[0] != "#")}


def test_what_is_not_served_is_said_as_openai_says_errors(server: Any) -> None:
    for method, path, status in (
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", f"/v1/models/{MODEL}", 405),
        ("POST", "/health", 405),
    ):
        answer = httpx.request(method, f"{server.url}{path}")
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert f"{method} {path} is not served here" in answer.json()["error"]["message"]
    assert "GET" in httpx.post(f"{server.url}/health").headers["allow"]


def _preflight(server: Any, origin: str) -> Any:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return httpx.options(f"{server.url}/v1/chat/completions", headers=asked)


def test_scripts_of_pages_may_ask_where_a_setting_or_this_machine_lets_them(server: Any, serve: Callable[..., Any]) -> None:
    for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8080"):
        assert _preflight(server, origin).headers["access-control-allow-origin"] == origin
    for origin in ("https://pages.example", "http://localhost.example", "http://localhost:3000.example", "null"):
        assert "access-control-allow-origin" not in _preflight(server, origin).headers
    with serve(origins=("https://pages.example",)) as running:
        asked = _preflight(running, "https://pages.example")
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://pages.example")
        assert "authorization" in asked.headers["access-control-allow-headers"]
        body = {"messages": _messages(None), "max_tokens": 2, "stream": True}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers={"Origin": "https://pages.example"})
        assert answer.headers["access-control-allow-origin"] == "https://pages.example"
        assert answer.text.strip().endswith("[DONE]")
        assert "access-control-allow-origin" not in _preflight(running, "https://other.example").headers
    for origin in ("pages.example", "https://pages.example/", "ftp://pages.example"):
        with pytest.raises(FastvlError, match=r"origin .* is none; it reads https://host"):
            Settings(origins=(origin,))


@pytest.mark.parametrize("reuse", ["cache.prefix_reuse=on", "cache.image_reuse=on", "cache.prefix_reuse=on, cache.image_reuse=on"])
def test_a_server_says_what_it_reused(serve: Callable[..., Any], labs: dict[str, Lab], picture: bytes, reuse: str) -> None:
    recipe = f"fastest, cache.kv=paged, {reuse}"
    inside, outside = labs[MODEL].apart(), labs[MODEL].apart()
    requests = [Request(images=[picture], prompt="What?", max_new_tokens=n, ignore_eos=True) for n in (3, 3, 4)]
    requests += [Request(prompt="Hello.", max_new_tokens=3, ignore_eos=True)] * 2
    with serve(recipe=recipe) as running:
        served = [outside.run(request, f"{running.url}/v1") for request in requests]
        used = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": _messages(None), "max_tokens": 2}).json()["usage"]
        asked = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": _messages(None), "max_tokens": 2}).json()[
            "usage"
        ]
    assert [run.kind for run in served] == [inside.run(request, recipe).kind for request in requests]
    assert {run.kind for run in served} >= {"cold", "cache_hit"}
    found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (used, asked)]
    assert (found[1] > 0) == ("prefix" in reuse)
    assert found[1] < asked["prompt_tokens"]


def test_no_path_of_the_disk_is_shown(labs: dict[str, Lab], serve: Callable[..., Any], tmp_path: Path, picture: bytes) -> None:
    folder = tmp_path / "secret" / "my-model"
    folder.mkdir(parents=True)
    for named, shown in ((str(folder), "my-model"), (f"{folder}/.", "my-model"), ("Qwen/Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B")):
        lab = labs[MODEL].apart()
        lab.checkpoint = dataclasses.replace(lab.checkpoint, name=named)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(labs, MODEL, lab)
            with serve() as running:
                assert [model.id for model in _client(running).models.list()] == [shown]
                assert _client(running).models.retrieve(shown).id == shown
                body = {"model": shown, "messages": _messages(picture), "max_tokens": 2, "return_trace": True}
                answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
                assert answer.json()["fastvl_lab"]["run"]["checkpoint"] == answer.json()["model"] == shown
                refused = httpx.post(
                    f"{running.url}/v1/chat/completions", json=body | {"messages": _messages(None, "<|image_pad|>")}
                )
                other = httpx.post(f"{running.url}/v1/chat/completions", json=body | {"model": named + "?"})
                assert not any("secret" in told.text for told in (answer, refused)), refused.text
                assert other.status_code == 404
        assert lab.checkpoint.name == named  # the caller's own is as it was
    with serve(served_name="gpt-5") as running:
        assert [model.id for model in _client(running).models.list()] == ["gpt-5"]
        body = {"model": MODEL, "messages": _messages(None), "max_tokens": 2}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 404
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body | {"model": "gpt-5"}).json()["model"] == "gpt-5"


def test_a_key_is_asked_for_where_one_is_set(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(api_key="a secret") as running:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            _client(running, api_key="another").models.list()
        with pytest.raises(EndpointError, match="answers 401"):
            running.lab.run(Request(prompt="?"), f"{running.url}/v1")
        for scheme in ("bearer", "BEARER", "Bearer "):
            assert httpx.get(f"{running.url}/v1/models", headers={"Authorization": f"{scheme} a secret"}).status_code == 200
        for shown in ("a secret", "Basic a secret", "Bearer", "Bearer a secre", "Bearer A secret"):
            assert httpx.get(f"{running.url}/v1/models", headers={"Authorization": shown}).status_code == 401
            assert httpx.get(f"{running.url}/v1/models/{MODEL}", headers={"Authorization": shown}).status_code == 401
        monkeypatch.setenv("FASTVL_LAB_API_KEY", "a secret")  # the server's own, which goes nowhere
        with pytest.raises(EndpointError, match="answers 401"):
            running.lab.run(Request(prompt="?"), f"{running.url}/v1")
        monkeypatch.setenv("FASTVL_LAB_ENDPOINT_KEY", "a secret")
        assert running.lab.run(Request(prompt="?", max_new_tokens=2), f"{running.url}/v1").tokens
        assert httpx.get(f"{running.url}/health").status_code == 200  # for load balancers, which have none


@pytest.mark.alone
def test_a_full_queue_is_said_at_once_and_who_leaves_makes_room(serve: Callable[..., Any]) -> None:
    body = {"model": MODEL, "messages": _messages(None), "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    with serve(max_queue=2) as running:
        url = f"{running.url}/v1/chat/completions"
        with httpx.Client(timeout=30) as one, one.stream("POST", url, json=body) as first:
            lines = first.iter_lines()
            next(lines)  # it is being served
            waiting = [_post_and_wait(running, body) for _ in range(2)]
            _until(lambda: len(running.queue._waiting) == 2)
            refused = httpx.post(url, json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert "2 requests wait already" in refused.json()["error"]["message"]
            waiting[0].close()
            _until(lambda: len(running.queue._waiting) == 1)
            waiting[1].close()
        started = time.monotonic()
        assert httpx.post(url, json=body | {"max_tokens": 2, "stream": False}, timeout=30).status_code == 200
        assert time.monotonic() - started < 10  # the endless one went with its client


def _post_and_wait(running: Any, body: dict[str, Any], *, unsent: int = 0) -> socket.socket:
    """A client that has asked, and reads nothing; unsent: bytes at the end of its body that it keeps."""
    host, port = running.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data[: len(data) - unsent])
    return connection


@pytest.mark.alone
def test_a_body_is_read_once_there_is_a_place_for_it(serve: Callable[..., Any]) -> None:
    """One that is on its way in holds its place; without one, no body is waited for; and who leaves while sending gives it back."""
    body = {"messages": _messages(None), "max_tokens": 2}
    with serve(max_queue=2, timeout=5) as running:
        url = f"{running.url}/v1/chat/completions"
        sending = [_post_and_wait(running, body, unsent=3) for _ in range(2)]
        _until(lambda: running.queue._reserved == 2)
        assert httpx.post(url, json=body).status_code == 429
        with _post_and_wait(running, body, unsent=3) as late:  # of whose body the end never comes
            late.settimeout(3)
            assert late.recv(100).startswith(b"HTTP/1.1 429")
        sending[0].close()
        _until(lambda: running.queue._reserved == 1)
        assert httpx.post(url, json=body, timeout=30).status_code == 200
        sending[1].settimeout(10)
        assert sending[1].recv(100).startswith(b"HTTP/1.1 504")  # a body has no more time than its request
        sending[1].close()
        assert running.queue._reserved == 0


@pytest.mark.alone
def test_images_are_counted_before_any_is_fetched_and_fetched_within_the_requests_time(serve: Callable[..., Any]) -> None:
    def asked(n: int, where: str = "one.example") -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": f"http://{where}/{i}.jpg"}} for i in range(n)]
        return {"messages": [{"role": "user", "content": parts}, *_messages(None)], "max_tokens": 2}

    fetched: list[tuple[str, ...]] = []
    hung = threading.Event()

    def fetch_all(urls: tuple[str, ...], settings: Settings, seconds: float) -> dict[str, bytes]:
        assert seconds <= settings.timeout
        fetched.append(urls)
        if "slow" in urls[0]:
            hung.wait(10)
        return dict.fromkeys(urls, b"no image")

    with pytest.MonkeyPatch.context() as patch, serve(image_hosts=("one.example",), timeout=1.0) as running:
        patch.setattr("fastvl_lab.serve.app.fetch_all", fetch_all)
        url = f"{running.url}/v1/chat/completions"
        for n in (65, 3000):
            assert f"the request has {n} images; the limit is 64" in httpx.post(url, json=asked(n)).json()["error"]["message"]
        assert fetched == []
        assert "not an image" in httpx.post(url, json=asked(2)).json()["error"]["message"]
        assert fetched == [("http://one.example/0.jpg", "http://one.example/1.jpg")]
        hopeless = [threading.Thread(target=lambda: httpx.post(url, json=asked(1, "slow.example"), timeout=30)) for _ in range(20)]
        for thread in hopeless:  # more than there are threads to wait on
            thread.start()
        _until(lambda: len(fetched) > 10)
        started = time.monotonic()
        assert httpx.post(url, json={"messages": _messages(None), "max_tokens": 2}, timeout=30).status_code == 200
        assert time.monotonic() - started < 0.9
        answer = httpx.post(url, json=asked(1, "slow.example"), timeout=30)
        assert (answer.status_code, time.monotonic() - started < 5) == (504, True)
        hung.set()
        for thread in hopeless:
            thread.join()
        _until(lambda: running.queue._reserved == 0)


def _until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.alone
def test_a_request_that_takes_too_long_is_ended(serve: Callable[..., Any]) -> None:
    body = {"model": MODEL, "messages": _messages(None), "max_tokens": 20_000, "ignore_eos": True}
    with serve(timeout=0.5) as running:
        url = f"{running.url}/v1/chat/completions"
        answer = httpx.post(url, json=body, timeout=30)
        assert answer.status_code == 504
        assert "longer than this server, or its own timeout, allows" in answer.json()["error"]["message"]
        lines = httpx.post(url, json=body | {"stream": True}, timeout=30).text.strip().splitlines()
        assert (
            "longer than this server, or its own timeout, allows"
            in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        )
        with pytest.raises(EndpointError, match=r"gave up.*longer than this server, or its own timeout, allows"):
            running.lab.run(Request(prompt="Go on.", max_new_tokens=20_000, ignore_eos=True), f"{running.url}/v1")


def test_many_clients_share_decode_steps_and_who_leaves_makes_room(serve: Callable[..., Any], picture: bytes) -> None:
    bodies = [{"messages": _messages(picture if n % 2 else None), "max_tokens": 40 + n, "ignore_eos": True} for n in range(6)]
    with serve(recipe="fastest, cache.kv=paged, schedule.batching=continuous, schedule.max_batch=4") as running:
        url, pool = f"{running.url}/v1/chat/completions", running.lab.memory.paged.pool

        def text(body: dict[str, Any]) -> str:
            answer = httpx.post(url, json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        alone = [text(body) for body in bodies]
        kept = _steps_kept()
        long = {"messages": _messages(None), "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with ThreadPoolExecutor(8) as clients, contextlib.ExitStack() as leaving:
            streams = [leaving.enter_context(httpx.stream("POST", url, json=long, timeout=120)) for _ in range(4)]
            lines = [stream.iter_lines() for stream in streams]  # kept: the end of one ends its stream
            for each in lines:
                next(each)
            together = [clients.submit(text, body) for body in bodies]
            _until(lambda: len(running.queue._waiting) == len(bodies))
            assert len(running.queue._running) == 4, "as many as max_batch are under way, and no more"
            used = _metrics(running)["fastvl_lab_kv_blocks_used"]
            leaving.close()  # and those who waited have room
            assert [one.result() for one in together] == alone
        _until(lambda: not running.queue._running and pool.n_used == 0)
        assert 0 < used <= pool.n_blocks
        after = _metrics(running)
        n_tokens = 2 * sum(body["max_tokens"] - 1 for body in bodies)  # of which decode steps make all but the first
        assert after["fastvl_lab_batch_size_sum"] >= n_tokens, "and those of the answer that was left"
        assert after['fastvl_lab_batch_size_bucket{le="4.0"}'] == after["fastvl_lab_batch_size_count"]
        assert after["fastvl_lab_batch_size_sum"] > after["fastvl_lab_batch_size_count"], "some were shared"
        assert _steps_kept() <= kept + 1, "steps are told and forgotten"


def _steps_kept() -> int:
    return sum(type(one) is Step for one in gc.get_objects())


def test_what_the_engine_fails_on_is_told_without_its_insides(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"model": MODEL, "messages": _messages(None), "max_tokens": 2}
    with serve() as running:
        for error, status, says in [
            (KeyError("/secret/path"), 500, "the server failed with a KeyError"),
            (DeviceError("out of memory"), 503, "out of memory"),
        ]:
            with monkeypatch.context() as patch:
                patch.setattr(Pipeline, "run", _raiser(error))
                answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
            assert answer.status_code == status
            assert answer.json()["error"]["message"] == says
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (torch.AcceleratorError("an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (DeviceError("CUDA error, of which somebody has made a sentence"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_health_tells_of_what_no_later_request_recovers_from(labs: dict[str, Lab], error: Exception, lasting: bool) -> None:
    """An orchestrator that asks /health starts the server anew."""
    queue = RequestQueue(labs[MODEL], Recipe.parse("fastest"), Metrics(), max_queue=1, warm_up=())

    async def served() -> None:
        with pytest.MonkeyPatch.context() as patch, queue.place() as put:
            patch.setattr(Pipeline, "run", _raiser(error))
            put(queued := QueuedRequest(Request(prompt="?")))
            queue.start()
            assert isinstance((await queued.events.get())[1], Exception)
            await asyncio.to_thread(queue.close)

    asyncio.run(served())
    assert (queue.failure is error) == lasting
    front = _Front(labs[MODEL].checkpoint, labs[MODEL].grammars, queue, Metrics(), Settings())
    queue.ready.set()
    assert asyncio.run(front.health(None)).status_code == (500 if lasting else 200)


def test_a_request_that_waits_and_is_given_up_is_held_no_longer(labs: dict[str, Lab]) -> None:
    """Its place is free, and so is its memory: clients that send images and leave would fill it while one long answer is made."""
    queue = RequestQueue(labs[MODEL], Recipe.parse("fastest"), Metrics(), max_queue=2, warm_up=())
    running, over = threading.Event(), threading.Event()

    def run(*_: object) -> None:
        running.set()
        over.wait(10)
        raise RequestCancelledError("enough")

    async def served() -> None:
        left: list[weakref.ref[Request]] = []

        def leave(n: int) -> None:
            for _ in range(n):
                with queue.place() as put:
                    put(queued := QueuedRequest(Request(prompt="?")))
                left.append(weakref.ref(queued.request))
                if running.is_set():
                    queue.give_up(queued)
                else:
                    early.append(queued)

        early: list[QueuedRequest] = []
        leave(2)  # there before anything is served
        queue.start()
        assert await asyncio.to_thread(running.wait, 10)
        leave(3)  # while something is: more than may wait at once
        queue.give_up(early.pop())
        gc.collect()
        assert [one() is None for one in left] == [False, True, True, True, True]
        over.set()
        await asyncio.to_thread(queue.close)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run", run)
        asyncio.run(served())


def test_a_fault_of_the_servers_own_is_not_taken_for_a_client_that_left(serve: Callable[..., Any]) -> None:
    body = {"messages": _messages(None), "max_tokens": 2}
    with serve() as running, pytest.MonkeyPatch.context() as patch:
        for name, error in (("whole", RuntimeError("a fault")), ("end", KeyError("a fault")), ("piece", RuntimeError("a fault"))):
            patch.setattr(Reply, name, _raiser(error))
            before = _metrics(running)
            with contextlib.suppress(httpx.RemoteProtocolError):  # it ends in the middle of a stream
                httpx.post(f"{running.url}/v1/chat/completions", json=body | {"stream": name != "whole"}, timeout=30)
            after = _metrics(running)
            assert after.get('fastvl_lab_requests_total{status="499"}', 0) == 0
            failed = 'fastvl_lab_requests_total{status="500"}'
            assert after[failed] == before.get(failed, 0) + 1


def _raiser(error: Exception) -> Callable[..., Any]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


def test_a_size_to_warm_up_that_cannot_be_is_refused_at_the_start(labs: dict[str, Lab], capsys: pytest.CaptureFixture[str]) -> None:
    for size, says in (
        ((0, 40), "give a Request, or the"),
        ((9, 9 * 201), "has an aspect ratio of 201; the limit is 200"),
        ((40_000, 40_000), "an image may have"),
    ):
        with pytest.raises(RequestError, match=says):
            create_app(labs[MODEL], "fastest", Settings(warm_up=(size,)))
    lab = labs[MODEL].apart()
    lab.checkpoint = dataclasses.replace(lab.checkpoint, session_len=90)
    with pytest.raises(RequestError, match="over session_len"):
        create_app(lab, "fastest", Settings(warm_up=((168, 140),)))
    for size in ("448", "448x", "axb", "448x-1", "4.5x4"):
        with pytest.raises(SystemExit, match="2"):
            main(["--checkpoint", MODEL, "--warm-up", size])
        assert f"{size!r} is no size; it reads WIDTHxHEIGHT, such as 448x448" in capsys.readouterr().err


def test_a_server_runs_a_recipe_that_can_run_here(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="is a peer, which has no toggles; give a recipe"):
        create_app(labs[MODEL], "transformers")
    monkeypatch.setattr("fastvl_lab.serve.__main__.Lab", lambda *_, **__: labs[MODEL])
    with pytest.raises(SystemExit, match="recipe 'quickest'"):
        main(["--checkpoint", MODEL, "--recipe", "quickest"])


def test_a_server_that_does_not_come_up_is_told_of_by_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho loading >&2\necho "no recipe $6 here" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(DeviceError, match="did not come up: no recipe quickest here"), serving(MODEL, "quickest"):
        pass


def test_a_server_that_says_much_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads takes 64 KiB, and then whoever writes to it waits for good."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom http.server import HTTPServer, SimpleHTTPRequestHandler as Handler\n"
        "sys.stderr.write('x' * 200_000)\nHandler.do_GET = lambda self: self.send_error(204)\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[-1])), Handler).serve_forever()\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with serving(MODEL, "fastest", patience=10) as url:
        assert httpx.get(url).status_code == 204


STORM = 200


@pytest.mark.alone
def test_a_storm_leaves_nothing_behind(server: Any, picture: bytes) -> None:
    """Clients that vanish, send rubbish or read slowly, among others that must not notice."""
    request = Request(messages=_messages(picture), max_new_tokens=12, ignore_eos=True)
    expected = server.lab.run(request, "fastest").text
    pool = server.lab.memory.paged.pool
    asyncio.run(_storm(server, picture, expected, 40))
    threads, memory = _threads(), _memory()
    longest: list[int] = []
    started = time.monotonic()
    outcomes = asyncio.run(_storm(server, picture, expected, STORM, longest))
    assert time.monotonic() - started < 60
    assert outcomes == {"complete": 120, "vanished": 40, "malformed": 10, "too large": 10, "hostile": 10, "slow": 10}
    assert max(longest) <= 8
    _until(lambda: not server.queue._waiting and pool.n_used == 0)
    assert _threads() == threads
    assert _memory() - memory < 60_000_000
    assert httpx.get(f"{server.url}/health").status_code == 200


def _threads() -> Counter[str]:
    """All but those of pools, which start as they are needed, up to their bound."""
    names = (re.sub(r"\d+", "", thread.name) for thread in threading.enumerate() if thread.name.startswith("fastvl"))
    return Counter(name for name in names if not name.startswith(("fastvl-reader", "fastvl-fetcher")))


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _storm(server: Any, picture: bytes, expected: str, number: int, longest: list[int] | None = None) -> Counter[str]:
    """How each of so many clients fared, 16 at a time."""
    kinds = {0: "vanished", 1: "vanished", 2: "malformed", 3: "vanished", 4: "vanished", 5: "too large", 6: "hostile", 7: "slow"}
    room, outcomes = asyncio.Semaphore(16), Counter[str]()
    url = f"{server.url}/v1/chat/completions"
    body = {"model": MODEL, "messages": _messages(picture), "max_tokens": 12, "ignore_eos": True, "stream": True}
    hostile = body | {"messages": _messages(picture[: len(picture) // 2][:200])}

    async def one(client: Any, kind: str) -> None:
        async with room:
            if longest is not None:
                longest.append(len(server.queue._waiting))
            if kind in ("malformed", "hostile"):
                asked = {"content": b'{"model": '} if kind == "malformed" else {"json": hostile}
                while (answer := await client.post(url, **asked)).status_code == 429:
                    await asyncio.sleep(0.05)
                assert answer.status_code == 400, answer.text
            elif kind == "too large":
                with contextlib.suppress(httpx.TransportError):  # hung up on while it was still sending
                    assert (await client.post(url, content=b" " * 20_000_000)).status_code == 413
            else:
                await stream(client, kind)
            outcomes[kind] += 1

    async def stream(client: Any, kind: str) -> None:
        while True:
            async with client.stream("POST", url, json=body) as answer:
                if answer.status_code == 429:
                    await answer.aread()
                    await asyncio.sleep(0.05)
                    continue
                text, ended = "", False
                async for line in answer.aiter_lines():
                    if kind == "vanished":
                        return
                    if kind == "slow":
                        await asyncio.sleep(0.02)
                    ended = ended or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        text += "".join(c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"])
                assert ended
                assert text == expected
                return

    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, kinds.get(n % 20, "complete")) for n in range(number)))
    return outcomes


SERVER = 'import runpy; runpy.run_module("fastvl_lab.serve", run_name="__main__")'


def test_a_termination_finishes_what_is_running(start_forked: Callable[..., Any], tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(SERVER)
    server = start_forked(tmp_path / "server.py", "--checkpoint", MODEL, "--port", str(port), "--warm-up", "168x140")
    _until(lambda: _healthy(port), 60)
    body = {"model": MODEL, "messages": _messages(None), "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.pid, signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    made = sum(len(json.loads(line[6:])["choices"]) for line in rest if line.startswith("data: {"))
    assert made > 100
    assert server.wait(30) != "late"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    assert "Traceback" not in server.said()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.benchmark
def test_a_server_adds_at_most_ten_milliseconds_to_ttft(labs: dict[str, Lab], picture: bytes) -> None:
    """Of the same request in turns, from a process of its own; the median difference must reach 10 ms three times to fail."""
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=4, ignore_eos=True)
    lab, differences = labs[MODEL], []
    with serving(MODEL, "fastest") as url:
        for _ in range(3):
            pairs = [(lab.run(request, url).ttft, lab.run(request, "fastest").ttft) for _ in range(25)][5:]
            differences.append(statistics.median(theirs - ours for theirs, ours in pairs))
            print(f"TTFT through the server less TTFT in process: {differences[-1] * 1e3:.2f} ms")
            if differences[-1] < 0.010:
                return
    pytest.fail(f"a server adds {differences} s to TTFT")
