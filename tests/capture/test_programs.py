"""The stages' programs: on the same inputs they do the same however often they are called, and leave the inputs as they were.

A recorded or compiled program is called before the call that counts, and its inputs are buffers that are used again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastvl_lab import Lab, Recipe, Request, photo, preprocessor, vit
from fastvl_lab.cache import BoundCache
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture import Stages
from fastvl_lab.capture.execute import Program
from fastvl_lab.capture.stages import decode_program, first_token_program, prefill_program, vit_program
from fastvl_lab.catalogue import Capture, Target, toggles
from fastvl_lab.decoder import bind_decoder
from fastvl_lab.decoder.steps import merge
from fastvl_lab.decoder.weights import decoder_weights
from fastvl_lab.inputs import leaves
from fastvl_lab.tokenizer import tokenize
from fastvl_lab.trace import Tracer

CPU = Target(device=torch.device("cpu"))
OFF = Tracer(CPU.device, "off")
PLAIN = Recipe.parse("baseline, vit.tower=lean, cache.kv=static, preprocessor.resize=pillow, preprocessor.patchify=torch")
BYTES = PLAIN.replace({"preprocessor.temporal": "folded", "preprocessor.payload": "uint8_folded"})


def _ways(slot: str) -> Iterator[tuple[Recipe, str, str]]:
    """Every option of a slot alone, and the last of all its toggles together, each with a padding and a kind of slots.

    But for the stock tower, which is no program, and what needs a device. Triton's kernels run in its interpreter, without padding,
    which would take long.
    """
    paddings, kinds = itertools.cycle(("exact", "multiples_of_64")), itertools.cycle(("static", "static", "paged"))
    recipes, last = [(PLAIN, False)], PLAIN
    for toggle in toggles():
        if toggle.slot == slot and toggle.path != "vit.tower":
            options = [o for o in toggle.options if o.needs.package == "triton" or o.needs.unmet(CPU) is None]
            recipes += [(PLAIN.choose(toggle.path, option.value), option.needs.package == "triton") for option in options[1:]]
            last = last.choose(toggle.path, options[-1].value)
    for recipe, interpreted in [*recipes, (BYTES, False), (last, True)]:
        yield recipe, "exact" if interpreted else next(paddings), next(kinds)


def _does_the_same_again(program: Program, inputs: Any) -> tuple[torch.Tensor, ...]:
    """Call it twice; what it gave."""
    before = [leaf.tensor.clone() for leaf in leaves(inputs)]
    first = tuple(output.clone() for output in program(inputs))
    for output, again in zip(first, program(inputs), strict=True):
        assert torch.equal(output, again)
        assert output.isfinite().all()
    for leaf, tensor in zip(leaves(inputs), before, strict=True):
        assert torch.equal(leaf.tensor, tensor), leaf.name
    return first


class _Seen:
    """In place of a stage's way to run: notes the inputs, and runs the program."""

    def __init__(self, program: Program) -> None:
        self._program, self.inputs = program, None

    def __call__(self, inputs: Any, tracer: Tracer) -> tuple[torch.Tensor, ...]:
        self.inputs = inputs
        return self._program(inputs)


@dataclass(kw_only=True, eq=False)
class _Bound:
    """A recipe's programs, and a request's inputs to them."""

    lab: Lab
    recipe: Recipe
    padding: str
    kv: str

    def __post_init__(self) -> None:
        checkpoint = dataclasses.replace(self.lab.checkpoint, session_len=256)
        self.request = Request(images=[photo("coffee", (84, 56))], prompt="?", max_new_tokens=4, min_pixels=56 * 56)
        self.images = images = preprocessor.bind(self.recipe.preprocessor, checkpoint)
        encoder = vit.bind(self.recipe.vit, checkpoint, images.patch_format)
        assert isinstance(encoder, vit.LeanEncoder)
        self.encoder, self.decoder = encoder, bind_decoder(self.recipe.attention, decoder_weights(checkpoint))
        cache = BoundCache(dataclasses.replace(self.recipe.cache, kv=self.kv), Memory(checkpoint), family="", images_by="")
        slot = Capture(shapes=self.padding, prefill="compile", decode="compile")  # by tables, however they are run
        self.stages = Stages(slot, encoder, self.decoder, cache.store, merge_size=2, graphs=None)
        self.programs = {
            "vit": vit_program(encoder),
            "prefill": prefill_program(self.decoder),
            "first_token": first_token_program(encoder, self.decoder),
            "decode": decode_program(self.decoder, samples=True),
        }
        self.seen = {stage: _Seen(program) for stage, program in self.programs.items()}
        for stage, seen in self.seen.items():
            setattr(self.stages, f"_{stage}", seen)
        self.prompt = tokenize(self.request, images.open(self.request).grids, checkpoint)
        self.place = cache.admit(self.prompt, 4, tuple)
        self.place.extend(self.prompt.n_tokens)

    def again(self, stage: str) -> tuple[torch.Tensor, ...]:
        """The stage's program on the inputs that it was given last."""
        return _does_the_same_again(self.programs[stage], self.seen[stage].inputs)


@torch.inference_mode()
def test_the_towers_program_writes_into_none_of_its_inputs(shallow: Lab) -> None:
    for recipe, padding, kv in _ways("vit"):
        bound = _Bound(lab=shallow, recipe=recipe, padding=padding, kv=kv)
        bound.stages.encode(bound.images.pixels(bound.request), OFF)
        made = bound.again("vit")
        plain = bound.encoder(bound.images.pixels(bound.request), OFF)
        for ours, theirs in zip(made, plain.parts, strict=True):
            assert (ours[: len(theirs)] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("name", [pytest.param("tiny-qwen2.5-vl", marks=pytest.mark.nightly), "tiny-qwen3-vl"])
def test_the_decoders_programs_write_into_none_of_their_inputs(shallow_labs: dict[str, Lab], name: str) -> None:
    """Of the family with DeepStack; the other's are the same without it."""
    shallow = shallow_labs[name]
    for recipe, padding, kv in _ways("attention"):
        bound = _Bound(lab=shallow, recipe=recipe, padding=padding, kv=kv)
        pixels, prompt, kv = bound.images.pixels(bound.request), bound.prompt, bound.place.kv
        vision = bound.encoder(pixels, OFF)
        bound.stages.prefill(merge(prompt, vision, bound.decoder.weights.embed), prompt, vision, kv, OFF)
        (logits,) = bound.again("prefill")

        bound.stages.first_token(pixels, prompt, kv, OFF)
        again, token = bound.again("first_token")
        assert (again - logits).abs().max() <= 1e-4
        assert token.tolist() == [int(again.argmax())]

        bound.place.extend(1)
        bound.stages.decode(token, torch.tensor([prompt.next_position]), kv, OFF)
        bound.again("decode")
        bound.place.close()
