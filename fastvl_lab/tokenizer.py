"""Request to prompt: the checkpoint's chat template, visual placeholders, and M-RoPE positions in closed form.

The template's text is tokenized with one placeholder an image; the placeholders are then repeated as ids. That equals tokenizing
the expanded text, because a special token never merges with its neighbours, and spares the tokenizer thousands of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from jinja2 import TemplateError

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RequestError
from fastvl_lab.request import Grid, Prompt, Request

# Bytes of text that a token seldom has more of.
_LIKELY_TOKEN = 4


def chat_text(request: Request, checkpoint: Checkpoint) -> str:
    """The conversation as the checkpoint's template writes it, one placeholder an image.

    Raises `RequestError` if the user's own words contain a placeholder, which would be taken for an image, if the template cannot
    write the conversation, and if its bytes alone make more tokens than a session has: before anything is tokenized.
    """
    messages = [{"role": m["role"], "content": list(m["content"])} for m in request.conversation]
    try:
        text: str = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:  # TypeError: a text-only template that takes content for a string
        raise RequestError(f"the chat template of {checkpoint.name!r} cannot write this conversation: {error}") from None
    check_bytes(text, checkpoint)
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


def check_text(request: Request, checkpoint: Checkpoint) -> None:
    """Raise `RequestError` where the text alone is longer than a session, for which a long one is tokenized.

    For callers on a thread that has time, before the request joins those that wait for a device.
    """
    length = sum(len(part.get("text", "")) for message in request.conversation for part in message["content"] or ())
    if length > _LIKELY_TOKEN * checkpoint.session_len:
        text = chat_text(request, checkpoint)
        (encoded,) = checkpoint.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)  # without the GIL
        check_length(len(encoded.ids), request, checkpoint, visual_tokens=None)


def check_bytes(text: str, checkpoint: Checkpoint) -> None:
    """Raise `RequestError` for a prompt of more bytes than a session's tokens can stand for, whatever they are."""
    if len(text) <= checkpoint.session_len or (longest := checkpoint.longest_token) is None:
        return
    # The tokenizer composes characters first (NFC), which leaves fewer bytes, but not of ASCII.
    n_bytes = len(text) if text.isascii() else len(unicodedata.normalize("NFC", text).encode())
    if n_bytes > longest * checkpoint.session_len:
        at_least = -(-n_bytes // longest)
        raise RequestError(
            f"the prompt has {n_bytes} bytes of text, which are at least {at_least} tokens: over session_len, "
            f"{checkpoint.session_len} (the model's own limit is {checkpoint.max_length}); shorten the prompt"
        )


def tokens_to_make(n_prompt: int, request: Request, checkpoint: Checkpoint) -> int:
    """How many tokens follow a prompt that `check_length` let pass: `max_new_tokens`, or, of one that may `fit`, what is left."""
    room = checkpoint.session_len - n_prompt
    return min(request.max_new_tokens, room) if request.fit else request.max_new_tokens


def check_length(n_prompt: int, request: Request, checkpoint: Checkpoint, *, visual_tokens: int | None) -> None:
    """Raise `RequestError` if prompt and answer together are longer than a session; visual_tokens: of the prompt, where known."""
    if n_prompt + (1 if request.fit else request.max_new_tokens) > checkpoint.session_len:
        of_images = "" if visual_tokens is None else f" ({visual_tokens} of them visual)"
        raise RequestError(
            f"the prompt has {n_prompt} tokens{of_images} and max_new_tokens is {request.max_new_tokens}: "
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
