"""Whether an engine computes what Transformers computes: the one check before any time is compared.

In float32 the logits of the prompt's last token, and the tokens, must be the oracle's. In half precision tokens prove nothing: two
right engines choose differently wherever two tokens are nearly as likely. There the engine's logits along tokens that all are
given must stay within twice half precision's own error, that of Transformers in the same dtype, against Transformers in float32;
and each token that it chose itself must be as good as the best one, within those errors.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from fastvl_lab import preprocessor, vit
from fastvl_lab.checkpoint.wider import in_wider_dtype, wider
from fastvl_lab.engine import Engine, EngineLike, Place, find
from fastvl_lab.errors import RequestError, sentence
from fastvl_lab.lab import Lab, dtype_name
from fastvl_lab.measure.tasks import (
    Decoding,
    Tower,
    bound_forward,
    bound_preprocessor,
    stock_forward,
    text_prompt,
    text_tokens,
)
from fastvl_lab.preprocessor.layout import own_settings
from fastvl_lab.preprocessor.patchify import to_picture
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import UNNAMED, Prompt, Request, check_request
from fastvl_lab.run import Run
from fastvl_lab.trace import Tracer

# Of the largest logit: what float32 may be off by.
FLOAT32_TOLERANCE = 1e-4

# Tokens that all engines go on with in half precision.
STEPS = 8

# Of an answer in half precision, how many tokens are held against the truth; each takes a row of logits.
_CHECKED_TOKENS = 64

# An engine may be off by twice what Transformers is in the same dtype.
BUDGET = 2.0


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How an engine came through.

    oracle: who answers for it, Transformers on the engine's own pixels; expected, expected_text: its answer. why: the sentence
    where parity does not hold, else "". by: what was compared. error, budget: of logits, as shares of the oracle's. other_from: the
    number of the first token that is not the oracle's, None where all are. moved: by how much the engine's pixels move one of
    Transformers' logits at most, None where they are the reference's. in_bounds: whether its pixels are as near to the stock ones
    as its recipe promises.
    """

    oracle: str
    holds: bool
    expected: tuple[int, ...] = ()
    expected_text: str = ""
    why: str = ""
    by: Literal["tokens", "logits"] = "tokens"
    error: float | None = None
    budget: float | None = None
    other_from: int | None = None
    moved: float | None = None
    in_bounds: bool = True

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Parity:
        """Read the form of `dataclasses.asdict`."""
        return cls(**{**record, "expected": tuple(record["expected"])})

    @property
    def _of_own(self) -> str:
        """The error as a multiple of the dtype's own, or ""; the budget is `BUDGET` of these."""
        by_logits = self.by == "logits" and self.error is not None and self.budget is not None
        return f"{BUDGET * self.error / self.budget:.1f}×" if by_logits else ""  # type: ignore[operator]

    @property
    def says(self) -> str:
        """In a few words, for tables."""
        if not self.holds:
            return "NO"
        on_its_pixels = "" if self.moved is None else ", on its pixels"
        return f"yes{on_its_pixels}" + (f", {self._of_own} the dtype's own error" if self._of_own else "")

    @property
    def sentence(self) -> str:
        """What was found, for a reader who has not asked yet."""
        if not self.holds:
            return f"{self.why}: its time is not compared"
        whose = "Transformers" if self.moved is None else "Transformers on this recipe's pixels"
        apart = "" if self.other_from is None else f"; tokens differ from number {self.other_from + 1} on"
        return (
            f"within {self._of_own} of this dtype's own error, beside {whose}{apart}" if self._of_own else f"same tokens as {whose}"
        )


def worst_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest relative error of any row of ours against the truth's, [n, width] each; NaN where there is one.

    The worst row, and not all together: what went wrong may be a few rows of thousands.
    """
    return float(torch.stack([((ours.to(t.dtype) - t).norm(dim=1) / t.norm(dim=1)).max() for ours, t in pairs]).max())


def allowed_error(own: float, dtype: torch.dtype) -> float:
    """What an engine's error may be where plain PyTorch's own in the same dtype is `own`: twice that, plus rounding."""
    return BUDGET * own + torch.finfo(dtype).eps


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What an oracle makes of a request along some tokens: in the wider dtype, and its own error in the lab's.

    tokens: what all go on with. logits: [1 + tokens, vocab] on the host, of the prompt's last token and after each. own_error: the
    worst step's relative error; own_off: the largest error of a single logit.
    """

    request: Request
    oracle: str
    tokens: tuple[int, ...]
    logits: torch.Tensor
    own_error: float
    own_off: float

    def error(self, logits: torch.Tensor) -> float:
        """The worst step's relative error of logits [1 + tokens, vocab]; NaN where there is one."""
        return worst_error([(logits.cpu(), self.logits)])

    def shortfall(self) -> float:
        """By how much the worst of the tokens falls short of the best one's logit."""
        chosen = self.logits[: len(self.tokens)].gather(1, torch.tensor(self.tokens)[:, None])[:, 0]
        return float((self.logits[: len(self.tokens)].max(dim=1).values - chosen).max())


def truth_along(lab: Lab, request: Request, oracle: str, tokens: Sequence[int]) -> Truth:
    """The truth of an oracle (a peer's text: Transformers on the pixels that some recipe makes) along these tokens."""
    own = lab.logits_along(request, oracle, tokens)
    given = torch.tensor(tokens, dtype=torch.int64)

    def in_wider() -> torch.Tensor:
        return find(oracle).bind(Place(checkpoint=in_wider_dtype(lab.checkpoint), memory=lab.memory)).logits_along(request, given)

    logits = lab.compute(in_wider)
    off = float((own.to(logits.dtype) - logits).abs().max())
    return Truth(
        request=request, oracle=oracle, tokens=tuple(tokens), logits=logits, own_error=worst_error([(own, logits)]), own_off=off
    )


def check_greedy(request: Request) -> None:
    """Raise `RequestError` for what is no request, or one whose tokens are not its logits' likeliest: they prove nothing.

    One that draws makes others by right; penalties and biases choose by logits that no engine tells.
    """
    check_request(request)
    if not request.sampling.is_greedy:
        what = "draws its tokens" if request.sampling.draws else "chooses by changed logits"
        raise RequestError(
            f"the request's sampling {what}, and engines are held to Transformers by the likeliest ones; leave its sampling out, "
            f"or measure it by Lab.run and fl.load"
        )


class Oracles:
    """Who answers for engines on one request; each is asked once, when it is first needed. known: oracles' runs that are there."""

    def __init__(
        self, lab: Lab, request: Request, *, known: Mapping[str, Run] | None = None, stop: threading.Event | None = None
    ) -> None:
        check_greedy(request)
        self.lab, self.request, self._stop = lab, request, stop
        self._runs: dict[str, Run] = dict(known or {})
        self._truths: dict[tuple[str, tuple[int, ...]], Truth] = {}

    def of(self, engine: EngineLike) -> str:
        """Who answers for the engine; pixels are no matter where there is no image."""
        backend = self.lab.checkpoint.image_backend
        return self.lab.engine(engine).oracle(backend) if self.request.image_inputs else "transformers"

    def run(self, oracle: str) -> Run:
        """The oracle's own run of the request."""
        if oracle not in self._runs:
            self._runs[oracle] = self.lab.run(self.request, oracle, stop=self._stop, trace="off")
        return self._runs[oracle]

    def truth(self, oracle: str, tokens: tuple[int, ...]) -> Truth:
        """What is true along these tokens, in a wider dtype."""
        if (oracle, tokens) not in self._truths:
            self._truths[oracle, tokens] = truth_along(self.lab, self.request, oracle, tokens)
        return self._truths[oracle, tokens]


def within_budget(found: Mapping[str, float | str], reference: str, dtype: torch.dtype) -> frozenset[str]:
    """Those whose error is at most twice the reference's in the same dtype, plus rounding; none where that could not run."""
    own = found[reference]
    if isinstance(own, str):
        return frozenset()
    budget = allowed_error(own, dtype)
    return frozenset(label for label, error in found.items() if not isinstance(error, str) and error <= budget)


def check(
    oracles: Oracles, given: EngineLike, runs: Sequence[Run], logits: torch.Tensor, base: str, *, steps: int | None = None
) -> Parity:
    """Hold an engine against its oracle; raises what the oracle raises.

    runs: all of its runs of the request, at least one. logits: float32 [vocab], of the last prompt token of any; empty for an
    endpoint. base: the oracle of the engine that others are compared with, which `Parity.moved` refers to. steps: how many tokens
    it is made to go on with; by default none in float32, and in half precision as many as it made, up to `STEPS`.
    """
    lab, engine, oracle = oracles.lab, oracles.lab.engine(given), oracles.of(given)
    theirs = oracles.run(oracle)
    found = Parity(
        oracle=oracle,
        holds=False,
        expected=theirs.tokens,
        expected_text=theirs.text,
        other_from=min((_departs(run.tokens, theirs.tokens) for run in _others(runs, theirs)), default=None),
        moved=None if oracle == base else float((theirs.logits - oracles.run(base).logits).abs().max()),
        in_bounds=_in_bounds(lab, oracles.request, engine),
    )
    for who, some in (("its", logits), (f"the {oracle}", theirs.logits)):
        if not bool(some.isfinite().all()):
            return dataclasses.replace(found, why=f"{who} logits are not finite")
    if not found.in_bounds:
        return dataclasses.replace(found, why="its pixels are further from the stock ones than it promises")
    in_float32 = lab.dtype == torch.float32
    if in_float32:
        found = _by_tokens(found, engine, theirs, logits)
    if steps is None:
        steps = 0 if in_float32 else min(STEPS, max(len(run.tokens) for run in runs) - 1)
    if not found.why and not engine.remote and (steps or not in_float32):
        found = _by_logits(found, oracles, engine, steps)
    if not found.why and not in_float32:
        found = _by_how_good_tokens_are(found, oracles, runs)
    return dataclasses.replace(found, holds=not found.why)


def _by_tokens(found: Parity, engine: Engine, theirs: Run, logits: torch.Tensor) -> Parity:
    """By tokens, and where it shows them by the prompt's logits."""
    oracle = found.oracle
    if len(logits):
        error = float((logits - theirs.logits).abs().max() / theirs.logits.abs().max())
        found = dataclasses.replace(found, error=error, budget=FLOAT32_TOLERANCE)
        if not error <= FLOAT32_TOLERANCE:
            off = f"{error:.1e} of the largest, over {FLOAT32_TOLERANCE:.0e}"
            return dataclasses.replace(found, why=f"its logits differ from those of {oracle} by {off}")
    if found.other_from is not None:
        others = "one run to the next" if engine.name == oracle else f"those of {oracle}"
        return dataclasses.replace(found, why=f"its tokens differ from {others}")
    return found


def _by_logits(found: Parity, oracles: Oracles, engine: Engine, steps: int) -> Parity:
    """By logits along tokens that all are made to go on with."""
    lab, oracle = oracles.lab, found.oracle
    truth = oracles.truth(oracle, text_tokens(lab, steps))
    error, budget = truth.error(lab.logits_along(oracles.request, engine, truth.tokens)), allowed_error(truth.own_error, lab.dtype)
    off = f"its logits are off by {error:.1%}, over {budget:.1%}, twice the error of {oracle} in {dtype_name(lab.dtype)}"
    return dataclasses.replace(found, by="logits", error=error, budget=budget, why="" if error <= budget else off)


def _by_how_good_tokens_are(found: Parity, oracles: Oracles, runs: Sequence[Run]) -> Parity:
    """By whether each token that it chose is as good as the best, within errors of the dtype."""
    others = [run.tokens[:_CHECKED_TOKENS] for run in _others(runs, oracles.run(found.oracle))]
    for made in dict.fromkeys([found.expected[:_CHECKED_TOKENS], *others]):
        if UNNAMED in made:
            why = f"its answer is not that of {found.oracle}, and without its tokens' ids nobody can tell whether they are as good"
            return dataclasses.replace(found, why=why)
        truth = oracles.truth(found.oracle, made)
        # Either of two logits, the chosen one and the best, may be off by twice what Transformers' own are.
        if not truth.shortfall() <= 2 * BUDGET * truth.own_off:
            why = f"a token of its answer falls {truth.shortfall():.2g} short of the best one's logit, and the logits of "
            why += f"{found.oracle} in {dtype_name(oracles.lab.dtype)} are off by {truth.own_off:.2g}"
            return dataclasses.replace(found, why=why)
    return found


def _others(runs: Sequence[Run], theirs: Run) -> list[Run]:
    """Those whose answer is another one."""
    return [run for run in runs if not run.made(theirs.tokens, theirs.text)]


def _departs(tokens: Sequence[int], others: Sequence[int]) -> int:
    """The number of the first token that is another, or that an endpoint does not name; of two answers that are not the same."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(tokens), len(others)))


def _in_bounds(lab: Lab, request: Request, engine: Engine) -> bool:
    """Whether a recipe's pixels are as near to the stock ones as it promises; one that promises nothing keeps its word."""
    within = engine.within(lab.checkpoint.image_backend)
    if engine.recipe is None or within is None or not request.image_inputs:
        return True
    pictures = (model_pictures(lab, request, recipe) for recipe in (engine.recipe, Recipe.baseline()))
    return max(difference.largest for difference in pixel_differences(*pictures)) <= within


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelDifference:
    """How far two recipes' pixels are apart, in levels of 255: a map uint8 [height, width, 3], its largest and its mean."""

    levels: np.ndarray
    largest: int
    mean: float


def model_pictures(lab: Lab, request: Request, recipe: Recipe) -> tuple[np.ndarray, ...]:
    """The request's images as the model sees them: resized, before normalisation; uint8 [height, width, 3] each."""
    if recipe.preprocessor.patchify == "triton":  # which changes no pixel, but writes them in the model's dtype
        recipe = recipe.replace("preprocessor.patchify", "torch")
    bound, layout = bound_preprocessor(lab, request, recipe), own_settings(lab.checkpoint)
    pixels = lab.compute(lambda: bound.patches(request))
    parts = pixels.patches.cpu().split([grid.n_patches for grid in pixels.grids])
    return tuple(to_picture(part, grid, layout).numpy() for part, grid in zip(parts, pixels.grids, strict=True))


def pixel_differences(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[PixelDifference, ...]:
    """Pictures as `model_pictures` gives them for two recipes, image by image."""
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        levels = np.abs(one.astype(np.int16) - other).astype(np.uint8)
        differences.append(PixelDifference(levels=levels, largest=int(levels.max()), mean=float(levels.mean())))
    return tuple(differences)


@dataclass(frozen=True, kw_only=True)
class StageCheck:
    """How an engine's stage came through: its worst row's relative error, or why it could not run.

    kv_bytes: what keys and values take at the end, of the decoder.
    """

    error: float | str
    kv_bytes: int | None = None


def check_tower(lab: Lab, task: Tower, engines: Mapping[str, EngineLike]) -> dict[str, StageCheck]:
    """Every recipe's visual tokens, DeepStack features included, against the stock tower in a wider dtype on the same pixels."""
    stock, request = in_wider_dtype(lab.checkpoint).vision.module, task.request

    def one(engine: EngineLike) -> StageCheck:
        recipe = lab.recipe(engine)
        sent = bound_preprocessor(lab, request, recipe)
        stock_form = dataclasses.replace(recipe.preprocessor, payload="float32", temporal="duplicated")
        pixels, whole = sent.pixels(request), preprocessor.bind(stock_form, lab.checkpoint).patches(request)
        patches, grids = whole.patches.to(lab.device, wider(lab.dtype)), torch.tensor(whole.grids, device=lab.device)
        truth = lab.checkpoint.family.stock_vision(stock, patches, grids)
        made = vit.bind(recipe.vit, lab.checkpoint, sent.patch_format)(pixels, Tracer(lab.device, "off"))
        return StageCheck(error=worst_error(zip(made.parts, truth.parts, strict=True)))

    return _each(lab, engines, one)


# The truth takes its prompt in pieces, because in float32 torch may write the scores of all of it out.
_PIECE = 1024


def check_decoder(lab: Lab, task: Decoding, engines: Mapping[str, EngineLike]) -> dict[str, StageCheck]:
    """Every engine's logits of a prompt's last token and after each of the steps' tokens, which are forced on all of them alike.

    Against the stock decoder in a wider dtype. Positions are those of a prompt with an image in it, so that each axis counts.
    """
    prompt = _with_places_of_an_image(text_prompt(lab, task.length, task.n_steps))
    forced = torch.tensor(text_tokens(lab, task.n_steps), device=lab.device)
    truth = lab.compute(partial(_decoder_truth, lab, prompt, forced))

    def one(engine: EngineLike) -> StageCheck:
        with bound_forward(lab, lab.engine(engine))(prompt, len(forced), forced) as forward:
            logits = torch.stack(list(forward.logits))
            return StageCheck(error=worst_error([(logits, truth)]), kv_bytes=forward.n_bytes())

    return _each(lab, engines, one)


@torch.inference_mode()
def _decoder_truth(lab: Lab, prompt: Prompt, forced: torch.Tensor) -> torch.Tensor:
    """The stock decoder's logits [1 + forced, vocab] in a wider dtype."""
    text = in_wider_dtype(lab.checkpoint).text
    with stock_forward(text.module, text.head, prompt, len(forced), forced, piece=_PIECE) as forward:
        return torch.stack(list(forward.logits))


def _each(lab: Lab, engines: Mapping[str, EngineLike], one: Callable[[EngineLike], StageCheck]) -> dict[str, StageCheck]:
    """One option that a device cannot run must not cost the others their rows."""

    @torch.inference_mode()
    def checked(engine: EngineLike) -> StageCheck:
        try:
            return one(engine)
        except Exception as error:
            return StageCheck(error=sentence(error))

    return {label: lab.compute(partial(checked, engine)) for label, engine in engines.items()}


def _with_places_of_an_image(prompt: Prompt) -> Prompt:
    """The prompt with its middle half at the positions of a square of visual tokens (arXiv 2409.12191, M-RoPE)."""
    n, device = prompt.n_tokens, prompt.positions.device
    side = math.isqrt(n // 2)
    first = (n - side * side) // 2
    row, column = (x.flatten() for x in torch.meshgrid(*[torch.arange(side, device=device)] * 2, indexing="ij"))
    image = first + torch.stack([torch.zeros_like(row), row, column])
    rest = first + side + torch.arange(n - first - side * side, device=device)
    positions = torch.cat([prompt.positions[:, :first], image, rest.expand(3, -1)], dim=1)
    return dataclasses.replace(prompt, positions=positions, next_position=first + side + len(rest))
