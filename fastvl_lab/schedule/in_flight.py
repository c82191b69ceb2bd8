"""One request from image bytes to text, a span a stage: the corridor every recipe walks, alone or among others."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch

from fastvl_lab.cache import BoundCache, Place
from fastvl_lab.capture import Stages
from fastvl_lab.capture.execute import Capture
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder.layers import Decoder
from fastvl_lab.decoder.steps import Step, merge, sample
from fastvl_lab.outcome import Outcome
from fastvl_lab.preprocessor import BoundPreprocessor, OpenedImages
from fastvl_lab.preprocessor.upload import upload_prompt
from fastvl_lab.request import Pixels, Prompt, VisionTokens
from fastvl_lab.schedule.inbox import Job
from fastvl_lab.streaming.answer import Answer, Decode, Forced, Steps
from fastvl_lab.streaming.text import Emitter, TokenBytes
from fastvl_lab.tokenizer import followed_by, tokenize, tokens_to_make


class Bound(Protocol):
    """A recipe's parts over a checkpoint, as its pipeline holds them."""

    checkpoint: Checkpoint
    images: BoundPreprocessor
    cache: BoundCache
    stages: Stages
    decoder: Decoder
    token_bytes: TokenBytes


class InFlight:
    """A request on its way. Each method is a stage or some; they are called in the order in which they stand.

    pixels: of the images that are still to go through the vision tower. seen: what a loop had done for all requests when this one
    had its last turn. number_admitted: how many it had admitted before this one came first.
    """

    def __init__(self, job: Job, bound: Bound) -> None:
        self.job, self.tracer = job, job.tracer
        self._bound = bound
        self._opened: OpenedImages | None = None
        self._place: Place | None = None
        self._first_place: Place | None = None
        self.pixels: Pixels | None = None
        self._hidden: torch.Tensor | None = None
        self._vision: VisionTokens | None = None
        self._captures: list[Capture] = []
        self.seen = 0
        self.number_admitted: int | None = None

    @property
    def n_prompt(self) -> int:
        return self._prompt.n_tokens

    @property
    def since(self) -> float:
        return self.job.since_ns / 1e9

    @property
    def n_left(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return self._rest.n_tokens - self._n_done

    @property
    def place(self) -> Place:
        assert self._place is not None, "it has not been admitted"
        return self._place

    @property
    def n_patches(self) -> int:
        """Of the images that its admission sends through the vision tower."""
        return 0 if self._opened is None else sum(self._opened.grids[n].n_patches for n in self.place.to_make)

    def open(self) -> None:
        """Headers and prompt; raises what the request cannot be served for, before any pixel of it is read."""
        request, span = self.job.request, self.tracer.span
        if request.image_inputs:
            with span("decode_image"):
                self._opened = self._bound.images.open(request)
        with span("tokenize"):
            self._prompt = tokenize(request, self._opened.grids if self._opened else (), self._bound.checkpoint)
            self._n_new = tokens_to_make(self._prompt.n_tokens, request, self._bound.checkpoint)

    def unpack(self) -> None:
        """All of its images, before it is admitted."""
        if self._opened is not None:
            self.pixels = self._bound.images.make(self._opened, self.tracer.span)

    def has_room(self, *, beside: int) -> bool:
        """Whether the caches could admit it now, beside so many others."""
        return self._bound.cache.has_room(self.n_prompt + len(self.answer.tokens), beside=beside)

    def admit(self) -> None:
        """Its place in the caches; then its images and what is left of its prompt, on the device.

        The tokens that it had made when it gave way are the end of its prompt.
        """
        bound, made = self._bound, self.answer.tokens
        self._n_told, self._n_done = len(made), 0  # tokens of the answer in the prompt; tokens of its rest that were computed
        with self.tracer.span("admit"):
            prompt = followed_by(self._prompt, made)
            contents = self._opened.contents if self._opened else tuple
            self._place = place = bound.cache.admit(prompt, self._n_new - len(made), contents)
            self._first_place = self._first_place or place
        self._make_pixels()
        self._visual_rows = (rest := prompt.after(place.reused)).visual_index  # on the host
        with self.tracer.span("upload"):
            self._rest = upload_prompt(rest, bound.images.copy)

    def _make_pixels(self) -> None:
        """Of the images whose visual tokens are not known; those that were unpacked before it was admitted are of all."""
        opened, to_make = self._opened, self.place.to_make
        if opened is None or len(to_make) < len(opened.images):
            self.pixels = None
        if opened is not None and to_make and self.pixels is None:
            self.pixels = self._bound.images.make(opened.only(to_make), self.tracer.span)

    def look_again(self) -> None:
        """Others have made visual tokens since it was admitted, of images that it shows too."""
        self.place.look()
        self._make_pixels()

    def give_way(self) -> None:
        """Leave the caches in the middle of its way; it is to be admitted again, and goes on where it was."""
        self.place.keep(self.answer.tokens[self._n_told :])
        self.place.close()
        self._place = self.pixels = None
        self._hidden = self._vision = None
        self.tracer.count("schedule: preempted")

    def first_token(self) -> None:
        """Patches and prompt to the first token of the answer, as one program."""
        with self.tracer.span("first_token"):
            self.place.extend(self._rest.n_tokens)
            self._logits, self.token = self._bound.stages.first_token(self.pixels, self._rest, self.place.kv, self.tracer)

    def encode(self, made: VisionTokens | None = None) -> None:
        """Patches to visual tokens, and these into their places among the prompt's embeddings.

        made: the visual tokens, where a call of the tower for several requests has made them.
        """
        span = self.tracer.span
        if self.pixels is not None and made is None:
            with span("vit"):
                made = self._bound.stages.encode(self.pixels, self.tracer)
        self.pixels = None
        with span("merge"):
            self._vision = self.place.visual_tokens(made)
            self._hidden = merge(self._rest, self._vision, self._bound.decoder.weights.embed)

    def prefill(self, n: int) -> None:
        """The next n tokens of the prompt; with the last of them comes the first of the answer."""
        stages, kv = self._bound.stages, self.place.kv
        with self.tracer.span("prefill"):
            hidden, piece, vision = self._piece(self._n_done, self._n_done + n)
            self.place.extend(n)
            logits = stages.prefill(hidden, piece, vision, kv, self.tracer)
        self._n_done += n
        if self.n_left == 0:
            with self.tracer.span("sample"):
                self.token = sample(logits, self._bound.decoder)
            if not self.answer.tokens:
                self._logits = logits
            self._hidden = self._vision = None  # nobody needs them any more

    def _piece(self, first: int, last: int) -> tuple[torch.Tensor, Prompt, VisionTokens | None]:
        """Some of the prompt's rows [last - first, hidden], and the visual tokens that stand in them."""
        assert self._hidden is not None, "it has not been encoded"
        if (first, last) == (0, self._rest.n_tokens):
            return self._hidden, self._rest, self._vision
        among = slice(*torch.searchsorted(self._visual_rows, torch.tensor([first, last])).tolist())
        piece = replace(
            self._rest,
            input_ids=self._rest.input_ids[first:last],
            positions=self._rest.positions[:, first:last],
            visual_index=self._rest.visual_index[among] - first,
        )
        vision = None
        if self._vision is not None and among.start < among.stop:
            levels = tuple(level[among] for level in self._vision.deepstack)
            vision = VisionTokens(embeds=self._vision.embeds[among], deepstack=levels)
        return self._hidden[first:last], piece, vision

    def steps(self, forced: Forced | None) -> Steps:
        """The decode steps of its answer, where nobody shares them. forced: tokens that the answer is made to go on with."""
        stages, place, decoder, tracer = self._bound.stages, self.place, self._bound.decoder, self.tracer

        def decode(token: torch.Tensor, position: torch.Tensor) -> Step:
            place.extend(1)
            return stages.decode(token, position, place.kv, tracer)

        chosen: Decode = decode if forced is None else forced.steps(decode)
        return Steps(
            first=self.token,
            next_positions=(self._prompt.next_position,),
            most=self._n_new,
            decode=chosen,
            sample=lambda step: sample(step.logits, decoder) if step.token is None else step.token,
            tracer=tracer,
        )

    @cached_property
    def answer(self) -> Answer:
        """Its answer, empty at first."""
        ends = () if self.job.request.ignore_eos else self._bound.checkpoint.eos_token_ids
        emitter = Emitter(self._bound.token_bytes, self.job.deliver)
        return Answer(most=self._n_new, ends=ends, emitter=emitter, tracer=self.tracer)

    def take(self, token_id: int) -> bool:
        """Note the answer's next token and send it on its way; whether it was the last."""
        last = self.answer.take(token_id)
        self.answer.emit((token_id,), last=last)
        return last

    @cached_property
    def _positions(self) -> torch.Tensor:
        """Of all tokens that the answer may have, int64 [n] on the device."""
        first = self._prompt.next_position
        return torch.arange(first, first + self._n_new, device=self.token.device)

    def next_input(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token that its next decode step reads, and the position: int64 [1] each."""
        number = len(self.answer.tokens) - 1
        return self.token, self._positions[number : number + 1]

    def note_captures(self) -> None:
        """What has been made since somebody asked last was made for this request."""
        self._captures += self._bound.stages.take_fresh()

    def outcome(self) -> Outcome:
        """The whole, once its last token was taken."""
        tokens, found = tuple(self.answer.tokens), self._first_place
        assert found is not None, "it has not been admitted"
        self.place.keep(tokens[self._n_told : -1])  # the last one has been through no layer
        for name, times in found.counts.items():
            self.tracer.count(name, times)
        self.note_captures()
        return Outcome(
            tokens=tokens,
            n_prompt=self.n_prompt,
            shapes=self._opened.shapes if self._opened else (),
            logits=self._logits[0],
            reused=found.hit,
            captures=tuple(self._captures),
        )

    def close(self) -> None:
        """Give its place back, if it has one."""
        if self._place is not None:
            self._place.close()
