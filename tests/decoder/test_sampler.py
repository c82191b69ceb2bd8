"""Tokens are chosen as Transformers chooses them: the same logits after its processors, the same distribution, the same draws."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from fastvl_lab import Lab, Request, RequestError, Sampling
from fastvl_lab.decoder.sampler import CountPenalty, Sampler, drawn, processors

ENGINES = ("baseline", "fastest", "fastest, cache.kv=paged, schedule.batching=continuous")

# Beside the plain ones, each of them with and without chance, and all of them at once.
ASKED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 1.5, "top_k": 7},
    "min_p": {"temperature": 1.2, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    "bias": {"logit_bias": {5: 100.0, 6: 99.0, 7: -100.0}, "frequency_penalty": 2.0},
    "all": {
        "temperature": 1.4,
        "top_p": 0.95,
        "top_k": 60,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": {5: 2.5, 40: -3.0},
        "min_tokens": 10,
    },
}


def _ids(lab: Lab) -> torch.Tensor:
    return lab.checkpoint.tokenizer("Tell me of the sea and of the ships", return_tensors="pt").input_ids


@pytest.mark.parametrize("name", ASKED)
def test_logits_are_those_of_generate_at_every_step(labs: dict[str, Lab], name: str) -> None:
    """Penalties, biases and warpers in Transformers' order, to 1e-6; those that it does not have stand where it puts a caller's."""
    lab, asked = labs["tiny-qwen2.5-vl"], ASKED[name]
    checkpoint, ids, ends = lab.checkpoint, _ids(lab), (5, 40)
    theirs = {
        key: value
        for key, value in asked.items()
        if key not in ("frequency_penalty", "presence_penalty", "logit_bias", "min_tokens")
    }
    counts = CountPenalty(ids.shape[1], asked.get("frequency_penalty", 0.0), asked.get("presence_penalty", 0.0))
    settings = GenerationConfig(
        max_new_tokens=16,
        do_sample="temperature" in asked,
        eos_token_id=list(ends),
        pad_token_id=0,
        min_new_tokens=asked.get("min_tokens"),
        sequence_bias={(token,): by for token, by in asked.get("logit_bias", {}).items()} or None,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **({"top_k": 0} | theirs if "temperature" in asked else theirs),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = checkpoint.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, logits_processor=[counts]
        )
    change = processors(Sampling(**asked), ids.shape[1], ends, torch.device("cpu"))
    n_changed = 0
    for number, (raw, expected) in enumerate(zip(made.logits, made.scores, strict=True)):
        changed = change(made.sequences[:, : ids.shape[1] + number], raw)
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)
        n_changed += not torch.equal(changed, raw)
    assert n_changed >= len(made.logits) - 1  # nothing is counted before the first token


def test_penalties_of_counts_are_openais() -> None:
    """Off each logit: its count in the answer times the one, and once the other if it is there at all."""
    prompt, made = [3, 3, 4], [1, 2, 1, 1, 7]
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    changed = CountPenalty(3, 0.5, 0.25)(torch.tensor([prompt + made]), logits)
    counts = Counter(made)
    expected = [logits[0, token] - 0.5 * counts[token] - 0.25 * (counts[token] > 0) for token in range(9)]
    torch.testing.assert_close(changed[0], torch.stack(expected), rtol=0, atol=1e-6)


def _chance_of_worse(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of a chi-squared statistic as large as this one; outcomes that are expected fewer than five times are one."""
    expected = probabilities.double() * counts.sum()
    often = expected >= 5
    seen = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    meant = torch.cat([expected[often], expected[~often].sum()[None]])
    meant, seen = meant[meant > 0], seen[meant > 0]
    statistic = ((seen - meant) ** 2 / meant).sum()
    return float(torch.special.gammaincc(torch.tensor((len(meant) - 1) / 2).double(), statistic / 2))


N_DRAWS = 20_000


def _at_once(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """As many rows of one call, of a generator that goes on from one to the next."""
    scores = processors(sampling, 0, (), logits.device)(torch.zeros(1, 0), logits)
    assert sampling.seed is not None
    return drawn(scores.expand(N_DRAWS, -1), torch.Generator().manual_seed(sampling.seed))


def _one_by_one(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    sampler = Sampler(sampling, torch.zeros(1, dtype=torch.int64), most=N_DRAWS, ends=())
    return torch.cat([sampler(logits) for _ in range(N_DRAWS)])


@pytest.mark.parametrize("draw", [_at_once, pytest.param(_one_by_one, marks=pytest.mark.nightly)])
def test_first_tokens_are_distributed_as_transformers_probabilities(
    labs: dict[str, Lab], draw: Callable[[torch.Tensor, Sampling], torch.Tensor]
) -> None:
    """20,000 draws from one prefill, at temperature 0.8 and top_p 0.9; the seed is fixed, and a false alarm one in a thousand."""
    lab, request = labs["tiny-qwen2.5-vl"], Request(prompt="Tell me of the sea", max_new_tokens=1)
    ours, theirs = (lab.run(request, engine).logits[None] for engine in ("fastest", "transformers"))
    counts = draw(ours, Sampling(temperature=0.8, top_p=0.9, seed=0)).bincount(minlength=ours.shape[1])

    def probabilities(temperature: float, top_p: float) -> torch.Tensor:
        scores = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, theirs))
        return scores.softmax(dim=-1)[0]

    expected = probabilities(0.8, 0.9)
    assert 5 < int((expected > 0).sum()) < len(expected), "a distribution that says something"
    assert not counts[expected == 0].any(), "what top_p leaves out is never drawn"
    assert _chance_of_worse(counts, expected) > 1e-3
    assert _chance_of_worse(counts, probabilities(0.9, 0.9)) < 1e-6, "the test tells another temperature"


@pytest.mark.parametrize("name", ["all", "repetition"])
def test_the_same_seed_makes_the_same_answer_on_every_engine(lab: Lab, picture: bytes, name: str) -> None:
    """Transformers' own draws included, after which its generator is as it was."""
    asked = {**ASKED[name], "seed": 7}
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=20, sampling=Sampling(**asked))
    before = torch.random.get_rng_state()
    theirs = lab.run(request, "transformers")
    assert torch.equal(torch.random.get_rng_state(), before)
    for engine in ENGINES:
        run = lab.run(request, engine)
        assert (run.tokens, run.text, run.finish_reason) == (theirs.tokens, theirs.text, theirs.finish_reason), engine
    assert lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=20), "fastest").tokens != theirs.tokens
    if "temperature" in asked:
        for seed in (8, None):
            other = Request(
                images=[picture], prompt="What is this?", max_new_tokens=20, sampling=Sampling(**{**asked, "seed": seed})
            )
            assert lab.run(other, "fastest").tokens != theirs.tokens


def test_logprobs_are_those_of_the_models_own_logits(labs: dict[str, Lab], picture: bytes) -> None:
    """Whatever the choice made of them: of each token, and of the likeliest in its place."""
    lab, sampling = labs["tiny-qwen3-vl"], Sampling(temperature=1.5, seed=2, frequency_penalty=1, logprobs=True, top_logprobs=3)
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=6, ignore_eos=True, sampling=sampling)
    run = lab.run(request, "fastest")
    expected = lab.logits_along(request, "fastest", run.tokens[:-1]).log_softmax(dim=-1)
    for engine in ("fastest, streaming.steps_per_round=16", ENGINES[2]):
        assert lab.run(request, engine).tokens == run.tokens
    told = [one for chunk in run.chunks for one in chunk.logprobs]
    assert [one.token for one in told] == list(run.tokens)
    assert b"".join(one.spelt for one in told).decode(errors="replace") == run.text
    for one, logprobs in zip(told, expected, strict=True):
        top = logprobs.topk(3)
        assert one.logprob == pytest.approx(float(logprobs[one.token]), abs=1e-4)
        assert [other.token for other in one.top] == top.indices.tolist()
        assert [other.logprob for other in one.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    streamed = [one for chunk in lab.stream(request, "fastest") for one in chunk.logprobs]
    assert streamed == told
    greedy = Request(images=[picture], prompt="What is this?", max_new_tokens=6, sampling=Sampling(logprobs=True))
    for chunk in lab.run(greedy, "fastest").chunks:
        assert all(one.top == () for one in chunk.logprobs)
    with pytest.raises(RequestError, match="logprobs is true, and the peer 'transformers' tells none"):
        lab.run(greedy, "transformers")


def test_an_answer_has_its_least_tokens_before_an_end_token_or_a_stop(labs: dict[str, Lab]) -> None:
    lab, plain = labs["tiny-qwen3-vl"].apart(), Request(prompt="Hi", max_new_tokens=12, ignore_eos=True)
    tokens, text = (run := lab.run(plain, "fastest")).tokens, run.text
    assert len(text) == len(tokens), "a character a token"
    number = next(n for n in range(2, 12) if tokens[n] not in tokens[:n])
    stop = text[number]
    for engine in ("transformers", *ENGINES):
        stopped = lab.run(Request(prompt="Hi", max_new_tokens=12, ignore_eos=True, sampling=Sampling(stop=stop)), engine)
        assert (stopped.text, len(stopped.tokens), stopped.finish_reason) == (text[:number], number + 1, "stop")
        more = Sampling(stop=stop, min_tokens=number + 1)
        longer = lab.run(Request(prompt="Hi", max_new_tokens=12, ignore_eos=True, sampling=more), engine)
        assert longer.text.startswith(text[: number + 1])
        assert len(longer.tokens) > number + 1
    lab = lab.apart()
    lab.checkpoint = dataclasses.replace(lab.checkpoint, eos_token_ids=(tokens[number],))
    for engine in ("transformers", *ENGINES):
        ended = lab.run(Request(prompt="Hi", max_new_tokens=12), engine)
        assert (len(ended.tokens), ended.finish_reason) == (number + 1, "stop")
        least = lab.run(Request(prompt="Hi", max_new_tokens=12, sampling=Sampling(min_tokens=12)), engine)
        assert (len(least.tokens), least.finish_reason) == (12, "length")
        assert tokens[number] not in least.tokens


def test_a_token_that_the_model_has_not_cannot_be_biased(lab: Lab) -> None:
    known = lab.checkpoint.config.get_text_config().vocab_size
    request = Request(prompt="Hi", max_new_tokens=2, sampling=Sampling(logit_bias={known: 1}))
    for engine in ("transformers", "fastest"):
        with pytest.raises(RequestError, match=f"logit_bias has token {known}, and the model has {known}, from 0 on"):
            lab.run(request, engine)


def test_what_is_greedy_has_no_sampler(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    """So it launches what it launched before there was one; also where a stop ends it."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a sampler was made")

    monkeypatch.setattr("fastvl_lab.schedule.in_flight.Sampler", refused)
    for engine in ENGINES:
        for sampling in (Sampling(), Sampling(stop="no such text", seed=1, top_p=0.5)):
            labs["tiny-qwen3-vl"].run(Request(prompt="Hi", max_new_tokens=3, sampling=sampling), engine)
        with pytest.raises(AssertionError, match="a sampler was made"):
            labs["tiny-qwen3-vl"].run(Request(prompt="Hi", sampling=Sampling(temperature=1)), engine)


def test_logits_that_are_no_numbers_make_a_token_and_no_fault() -> None:
    """As where the likeliest is taken; on CUDA an assertion would end the process's device."""
    sampler = Sampler(Sampling(temperature=1, top_p=0.5, seed=0), torch.zeros(2, dtype=torch.int64), most=1, ends=())
    assert 0 <= int(sampler(torch.full((1, 8), float("nan")))) < 8
