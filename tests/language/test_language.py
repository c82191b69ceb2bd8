"""The decoder's parts against the stock modules, on geometries other than the built-in ones too."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab import CheckpointError, Lab
from fastvl_lab.attention import sdpa
from fastvl_lab.cache import ConcatCache
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.language.decode import decode
from fastvl_lab.language.decoder import decoder_weights
from fastvl_lab.language.merge import merge
from fastvl_lab.language.prefill import prefill
from fastvl_lab.language.sample import greedy
from fastvl_lab.request import Prompt, VisionTokens


def _inner(_: str) -> nullcontext[None]:
    return nullcontext()


def _checkpoint(name: str, **changes: object) -> Checkpoint:
    """A random model of another geometry; only what the decoder reads is there."""
    config = AutoConfig.from_pretrained(tiny.folder(name))
    for field, value in changes.items():
        setattr(config if field == "tie_word_embeddings" else config.text_config, field, value)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    randomise(model, seed=5)
    return Checkpoint(
        name=name,
        family=config.model_type,
        model=model,
        tokenizer=None,
        image_processor=None,
        eos_token_ids=(),
        max_length=1000,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def _prompt(n_tokens: int) -> Prompt:
    generator = torch.Generator().manual_seed(1)
    return Prompt(
        input_ids=torch.randint(0, 256, (n_tokens,), generator=generator),
        positions=torch.randint(0, 900, (3, n_tokens), generator=generator),
        visual_index=torch.tensor([2, 3, 5]),
        next_position=901,
    )


GEOMETRIES = [
    ("tiny-qwen2.5-vl", {}),
    ("tiny-qwen2.5-vl", {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512, "tie_word_embeddings": False}),
    ("tiny-qwen3-vl", {}),
    ("tiny-qwen3-vl", {"head_dim": 64, "num_key_value_heads": 1, "num_hidden_layers": 6, "hidden_size": 192}),
    ("tiny-qwen3-vl", {"num_key_value_heads": 4, "tie_word_embeddings": False, "intermediate_size": 100}),
]


@pytest.mark.parametrize(("name", "changes"), GEOMETRIES)
@torch.inference_mode()
def test_prefill_and_decode_equal_the_stock_decoder(name: str, changes: dict) -> None:
    """Random M-RoPE positions, visual tokens in the prompt, DeepStack where the family has it; then a token on top."""
    checkpoint = _checkpoint(name, **changes)
    stock, weights = checkpoint.model.model.language_model, decoder_weights(checkpoint)
    sections = sum(weights.rope.sections)
    if sections != weights.head_dim // 2:  # the geometry changed the head, so its sections change with it
        third = weights.head_dim // 6
        sections_now = [weights.head_dim // 2 - 2 * third, third, third]
        checkpoint.config.text_config.rope_parameters["mrope_section"] = sections_now
        stock.rotary_emb.mrope_section = sections_now
        weights = decoder_weights(checkpoint)
    prompt, hidden_size = _prompt(40), weights.embed.shape[1]
    generator = torch.Generator().manual_seed(2)
    levels = 2 if checkpoint.family == "qwen3_vl" else 0
    features = [torch.randn(3, hidden_size, generator=generator) for _ in range(1 + levels)]
    vision = VisionTokens(embeds=features[0], deepstack=tuple(features[1:]))
    cache = ConcatCache(len(weights.layers))
    merged = merge(prompt, vision, weights.embed)
    embeds = merged.clone()
    prefilled = prefill(merged, prompt, vision, weights, sdpa.prefill, cache, _inner)

    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, prompt.visual_index] = True
    extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(vision.deepstack)} if levels else {}
    expected = stock(inputs_embeds=embeds[None], position_ids=prompt.positions[:, None], use_cache=True, **extra)
    logits = checkpoint.model.lm_head(expected.last_hidden_state[0, -1])
    assert (prefilled.logits - logits).abs().max() < 1e-4

    token, token_id = greedy(prefilled.logits)
    assert token_id == int(logits.argmax())
    position = torch.tensor([prompt.next_position])
    ours = decode(token, position, weights, sdpa.decode, prefilled.cache, _inner)
    after = stock(
        inputs_embeds=stock.embed_tokens(token[None]),
        position_ids=position.expand(3, 1, 1),
        past_key_values=expected.past_key_values,
        use_cache=True,
    )
    assert (ours - checkpoint.model.lm_head(after.last_hidden_state[0, -1])).abs().max() < 1e-4


@torch.inference_mode()
def test_decoding_step_by_step_equals_prefilling_the_longer_prompt(lab: Lab) -> None:
    weights = decoder_weights(lab.checkpoint)
    ids = torch.arange(40, 64)
    prompts = [
        Prompt(input_ids=ids[:n], positions=torch.arange(n).expand(3, n), visual_index=ids[:0], next_position=n) for n in (20, 24)
    ]
    caches = [ConcatCache(len(weights.layers)) for _ in prompts]
    results = [
        prefill(merge(prompt, None, weights.embed), prompt, None, weights, sdpa.prefill, cache, _inner)
        for prompt, cache in zip(prompts, caches, strict=True)
    ]
    for n in range(20, 24):
        logits = decode(ids[n : n + 1], torch.tensor([n]), weights, sdpa.decode, caches[0], _inner)
    assert (logits - results[1].logits).abs().max() < 1e-4


def test_rope_equals_the_stock_modules(lab: Lab) -> None:
    positions = torch.randint(0, 5000, (3, 33), generator=torch.Generator().manual_seed(0))
    stock = lab.checkpoint.model.model.language_model.rotary_emb
    cos, sin = stock(torch.zeros(1, dtype=torch.float32), positions[:, None])
    ours = decoder_weights(lab.checkpoint).rope.cos_sin(positions, torch.float32)
    assert torch.equal(ours[0][:, 0], cos[0])
    assert torch.equal(ours[1][:, 0], sin[0])


def test_merge_puts_visual_tokens_in_their_places_and_leaves_the_table_alone() -> None:
    table = torch.arange(12.0).reshape(6, 2)
    prompt = Prompt(
        input_ids=torch.tensor([1, 5, 5, 2]), positions=torch.zeros(3, 4), visual_index=torch.tensor([1, 2]), next_position=4
    )
    merged = merge(prompt, VisionTokens(embeds=torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])), table)
    assert merged.tolist() == [[2, 3], [-1, -2], [-3, -4], [4, 5]]
    assert torch.equal(table, torch.arange(12.0).reshape(6, 2))


def test_the_decoder_copies_no_parameter(lab: Lab) -> None:
    weights, model = decoder_weights(lab.checkpoint), lab.checkpoint.model
    assert weights.embed is weights.lm_head is model.lm_head.weight
    assert weights.layers[0].self_attn.q_proj.weight is model.model.language_model.layers[0].self_attn.q_proj.weight


def test_geometries_without_code_are_refused() -> None:
    checkpoint = _checkpoint("tiny-qwen2.5-vl")
    checkpoint.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(CheckpointError, match="sliding-window attention"):
        decoder_weights(checkpoint)
    checkpoint = _checkpoint("tiny-qwen2.5-vl")
    checkpoint.model.model.language_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(CheckpointError, match="dynamic RoPE"):
        decoder_weights(checkpoint)


def test_cache_returns_all_that_was_appended() -> None:
    cache, pieces = ConcatCache(2), [torch.randn(n, 1, 4) for n in (5, 1, 1)]
    for piece in pieces:
        keys, values = cache.append(1, piece, -piece)
    assert torch.equal(keys, torch.cat(pieces))
    assert torch.equal(values, -torch.cat(pieces))
    first, _ = cache.append(0, pieces[0], pieces[0])
    assert torch.equal(first, pieces[0])
