"""Clients that nobody here wrote: what they send is answered with text, and what they measure is what the server's trace says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvl_lab import photo
from fastvl_lab.serve import serving
from fastvl_lab.serve.settings import Settings

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


def _examples(repository: Path, language: str) -> list[str]:
    """The blocks of the page that ask a server."""
    page = (repository / "docs" / "serving.md").read_text()
    return [block for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if "127.0.0.1:8000" in block]


def test_the_pages_curl_examples_run(brief_server: Any, repository: Path, tmp_path: Path, picture: bytes) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    (tmp_path / "photo.jpg").write_bytes(picture)
    examples = [block for block in _examples(repository, "sh") if "curl" in block]
    assert len(examples) == 2
    for example in examples:
        script = example.replace("http://127.0.0.1:8000", brief_server.url)
        said = subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
        events = [json.loads(line) for line in said.replace("data: ", "").splitlines() if line and line != "[DONE]"]
        assert events[-1]["usage"]["completion_tokens"] == 16, said


def test_the_pages_openai_example_runs(brief_server: Any, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="needs the openai client (extra dev)")
    (example,) = (block for block in _examples(repository, "python") if "from openai" in block)
    exec(compile(example.replace("http://127.0.0.1:8000", brief_server.url), "docs/serving.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20


def test_the_page_names_the_limits_that_there_are(repository: Path) -> None:
    page = (repository / "docs" / "serving.md").read_text().partition("## Limits")[2]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    said = {name: row[2] for row in rows for name in re.findall(r"`(?:--)?([\w-]+)`", row[1])}
    sizes = ("max_queue", "max_body", "max_connections", "max_held", "fetch_bytes")
    for name in (*sizes, "timeout", "head_seconds", "stall_seconds", "fetch_seconds"):
        assert f"{getattr(Settings(), name):,.0f}" in said[name if name in said else name.replace("_", "-")], name


@pytest.mark.client
@pytest.mark.alone
@pytest.mark.parametrize("client", ["openai", "langchain", "litellm"])
def test_what_a_client_measures_is_what_the_server_says(client: str, tmp_path: Path) -> None:
    """Of a large image, beside whose time HTTP's is small: text came, TTFT agrees within 5%, and tokens are the same."""
    python, n = os.environ["FASTVL_LAB_CLIENTS"], 8
    image = tmp_path / "image.jpg"
    image.write_bytes(photo("astronaut", (1280, 960)))
    script = Path(__file__).with_name("live_client.py")
    with serving(MODEL, "fastest", "--warm-up", "1280x960") as url:
        command = [python, str(script), client, url, MODEL, str(image), str(n)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
            assert asking.stdin is not None
            assert asking.stdout is not None
            assert asking.stdout.readline() == "ready\n"
            before = _metrics(url)
            answers, _ = asking.communicate("go\n", timeout=240)
        after = _metrics(url)
    seen = json.loads(answers)
    assert all(one["text"] for one in seen)
    told = {name: after[name] - before.get(name, 0) for name in after}
    assert told["fastvl_lab_ttft_seconds_count"] == n
    for number, of in enumerate(("prompt", "answer")):
        assert sum(one["tokens"][number] for one in seen) == told[f'fastvl_lab_tokens_total{{of="{of}"}}']
    assert sum(one["ttft"] for one in seen) == pytest.approx(told["fastvl_lab_ttft_seconds_sum"], rel=0.05)


def _metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url.removesuffix('/v1')}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line and line[0] != "#")}


@pytest.mark.client
def test_the_pages_langchain_example_runs(brief_server: Any, repository: Path, tmp_path: Path) -> None:
    (example,) = (block for block in _examples(repository, "python") if "langchain" in block)
    script = tmp_path / "example.py"
    script.write_text(example.replace("http://127.0.0.1:8000", brief_server.url))
    said = subprocess.run([os.environ["FASTVL_LAB_CLIENTS"], script], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.strip()
