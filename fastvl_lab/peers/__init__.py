"""Engines that are not ours, measured the same way; each is imported when asked for."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.errors import RecipeError
from fastvl_lab.pipeline import Engine
from fastvl_lab.recipe import ORACLE_TOGGLES, Recipe

PEERS = ("transformers", "an http(s) address ending in /v1")


def is_peer(text: object) -> bool:
    """Whether an engine's text names a peer, and not a recipe."""
    return isinstance(text, str) and (text.partition(",")[0].strip() == "transformers" or is_remote(text))


def is_remote(text: object) -> bool:
    """Whether an engine's text is the address of an endpoint, which computes elsewhere."""
    return isinstance(text, str) and text.strip().startswith(("http://", "https://"))


def parse(text: str) -> str:
    """A peer's text in its one spelling: an endpoint's address, or a name, then changes of the toggles that decide on pixels.

    "transformers, preprocessor.resize=torch" is Transformers' model behind the lab's preprocessing; "http://127.0.0.1:8000/v1" any
    OpenAI-compatible server, whose model may follow where it has several: ", model=…". Raises `RecipeError`.
    """
    if is_remote(text):
        address, comma, model = (part.strip() for part in text.partition(","))
        if comma and (not model.startswith("model=") or model == "model="):
            raise RecipeError(f"endpoint {text!r} has {model!r}; what may follow its address is model=<name>")
        if not _is_address(address):
            raise RecipeError(f"endpoint {text!r} is no address; it reads http://host:port/v1, or https")
        return ", ".join([address.rstrip("/"), *([model] if comma else [])])
    name, recipe = _read(text)
    for path in recipe.changes():
        if path not in ORACLE_TOGGLES:
            raise RecipeError(f"{text!r} changes {path}, which a peer does not have; the choices are {', '.join(ORACLE_TOGGLES)}")
    return ", ".join([name, *(f"{path}={value}" for path, value in recipe.changes().items())])


def _is_address(text: str) -> bool:
    """Whether a URL has a host, and a port that there can be, if any."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def bind(text: str, checkpoint: Checkpoint) -> Engine:
    """The peer of a text that `parse` has read: over a checkpoint's own weights, or whatever the endpoint serves."""
    if is_remote(text):
        from fastvl_lab.peers.http import HttpPeer

        address, _, model = text.partition(", model=")
        return HttpPeer(address, model or None, checkpoint.tokenizer)
    from fastvl_lab.peers.transformers import TransformersPeer

    _, recipe = _read(text)
    recipe.check(checkpoint.device)
    return TransformersPeer(checkpoint, recipe.preprocessor)


def _read(text: str) -> tuple[str, Recipe]:
    """The peer's name, and its changes as a recipe of which only the preprocessor counts."""
    name, comma, changes = text.partition(",")
    return name.strip(), Recipe.parse(f"baseline{comma}{changes}")
