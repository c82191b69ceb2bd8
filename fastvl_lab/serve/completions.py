"""OpenAI's completions of a text, without the chat template, and vLLM's endpoints for the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RequestError, check_whole_number, quoted
from fastvl_lab.preprocessor import open_images
from fastvl_lab.request import Prompt, Request
from fastvl_lab.serve import chat as chats
from fastvl_lab.serve.chat import Chat, Draft, Served, check_model, flag, read_asked
from fastvl_lab.serve.choosing import max_answers
from fastvl_lab.serve.settings import Settings
from fastvl_lab.tokenizer import tokenize

# What /tokenize and /detokenize read of a body, as vLLM names it.
_FLAGS = ("add_special_tokens", "add_generation_prompt", "return_token_strs")
OF_TEXT = ("model", "prompt", "add_special_tokens", "return_token_strs")
OF_CHAT = ("model", "messages", "add_generation_prompt", "return_token_strs", *chats.OF_IMAGES, "tools", "tool_choice")
OF_TOKENS = ("model", "tokens")
OWN = ("prompt", "echo", "suffix")


def read(data: Mapping[str, Any], served: Served, settings: Settings) -> Draft:
    """A body as the completion of a text; raises `RequestError`s, here or in `Draft.chat`."""
    asked = read_asked(data, served, settings, own=OWN, raw=True)
    if data.get("suffix"):
        raise RequestError(f"suffix is {quoted(data['suffix'])}; an answer is made of what comes before it, so leave it out")
    prompt, echo = data.get("prompt"), flag(data, "echo")
    if echo and asked.limits["sampling"].logprobs:
        raise RequestError(
            "echo is true, and logprobs are asked for; of a prompt's tokens there are none, so leave one of them out"
        )
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(one, str) and one for one in prompts):
        raise RequestError(f"prompt is {quoted(prompt)}; it must be a text that is not empty, or a list of such texts")
    if (n := len(prompts)) * asked.n > (most := max_answers(settings)):
        raise RequestError(
            f"{n} prompts with {asked.n} answers each are over {most}, the limit, as each takes a place in the queue"
        )
    if n > 1 and asked.trace:
        raise RequestError(f"return_trace is true and there are {n} prompts; a trace is of one answer, so give one")

    def chat(_: Mapping[str, bytes]) -> Chat:
        first, *others = (Request(prompt=one, raw=True, **asked.limits) for one in prompts)
        return Chat(request=first, others=tuple(others), served=served, asked=asked, echo=echo)

    return Draft(asked=asked, addresses=(), chat=chat)


def read_prompt(data: Mapping[str, Any], served: Served, settings: Settings) -> Draft:
    """The prompt of a body to /tokenize: that of a chat, where it has messages, else of a text. Raises `RequestError`."""
    _check_known(data, OF_CHAT if "messages" in data else OF_TEXT)
    for name in _FLAGS:  # tokenizers of both families add no special tokens
        flag(data, name)
    if data.get("add_generation_prompt") is False:
        raise RequestError("add_generation_prompt is false; a prompt ends where its answer begins, so it must be true or left out")
    if isinstance(prompt := data.get("prompt"), list) and len(prompt) > 1:
        raise RequestError(f"prompt is {quoted(prompt)}; tokens are told of one text at a time")
    asked = {name: value for name, value in data.items() if name not in _FLAGS} | {"max_tokens": 1}
    return chats.read(asked, served, settings) if "messages" in data else read(asked, served, settings)


def tokens_of(chat: Chat, checkpoint: Checkpoint, *, with_texts: bool) -> dict[str, Any]:
    """The tokens that the model reads for a prompt, visual tokens included, as vLLM's /tokenize has them.

    with_texts: whether the vocabulary's own text of each is told, too. Raises `RequestError` and `ImageError`.
    """
    ids = prompt_of(chat.request, checkpoint).input_ids.tolist()
    texts = checkpoint.tokenizer.convert_ids_to_tokens(ids) if with_texts else None
    return {"count": len(ids), "max_model_len": checkpoint.session_len, "tokens": ids, "token_strs": texts}


def prompt_of(request: Request, checkpoint: Checkpoint) -> Prompt:
    """A request's prompt as the engine will make it, of which images no more than their headers are read; raises `RequestError`."""
    return tokenize(request, open_images(request, checkpoint).grids, checkpoint)


def text_of(data: Mapping[str, Any], served: Served, checkpoint: Checkpoint) -> dict[str, str]:
    """What the tokens of a body to /detokenize spell; raises `RequestError`."""
    _check_known(data, OF_TOKENS)
    check_model(data, served)
    tokens, known = data.get("tokens"), checkpoint.config.get_text_config().vocab_size
    if not isinstance(tokens, list):
        raise RequestError(f"tokens is {quoted(tokens)}; it must be a list of token ids")
    for token in tokens:
        check_whole_number("a token", token, least=0)
        if token >= known:
            raise RequestError(f"a token is {token}; the model has {known}")
    return {"prompt": checkpoint.tokenizer.decode(tokens)}


def _check_known(data: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in data:
        if name not in known:
            raise RequestError(f"the field {quoted(name)} is unknown; the choices are {', '.join(known)}")
