"""A client of its own environment (`make clients`) asks a server: live_client.py CLIENT URL MODEL IMAGE N.

It prints JSON: of each request its text, the seconds to its first, and the tokens that the client was told.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Piece = tuple[str, "tuple[int, int] | None"]  # new text; tokens of prompt and answer, where they are told


def with_openai(url: str, model: str, messages: list[dict[str, Any]]) -> Callable[[], Iterator[Piece]]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)

    def ask() -> Iterator[Piece]:
        options = {"include_usage": True}
        asked = {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0.7, "seed": 1}
        for event in client.chat.completions.create(**asked, stream=True, stream_options=options):
            text = event.choices[0].delta.content if event.choices else ""
            yield text or "", event.usage and (event.usage.prompt_tokens, event.usage.completion_tokens)

    return ask


def with_langchain(url: str, model: str, messages: list[dict[str, Any]]) -> Callable[[], Iterator[Piece]]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=16, stream_usage=True, max_retries=0)

    def ask() -> Iterator[Piece]:
        for chunk in chat.stream(messages):
            usage = chunk.usage_metadata
            yield str(chunk.content or ""), usage and (usage["input_tokens"], usage["output_tokens"])

    return ask


def with_litellm(url: str, model: str, messages: list[dict[str, Any]]) -> Callable[[], Iterator[Piece]]:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices when it is imported
    import litellm

    def ask() -> Iterator[Piece]:
        asked = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "messages": messages, "max_tokens": 16}
        for event in litellm.completion(**asked, temperature=0.2, stream=True, stream_options={"include_usage": True}):
            usage = getattr(event, "usage", None)
            text = event.choices[0].delta.content if event.choices else ""
            yield text or "", usage and (usage.prompt_tokens, usage.completion_tokens)

    return ask


def measured(ask: Callable[[], Iterator[Piece]]) -> dict[str, Any]:
    began, ttft, text, tokens = time.perf_counter(), None, "", None
    for piece, told in ask():
        if piece and ttft is None:
            ttft = time.perf_counter() - began
        text, tokens = text + piece, told or tokens
    return {"text": text, "ttft": ttft, "tokens": tokens}


def main() -> None:
    client, url, model, image, n = sys.argv[1:]
    uri = f"data:image/jpeg;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is this?"}]
    clients = {"openai": with_openai, "langchain": with_langchain, "litellm": with_litellm}
    ask = clients[client](url, model, [{"role": "user", "content": content}])
    measured(ask)  # connects, and warms both sides
    print("ready", flush=True)
    sys.stdin.readline()  # meanwhile the other side notes what the server has counted so far
    print(json.dumps([measured(ask) for _ in range(int(n))]))


if __name__ == "__main__":
    main()
