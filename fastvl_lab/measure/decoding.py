"""The decoder alone, on prompts of a given length: prefill and decode steps timed side by side, and what the cache takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fastvl_lab import attention
from fastvl_lab.cache import BoundCache, Place
from fastvl_lab.catalogue import toggles
from fastvl_lab.engine import Engine, EngineLike
from fastvl_lab.errors import FastvlError, RequestError, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.language.decode import decode
from fastvl_lab.language.decoder import Decoder
from fastvl_lab.language.merge import merge
from fastvl_lab.language.prefill import prefill
from fastvl_lab.language.weights import decoder_weights
from fastvl_lab.measure.rounds import Rounds, Task, now, time_rounds
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Prompt
from fastvl_lab.trace import no_inner


def time_decoding(
    lab: Lab,
    length: int,
    engines: Mapping[str, EngineLike],
    *,
    steps: int = 8,
    repeats: int = 10,
    warm_up: int = 2,
    seed: int = 0,
) -> Rounds:
    """Seconds of "prefill" and of one "decode" step (the mean of `steps`), for text prompts of `length` random tokens.

    engines: label -> recipe, or "transformers" for the stock decoder called layer by layer as `generate` calls it, with its dynamic
    cache; the device is waited for after prefill and after the steps. Each step chooses its token, on the device. Raises
    `RequestError` for lengths that a session has no room for.
    """
    prompt = text_prompt(lab, length, steps)
    tasks = {label: _task(lab, prompt, lab.engine(engine), steps) for label, engine in engines.items()}
    return time_rounds(tasks, repeats=repeats, warm_up=warm_up, seed=seed)


def attention_variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe with every way of attention, in prefill and decode alike where both have it: "attention=sdpa" -> a recipe."""
    variants: dict[str, Recipe] = {}
    for toggle in toggles():
        if toggle.path in ("attention.prefill", "attention.decode"):
            for value in toggle.values:
                label = f"attention={value}"
                variants[label] = variants.get(label, recipe).choose(toggle.path, value)
    return variants


def bindable(lab: Lab, recipes: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipes whose decoder can run on this lab, and of each of the others the sentence that says why it cannot."""
    can: dict[str, Recipe] = {}
    cannot: dict[str, str] = {}
    for label, recipe in recipes.items():
        try:
            BoundDecoder.of(lab, recipe)
            can[label] = recipe
        except FastvlError as error:
            cannot[label] = sentence(error)
    return can, cannot


def kv_bytes_over_steps(lab: Lab, length: int, steps: int, recipe: Recipe) -> list[int]:
    """Bytes that hold the keys and values of a text prompt of `length` tokens: after prefill, then after each of the decode steps.

    Of kv=concat, the elements of its tensors (while a layer's are concatenated, the old and the new stand side by side, which is
    not counted); of static, the room of a whole session; of paged, the blocks that the sequence has taken. Raises `RequestError` as
    `text_prompt` does.
    """
    prompt, bound = text_prompt(lab, length, steps), BoundDecoder.of(lab, recipe)

    @torch.inference_mode()
    def run() -> list[int]:
        place = bound.cache.admit(prompt, steps + 1, tuple)
        try:
            logits, held = bound.prefill(prompt, place), [place.n_bytes]
            for number in range(steps):
                position = torch.full((1,), prompt.next_position + number, device=lab.device)
                logits = bound.step(bound.decoder.operations.argmax(logits), position, place)
                held.append(place.n_bytes)
            return held
        finally:
            place.close()

    return lab.compute(run)


def text_prompt(lab: Lab, length: int, steps: int) -> Prompt:
    """Random text tokens on the lab's device, the same for the same length."""
    if length < 1 or steps < 1 or length + steps > lab.checkpoint.session_len:
        raise RequestError(
            f"length is {length} and steps {steps}; both must be at least 1, and together at most session_len, "
            f"{lab.checkpoint.session_len}"
        )
    text_ids = torch.arange(min(256, lab.checkpoint.config.get_text_config().vocab_size))  # below all special tokens
    chosen = torch.randint(0, len(text_ids), (length,), generator=torch.Generator().manual_seed(length))
    return Prompt(
        input_ids=text_ids[chosen].to(lab.device),
        positions=torch.arange(length, device=lab.device).expand(3, -1).contiguous(),
        visual_index=torch.empty(0, dtype=torch.int64, device=lab.device),
        next_position=length,
        images=(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundDecoder:
    """A recipe's decoder and its cache, outside of any request."""

    decoder: Decoder
    cache: BoundCache

    @classmethod
    def of(cls, lab: Lab, recipe: Recipe) -> BoundDecoder:
        """Bind a recipe's slots 3 and 4; raises `RecipeError` where it cannot run."""
        recipe.check(lab.checkpoint.target)
        return cls(
            decoder=attention.bind(recipe.attention, decoder_weights(lab.checkpoint)),
            cache=BoundCache(recipe.cache, lab.memory, family=str(recipe), images_by=str(recipe)),
        )

    def prefill(self, prompt: Prompt, place: Place) -> torch.Tensor:
        """A text prompt through the decoder: logits of its last token, float32 [vocab]."""
        hidden = merge(prompt, None, self.decoder.weights.embed)
        place.extend(prompt.n_tokens)
        return prefill(hidden, prompt, None, self.decoder, place.kv, no_inner)[0]

    def step(self, token: torch.Tensor, position: torch.Tensor, place: Place) -> torch.Tensor:
        """One more token: the logits after it, float32 [vocab]."""
        place.extend(1)
        return decode(token, position, self.decoder, place.kv, no_inner)[0]


def _task(lab: Lab, prompt: Prompt, engine: Engine, steps: int) -> Task:
    if engine.recipe is not None:
        return _recipe_task(lab, prompt, engine.recipe, steps)
    return _stock_task(lab, prompt, steps)


def _recipe_task(lab: Lab, prompt: Prompt, recipe: Recipe, steps: int) -> Task:
    bound, device = BoundDecoder.of(lab, recipe), lab.device

    @torch.inference_mode()
    def run() -> dict[str, float]:
        place = bound.cache.admit(prompt, steps + 1, tuple)
        try:
            started = now(device)
            logits = bound.prefill(prompt, place)
            prefilled = now(device)
            position = torch.full((1,), prompt.next_position, device=device)
            for _ in range(steps):
                logits = bound.step(bound.decoder.operations.argmax(logits), position, place)
                position += 1
            return {"prefill": prefilled - started, "decode": (now(device) - prefilled) / steps}
        finally:
            place.close()

    return partial(lab.compute, run)


def _stock_task(lab: Lab, prompt: Prompt, steps: int) -> Task:
    text, head, device = lab.checkpoint.text.module, lab.checkpoint.text.head, lab.device

    @torch.inference_mode()
    def run() -> dict[str, float]:
        started = now(device)
        embeds = text.embed_tokens(prompt.input_ids[None])
        out = text(inputs_embeds=embeds, position_ids=prompt.positions[:, None], use_cache=True)
        logits = head(out.last_hidden_state[:, -1:])[0, -1].float()
        prefilled = now(device)
        position = torch.full((3, 1, 1), prompt.next_position, device=device)
        for _ in range(steps):
            embeds = text.embed_tokens(logits.argmax(keepdim=True)[None])
            kept = out.past_key_values
            out = text(inputs_embeds=embeds, position_ids=position, past_key_values=kept, use_cache=True)
            logits = head(out.last_hidden_state[:, -1:])[0, -1].float()
            position += 1
        return {"prefill": prefilled - started, "decode": (now(device) - prefilled) / steps}

    return partial(lab.compute, run)
