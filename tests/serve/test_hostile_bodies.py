"""Bodies that nobody foresaw: each is answered, or refused in a sentence, and none is the server's fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fastvl_lab import FastvlError
from fastvl_lab.serve import chat, completions
from fastvl_lab.serve.chat import Served, json_object
from fastvl_lab.serve.settings import Settings

httpx = pytest.importorskip("httpx", reason="tests of the server need httpx (extra dev)")
pytest.importorskip("fastapi", reason="tests of the server need fastapi (extra serve)")
hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis (extra dev)")
st = pytest.importorskip("hypothesis.strategies")

MODEL = "tiny-qwen2.5-vl"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308, True]))
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\0", "<|image_pad|>", "<|im_end|>", "\ud800", "data:,x", "file:///etc/hostname", PIXEL]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=6
)


def _object(**fields: Any) -> Any:
    """An object with these fields, as they should be more often than not."""
    return st.fixed_dictionaries({}, optional={name: st.one_of(good, good, VALUES) for name, good in fields.items()})


def _body(fields: tuple[str, ...], **own: Any) -> Any:
    """A body with its own fields, and with two others at most: of more, nearly all would be refused for the first."""
    return st.builds(lambda body, more: more | body, _object(**own), st.dictionaries(st.sampled_from(fields), VALUES, max_size=2))


PART = _object(
    type=st.sampled_from(["text", "image_url", "image", "refusal", "video_url"]),
    text=TEXTS,
    image_url=st.one_of(TEXTS, _object(url=TEXTS, detail=st.sampled_from(["low", "auto", "original"]), max_pixels=NUMBERS)),
    max_pixels=NUMBERS,
    refusal=TEXTS,
)
SAID = st.builds(lambda content: {"role": "user", "content": content}, st.one_of(TEXTS, st.lists(PART, max_size=2)))
MESSAGE = _object(
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool", "nobody"]),
    content=st.one_of(TEXTS, st.lists(PART, max_size=3)),
    tool_calls=VALUES,
    name=TEXTS,
)
MESSAGES = st.lists(st.one_of(st.just({"role": "user", "content": "hi"}), SAID, MESSAGE), min_size=1, max_size=2)
SCHEMA = _object(
    type=st.sampled_from(["object", "array", "string", "integer", "nothing"]),
    properties=st.dictionaries(TEXTS, VALUES, max_size=2),
    required=st.lists(TEXTS, max_size=2),
    enum=st.lists(LEAVES, max_size=2),
    pattern=TEXTS,
    maxLength=NUMBERS,
)
FORMAT = _object(
    type=st.sampled_from(["text", "json_object", "json_schema", "regex"]),
    json_schema=_object(name=TEXTS, schema=SCHEMA, strict=st.booleans()),
)
TOOL = _object(
    type=st.just("function"), function=_object(name=st.sampled_from(["f", "g"]), parameters=SCHEMA, strict=st.booleans())
)
TOOLS = {"tools": st.lists(TOOL, max_size=2), "tool_choice": st.sampled_from(["auto", "none", "required"])}
FIELDS = (*chat.READ, "response_format", "tools", "echo", "top_logprobs", "suffix", "user")
PLAIN_CHAT = _body((*FIELDS, *chat.OF_IMAGES), messages=MESSAGES)
FORMED_CHAT = _object(messages=st.just([{"role": "user", "content": "hi"}]), response_format=FORMAT, **TOOLS)
# Each field as it should be, so that reading is tried as often as refusing.
CHOICES = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "max_tokens": st.integers(1, 50),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "n": st.integers(1, 3),
    "seed": st.integers(0, 9),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
}
SOUND_CHAT = st.fixed_dictionaries({"messages": st.lists(SAID, min_size=1, max_size=2)}, optional=CHOICES)
SOUND_TEXT = st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=8)}, optional=CHOICES)
CHAT = st.one_of(PLAIN_CHAT, FORMED_CHAT, SOUND_CHAT)
PROMPTS = st.one_of(TEXTS, st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3))
TEXT = st.one_of(_body(FIELDS, prompt=PROMPTS), SOUND_TEXT)
TOKENIZE = st.one_of(
    _body(completions.OF_TEXT, prompt=TEXTS),
    _body(completions.OF_CHAT, messages=MESSAGES),
    st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=8)}),
)
DETOKENIZE = _body(completions.OF_TOKENS, tokens=st.lists(st.integers(-1, 400), max_size=5))
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/tokenize": TOKENIZE, "/detokenize": DETOKENIZE}

SERVED = Served(model=MODEL, ends=(7, 9), session_len=4096)


def _checked(n: int, bodies: Any, check: Callable[[Any], None]) -> None:
    """Check n bodies, the same ones each time."""
    quiet = list(hypothesis.HealthCheck)
    settings = hypothesis.settings(max_examples=n, deadline=None, database=None, derandomize=True, suppress_health_check=quiet)
    settings(hypothesis.given(bodies)(check))()


@pytest.mark.parametrize(("read", "bodies"), [(chat.read, CHAT), (completions.read, TEXT), (completions.read_prompt, TOKENIZE)])
@pytest.mark.parametrize("n", [60, pytest.param(3000, marks=pytest.mark.nightly)])
def test_a_body_is_read_or_refused_in_a_sentence(read: Any, bodies: Any, n: int) -> None:
    """By an error of ours, which is a 400: any other would be a 500."""
    ends = Counter[str]()

    def check(body: Any) -> None:
        said = "read"
        try:
            draft = read(json_object(json.dumps(body).encode()), SERVED, Settings())
            draft.chat(dict.fromkeys(draft.addresses, b"no image")).with_others()
        except FastvlError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
        ends["read" if said == "read" else "refused"] += 1

    _checked(n, bodies, check)
    assert min(ends["read"], ends["refused"]) > n // 30, "both are seen"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [10, pytest.param(500, marks=pytest.mark.nightly)])
def test_no_body_is_the_servers_fault(server: Any, path: str, n: int) -> None:
    """Over HTTP: a status that the description knows, under 500, and an answer or an error in OpenAI's form."""
    described = httpx.get(f"{server.url}/openapi.json").json()["paths"][path]["post"]["responses"]
    with httpx.Client(timeout=60) as client:

        def check(body: Any) -> None:
            asked = {"max_tokens": 3} | body | {"stream": False} if path.startswith("/v1") else body
            answer = client.post(f"{server.url}{path}", content=json.dumps(asked).encode())
            assert str(answer.status_code) in described
            assert answer.status_code < 500, (answer.text, body)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        _checked(n, BODIES[path], check)
    assert httpx.get(f"{server.url}/health").status_code == 200
