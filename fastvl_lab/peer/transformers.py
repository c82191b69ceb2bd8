"""Transformers end to end: the oracle for tokens and the bar to beat in time.

It runs at its normal best: the checkpoint's default image processor, SDPA attention, `generate` with its dynamic cache and a
streamer, logits of the last token only. Its streamer hands text on by the same rule as the lab's pipeline, since Transformers' own
holds each word back until the next begins. Stages are timed through hooks on its modules; what `generate` does between them is
`unaccounted`, but for its handling of logits, which is in `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, __version__ as VERSION
from transformers.generation.streamers import BaseStreamer

from fastvl_lab.catalogue import Preprocessor
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder.sampler import Allowed, Grammar, count_penalties
from fastvl_lab.engine import Engine, PeerInfo, Place, engine
from fastvl_lab.errors import RecipeError, RequestError
from fastvl_lab.grammars import Grammars
from fastvl_lab.pipeline import Outcome
from fastvl_lab.preprocessor import bind
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Grid, Pixels, Request
from fastvl_lab.sampling import Sampling
from fastvl_lab.streaming.answer import Answer
from fastvl_lab.streaming.text import AnswerText, Deliver, Emitter, TokenBytes
from fastvl_lab.tokenizer import chat_text, check_bias, check_length, check_tokens, tokens_to_make
from fastvl_lab.trace import Tracer

# What its pixels depend on, and what those cannot do without.
_TOGGLES = ("preprocessor.decode", "preprocessor.resize", "preprocessor.patchify")


@engine("transformers", about=lambda: PeerInfo(word="transformers", does="Transformers in this process", version=VERSION))
def transformers(text: str) -> Engine:
    """Read "transformers", then changes of the toggles that decide on pixels: "transformers, preprocessor.resize=torch"."""
    name, comma, changes = text.partition(",")
    recipe = Recipe.parse(f"baseline{comma}{changes}")
    for path in recipe.changes():
        if path not in _TOGGLES:
            raise RecipeError(f"{text!r} changes {path}, which a peer does not have; the choices are {', '.join(_TOGGLES)}")

    def over(place: Place) -> TransformersPeer:
        recipe.check(place.checkpoint.target)
        return TransformersPeer(place.checkpoint, recipe.preprocessor, place.grammars)

    changed = (f"{path}={value}" for path, value in recipe.changes().items())
    return Engine(name=", ".join([name.strip(), *changed]), bind=over)


class TransformersPeer:
    """Transformers over a checkpoint's stock model.

    preprocessor: the lab's own preprocessing in place of the stock one, to be the oracle on its pixels. grammars: the lab's, which
    hold its answers to formats.
    """

    def __init__(self, checkpoint: Checkpoint, preprocessor: Preprocessor | None = None, grammars: Grammars | None = None) -> None:
        self.checkpoint = checkpoint
        self._grammars = grammars or Grammars(checkpoint)
        self.images = bind(preprocessor or Preprocessor(), checkpoint)
        self.token_bytes = TokenBytes.of(checkpoint.tokenizer)

    @torch.inference_mode()
    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Serve one request with `generate`; raises `RequestError` for one that cannot be served."""
        checkpoint = self.checkpoint
        sampling = request.sampling
        if sampling.logprobs:
            raise RequestError("logprobs is true, and the peer 'transformers' tells none as it streams; ask a recipe for them")
        inputs, pixels = self._inputs(request, tracer)
        n_prompt = inputs["input_ids"].shape[1]
        most = tokens_to_make(n_prompt, request, checkpoint)
        settings = GenerationConfig(
            max_new_tokens=most,
            eos_token_id=None if request.ignore_eos else list(checkpoint.eos_token_ids) or None,
            pad_token_id=checkpoint.tokenizer.pad_token_id,
            **_choosing(sampling),
        )
        held = None if request.is_greedy else self._grammars.of(request)
        text = partial(AnswerText, self.token_bytes, request.stops, sampling.min_tokens)
        answer = Answer(
            most=most,
            ends=settings.eos_token_id or (),
            emitter=Emitter(text(), deliver),
            tracer=tracer,
            text=text() if request.stops else None,
        )
        with _stage_spans(checkpoint, tracer, has_images=pixels is not None) as seen, _seeded(sampling, checkpoint.device):
            output = checkpoint.model.generate(
                **inputs,
                generation_config=settings,
                logits_processor=LogitsProcessorList([*_holding(held, checkpoint.device), *count_penalties(sampling, n_prompt)]),
                stopping_criteria=StoppingCriteriaList([_stopped_by(text())] if request.stops else []),
                streamer=_Streamer(answer),
            )
        return Outcome(
            tokens=tuple(output[0, n_prompt:].tolist()),
            n_prompt=n_prompt,
            shapes=pixels.shapes if pixels else (),
            logits=seen["logits"][0, -1].float(),
            finish_reason=answer.finish_reason,
        )

    @torch.inference_mode()
    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the prompt's last token, and after each of `tokens` (int64 [n]), by one forward over all of them.

        In the model's dtype [1 + n, vocab], on the host.
        """
        inputs, _ = self._inputs(request, Tracer(self.checkpoint.device, "off"), tokens)
        logits: torch.Tensor = self.checkpoint.model(**inputs, logits_to_keep=len(tokens) + 1, use_cache=False).logits[0]
        return logits.cpu()

    def _inputs(
        self, request: Request, tracer: Tracer, after: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], Pixels | None]:
        """What the model's forward takes, on the device, and the pixels among it; after: tokens that follow the prompt."""
        opened = pixels = None
        if request.image_inputs:
            with tracer.span("decode_image"):
                opened = self.images.open(request)
        with tracer.span("tokenize"):
            ids = self._tokenize(request, opened.grids if opened else ())
            is_image = ids == self.checkpoint.image_token_id
            if after is not None:
                ids, is_image = torch.cat([ids, after[None].to(ids)], dim=1), F.pad(is_image, (0, len(after)))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if opened is not None:
            pixels = self.images.make(opened, tracer.span)
        with tracer.span("upload"):
            if pixels is not None:
                inputs |= self.checkpoint.family.stock_inputs(is_image, pixels.patches, torch.tensor(pixels.grids))
            return {name: tensor.to(self.checkpoint.device) for name, tensor in inputs.items()}, pixels

    def _tokenize(self, request: Request, grids: tuple[Grid, ...]) -> torch.Tensor:
        """What Transformers' processor makes of text, int64 [1, n]: placeholders expanded in the string, then tokenized.

        The processor class itself needs torchvision for its video part, so its few lines of text handling are done here.
        """
        checkpoint = self.checkpoint
        text, placeholder = chat_text(request, checkpoint), checkpoint.tokenizer.decode([checkpoint.image_token_id])
        visual_tokens = [grid.visual_tokens(checkpoint.merge_size) for grid in grids]
        pieces = text.split(placeholder)
        text = pieces[0] + "".join(placeholder * n + piece for n, piece in zip(visual_tokens, pieces[1:], strict=True))
        ids: torch.Tensor = checkpoint.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        check_tokens(int(ids.max()), checkpoint)
        check_bias(request, checkpoint)
        check_length(ids.shape[1], request, checkpoint, visual_tokens=sum(visual_tokens))
        return ids


class _Streamer(BaseStreamer):
    """Receives each token from `generate` and emits its text."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate sends the prompt first
            self._prompt_seen = True
            return
        self._answer.tracer.end("sample")
        token = int(value)
        last = self._answer.take(token)
        self._answer.emit((token,), last=last)

    def end(self) -> None:
        pass


def _choosing(sampling: Sampling) -> dict[str, Any]:
    """The same in `generate`'s words; of what is not named it takes defaults, of which some would sample."""
    settings: dict[str, Any] = {"do_sample": sampling.draws, "repetition_penalty": sampling.repetition_penalty}
    if sampling.draws:
        settings |= {"temperature": sampling.temperature, "top_k": max(sampling.top_k, 0), "top_p": sampling.top_p}
    if sampling.draws and sampling.min_p:
        settings["min_p"] = sampling.min_p
    if sampling.min_tokens:
        settings["min_new_tokens"] = sampling.min_tokens
    if sampling.logit_bias:
        settings["sequence_bias"] = {(token,): by for token, by in sampling.logit_bias.items()}
    return settings


def _holding(grammar: Grammar | None, device: torch.device) -> list[Callable[..., torch.Tensor]]:
    """A logits processor that leaves what a grammar allows, if there is one."""
    if grammar is None:
        return []
    allowed, is_first = Allowed(grammar, device), True

    def hold(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal is_first
        if not is_first:
            allowed.note(input_ids[0, -1:])
        is_first = False
        return allowed.among(scores)

    return [hold]


def _stopped_by(text: AnswerText) -> Callable[..., torch.Tensor]:
    """A stopping criterion with a text of its own: some versions ask it before the streamer has the token, some after."""

    def stopped(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        text.push(int(input_ids[0, -1]))
        return torch.tensor([text.found], device=input_ids.device)

    return stopped


@contextmanager
def _seeded(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """`generate` draws from torch's own generator of the device, which is afterwards as it was."""
    if not sampling.draws:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch.seed() if sampling.seed is None else sampling.seed % 2**64)
        yield


@contextmanager
def _stage_spans(checkpoint: Checkpoint, tracer: Tracer, *, has_images: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Open and close the model's stages from hooks; yields a dict that will hold the first step's logits."""
    seen: dict[str, torch.Tensor] = {}
    inside = vision_done = False

    def before_model(*_: Any) -> None:
        nonlocal inside
        if not seen and (vision_done or not has_images):
            tracer.begin("merge")
        inside = True

    def before_vision(*_: Any) -> None:
        tracer.begin("vit")

    def after_vision(*_: Any) -> None:
        nonlocal vision_done
        tracer.end("vit")
        vision_done = True
        if inside:  # some versions run the tower inside the model's forward, some before it
            tracer.begin("merge")

    def before_decoder(*_: Any) -> None:
        if not seen:
            tracer.end("merge")
        tracer.begin("decode" if seen else "prefill")

    def after_head(_module: Any, _inputs: Any, logits: torch.Tensor) -> None:
        tracer.end("decode" if seen else "prefill")
        seen.setdefault("logits", logits)
        tracer.begin("sample")

    vision, text = checkpoint.vision, checkpoint.text
    handles = [
        checkpoint.model.model.register_forward_pre_hook(before_model),
        vision.module.register_forward_pre_hook(before_vision),
        vision.module.register_forward_hook(after_vision),
        text.module.register_forward_pre_hook(before_decoder),
        text.head.register_forward_hook(after_head),
    ]
    layers = {"vit.patch_embed": vision.patch_embed}
    layers |= {f"vit.block.{i}": block for i, block in enumerate(vision.blocks)}
    layers |= {f"language.layer.{i}": layer for i, layer in enumerate(text.blocks)}
    try:
        with tracer.modules(layers):
            yield seen
    finally:
        for handle in handles:
            handle.remove()
