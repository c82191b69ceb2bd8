"""Request to prompt: the checkpoint's chat template, visual placeholders, and M-RoPE positions in closed form.

The template's text is tokenized with one placeholder an image; the placeholders are then repeated as ids. That equals tokenizing
the expanded text, because a special token never merges with its neighbours, and spares the tokenizer thousands of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jinja2 import TemplateError

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RequestError
from fastvl_lab.request import Grid, Prompt, Request


def chat_text(request: Request, checkpoint: Checkpoint) -> str:
    """The conversation as the checkpoint's template writes it, one placeholder an image.

    Raises `RequestError` if the user's own words contain a placeholder, which would be taken for an image, and if the template
    cannot write the conversation.
    """
    messages = [{"role": m["role"], "content": list(m["content"])} for m in request.conversation]
    try:
        text: str = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:  # TypeError: a text-only template that takes content for a string
        raise RequestError(f"the chat template of {checkpoint.name!r} cannot write this conversation: {error}") from None
    image, video = (checkpoint.tokenizer.convert_ids_to_tokens(token) for token in _placeholder_ids(checkpoint))
    if text.count(image) != len(request.image_inputs) or video in text:
        words = "".join(m["role"] + "".join(part.get("text", "") for part in m["content"]) for m in request.conversation)
        for placeholder in (image, video):
            if placeholder in words:
                raise RequestError(
                    f"the prompt contains the placeholder {placeholder!r}, which stands for an image or video; "
                    f"remove it from the text and give images in images or as message parts"
                )
        raise RequestError(
            f"the chat template of {checkpoint.name!r} wrote {text.count(image)} image placeholders for "
            f"{len(request.image_inputs)} images; it is no template for images"
        )
    return text


def _placeholder_ids(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.image_token_id, int(checkpoint.config.video_token_id)


def tokenize(request: Request, grids: Sequence[Grid], checkpoint: Checkpoint) -> Prompt:
    """Write the prompt of a request whose images have these grids; int64 tensors on the host.

    Raises `RequestError` if the prompt and the tokens to make exceed a session's length.
    """
    ids = np.asarray(checkpoint.tokenizer(chat_text(request, checkpoint), add_special_tokens=False).input_ids)
    is_image = ids == checkpoint.image_token_id
    assert is_image.sum() == len(grids), "one placeholder an image"

    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[is_image] = visual_tokens = [grid.visual_tokens(checkpoint.merge_size) for grid in grids]
    check_length(int(repeats.sum()), request, checkpoint, visual_tokens=sum(visual_tokens))

    input_ids = np.repeat(ids, repeats)  # [n_tokens]
    positions, next_position = mrope_positions(is_image, grids, checkpoint.merge_size)
    first_tokens = (np.cumsum(repeats) - repeats)[is_image].tolist()
    return Prompt(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        visual_index=torch.from_numpy(np.flatnonzero(input_ids == checkpoint.image_token_id)),
        next_position=next_position,
        images=tuple(zip(first_tokens, visual_tokens, strict=True)),
    )


def check_length(n_prompt: int, request: Request, checkpoint: Checkpoint, *, visual_tokens: int) -> None:
    """Raise `RequestError` if prompt and answer together are longer than a session."""
    if n_prompt + request.max_new_tokens > checkpoint.session_len:
        raise RequestError(
            f"the prompt has {n_prompt} tokens ({visual_tokens} of them visual) and max_new_tokens is {request.max_new_tokens}: "
            f"together over session_len, {checkpoint.session_len} (the model's own limit is {checkpoint.max_length}); "
            f"set a smaller {'max_pixels or ' if visual_tokens else ''}max_new_tokens, or shorten the prompt"
        )


def mrope_positions(is_image: np.ndarray, grids: Sequence[Grid], merge_size: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions of a prompt, and the position of the token after it.

    is_image: bool [n_unexpanded], true at the placeholder of each image, before expansion. Returns int64 [3, n_tokens].

    Text counts up in all three rows. An image of merged grid (t, h, w) starting at p has rows p+t, p+h, p+w, and the text after it
    goes on at p + max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index` in Transformers). Both families place
    images alike; they differ for videos.
    """
    segments, position, begin = [], 0, 0
    for at, grid in zip(np.flatnonzero(is_image), grids, strict=True):
        text = np.arange(at - begin) + position
        position += int(at - begin)
        h, w = grid.h // merge_size, grid.w // merge_size
        image = np.indices((grid.t, h, w)).reshape(3, -1) + position
        segments += [np.broadcast_to(text, (3, len(text))), image]
        position += max(h, w)
        begin = int(at) + 1
    tail = np.arange(len(is_image) - begin) + position
    segments.append(np.broadcast_to(tail, (3, len(tail))))
    return np.concatenate(segments, axis=1).astype(np.int64), position + len(tail)
