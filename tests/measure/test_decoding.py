"""The decoder alone: what is timed is what Transformers computes, and what the caches hold is counted."""

from __future__ import annotations

import pytest
import torch

from fastvl_lab import Lab, Recipe, RequestError
from fastvl_lab.cache.memory import BLOCK_SIZE
from fastvl_lab.catalogue import toggles
from fastvl_lab.measure.decoding import (
    BoundDecoder,
    attention_variants,
    bindable,
    kv_bytes_over_steps,
    text_prompt,
    time_decoding,
)


def test_every_engine_is_timed_in_both_steps(lab: Lab) -> None:
    engines = {"transformers": "transformers", "baseline": Recipe.baseline(), "text": "fastest, cache.kv=paged"}
    rounds = time_decoding(lab, 20, engines, steps=2, repeats=3, warm_up=1)
    assert rounds.labels == tuple(engines)
    for label in engines:
        for step in ("prefill", "decode"):
            assert len(rounds.seconds(label, step)) == 3
            assert min(rounds.seconds(label, step)) > 0


@pytest.mark.parametrize("recipe", ["baseline", "fastest", "fastest, cache.kv=paged"])
@torch.inference_mode()
def test_what_is_timed_computes_what_the_stock_decoder_computes(lab: Lab, recipe: str) -> None:
    bound, prompt, steps = BoundDecoder.of(lab, Recipe.parse(recipe)), text_prompt(lab, 37, 3), 3
    stock, head = lab.checkpoint.model.model.language_model, lab.checkpoint.model.lm_head
    ids, place = prompt.input_ids, bound.cache.admit(prompt, steps + 1, tuple)
    logits = bound.prefill(prompt, place)
    for number in range(steps + 1):
        assert (logits - head(stock(input_ids=ids[None]).last_hidden_state[0, -1])).abs().max() < 1e-4
        token = logits.argmax(keepdim=True)
        ids = torch.cat([ids, token])
        if number < steps:
            logits = bound.step(token, torch.tensor([37 + number]), place)
    place.close()


@pytest.mark.parametrize(("length", "steps"), [(0, 1), (1, 0), (1000, 25)])
def test_a_prompt_that_no_session_has_room_for_is_refused(length: int, steps: int) -> None:
    lab = Lab("tiny-qwen2.5-vl", device="cpu", session_len=1024)
    with pytest.raises(RequestError, match=r"together at most session_len, 1024"):
        time_decoding(lab, length, {"baseline": Recipe.baseline()}, steps=steps)
    with pytest.raises(RequestError, match="session_len, 1024"):
        kv_bytes_over_steps(lab, length, steps, Recipe.baseline())


def test_bytes_of_keys_and_values_are_those_of_what_is_kept(lab: Lab) -> None:
    text, length, steps = lab.checkpoint.config.text_config, 30, 40
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4
    tokens = [length + step for step in range(steps + 1)]

    concat, static, paged = (
        kv_bytes_over_steps(lab, length, steps, Recipe.parse(f"baseline, cache.kv={kind}"))
        for kind in ("concat", "static", "paged")
    )
    assert concat == [n * a_token for n in tokens]
    assert static == [(lab.checkpoint.session_len + 1) * a_token] * (steps + 1)
    assert paged == [-(-n // BLOCK_SIZE) * BLOCK_SIZE * a_token for n in tokens]
    assert lab.memory.paged.pool.n_used == 0  # the blocks are given back


def test_every_way_of_attention_is_a_recipe_and_those_that_cannot_run_say_why(lab: Lab) -> None:
    fastest = Recipe.fastest(lab.device)
    variants = attention_variants(Recipe.parse("baseline, cache.kv=concat, attention.norms=native"))
    options = {o.value for t in toggles() if t.path in ("attention.prefill", "attention.decode") for o in t.options}
    assert set(variants) == {f"attention={value}" for value in options}
    assert variants["attention=sdpa"].attention.prefill == variants["attention=sdpa"].attention.decode == "sdpa"
    assert variants["attention=varlen"].attention.decode == "eager"  # it has no decode, which stays the recipe's
    assert variants["attention=triton"].cache.kv == "static"  # and what an option cannot do without comes with it
    assert all(variant.attention.norms == "native" for variant in variants.values())

    can, cannot = bindable(lab, attention_variants(fastest) | {"fastest": fastest})
    assert {"attention=eager", "attention=sdpa", "fastest"} <= set(can)
    assert can["fastest"] == fastest
    if lab.device.type == "cpu":
        assert "needs a CUDA device" in cannot["attention=varlen"]
        assert "needs a CUDA device" in cannot["attention=triton"]
    assert not set(can) & set(cannot)
