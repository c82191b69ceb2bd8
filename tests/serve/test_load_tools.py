"""Load tools of other hands, called as docs/serving.md calls them: nothing fails, and they see what the server says of its runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fastvl_lab import Lab
from fastvl_lab.checkpoint import tiny
from fastvl_lab.run import Run
from fastvl_lab.serve.metrics import Metrics

pytest.importorskip("fastapi", reason="tests of the server need fastapi (extra serve)")

MODEL = "tiny-qwen2.5-vl"
N = 8  # requests that each of the page's commands measures


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a tool measured: seconds to first tokens, and tokens of prompts and answers, of the requests that succeeded."""

    ttfts: list[float]
    prompt_tokens: int
    answer_tokens: int
    failed: int


def _of_vllm(folder: Path) -> Seen:
    said = json.loads((folder / "vllm.json").read_text())
    tokens = {"prompt_tokens": said["total_input_tokens"], "answer_tokens": said["total_output_tokens"]}
    return Seen(ttfts=said["ttfts"], failed=said["failed"], **tokens)


def _of_aiperf(folder: Path) -> Seen:
    lines = (folder / "aiperf" / "profile_export.jsonl").read_text().splitlines()
    records = [one for one in map(json.loads, lines) if one["metadata"]["benchmark_phase"] == "profiling"]
    good = [one["metrics"] for one in records if not one.get("error")]
    return Seen(
        ttfts=[one["time_to_first_token"]["value"] / 1e3 for one in good],
        prompt_tokens=sum(one["usage_prompt_tokens"]["value"] for one in good),
        answer_tokens=sum(one["usage_completion_tokens"]["value"] for one in good),
        failed=len(records) - len(good),
    )


def _of_guidellm(folder: Path) -> Seen:
    (one,) = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    good, bad = one["requests"]["successful"], (*one["requests"]["errored"], *one["requests"]["incomplete"])
    return Seen(
        ttfts=[request["time_to_first_token_ms"] / 1e3 for request in good],
        prompt_tokens=sum(request["prompt_tokens"] for request in good),
        answer_tokens=sum(request["output_tokens"] for request in good),
        failed=len(bad),
    )


def _called(repository: Path, tool: str, url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The page's command that calls a tool, run in a folder against this server; nothing is asked of the network."""
    page = (repository / "docs" / "serving.md").read_text()
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if block.startswith(f"{tool} "))
    programs = [Path(os.environ["FASTVL_LAB_CLIENTS"]).parent, Path(os.environ.get("FASTVL_LAB_VLLM", "")).parent]
    environment = os.environ | {
        "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
        "CHECKPOINT": str(tiny.folder(MODEL)),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if tool == "aiperf":  # which takes no folder for a tokenizer when it is told to stay offline
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)
    script = block.replace("http://127.0.0.1:8000", url)
    cores = sorted(os.sched_getaffinity(0))[-1:]  # tools compute beside what they measure
    return subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


@pytest.fixture
def one_core() -> Iterator[None]:
    """The server computes on one core, so that there is another for who measures it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.client
@pytest.mark.alone
@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(
    ("tool", "read"),
    [pytest.param("vllm", _of_vllm, marks=pytest.mark.engine), ("aiperf", _of_aiperf), ("guidellm", _of_guidellm)],
)
def test_what_a_load_tool_measures_is_what_the_server_says(
    serve: Callable[..., Any],
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    read: Callable[[Path], Seen],
) -> None:
    """One at a time, of an image each: each succeeds, tokens are the same, and half of the TTFTs lie within 5%.

    Or within 5 ms, where TTFT is under 100 ms: a client written in Python takes some to send a megabyte and to wake up.
    """
    runs, served = list[Run](), Metrics.served
    monkeypatch.setattr(Metrics, "served", lambda self, run: (runs.append(run), served(self, run))[1])
    with serve(warm_up=((672, 504),)) as server:
        ended = _called(repository, tool, server.url, tmp_path)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    seen, own = read(tmp_path), runs[-N:]  # some warm up first
    assert (len(seen.ttfts), seen.failed) == (N, 0)
    assert seen.prompt_tokens == sum(run.n_prompt for run in own)
    assert seen.answer_tokens == sum(len(run.tokens) for run in own)
    ttft = median(run.ttft for run in own)
    print(f"\n{tool}: TTFT {median(seen.ttfts) * 1e3:.1f} ms, of the server {ttft * 1e3:.1f}")
    assert median(seen.ttfts) == pytest.approx(ttft, rel=0.05, abs=0.005)


@pytest.mark.client
def test_schemathesis_finds_no_answer_that_the_description_does_not_know(
    serve: Callable[..., Any], repository: Path, tmp_path: Path
) -> None:
    """No fault of the server's own, no status, type or body that is not described, no body taken that is described as wrong.

    A body's own `timeout` may make a 504. Answers are short: a lab of short sessions, and few answers at once.
    """
    lab = Lab(MODEL, device="cpu", dtype="float32", session_len=96)
    settings = "[checks]\nnot_a_server_error.expected-statuses = ['2xx', '3xx', '4xx', 504]\n"
    (tmp_path / "schemathesis.toml").write_text(settings)
    with serve(lab=lab, max_queue=4, max_tokens=4) as server:
        ended = _called(repository, "schemathesis", server.url, tmp_path)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-1000:]
    assert re.search(r"[1-9]\d* generated, [1-9]\d* passed", ended.stdout), ended.stdout[-1000:]
