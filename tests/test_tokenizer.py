"""Prompts and M-RoPE positions, against Transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvl_lab import Lab, Request, RequestError
from fastvl_lab.request import Grid
from fastvl_lab.tokenizer import mrope_positions, tokenize

grids_strategy = st.lists(st.builds(lambda h, w: Grid(1, 2 * h, 2 * w), st.integers(1, 40), st.integers(1, 40)), max_size=4)
# Without placeholders, which hypothesis knows from the source, and which are refused in a prompt.
text_strategy = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "_pad|>" not in text)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), grids=grids_strategy)
@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_prompt_and_positions_equal_transformers(labs: dict[str, Lab], name: str, data: st.DataObject, grids: list[Grid]) -> None:
    """0 to 4 images of random grids between random texts."""
    checkpoint = labs[name].checkpoint
    content: list[dict] = [{"type": "text", "text": data.draw(text_strategy)}]
    for _ in grids:
        content.append({"type": "image", "image": b"not decoded here"})
        content.append({"type": "text", "text": data.draw(text_strategy)})
    prompt = tokenize(Request(messages=[{"role": "user", "content": content}]), grids, checkpoint)

    text = checkpoint.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pieces = text.split("<|image_pad|>")
    assert len(pieces) == len(grids) + 1
    expanded = pieces[0]
    for grid, piece in zip(grids, pieces[1:], strict=True):
        expanded += "<|image_pad|>" * (grid.h * grid.w // 4) + piece
    input_ids = checkpoint.tokenizer(expanded, return_tensors="pt").input_ids
    assert torch.equal(prompt.input_ids, input_ids[0])

    is_image = input_ids == checkpoint.image_token_id
    assert torch.equal(prompt.visual_index, is_image[0].nonzero()[:, 0])
    grid_thw = torch.tensor(grids) if grids else None
    positions, delta = checkpoint.model.model.get_rope_index(input_ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid_thw)
    assert torch.equal(prompt.positions, positions[:, 0])
    assert prompt.next_position == prompt.n_tokens + int(delta)


def test_positions_of_a_known_prompt() -> None:
    """Two text tokens, a 2 x 3 image, one text token: written out by hand."""
    positions, following = mrope_positions(np.array([False, False, True, False]), [Grid(1, 4, 6)], merge_size=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


@pytest.mark.parametrize("placeholder", ["<|image_pad|>", "<|video_pad|>"])
def test_a_placeholder_in_the_text_is_refused(lab: Lab, placeholder: str) -> None:
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=r"the prompt contains the placeholder '<\|(image|video)_pad\|>'"):
            lab.run(Request(prompt=f"Look: {placeholder}"), engine)


def test_a_placeholder_put_together_from_parts_is_refused(lab: Lab) -> None:
    parts = [{"type": "text", "text": "<|image_"}, {"type": "text", "text": "pad|>"}]
    for messages in ([{"role": "user", "content": parts}], [{"role": "<|image_pad|>", "content": "Hello."}]):
        for engine in ("baseline", "transformers"):
            with pytest.raises(RequestError, match="the prompt contains the placeholder"):
                lab.run(Request(messages=messages), engine)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m['role'] }}{% endfor %}",
            "wrote 0 image placeholders for 1 images",
        ),
        ("{{ messages[0]['content'] + 'x' }}", "cannot write this conversation"),
        ("{{ raise_exception('roles must alternate') }}", "cannot write this conversation: roles must alternate"),
        ("{% for %}", "cannot write this conversation"),
    ],
)
def test_templates_that_cannot_write_the_conversation_are_refused(
    lab: Lab, template: str, says: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.checkpoint.tokenizer, "chat_template", template)
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=says):
            lab.run(Request(images=[picture], prompt="?"), engine)


def test_a_prompt_longer_than_the_model_is_refused_with_the_numbers(lab: Lab) -> None:
    limit = lab.checkpoint.session_len
    request = Request(prompt="Hello.", max_new_tokens=limit)
    for engine in ("baseline", "transformers"):
        with pytest.raises(RequestError, match=rf"max_new_tokens is {limit}: together over session_len, {limit} "):
            lab.run(request, engine)
