"""An endpoint as the lab measures it: first text of any channel, tokens as it counts them, and its own word on what it reused."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvl_lab import EndpointError, Lab, Request, compare
from fastvl_lab.peer.http import HttpPeer
from fastvl_lab.request import UNNAMED

Make = Callable[..., dict[str, Any]]
DONE = b"data: [DONE]\n\n"
STEP = 0.06


@pytest.fixture
def lab(labs: dict[str, Lab]) -> Lab:
    """A lab that knows no endpoint yet."""
    return labs["tiny-qwen3-vl"].apart()


@pytest.fixture
def request_() -> Request:
    return Request(prompt="hi", max_new_tokens=8, ignore_eos=True)


@pytest.mark.alone
@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "a"}, {"reasoning_content": "b"}, {"content": "c"}],
        [{"reasoning": "a", "reasoning_content": "a", "content": None}, {"content": [{"text": "b"}]}, {"content": "c"}],
        [{"refusal": "a"}, {"refusal": "b"}, {"refusal": "c"}],
        [{"reasoning": "a"}, {"reasoning": "b"}, {"reasoning": "c"}],  # cut off while it thinks
        [{"tool_calls": [{"function": {"name": "a"}}]}, {"tool_calls": [{"function": {"arguments": "b"}}]}, {"content": "c"}],
    ],
)
def test_the_first_text_of_any_channel_ends_ttft(
    fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make, deltas: list[Any]
) -> None:
    pieces = [item for delta in deltas for item in (STEP, chunk(delta=delta))]
    fake.script = [chunk(delta={"role": "assistant", "content": ""}), *pieces, usage(3), DONE]
    run = lab.run(request_, fake.url)
    assert (run.text, len(run.tokens), run.n_prompt) == ("abc", 3, 12)
    assert STEP <= run.ttft < 2 * STEP
    assert run.tpot == pytest.approx(STEP, rel=0.4)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("texts", "total", "n_chunks"),
    [
        (["a", "", "", "", "b"], 5, 5),
        (["a", "", "", "", ""], 5, 5),  # at its end, too, tokens have a time
        (["        ", "        ", "b"], 3, 3),  # longer tokens than this side's
        (["ab", "cd", "ef"], 6, 3),  # two tokens a piece
    ],
)
def test_tpot_is_of_the_tokens_that_the_endpoint_counts(
    fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make, texts: list[str], total: int, n_chunks: int
) -> None:
    pieces = [item for text in texts for item in (STEP, chunk(text))]
    fake.script = [chunk(""), *pieces, usage(total), DONE]
    run = lab.run(request_, fake.url)
    assert (len(run.tokens), len(run.chunks)) == (total, n_chunks)
    assert sum(len(piece.tokens) for piece in run.chunks) == total
    assert run.tpot == pytest.approx(STEP * len(texts) / total, rel=0.4)


def test_an_answer_without_any_text_has_a_time_all_the_same(
    fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make
) -> None:
    fake.script = [chunk(""), chunk(""), chunk(""), usage(2)]
    run = lab.run(request_, fake.url)
    assert (run.text, run.tokens, run.chunks[0].tokens) == ("", (UNNAMED, UNNAMED), (UNNAMED, UNNAMED))
    assert run.tpot is None
    fake.script = [chunk("", token_ids=[7]), chunk("a", token_ids=[8, 9]), chunk("", token_ids=[3]), chunk("", delta={}), usage(4)]
    assert [piece.tokens for piece in lab.run(request_, fake.url).chunks] == [(7, 8, 9), (3,)]
    for script in ([], [DONE], [chunk(""), chunk(delta={})], [usage(None)]):
        fake.script = script
        with pytest.raises(EndpointError, match="ended its answer without a token"):
            lab.run(request_, fake.url)


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        ({}, ["unknown", "unknown"]),
        ({"prompt_tokens_details": None}, ["unknown", "unknown"]),
        ({"prompt_tokens_details": {"cached_tokens": None}}, ["unknown", "unknown"]),
        ({"prompt_tokens_details": {"cached_tokens": 16}}, ["cache_hit", "cache_hit"]),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, ["cold", "warm"]),
    ],
)
def test_a_run_is_of_the_kind_that_the_endpoint_says(
    fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make, said: dict[str, Any], kinds: list[str]
) -> None:
    fake.script = [chunk("a"), chunk("b"), usage(2, **said), DONE]
    seen = [lab.run(request_, fake.url).kind]
    asking = threading.Thread(target=lambda: seen.append(lab.run(request_, fake.url).kind))  # which thread asks does not matter
    asking.start()
    asking.join()
    assert seen == kinds


@pytest.mark.parametrize(("word", "kind"), [("warm", "warm"), ("cold", "cold"), ("hot", "unknown"), (None, "unknown")])
def test_the_labs_own_server_is_taken_at_its_word(
    fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make, word: str | None, kind: str
) -> None:
    for told in ({"kind": word}, {"run": {"kind": word}}):
        fake.script = [chunk("a"), usage(1) | {"fastvl_lab": told}, DONE]
        assert lab.run(request_, fake.url).kind == kind


def test_runs_of_unknown_kind_are_compared_and_called_so(fake: Any, lab: Lab, request_: Request, chunk: Make, usage: Make) -> None:
    ours = lab.run(request_, "fastest")
    fake.script = [*(chunk(piece.text) for piece in ours.chunks), usage(8), DONE]
    comparison = compare(lab, request_, {"ours": "fastest", "served": fake.url}, repeats=2)
    row = comparison.summary()[1]
    assert (row["warm_runs"], row["unknown_runs"], row["hit_runs"], row["tokens_equal"]) == (0, 2, 0, True)
    assert row["ttft_ms"] > 0
    assert comparison.speedup("ours") is not None
    assert "the endpoint does not say whether it reused anything" in comparison.findings()[1]
    assert "does not say" not in comparison.findings()[0]
    assert comparison.representative("served").kind == "unknown"
    fake.script = [chunk(ours.text), usage(8), DONE]  # the same text, whose tokens it does not name
    assert compare(lab, request_, {"ours": "fastest", "served": fake.url}, repeats=1).parity("ours")
    for other in ([chunk(ours.text), usage(9)], [chunk(ours.text[:-1] + "?"), usage(8)]):
        fake.script = other
        wrong = compare(lab, request_, {"ours": "fastest", "served": fake.url}, repeats=1)
        assert (wrong.parity("ours"), wrong.parity("served"), wrong.speedup("ours")) == (True, False, None)


@pytest.mark.parametrize(
    "script",
    [
        [b"data: {'a'}\n\n"],
        [{"error": {"message": "out of room"}}],
        [{"choices": [{"delta": {"content": "a"}}]}, {"object": "error", "message": "out of room"}],
        [b'{"choices": [{"message": {"content": "a"}}]}'],
    ],
)
def test_a_bad_answer_is_an_error_that_names_the_endpoint(fake: Any, lab: Lab, request_: Request, script: list[Any]) -> None:
    fake.script = script
    with pytest.raises(EndpointError, match=r"^127\.0\.0\.1:\d+: .*(no JSON|out of room|in one piece)"):
        lab.run(request_, fake.url)


def test_leaving_a_stream_waits_for_no_endpoint_that_is_silent(fake: Any, lab: Lab, request_: Request, chunk: Make) -> None:
    fake.script = [chunk("a"), 5.0, chunk("b"), DONE]
    for _ in lab.stream(request_, fake.url):
        left = time.perf_counter()
        break
    assert time.perf_counter() - left < 2


def test_an_error_of_who_listens_is_not_the_endpoints(fake: Any, lab: Lab, request_: Request, chunk: Make) -> None:
    def broken(_: object) -> None:
        raise BrokenPipeError("the listener's own")

    fake.script = [chunk("a"), DONE]
    with pytest.raises(BrokenPipeError, match="the listener's own"):
        lab.run(request_, fake.url, on_chunk=broken)


def test_an_odd_list_of_models_is_no_obstacle_where_the_model_is_named(fake: Any, lab: Lab, request_: Request, chunk: Make) -> None:
    fake.script, fake.models = [chunk("a"), DONE], {"data": [{"name": "m"}, None]}
    with pytest.raises(EndpointError, match="lists no model; name one behind the address"):
        lab.run(request_, fake.url)
    assert lab.run(request_, f"{fake.url}, model=n").checkpoint == "n"
    assert fake.asked[-1]["model"] == "n"
    fake.models = {"data": None}
    with pytest.raises(EndpointError, match="is no OpenAI-compatible endpoint: its list of models is none"):
        lab.apart().run(request_, fake.url)


def test_ids_are_asked_of_those_who_have_them(fake: Any, lab: Lab, request_: Request, chunk: Make) -> None:
    fake.script = [chunk("a"), DONE]
    for owner, asked in (("vllm", True), ("fastvl_lab", True), ("sglang", None), (None, None)):
        fake.models = {"data": [{"id": "m", "owned_by": owner}]}
        lab.apart().run(request_, fake.url)
        assert fake.asked[-1].get("return_token_ids") is asked


def test_a_key_is_sent_to_this_machine_or_encrypted_and_never_the_servers_own(
    fake: Any, lab: Lab, request_: Request, chunk: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script = [chunk("a"), DONE]
    monkeypatch.setenv("FASTVL_LAB_API_KEY", "the server's own")
    lab.run(request_, fake.url)
    monkeypatch.setenv("FASTVL_LAB_ENDPOINT_KEY", " secret ")
    lab.apart().run(request_, fake.url.replace("127.0.0.1", "localhost"))
    assert fake.keys == [None, "Bearer secret"]
    for address in (
        "http://gpu.example/v1",
        "http://192.0.2.1:8000/v1",
        "http://localhost.example/v1",
        "http://127.0.0.1.example/v1",
    ):
        with pytest.raises(EndpointError, match=r"FASTVL_LAB_ENDPOINT_KEY is set and would go to .* unencrypted") as raised:
            HttpPeer(address, None, None)
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("FASTVL_LAB_ENDPOINT_KEY", "secr\u00e9t")
    with pytest.raises(EndpointError, match="no header can carry"):
        HttpPeer("https://gpu.example/v1", None, None)


def _sent(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_pictures_are_sent_as_the_lab_itself_sees_them(
    fake: Any, lab: Lab, chunk: Make, decode: Callable[..., list[Image.Image]]
) -> None:
    fake.script = [chunk("a"), DONE]
    base = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    pictures: list[Any] = [base.convert(mode) for mode in ("L", "LA", "RGBA", "CMYK", "LAB", "HSV", "1", "P", "I;16")]
    for orientation in (3, 6, 7):
        exif, encoded = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        base.save(encoded, "PNG", exif=exif.tobytes())
        pictures.append(Image.open(encoded))
    pictures += [np.asarray(base)[::-1], np.asarray(base.convert("L"))]
    for picture in pictures:
        lab.run(Request(images=[picture], prompt="?", max_new_tokens=1), fake.url)
        assert np.array_equal(_sent(fake.asked[-1]), np.asarray(decode([picture])[0])), picture


def test_what_a_message_carries_is_sent_and_what_nobody_takes_is_refused(fake: Any, lab: Lab, chunk: Make, picture: bytes) -> None:
    def with_part(**more: Any) -> Request:
        content = [{"type": "image", "image": picture, **more}, {"type": "text", "text": "?"}]
        call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        return Request(messages=[{"role": "user", "content": content}, call], max_new_tokens=1)

    fake.script = [chunk("a"), DONE]
    lab.run(with_part(detail="high"), fake.url)
    user, assistant = fake.asked[-1]["messages"]
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert assistant == {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    with pytest.raises(EndpointError, match="knows no max_pixels of a single image"):
        lab.run(with_part(max_pixels=3136), fake.url)
    fake.models = {"data": [{"id": "m", "owned_by": "fastvl_lab"}]}
    lab.apart().run(with_part(max_pixels=3136), fake.url)
    assert fake.asked[-1]["messages"][0]["content"][0]["max_pixels"] == 3136
