"""What a client may ask of the choice of tokens, checked once."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest

from fastvl_lab import Request, RequestError, Sampling


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"temperature": 2.5}, "temperature is 2.5; it must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be a number from 0 to 1"),
        ({"top_k": -2}, "top_k is -2; it must be a whole number of at least -1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number from 0.01 to 100"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; it must be a number from -2 to 2"),
        ({"presence_penalty": 10**400}, "presence_penalty is 1000"),
        ({"logit_bias": [5]}, "logit_bias is [5]; it must map token ids to numbers from -100 to 100"),
        ({"logit_bias": {"5": 1}}, "a token of logit_bias is '5'"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 is 101"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a whole number below 2**63"),
        ({"stop": 3}, "stop is 3; it must be a text or a list of texts"),
        ({"stop": ["a", ""]}, "a stop has 0 characters; it must have from 1 to 256"),
        ({"stop": ["a"] * 17}, "stop has 17 texts; the limit is 16"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"logprobs": 5}, "logprobs is 5; it must be true or false; top_logprobs says how many"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; the limit is 20"),
        ({"top_logprobs": 2}, "top_logprobs is 2 and logprobs is false"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        Sampling(**asked)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_request_refuses_what_is_no_sampling_or_asks_for_more_than_its_length() -> None:
    with pytest.raises(RequestError, match=r"sampling is \{'temperature': 1\}; give a fastvl_lab.Sampling"):
        Request(prompt="?", sampling={"temperature": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="min_tokens is 9, over max_new_tokens, 8"):
        Request(prompt="?", max_new_tokens=8, sampling=Sampling(min_tokens=9))


def test_numbers_of_any_type_become_pythons_own() -> None:
    made = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), logit_bias=UserDict({np.int32(7): 1, 2: 0}), stop="x")
    assert made == Sampling(temperature=0.5, top_k=3, logit_bias={7: 1.0}, stop=("x",))
    assert {type(made.temperature), type(made.top_k), *map(type, made.logit_bias)} == {float, int}
    assert hash(made) == hash(Sampling(temperature=0.5, top_k=3, logit_bias={7: 1.0}, stop=("x",)))


@pytest.mark.parametrize(
    ("asked", "is_greedy", "draws"),
    [
        ({}, True, False),
        ({"temperature": 1e-6, "top_p": 0.5, "top_k": 3, "seed": 1}, True, False),
        ({"stop": "a", "logprobs": True, "logit_bias": {5: 0}}, True, False),
        ({"temperature": 0.7}, False, True),
        ({"min_tokens": 1}, False, False),
        ({"repetition_penalty": 1.1}, False, False),
        ({"presence_penalty": 0.1}, False, False),
        ({"logit_bias": {5: 1}}, False, False),
    ],
)
def test_what_is_greedy_and_what_draws(asked: dict[str, Any], is_greedy: bool, draws: bool) -> None:
    sampling = Sampling(**asked)
    assert (sampling.is_greedy, sampling.draws) == (is_greedy, draws)
