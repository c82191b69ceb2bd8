"""One request from image bytes to text, a span a stage: the corridor every recipe walks, alone or among others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

import torch

from fastvl_lab.cache import BoundCache, Place
from fastvl_lab.capture import Stages
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.stages import InParts
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder.layers import Decoder
from fastvl_lab.decoder.sampler import Sampler
from fastvl_lab.decoder.steps import Step, likeliest, merge
from fastvl_lab.grammars import Grammars, Held
from fastvl_lab.outcome import Outcome
from fastvl_lab.preprocessor import BoundPreprocessor, OpenedImages
from fastvl_lab.preprocessor.upload import upload_prompt
from fastvl_lab.request import Pixels, Prompt, TokenLogprob, VisionTokens
from fastvl_lab.schedule.inbox import Job
from fastvl_lab.streaming.answer import Answer, Decode, Forced, Steps
from fastvl_lab.streaming.text import AnswerText, Emitter, TokenBytes
from fastvl_lab.tokenizer import followed_by, tokenize, tokens_to_make


class Bound(Protocol):
    """A recipe's parts over a checkpoint, as its pipeline holds them."""

    checkpoint: Checkpoint
    images: BoundPreprocessor
    cache: BoundCache
    stages: Stages
    decoder: Decoder
    token_bytes: TokenBytes
    grammars: Grammars


class InFlight:
    """A request on its way. Each method is a stage or some; they are called in the order in which they stand.

    pixels: of the images that are still to enter the vision tower. seen: what a loop had done for all requests when this one had
    its last turn. number_admitted: how many it had admitted before this one came first.
    """

    def __init__(self, job: Job, bound: Bound) -> None:
        self.job, self.tracer = job, job.tracer
        self._bound = bound
        self._opened: OpenedImages | None = None
        self._place: Place | None = None
        self._first_place: Place | None = None
        self.pixels: Pixels | None = None
        self._in_tower: InParts | None = None
        self._hidden: torch.Tensor | None = None
        self._merged: Prompt | None = None  # whose embeddings it is
        self._vision: VisionTokens | None = None
        self._held: Held | None = None  # to what it asks its answer to be
        self._sampler: Sampler | None = None
        self._captures: list[Capture] = []
        self.seen = 0
        self.number_admitted: int | None = None

    @property
    def n_prompt(self) -> int:
        return self._prompt.n_tokens

    @property
    def images(self) -> tuple[tuple[int, int], ...]:
        """Of each image, in order, the prompt's first token that is its, and how many are."""
        return self._prompt.images

    @property
    def since(self) -> float:
        return self.job.since_ns / 1e9

    @property
    def n_left(self) -> int:
        """Tokens that are still to be computed: of the prompt, or before it of its images, a share of them a block of the tower."""
        if (tower := self._in_tower) is None:
            return self._rest.n_tokens - self._n_done
        return -(-self._n_visual * tower.n_left // tower.n_blocks)

    @property
    def is_in_tower(self) -> bool:
        """Whether its images go through the tower by parts, so that its prompt is not there yet."""
        return self._in_tower is not None

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
        if request.sampling.format is not None or request.offered:
            with span("grammar"):
                self._held = self._bound.grammars.of(request)

    @property
    def is_unpacked(self) -> bool:
        """Whether it has no images, or `unpack` has been there."""
        return self._opened is None or self.pixels is not None

    def unpack(self) -> None:
        """All of its images, before it is admitted."""
        assert self._opened is not None
        self.pixels = self._bound.images.make(self._opened, self.tracer.span)

    def open_and_unpack(self) -> None:
        self.open()
        if not self.is_unpacked:
            self.unpack()

    def has_room(self, *, beside: int) -> bool:
        """Whether the caches could admit it now, beside so many others."""
        return self._bound.cache.has_room(self.n_prompt + len(self.answer.tokens), beside=beside)

    def admit(self) -> None:
        """Its place in the caches; then its images and what is left of its prompt, on the device."""
        self.take_place()
        self._make_pixels()
        self.upload_prompt()

    def take_place(self) -> None:
        """Its place in the caches alone; its images and its prompt follow.

        The tokens that it had made when it gave way are the end of its prompt.
        """
        made = self.answer.tokens
        self._n_told, self._n_done = len(made), 0  # tokens of the answer in the prompt; tokens of its rest that were computed
        contents = self._opened.contents if self._opened else tuple
        with self.tracer.span("admit"):
            self._admitted = followed_by(self._prompt, made)
            self._place = self._bound.cache.admit(self._admitted, self._n_new - len(made), contents)
            self._first_place = self._first_place or self._place

    def upload_prompt(self) -> None:
        """What is left of its prompt, to the device; where its tokens are not the likeliest, all of it for whoever chooses them."""
        self._visual_rows = (rest := self._admitted.after(self.place.reused)).visual_index  # on the host
        with self.tracer.span("upload"):
            self._rest = upload_prompt(rest, self._bound.images.copy)
            request, sampling = self.job.request, self.job.request.sampling
            chooses = sampling.logprobs or not request.is_greedy
            if chooses and self._sampler is None:  # one that gave way goes on with its own
                prompt = self._bound.images.copy(self._prompt.input_ids)
                self._sampler = Sampler(sampling, prompt, most=self._n_new, ends=self._ends, grammar=self._held)

    def patches_of_each(self) -> Iterator[torch.Tensor]:
        """The images that its admission found to make, unpacked one at a time, for any thread to ask for; on the host mostly."""
        assert self._opened is not None
        return self._bound.images.patches_of_each(self._opened.only(self.place.to_make), self.tracer.span)

    def upload_image(self, number: int, patches: torch.Tensor) -> None:
        """One image's patches to the device, where `encode` finds them."""
        assert self._opened is not None
        with self.tracer.span("upload"):
            self.pixels = Pixels(patches=self._bound.images.upload(patches), shapes=self._opened.only([number]).shapes)

    def _make_pixels(self) -> None:
        """Of the images whose visual tokens are not known; those that were unpacked before it was admitted are of all."""
        opened, to_make = self._opened, self.place.to_make
        if opened is None or len(to_make) < len(opened.images):
            self.pixels = None
        if opened is not None and to_make and self.pixels is None:
            self.pixels = self._bound.images.make(opened.only(to_make), self.tracer.span)

    def look_again(self) -> None:
        """Others may have made visual tokens since it was admitted, of images that it shows too."""
        to_make = self.place.to_make
        self.place.look()
        if self.place.to_make != to_make:
            self._make_pixels()

    def give_way(self) -> None:
        """Leave the caches in the middle of its way; it is to be admitted again, and goes on where it was."""
        self.place.keep(self.answer.tokens[self._n_told :])
        self.close()
        self.tracer.count("schedule: preempted")

    def first_token(self) -> None:
        """Patches and prompt to the first token of the answer, as one program."""
        with self.tracer.span("first_token"):
            self.place.extend(self._rest.n_tokens)
            self._logits, token = self._bound.stages.first_token(self.pixels, self._rest, self.place.kv, self.tracer)
            self.token = self.choose(Step(self._logits, token))

    def encode(self, made: VisionTokens | None = None, images: range | None = None, end: int | None = None) -> None:
        """Patches to visual tokens, and these into their places among the prompt's embeddings.

        made: the visual tokens, where a call of the tower for several requests has made them. images, end: of these images and of
        the prompt up to that token, where what follows is encoded later (`schedule.overlap`).
        """
        span = self.tracer.span
        if self.pixels is not None and made is None:
            with span("vit"):
                made = self._bound.stages.encode(self.pixels, self.tracer)
        self.pixels = None
        self._merge(made, images, end)

    def enter_tower(self) -> None:
        """Its images are to go through the tower by `encode_part`; without images its prompt is there already."""
        if (pixels := self.pixels) is None:
            self._merge(None)
            return
        with self.tracer.span("vit"):
            self._in_tower = self._bound.stages.encode_in_parts(pixels, self.tracer)
        self.pixels, self._n_visual = None, sum(shape.visual_tokens for shape in pixels.shapes)

    def encode_part(self, n: int) -> int:
        """So many of the tower's blocks as n tokens are worth, and one at least. Returns how many patches count for them."""
        tower = self._in_tower
        assert tower is not None, "it is not in the tower"
        before = self._patches_to_come(tower)
        with self.tracer.span("vit"):
            made = tower.go_on(min(max(n * tower.n_blocks // self._n_visual, 1), tower.n_left), self.tracer.inner)
        if made is not None:
            self._in_tower = None
            self._merge(made)
        return before - self._patches_to_come(tower)

    def _patches_to_come(self, tower: InParts) -> int:
        return self._n_visual * self._bound.checkpoint.merge_size**2 * tower.n_left // tower.n_blocks

    def _merge(self, made: VisionTokens | None, images: range | None = None, end: int | None = None) -> None:
        with self.tracer.span("merge"):
            self._vision = self.place.visual_tokens(made, images)
            self._merged = self._rows(self._n_done, self._rest.n_tokens if end is None else end)
            self._hidden = merge(self._merged, self._vision, self._bound.decoder.weights.embed)

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
                self.token = self.choose(Step(logits))
            if not self.answer.tokens:
                self._logits = logits
            self._hidden = self._merged = self._vision = None  # nobody needs them any more

    def _piece(self, first: int, last: int) -> tuple[torch.Tensor, Prompt, VisionTokens | None]:
        """Some of the prompt's rows [last - first, hidden], and the visual tokens that stand in them."""
        assert self._hidden is not None, "it has not been encoded"
        assert self._merged is not None
        if last - first == len(self._hidden):
            return self._hidden, self._merged, self._vision
        assert len(self._hidden) == self._rest.n_tokens, "a prompt that is merged by pieces is computed by the same"
        vision, among = None, self._visual_rows_in(first, last)
        if self._vision is not None and among.start < among.stop:
            levels = tuple(level[among] for level in self._vision.deepstack)
            vision = VisionTokens(embeds=self._vision.embeds[among], deepstack=levels)
        return self._hidden[first:last], self._rows(first, last), vision

    def _rows(self, first: int, last: int) -> Prompt:
        """Some tokens of the rest of the prompt; views where these are on the device."""
        if (first, last) == (0, self._rest.n_tokens):
            return self._rest
        return replace(
            self._rest,
            input_ids=self._rest.input_ids[first:last],
            positions=self._rest.positions[:, first:last],
            visual_index=self._rest.visual_index[self._visual_rows_in(first, last)] - first,
        )

    def _visual_rows_in(self, first: int, last: int) -> slice:
        """Which of its visual tokens stand in those rows."""
        return slice(*torch.searchsorted(self._visual_rows, torch.tensor([first, last])).tolist())

    def steps(self, forced: Forced | None) -> Steps:
        """The decode steps of its answer, where nobody shares them. forced: tokens that the answer is made to go on with."""
        stages, place, tracer = self._bound.stages, self.place, self.tracer

        def decode(token: torch.Tensor, position: torch.Tensor) -> Step:
            place.extend(1)
            return stages.decode(token, position, place.kv, tracer)

        chosen: Decode = decode if forced is None else forced.steps(decode)
        return Steps(
            first=self.token,
            next_positions=(self._prompt.next_position,),
            most=self._n_new,
            decode=chosen,
            sample=self.choose,
            tracer=tracer,
        )

    @property
    def has_sampler(self) -> bool:
        """Whether its tokens are chosen by its own logits, or their logprobs told; the likeliest are found for all at once."""
        return self._sampler is not None

    def choose(self, step: Step) -> torch.Tensor:
        """The next token of its answer, int64 [1] on the device, from what its own step gave."""
        if self._sampler is not None:
            return self._sampler(step.logits)
        return likeliest(step, self._bound.decoder)

    @property
    def _ends(self) -> tuple[int, ...]:
        return () if self.job.request.ignore_eos else tuple(self._bound.checkpoint.eos_token_ids)

    @cached_property
    def answer(self) -> Answer:
        """Its answer, empty at first."""
        sampling, stops = self.job.request.sampling, self.job.request.stops
        new_text = partial(AnswerText, self._bound.token_bytes, stops, sampling.min_tokens)
        emitter = Emitter(new_text(), self.job.deliver, self._logprob if sampling.logprobs else None)
        text = new_text() if stops else None
        return Answer(most=self._n_new, ends=self._ends, emitter=emitter, tracer=self.tracer, text=text)

    def _logprob(self, number: int) -> TokenLogprob:
        """Of a token of its answer that the host has learnt."""
        assert self._sampler is not None
        spelt, (chosen, *top) = self._bound.token_bytes.spelt, self._sampler.logprobs(number, self.answer.tokens[number])
        others = tuple(TokenLogprob(token=token, spelt=spelt(token), logprob=logprob) for token, logprob in top)
        return TokenLogprob(token=chosen[0], spelt=spelt(chosen[0]), logprob=chosen[1], top=others)

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
            finish_reason=self.answer.finish_reason,
            reused=found.hit,
            captures=tuple(self._captures),
        )

    def close(self) -> None:
        """Give its place back, if it has one, and let go of what it has on the device: an error's traceback may hold it itself."""
        if self._place is not None:
            self._place.close()
        self._place = self.pixels = self._in_tower = self._hidden = self._merged = self._vision = None
