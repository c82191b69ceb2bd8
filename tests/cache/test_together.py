"""Several requests of different lengths share forwards: each has the logits that it has alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from fastvl_lab import Lab, Recipe
from fastvl_lab.cache import Place, together
from fastvl_lab.cache.memory import Memory
from fastvl_lab.decoder.steps import merge
from fastvl_lab.measure.tasks import text_prompt
from fastvl_lab.pipeline import Pipeline
from fastvl_lab.request import Prompt
from fastvl_lab.trace import Tracer

OFF = Tracer(torch.device("cpu"), "off")
LENGTHS, STEPS = (37, 5, 64, 1), 6
BASELINE, FASTEST = Recipe.baseline(), Recipe.fastest()
RECIPES = {
    "concat, eager": BASELINE.choose("cache.kv", "concat"),
    "paged, eager": BASELINE.choose("cache.kv", "paged"),
    "concat, fastest": FASTEST.choose("cache.kv", "concat"),
    "paged, fastest": FASTEST.choose("cache.kv", "paged"),
    "paged, padded, eager": BASELINE.choose("cache.kv", "paged").replace(
        {"vit.tower": "lean", "capture.shapes": "multiples_of_64"}
    ),
    "paged, padded, fastest": FASTEST.choose("cache.kv", "paged").choose("capture.shapes", "powers_of_two"),
}


def _tokens(number: int) -> list[int]:
    return [(17 * number + 31 * step) % 256 for step in range(STEPS)]


def _place(pipeline: Pipeline, prompt: Prompt) -> Place:
    return pipeline.cache.admit(prompt, STEPS + 1, tuple)


def _prefilled(pipeline: Pipeline, place: Place, prompt: Prompt) -> torch.Tensor:
    place.extend(prompt.n_tokens)
    hidden = merge(prompt, None, pipeline.decoder.weights.embed)
    return pipeline.stages.prefill(hidden, prompt, None, place.kv, OFF)


def _alone(pipeline: Pipeline, number: int, prompt: Prompt) -> Iterator[torch.Tensor]:
    """Logits after the prompt, and after each of the tokens."""
    place = _place(pipeline, prompt)
    yield _prefilled(pipeline, place, prompt)[0].clone()
    for step, token in enumerate(_tokens(number)):
        place.extend(1)
        position = torch.tensor([prompt.next_position + step])
        yield pipeline.stages.decode(torch.tensor([token]), position, place.kv, OFF).logits[0].clone()
    place.close()


@pytest.mark.parametrize("name", RECIPES)
@torch.inference_mode()
def test_decode_steps_of_requests_that_come_and_go(lab: Lab, name: str) -> None:
    """Each is prefilled by itself; then steps of all, of some, and of one alone, in any order."""
    checkpoint = dataclasses.replace(lab.checkpoint, session_len=256)
    pipeline = Pipeline(checkpoint, RECIPES[name], Memory(checkpoint, budget=2**26))
    prompts = [text_prompt(lab, length, STEPS) for length in LENGTHS]
    expected = [list(_alone(pipeline, number, prompt)) for number, prompt in enumerate(prompts)]
    places = [_place(pipeline, prompt) for prompt in prompts]
    for number in (2, 0, 3, 1):
        assert (_prefilled(pipeline, places[number], prompts[number])[0] - expected[number][0]).abs().max() < 1e-4

    done = [0] * len(prompts)
    for sharing in ((0, 1, 2, 3), (0, 1, 2, 3), (3, 1), (1,), (0, 1, 2, 3), (2, 0)):
        kv = together([places[number].sequence for number in sharing])
        kv.extend([1] * len(sharing))
        tokens = torch.tensor([_tokens(number)[done[number]] for number in sharing])
        positions = torch.tensor([prompts[number].next_position + done[number] for number in sharing])
        logits = pipeline.stages.decode(tokens, positions, kv, OFF).logits
        for row, number in enumerate(sharing):
            done[number] += 1
            assert (logits[row] - expected[number][done[number]]).abs().max() < 1e-4, (sharing, number)
    # A request goes on alone in the cache that it had for itself.
    places[0].extend(1)
    token, position = torch.tensor([_tokens(0)[done[0]]]), torch.tensor([prompts[0].next_position + done[0]])
    logits = pipeline.stages.decode(token, position, places[0].kv, OFF).logits
    assert (logits[0] - expected[0][done[0] + 1]).abs().max() < 1e-4
    for place in places:
        place.close()


@pytest.mark.parametrize("name", ["concat, eager", "paged, fastest"])
@torch.inference_mode()
def test_prompts_and_steps_share_forwards(lab: Lab, name: str) -> None:
    """One prefill of all prompts, packed; then steps of all in one cache, which each extends."""
    checkpoint = dataclasses.replace(lab.checkpoint, session_len=256)
    pipeline = Pipeline(checkpoint, RECIPES[name], Memory(checkpoint, budget=2**26))
    prompts = [text_prompt(lab, length, STEPS) for length in LENGTHS]
    expected = [list(_alone(pipeline, number, prompt)) for number, prompt in enumerate(prompts)]
    packed = Prompt(
        input_ids=torch.cat([prompt.input_ids for prompt in prompts]),
        positions=torch.cat([prompt.positions for prompt in prompts], dim=1),
        visual_index=prompts[0].visual_index,
        next_position=0,
        images=(),
    )
    places = [_place(pipeline, prompt) for prompt in prompts]
    kv = together([place.sequence for place in places])
    kv.extend(LENGTHS)
    made = [pipeline.stages.prefill(merge(packed, None, pipeline.decoder.weights.embed), packed, None, kv, OFF)]
    positions = torch.tensor([prompt.next_position for prompt in prompts])
    for step in range(STEPS):
        kv.extend([1] * len(prompts))
        tokens = torch.tensor([_tokens(number)[step] for number in range(len(prompts))])
        made.append(pipeline.stages.decode(tokens, positions + step, kv, OFF).logits)
    for number, own in enumerate(expected):
        assert all((logits[number] - alone).abs().max() < 1e-4 for logits, alone in zip(made, own, strict=True))
