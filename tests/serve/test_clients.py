"""Clients that nobody here wrote: what they send is answered with text, and what they measure is what the server's trace says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
pytest.importorskip("fastapi", reason="tests of the server need fastapi (extra serve)")

MODEL = "tiny-qwen2.5-vl"

# Bodies as the clients' own sources and documentation write them, with MODEL and IMAGE where a name and a data URI stand.
BODIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("client_bodies.json").read_text())


def _filled(value: Any, uri: str) -> Any:
    if isinstance(value, dict):
        return {name: _filled(item, uri) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, uri) for item in value]
    return {"MODEL": MODEL, "IMAGE": uri}.get(value, value) if isinstance(value, str) else value


def _text(answer: Any) -> tuple[str, dict[str, Any] | None]:
    """The text of an answer, streamed or whole, and the usage that it tells."""
    if answer.headers["content-type"].startswith("application/json"):
        events = [answer.json()]
    else:
        lines = [line for line in answer.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    choices = [choice for event in events for choice in event["choices"]]
    assert all("error" not in event for event in events)
    texts = (choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") for choice in choices)
    return "".join(text or "" for text in texts), events[-1].get("usage")


@pytest.mark.parametrize("client", BODIES)
def test_what_a_client_sends_is_answered_with_text(brief_server: Any, picture: bytes, data_uri: Any, client: str) -> None:
    path, body = BODIES[client]["path"], _filled(BODIES[client]["body"], data_uri(picture))
    answer = httpx.post(f"{brief_server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text, usage = _text(answer)
    assert text
    if body.get("stream_options") or not body.get("stream"):
        assert usage is not None
        assert usage["completion_tokens"] > 0
        if body.get("ignore_eos"):
            assert usage["completion_tokens"] == body.get("max_tokens", body.get("max_completion_tokens"))


@pytest.fixture(scope="session")
def brief_server(serve: Callable[..., Any]) -> Any:
    """One whose answers are short where a client does not say: a random model seldom ends by itself."""
    with serve(max_tokens=24) as running:
        yield running
