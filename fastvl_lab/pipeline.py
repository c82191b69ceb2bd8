"""One request from image bytes to text, one span per stage: the corridor every recipe walks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fastvl_lab import attention, capture, preprocessor, streaming, vit
from fastvl_lab.cache import new_cache
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.language.decode import decode
from fastvl_lab.language.decoder import decoder_weights
from fastvl_lab.language.merge import merge
from fastvl_lab.language.prefill import prefill
from fastvl_lab.language.sample import greedy
from fastvl_lab.preprocessor.upload import upload_pixels, upload_prompt
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import ImageShape, Request
from fastvl_lab.streaming import Deliver, TokenBytes
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.trace import Tracer


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What an engine reports when a request is done; `logits` are those of the last prompt token, float32 [vocab]."""

    tokens: tuple[int, ...]
    n_prompt: int
    shapes: tuple[ImageShape, ...]
    logits: torch.Tensor


class Engine(Protocol):
    """What a recipe's pipeline and every peer have in common: a request in, text out through `deliver`."""

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome: ...


class Pipeline:
    """A recipe bound to a checkpoint: its functions are chosen here, once, and run over the checkpoint's own weights."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        recipe.check(checkpoint.device)
        self.checkpoint, self.recipe = checkpoint, recipe
        self.images = images = preprocessor.bind(recipe.preprocessor, checkpoint)
        self.encode = capture.bind(recipe.capture.vit, vit.bind(recipe.vit, checkpoint, images.patch_format))
        self.prefill = capture.bind(recipe.capture.prefill, prefill)
        self.decode = capture.bind(recipe.capture.decode, decode)
        self.attention = attention.bind(recipe.attention)
        self.new_emitter = streaming.bind(recipe.streaming)
        self.weights = decoder_weights(checkpoint)
        self.token_bytes = TokenBytes.of(checkpoint.tokenizer)

    @torch.inference_mode()
    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Serve one request; raises `RequestError` for one that cannot be served."""
        checkpoint, weights = self.checkpoint, self.weights
        span, inner = tracer.span, tracer.inner
        pixels = vision = None
        if request.image_inputs:
            with span("decode_image"):
                decoded = self.images.decode(request)
            with span("preprocess"):
                pixels = self.images.preprocess(decoded, request)
        with span("tokenize"):
            prompt = tokenize(request, pixels.grids if pixels else (), checkpoint)
        with span("upload"):
            prompt = upload_prompt(prompt, self.images.copy)
            if pixels is not None:
                pixels = upload_pixels(pixels, self.images.upload)
        if pixels is not None:
            with span("vit"):
                vision = self.encode(pixels, tracer)
        with span("merge"):
            hidden = merge(prompt, vision, weights.embed)
        with span("prefill"):
            cache = new_cache(self.recipe.cache, len(weights.layers))
            prefilled = self.prefill(hidden, prompt, vision, weights, self.attention.prefill, cache, inner)

        emitter, tokens, logits = self.new_emitter(self.token_bytes, deliver), [], prefilled.logits
        position = torch.full((1,), prompt.next_position, device=checkpoint.device)
        while True:
            with span("sample"):
                token, token_id = greedy(logits)
            tokens.append(token_id)
            done = len(tokens) == request.max_new_tokens or (not request.ignore_eos and token_id in checkpoint.eos_token_ids)
            with span("emit"):
                emitter.emit(token_id, last=done)
            if done:
                break
            with span("decode"):
                logits = self.decode(token, position, weights, self.attention.decode, cache, inner)
                position += 1
        return Outcome(
            tokens=tuple(tokens),
            n_prompt=prompt.n_tokens,
            shapes=pixels.shapes if pixels else (),
            logits=prefilled.logits,
        )
