"""The stages' programs: on the same inputs they do the same however often they are called, and leave the inputs as they were.

A recorded or compiled program is called before the call that counts, and its inputs are buffers that are used again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from fastvl_lab import Lab, Recipe, Request, photo, preprocessor, vit
from fastvl_lab.cache import BoundCache
from fastvl_lab.cache.memory import Memory
from fastvl_lab.capture.execute import Program, Tensors
from fastvl_lab.capture.shapes import size_of
from fastvl_lab.capture.stages import Programs, prompt_inputs, step_inputs, vit_inputs, with_rows
from fastvl_lab.catalogue import Target, toggles
from fastvl_lab.decoder import bind_decoder
from fastvl_lab.decoder.steps import merge
from fastvl_lab.decoder.weights import decoder_weights
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


def _does_the_same_again(program: Program, tensors: Tensors, rest: Hashable = None) -> tuple[torch.Tensor, ...]:
    """Call it twice; what it gave."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    first = tuple(output.clone() for output in program(tensors, rest))
    for output, again in zip(first, program(tensors, rest), strict=True):
        assert torch.equal(output, again)
        assert output.isfinite().all()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    return first


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
        self.programs = Programs(encoder=encoder, decoder=self.decoder, layers=cache.layers, in_place=cache.in_place)
        self.prompt = tokenize(self.request, images.open(self.request).grids, checkpoint)
        self.size, self.padded = size_of(self.padding), self.padding != "exact"
        self.place = cache.admit(self.prompt, 4, tuple)
        self.place.extend(self.prompt.n_tokens)

    def of_tower(self) -> tuple[dict[str, torch.Tensor], Hashable]:
        return vit_inputs(self.encoder, self.images.pixels(self.request), 2, self.size, OFF)

    def of_prompt(self, name: str, rows: torch.Tensor, n_visual: int) -> dict[str, torch.Tensor]:
        return prompt_inputs(self.prompt, {name: rows}, n_visual, self.place.kv, self.size, OFF)  # type: ignore[arg-type]


@torch.inference_mode()
def test_the_towers_program_writes_into_none_of_its_inputs(lab: Lab) -> None:
    for recipe, padding, kv in _ways("vit"):
        bound = _Bound(lab=lab, recipe=recipe, padding=padding, kv=kv)
        tensors, rest = bound.of_tower()
        made = _does_the_same_again(bound.programs.vit(), tensors, rest)
        plain = bound.encoder(bound.images.pixels(bound.request), OFF)
        for ours, theirs in zip(made, plain.parts, strict=True):
            assert (ours[: len(theirs)] - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.inference_mode()
def test_the_decoders_programs_write_into_none_of_their_inputs(lab: Lab) -> None:
    for recipe, padding, kv in _ways("attention"):
        bound = _Bound(lab=lab, recipe=recipe, padding=padding, kv=kv)
        of_vit, rest = bound.of_tower()
        n_visual = len(of_vit["patches"]) // 4
        vision = bound.encoder(bound.images.pixels(bound.request), OFF)
        inputs = bound.of_prompt("hidden", merge(bound.prompt, vision, bound.decoder.weights.embed), n_visual)
        inputs |= {f"deepstack.{level}": with_rows(added, n_visual) for level, added in enumerate(vision.deepstack)}
        (logits,) = _does_the_same_again(bound.programs.prefill(padded=bound.padded), inputs)

        whole = bound.of_prompt("input_ids", bound.prompt.input_ids, n_visual)
        whole |= {f"vit.{name}": tensor for name, tensor in of_vit.items()}
        again, token = _does_the_same_again(bound.programs.first_token(padded=bound.padded), whole, rest)
        assert (again - logits).abs().max() <= 1e-4
        assert token.tolist() == [int(again.argmax())]

        bound.place.extend(1)
        step = step_inputs(token, torch.tensor([bound.prompt.next_position]), bound.place.kv, bound.size, OFF)  # type: ignore[arg-type]
        _does_the_same_again(bound.programs.decode(padded=bound.padded), step)
        bound.place.close()
