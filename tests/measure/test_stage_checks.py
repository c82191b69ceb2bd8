"""A stage's check: what is wrong in one place is over the budget, and what fails costs the others nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastvl_lab import Lab, Request, photo
from fastvl_lab.cache.slotted import KvShape
from fastvl_lab.catalogue import Target
from fastvl_lab.decoder import eager, sdpa
from fastvl_lab.decoder.layers import KvCache
from fastvl_lab.decoder.rope import MRope
from fastvl_lab.measure import parity
from fastvl_lab.measure.parity import StageCheck, check_decoder, check_tower, within_budget, worst_error
from fastvl_lab.measure.recipes import of_the_decoder, of_the_tower
from fastvl_lab.measure.tasks import Decoding, Tower, text_prompt, text_tokens
from fastvl_lab.vit import attention


def _check(lab: Lab, *labels: str, length: int = 40, steps: int = 3) -> dict[str, StageCheck]:
    engines = of_the_decoder(Target(device=lab.device, dtype=lab.dtype))
    return check_decoder(lab, Decoding(length, steps), {label: engines[label] for label in ("transformers", *labels)})


def _right(lab: Lab, found: dict[str, StageCheck]) -> set[str]:
    return set(within_budget({label: one.error for label, one in found.items()}, "transformers", lab.dtype))


def _blind_to_the_newest_key(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    keys, values = cache.read(layer, 0)
    return eager._attend(q, keys[:-1], values[:-1], None)


def test_the_truth_is_the_stock_decoder_in_a_wider_dtype_however_the_prompt_is_cut(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, forced = text_prompt(lab, 40, 3), torch.tensor(text_tokens(lab, 3))
    prompt = parity._with_places_of_an_image(prompt)
    assert prompt.positions.shape == (3, 40)
    assert len({tuple(axis) for axis in prompt.positions.tolist()}) == 3  # the axes differ
    assert prompt.positions[:, -1].tolist() == [prompt.next_position - 1] * 3
    truths = []
    for piece in (7, 40, 1000):
        monkeypatch.setattr(parity, "_PIECE", piece)
        with torch.inference_mode():
            truths.append(parity._decoder_truth(lab, prompt, forced))
    assert truths[0].dtype == torch.float64
    assert truths[0].shape == (4, lab.checkpoint.config.text_config.vocab_size)
    text, ids = lab.checkpoint.model.model.language_model, torch.cat([prompt.input_ids, forced])
    after = prompt.next_position + torch.arange(3).expand(3, -1)
    out = text(inputs_embeds=text.embed_tokens(ids)[None], position_ids=torch.cat([prompt.positions, after], dim=1)[:, None])
    whole = lab.checkpoint.model.lm_head(out.last_hidden_state[0, 39:])
    for truth in truths:
        assert worst_error([(whole, truth)]) < 1e-5
        assert worst_error([(truth, truths[1])]) < 1e-5


def test_an_engine_that_is_wrong_in_one_place_is_not_within_the_budget(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("baseline", "lean", "rope=rolled")
    assert _right(lab, _check(lab, *labels)) == {"transformers", *labels}

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", _blind_to_the_newest_key)
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline"}

    halves = MRope.halves
    with monkeypatch.context() as patch:  # right for text, whose three axes agree
        patch.setattr(MRope, "halves", lambda rope, positions: halves(rope, positions[:1]))
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline", "lean"}

    def not_a_number(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        last = cache.segments.lengths[0] == 43
        return eager.decode(q, cache, layer) * (float("nan") if last else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", not_a_number)
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline"}


def test_one_option_that_fails_says_why_and_its_cache_is_given_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(sdpa, "decode", fail)
    found = _check(lab, "decode=eager", "kv=paged")
    assert found["kv=paged"].error == "RuntimeError: out of resources"
    assert found["kv=paged"].kv_bytes is None
    assert _right(lab, found) == {"transformers", "decode=eager"}
    assert lab.memory.paged.pool.n_used == 0


def test_nothing_is_within_the_budget_of_a_reference_that_could_not_run() -> None:
    assert within_budget({"stock": "RuntimeError: no", "ours": 0.0}, "stock", torch.float32) == frozenset()
    assert within_budget({"stock": float("nan"), "ours": 0.0}, "stock", torch.float32) == frozenset()
    ones, nan = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [1.0, float("nan")]])
    error = worst_error([(ones, ones), (nan, ones), (ones, ones)])
    assert within_budget({"stock": 0.1, "ours": error}, "stock", torch.float32) == {"stock"}


def test_bytes_of_keys_and_values_are_those_of_what_is_kept(lab: Lab) -> None:
    a_token = KvShape.of(lab.checkpoint).bytes_per_token
    held = {label: one.kv_bytes for label, one in _check(lab, "lean", "kv=static", "kv=paged").items()}
    assert held == {
        "transformers": 43 * a_token,
        "lean": 43 * a_token,
        "kv=static": (lab.checkpoint.session_len + 1) * a_token,
        "kv=paged": 48 * a_token,
    }


def test_one_option_that_fails_or_loses_one_window_is_red_and_the_rest_are_timed(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    request = Request(images=[photo("coffee", (336, 280))], prompt="?")
    recipes = of_the_tower(Target(device=lab.device, dtype=lab.dtype), lab.checkpoint.family)
    attend = attention.grouped(torch.float32).attend

    def without_the_last_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: Any) -> torch.Tensor:
        out = attend(q, k, v, prepared)
        out[-prepared.fixed[-1].length :] = 0
        return out

    broken = dataclasses.replace(attention.grouped(torch.float32), attend=without_the_last_window)
    monkeypatch.setitem(attention.OPTIONS, "grouped", lambda dtype: broken)
    found = check_tower(lab, Tower(request), {name: recipes[name] for name in ("stock", "lean", "attention=grouped")})
    assert found["attention=grouped"].error > 100 * found["stock"].error

    def fail(dtype: torch.dtype) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setitem(attention.OPTIONS, "grouped", fail)
    found = check_tower(lab, Tower(request), {name: recipes[name] for name in ("stock", "attention=grouped")})
    assert found["attention=grouped"].error == "RuntimeError: out of resources"
