"""The oracle is Transformers itself, at its normal best and left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

from fastvl_lab import Lab, Request


def test_tokens_are_what_a_plain_generate_call_gives(lab: Lab, picture: bytes) -> None:
    """Written as Transformers' documentation does, with nothing of the lab but the checkpoint."""
    import io

    from PIL import Image

    checkpoint = lab.checkpoint
    batch = checkpoint.image_processor([Image.open(io.BytesIO(picture))], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    n_visual = int(batch["image_grid_thw"].prod() // 4)
    inputs = checkpoint.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * n_visual), return_tensors="pt")
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[258, 256], pad_token_id=256)
    output = checkpoint.model.generate(
        **inputs,
        **batch,
        mm_token_type_ids=(inputs["input_ids"] == checkpoint.image_token_id).int(),
        generation_config=settings,
        streamer=TextStreamer(checkpoint.tokenizer, skip_prompt=True),
    )
    expected = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=12)
    for engine in ("transformers", "baseline"):
        assert lab.run(request, engine).tokens == expected


def test_it_runs_at_its_normal_best(lab: Lab, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA in both towers, and logits of the last prompt token only."""
    model = lab.checkpoint.model
    assert {model.config.vision_config._attn_implementation, model.config.text_config._attn_implementation} == {"sdpa"}
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, logits: shapes.append(tuple(logits.shape)))
    lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True), "transformers")
    handle.remove()
    assert shapes == [(1, 1, model.config.text_config.vocab_size)] * 3


def test_it_leaves_the_model_as_it_was(lab: Lab, picture: bytes) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=3)
    before = {name: p.clone() for name, p in lab.checkpoint.model.named_parameters()}
    for level in ("off", "stages", "layers"):
        lab.run(request, "transformers", trace=level)
    assert all(torch.equal(before[name], p) for name, p in lab.checkpoint.model.named_parameters())
    assert not [m for m in lab.checkpoint.model.modules() if m._forward_hooks or m._forward_pre_hooks]
