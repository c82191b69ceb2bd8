"""Request to prompt: the checkpoint's chat template, visual placeholders, and positions in closed form.

The template's text is tokenized with one placeholder an image; the placeholders are then repeated as ids. That equals tokenizing
the expanded text, because a special token never merges with its neighbours, and spares the tokenizer thousands of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jinja2 import TemplateError

from fastvl_lab.channels import THOUGHT_OPEN
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RequestError, quoted, shortened
from fastvl_lab.messages import Message, says_something, strings_in, words_of
from fastvl_lab.request import Grid, Prompt, Request
from fastvl_lab.tools import Tool, name_of

# Bytes of text that a token seldom has more of.
_LIKELY_TOKEN = 4

# What tells a tool's answer from others; where a template does not write it, it keeps the answers in their order.
_LINKS = ("tool_call_id", "name")


def chat_text(request: Request, checkpoint: Checkpoint) -> str:
    """The conversation as the checkpoint's template writes it, one placeholder an image; a raw prompt as it is.

    It is what `apply_chat_template` makes of the same messages. Raises `RequestError` if the user's own words contain a
    placeholder, which would be taken for an image, if a message has a field that the template does not write, if the template
    cannot write the conversation, and if its bytes alone make more tokens than a session has: before anything is tokenized.
    """
    messages = [] if request.raw else [_for_templates(message) for message in request.conversation]
    placeholders = [int(getattr(checkpoint.config, key)) for key in checkpoint.family.placeholders]
    image, *others = checkpoint.tokenizer.convert_ids_to_tokens(placeholders)
    words = [word for message in request.conversation for word in words_of(message)]
    words += strings_in(list(request.offered))
    text = (request.prompt or "") if request.raw else _written(messages, checkpoint, request.offered)
    check_bytes(text, checkpoint)
    mistaken = text.count(image) != len(request.image_inputs) or any(other in text for other in others)
    for placeholder in (image, *others):
        parts = "".join(words) if mistaken else ""
        if placeholder in parts or any(placeholder in word for word in words):
            raise RequestError(
                f"the prompt contains the placeholder {placeholder!r}, which stands for an image or video; "
                f"remove it from the text and give images in images or as message parts"
            )
    if mistaken:
        raise RequestError(
            f"the chat template of {quoted(checkpoint.name)} wrote {text.count(image)} image placeholders for "
            f"{len(request.image_inputs)} images; it is no template for images"
        )
    if not text:
        raise RequestError(f"the chat template of {quoted(checkpoint.name)} makes an empty prompt of this conversation")
    names = [name_of(tool) for tool in request.offered]
    if names and (not all(name in text for name in names) or text == _written(messages, checkpoint)):
        raise RequestError(
            f"the chat template of {quoted(checkpoint.name)} does not show tools to the model; leave them out, or describe them "
            f"in a message"
        )
    for role, field in _fields(messages, text):
        if not _is_written(field, role, messages, text, checkpoint, request.offered):
            number = next(n for n, m in enumerate(messages) if m["role"] == role and says_something(m.get(field)))
            raise RequestError(
                f"message {number} has the field {quoted(field)}, which the chat template of {quoted(checkpoint.name)} does not "
                f"write for the role {quoted(role)}; leave it out, or put it into the content"
            )
    return text


def _for_templates(message: Message) -> Message:
    """With a list for the parts, which templates can join and slice."""
    content = message.get("content")
    return message | {"content": list(content)} if isinstance(content, tuple) else message


def opens_thought(checkpoint: Checkpoint) -> bool:
    """Whether prompts end where the model thinks: the template of a thinking model begins its answers with a mark."""
    try:
        return _written([{"role": "user", "content": "x"}], checkpoint).rstrip().endswith(THOUGHT_OPEN)
    except RequestError:
        return False


def _written(messages: Sequence[Message], checkpoint: Checkpoint, tools: Sequence[Tool] = ()) -> str:
    """What the template makes of messages and tools; raises `RequestError`."""
    try:
        text: str = checkpoint.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is foreign code, and may fail in any way on messages that it was not written for
        why = shortened(str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}")
        raise RequestError(f"the chat template of {quoted(checkpoint.name)} cannot write this conversation: {why}") from None
    return text


def _fields(messages: Sequence[Message], text: str) -> Iterator[tuple[str, str]]:
    """Every (role, field) that says something and is not seen in the prompt at a glance, once."""
    seen = set()
    for message in messages:
        for field, value in message.items():
            known = field == "role" or (message["role"] == "tool" and field in _LINKS)
            if field == "content":  # parts are written, or a template takes them for a text and fails; a text may be passed over
                known = not isinstance(value, str) or value.strip() in text
            if not known and says_something(value) and (message["role"], field) not in seen:
                seen.add((message["role"], field))
                yield message["role"], field


def _is_written(
    field: str, role: str, messages: Sequence[Message], text: str, checkpoint: Checkpoint, tools: Sequence[Tool]
) -> bool:
    """Whether the template can write a field of a role's messages.

    It can if some conversation reads otherwise without the field: the one at hand, or the message alone behind a question. The
    second is for templates that leave a field out of some turns and mean it, such as the reasoning of earlier ones. That the
    template's source has the field's name would prove less: a function in a tool call has a name, too.
    """

    def without(message: Message) -> Message:
        return {name: value for name, value in message.items() if name != field}

    def written(conversation: Sequence[Message]) -> str | None:
        try:
            return _written(conversation, checkpoint, tools)
        except RequestError:
            return None

    def differs(conversation: Sequence[Message]) -> bool:
        whole = text if conversation is messages else written(conversation)
        return whole is not None and whole != written([without(m) if m["role"] == role else m for m in conversation])

    value = next(m[field] for m in messages if m["role"] == role and says_something(m.get(field)))
    alone = {"role": role, "content": "x", field: "x" if isinstance(value, str) else value}
    question = {"role": "user", "content": "x"}
    return differs(messages) or any(differs(trial) for trial in ([alone], [question, alone]))


def tokenize(request: Request, grids: Sequence[Grid], checkpoint: Checkpoint) -> Prompt:
    """Write the prompt of a request whose images have these grids; int64 tensors on the host.

    Raises `RequestError` if the prompt and the tokens to make exceed a session's length.
    """
    ids = np.asarray(checkpoint.tokenizer(chat_text(request, checkpoint), add_special_tokens=False).input_ids, dtype=np.int64)
    check_tokens(int(ids.max()), checkpoint)
    check_bias(request, checkpoint)
    is_image = ids == checkpoint.image_token_id
    assert is_image.sum() == len(grids), "one placeholder an image"

    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[is_image] = visual_tokens = [grid.visual_tokens(checkpoint.merge_size) for grid in grids]
    check_length(int(repeats.sum()), request, checkpoint, visual_tokens=sum(visual_tokens))

    input_ids = np.repeat(ids, repeats)  # [n_tokens]
    positions, next_position = checkpoint.family.positions(is_image, grids, checkpoint.merge_size)
    first_tokens = (np.cumsum(repeats) - repeats)[is_image].tolist()
    return Prompt(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        visual_index=torch.from_numpy(np.flatnonzero(input_ids == checkpoint.image_token_id)),
        next_position=next_position,
        images=tuple(zip(first_tokens, visual_tokens, strict=True)),
    )


def followed_by(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt, on the host, with generated tokens at its end; they are text, whatever their ids."""
    if not tokens:
        return prompt
    after = torch.arange(prompt.next_position, prompt.next_position + len(tokens))
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, torch.tensor(tokens)]),
        positions=torch.cat([prompt.positions, after.expand(3, -1)], dim=1),
        next_position=prompt.next_position + len(tokens),
    )


def check_tokens(highest: int, checkpoint: Checkpoint) -> None:
    """Raise `RequestError` for a token that the tokenizer has and the model has not; highest: of a prompt's ids."""
    if highest >= (known := checkpoint.config.get_text_config().vocab_size):
        token = checkpoint.tokenizer.convert_ids_to_tokens(highest)
        raise RequestError(f"the prompt has the token {quoted(token)}, number {highest}, and the model has {known}; leave it out")


def check_bias(request: Request, checkpoint: Checkpoint) -> None:
    """Raise `RequestError` for a token of `logit_bias` that the model has not."""
    known = checkpoint.config.get_text_config().vocab_size
    if (highest := max(request.sampling.logit_bias, default=0)) >= known:
        raise RequestError(f"logit_bias has token {highest}, and the model has {known}, from 0 on; leave it out")


def check_text(request: Request, checkpoint: Checkpoint) -> None:
    """Raise `RequestError` where the text alone is longer than a session, for which a long one is tokenized.

    For callers on a thread that has time, before the request joins those that wait for a device.
    """
    length = sum(len(word) for message in request.conversation for word in words_of(message))
    length += sum(map(len, strings_in(list(request.offered))))
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
