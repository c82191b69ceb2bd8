"""What engines are timed on besides whole requests: the preprocessor, the vision tower and the decoder, each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from fastvl_lab import preprocessor, vit
from fastvl_lab.cache import BoundCache, Place
from fastvl_lab.decoder import bind_decoder
from fastvl_lab.decoder.layers import Decoder
from fastvl_lab.decoder.steps import decode, merge, prefill
from fastvl_lab.decoder.weights import decoder_weights
from fastvl_lab.engine import Engine, EngineLike, find_recipe
from fastvl_lab.errors import RequestError
from fastvl_lab.lab import Lab
from fastvl_lab.measure.quiet import QUIET, Quiet
from fastvl_lab.measure.recipes import cannot_run
from fastvl_lab.measure.samples import Samples, StageSample, Timed, now, time_rounds
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Grid, Prompt, Request, check_request
from fastvl_lab.trace import Tracer, no_inner

T = TypeVar("T")


class Task(Protocol):
    """A part of a request; the device is waited for after each of its `steps`."""

    @property
    def steps(self) -> tuple[str, ...]: ...

    def bind(self, lab: Lab, engine: Engine) -> Timed:
        """The part as the engine does it; raises `RequestError` for a senseless request, `RecipeError` for what cannot run here."""


def time_task(
    lab: Lab,
    task: Task,
    engines: Mapping[str, EngineLike],
    *,
    repeats: int = 10,
    warm_up: int = 2,
    seed: int = 0,
    quiet: Quiet | None = QUIET,
) -> Samples[StageSample]:
    """Seconds of each of a task's steps for every engine (label -> recipe, its text, or "transformers"), side by side.

    quiet: as `time_rounds` has it.
    """
    timed = {label: task.bind(lab, lab.engine(engine)) for label, engine in engines.items()}
    return time_rounds(timed, repeats=repeats, warm_up=warm_up, seed=seed, quiet=quiet, device=lab.device)


@dataclass(frozen=True)
class Preprocessing:
    """From the bytes of a request's images to patches on the device."""

    request: Request
    steps = ("decode_image", "preprocess", "upload")

    def bind(self, lab: Lab, engine: Engine) -> Timed:
        bound = bound_preprocessor(lab, self.request, engine)

        def run() -> dict[str, float]:
            seconds = dict.fromkeys(self.steps, 0.0)

            @contextmanager
            def span(step: str) -> Iterator[None]:
                started = now(lab.device)
                yield
                seconds[step] += now(lab.device) - started

            with span("decode_image"):
                opened = bound.open(self.request)
            bound.make(opened, span)
            return seconds

        return _on_thread(lab, run)


@dataclass(frozen=True)
class Tower:
    """From the uploaded patches of a request's images to visual tokens."""

    request: Request
    steps = ("vit",)

    def bind(self, lab: Lab, engine: Engine) -> Timed:
        images = bound_preprocessor(lab, self.request, engine)
        encode = vit.bind(find_recipe(engine).vit, lab.checkpoint, images.patch_format)
        pixels, off = _on_thread(lab, lambda: images.pixels(self.request))(), Tracer(lab.device, "off")

        def run() -> dict[str, float]:
            started = now(lab.device)
            encode(pixels, off)
            return {"vit": now(lab.device) - started}

        return _on_thread(lab, run)


@dataclass(frozen=True)
class Decoding:
    """Prefill of a text prompt of `length` random tokens, and the mean of `n_steps` decode steps that choose their own tokens."""

    length: int
    n_steps: int = 8
    steps = ("prefill", "decode")

    def bind(self, lab: Lab, engine: Engine) -> Timed:
        prompt, begin = text_prompt(lab, self.length, self.n_steps), bound_forward(lab, engine)

        def run() -> dict[str, float]:
            with begin(prompt, self.n_steps) as forward:
                started = now(lab.device)
                next(forward.logits)
                prefilled = now(lab.device)
                for _ in forward.logits:
                    pass
                return {"prefill": prefilled - started, "decode": (now(lab.device) - prefilled) / self.n_steps}

        return _on_thread(lab, run)


def _on_thread(lab: Lab, work: Callable[[], T]) -> Callable[[], T]:
    """Work that is done on the lab's thread, without gradients."""
    return partial(lab.compute, torch.inference_mode()(work))


def bound_preprocessor(lab: Lab, request: Request, engine: EngineLike) -> preprocessor.BoundPreprocessor:
    """An engine's preprocessor; raises `RequestError` for a request without images, and `RecipeError`."""
    if not request.image_inputs:
        raise RequestError("the request has no images; there is nothing to preprocess, and no visual token to make")
    recipe = lab.recipe(engine)
    recipe.check(lab.checkpoint.target)
    return preprocessor.bind(recipe.preprocessor, lab.checkpoint)


def grids_of(lab: Lab, request: Request) -> tuple[Grid, ...]:
    """The patch grids that the request's images become, from their headers; raises `RequestError`."""
    check_request(request)
    return preprocessor.open_images(request, lab.checkpoint).grids


def text_tokens(lab: Lab, n: int) -> tuple[int, ...]:
    """Random text tokens, the same for the same number."""
    vocab = min(256, lab.checkpoint.config.get_text_config().vocab_size)  # below all special tokens
    return tuple(torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n)).tolist())


def text_prompt(lab: Lab, length: int, steps: int) -> Prompt:
    """Random text tokens on the lab's device, the same for the same length; raises `RequestError` for no room in a session."""
    if length < 1 or steps < 1 or length + steps > lab.checkpoint.session_len:
        raise RequestError(
            f"length is {length} and steps {steps}; both must be at least 1, and together at most session_len, "
            f"{lab.checkpoint.session_len}"
        )
    return Prompt(
        input_ids=torch.tensor(text_tokens(lab, length), device=lab.device),
        positions=torch.arange(length, device=lab.device).expand(3, -1).contiguous(),
        visual_index=torch.empty(0, dtype=torch.int64, device=lab.device),
        next_position=length,
        images=(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """A text prompt on its way through a decoder. logits: [vocab], of its last token, then after each decode step, computed when
    they are asked for; n_bytes: what its keys and values take so far."""

    logits: Iterator[torch.Tensor]
    n_bytes: Callable[[], int]


# A prompt, how many decode steps are to follow, and the tokens int64 [steps] that they are given; else each step's own choice.
Begin = Callable[..., AbstractContextManager[Forward]]


def bound_forward(lab: Lab, engine: Engine) -> Begin:
    """An engine's decoder, "transformers" being the stock one called layer by layer; raises `RecipeError` where it cannot run."""
    text = lab.checkpoint.text
    return partial(stock_forward, text.module, text.head) if engine.recipe is None else BoundDecoder.of(lab, engine.recipe).forward


@contextmanager
def stock_forward(
    text: Any, head: Any, prompt: Prompt, steps: int, forced: torch.Tensor | None = None, *, piece: int | None = None
) -> Iterator[Forward]:
    """Stock modules as `generate` calls them, with its dynamic cache; piece: how many of the prompt's tokens go in at once."""
    kept: Any = None

    def through(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        embeds = text.embed_tokens(ids[None])
        out = text(inputs_embeds=embeds, position_ids=positions.expand(3, -1)[:, None], past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        logits: torch.Tensor = head(out.last_hidden_state[:, -1:])[0, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def prefilled() -> torch.Tensor:
        size = piece or prompt.n_tokens
        for ids, positions in zip(prompt.input_ids.split(size), prompt.positions.split(size, dim=1), strict=True):
            logits = through(ids, positions)
        return logits

    yield Forward(
        logits=_steps(prompt, steps, forced, prefilled, through, partial(torch.argmax, dim=0, keepdim=True)),
        n_bytes=lambda: sum(x.nbytes for layer in kept.layers for x in (layer.keys, layer.values)),
    )


def _steps(
    prompt: Prompt,
    steps: int,
    forced: torch.Tensor | None,
    prefilled: Callable[[], torch.Tensor],
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[torch.Tensor]:
    logits = prefilled()
    yield logits
    position = torch.full((1,), prompt.next_position, device=logits.device)
    for number in range(steps):
        logits = step(choose(logits) if forced is None else forced[number : number + 1], position)
        yield logits
        position += 1


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
            decoder=bind_decoder(recipe.attention, decoder_weights(lab.checkpoint)),
            cache=BoundCache(recipe.cache, lab.memory, family=str(recipe), images_by=str(recipe)),
        )

    @contextmanager
    def admitted(self, prompt: Prompt, steps: int) -> Iterator[Place]:
        """Room for the prompt and so many decode steps, given back at the end."""
        place = self.cache.admit(prompt, steps + 1, tuple)
        try:
            yield place
        finally:
            place.close()

    @contextmanager
    def forward(self, prompt: Prompt, steps: int, forced: torch.Tensor | None = None) -> Iterator[Forward]:
        """As `Begin`."""
        with self.admitted(prompt, steps) as place:
            prefilled, step = partial(self.prefill, prompt, place), partial(self.step, place=place)
            logits = _steps(prompt, steps, forced, prefilled, step, self.decoder.operations.argmax)
            yield Forward(logits=logits, n_bytes=lambda: place.n_bytes)

    def prefill(self, prompt: Prompt, place: Place) -> torch.Tensor:
        """A text prompt through the decoder: logits of its last token, float32 [vocab]."""
        hidden = merge(prompt, None, self.decoder.weights.embed)
        place.extend(prompt.n_tokens)
        return prefill(hidden, prompt, None, self.decoder, place.kv, no_inner)[0]

    def step(self, token: torch.Tensor, position: torch.Tensor, place: Place) -> torch.Tensor:
        """One more token: the logits after it, float32 [vocab]."""
        place.extend(1)
        return decode(token, position, self.decoder, place.kv, no_inner)[0]


def bindable(lab: Lab, recipes: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipes that can run on this lab, and of each of the others the sentence that says why it cannot."""
    reasons = {label: cannot_run(recipe, lab.checkpoint.target) for label, recipe in recipes.items()}
    can = {label: recipe for label, recipe in recipes.items() if reasons[label] is None}
    return can, {label: reason for label, reason in reasons.items() if reason is not None}


def kv_bytes_over_steps(lab: Lab, length: int, steps: int, recipe: Recipe) -> list[int]:
    """Bytes that hold the keys and values of a text prompt of `length` tokens: after prefill, then after each of the decode steps.

    Of kv=static they are the room of a whole session, of paged the blocks taken. Raises `RequestError` as `text_prompt` does.
    """
    prompt, bound = text_prompt(lab, length, steps), BoundDecoder.of(lab, recipe)

    def run() -> list[int]:
        with bound.forward(prompt, steps) as forward:
            return [forward.n_bytes() for _ in forward.logits]

    return _on_thread(lab, run)()
