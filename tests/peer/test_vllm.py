"""A real vLLM, started by its name: the same tokens as Transformers, and options that reach it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvl_lab import EndpointError, Lab, Request, compare

pytestmark = [pytest.mark.engine, pytest.mark.alone]


@pytest.fixture(params=["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def own(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(request.param, device="cpu", dtype="float32", session_len=4096) as lab:
        yield lab


def test_it_makes_the_tokens_of_transformers(own: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=32, ignore_eos=True)
    found = compare(own, request, {"stock": "transformers", "theirs": "vllm, graphs=off"}, repeats=2)
    assert found.parity("theirs"), found.findings()
    runs = found.runs("theirs")
    assert [run.kind for run in runs][-1] == "warm"
    assert runs[0].tokens == own.run(request, "transformers").tokens
    assert runs[0].n_prompt == own.run(request, "fastest").n_prompt
    (server,) = own.servers
    said = server.log.read_text()
    assert "'enforce_eager': True" in said  # among the arguments that are not its defaults
    assert f"on http://127.0.0.1:{server.port}" in said


def test_a_flag_that_it_does_not_have_is_told_in_its_words(labs: dict[str, Lab]) -> None:
    with pytest.raises(EndpointError, match=r"before it was ready: .*--warp"):
        labs["tiny-qwen3-vl"].run(Request(prompt="Hi.", max_new_tokens=1), "vllm, --warp=9")
