"""What a workbench runs and remembers: one worker thread, the newest wish first, and every result; no widgets."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import RequestCancelledError, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.measure.attribution import Attribution, attribute
from fastvl_lab.measure.audit import Audit, audit
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.floors import Ceilings, floor
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.photo import photo
from fastvl_lab.measure.statistics import Interval
from fastvl_lab.preprocessor.decode_image import open_image, read_orientation, rgb_of
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, ImageInput, Request
from fastvl_lab.run import Run
from fastvl_lab.trace import Span

STOCK, BEFORE, RECIPE = "transformers", "the run before", "this recipe"

_PREVIEW = 130  # pixels of the longer side


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every recipe: a checkpoint, a picture (a photograph's name, a path, or bytes), a prompt, how many tokens.

    name: of a picture that is bytes. size: (width, height) that it is resized to first; None leaves it as it is. within: it keeps
    its aspect ratio, and the size is that of a box around it. max_pixels: the request's; None is the checkpoint's own.
    """

    checkpoint: str
    picture: str | bytes
    prompt: str
    max_new_tokens: int
    name: str = ""
    size: tuple[int, int] | None = None
    within: bool = False
    max_pixels: int | None = None

    def request(self) -> Request:
        """Raises `ImageError` for a picture that is none."""
        size = _fitted(self.picture, self.size) if self.size and self.within else self.size
        return Request(
            images=[photo(self.picture, size)],
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            max_pixels=self.max_pixels,
            ignore_eos=True,
        )

    def about_picture(self) -> str:
        """Which it is, and what is done to it before the request."""
        name = self.name or (self.picture if isinstance(self.picture, str) else f"{len(self.picture)} bytes")
        done = "as it is" if self.size is None else f"{'within' if self.within else 'resized to'} {self.size[0]}×{self.size[1]}"
        return f"{name} {done}" + ("" if self.max_pixels is None else f", max_pixels {self.max_pixels}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One answer, and what has been measured of it since.

    run: the first. held: bytes by what held them after it. before: the recipe that it was measured beside, if any. comparison: of
    Transformers, that one, and its own. layers: a run of Transformers and one of its own with every block timed. floors: stage to
    seconds. attribution: its way from the baseline.
    """

    number: int
    question: Question
    recipe: Recipe
    run: Run
    held: Mapping[str, int]
    before: Recipe | None = None
    comparison: Comparison | None = None
    layers: Mapping[str, Run] | None = None
    floors: Mapping[str, float] | None = None
    attribution: Attribution | None = None

    @property
    def shown(self) -> Run:
        """The run to look at: of the measured ones the median, else the first."""
        return self.run if self.comparison is None else self.comparison.representative(RECIPE)

    @property
    def reference(self) -> Run | None:
        return None if self.comparison is None else self.comparison.representative(STOCK)

    @cached_property
    def audit(self) -> Audit:
        return audit(self.shown)

    @property
    def checked(self) -> Parity | None:
        """How it came through its parity check; None before it is measured."""
        return None if self.comparison is None else self.comparison.checks[RECIPE]

    @property
    def parity(self) -> bool | None:
        """Whether it computes what it must; None before it is measured."""
        return None if self.checked is None else self.checked.holds

    @cached_property
    def speedup(self) -> Interval | None:
        """How many times as fast as Transformers to the first token, where parity holds and rounds were warm."""
        return self.comparison.speedup(RECIPE) if self.comparison is not None and self.parity else None

    @cached_property
    def against_before(self) -> Interval | None:
        """The same over the recipe it was measured beside."""
        if self.comparison is None or BEFORE not in self.comparison.engines:
            return None
        return self.comparison.speedup(RECIPE, BEFORE)


@dataclass(frozen=True, kw_only=True)
class News:
    """What a session tells while it works: its state, and with it any of these.

    text: the answer so far. stages: those that have ended of a run that takes long. preview: a small JPEG of the picture that is
    asked about. result: a new one, or one that knows more. error: in a sentence.
    """

    state: str
    text: str = ""
    stages: tuple[Span, ...] = ()
    preview: bytes = b""
    result: Result | None = None
    error: str = ""


# Does what was wished for: (lab, the request, set when it is to end) -> what is known then.
Work = Callable[[Lab, Request, threading.Event], Result]


@dataclass(kw_only=True)
class _Wish:
    question: Question
    state: str
    work: Work
    stop: threading.Event = field(default_factory=threading.Event)


class Session:
    """Runs what is wished for on one thread that lives as long as it does: torch has a pool of threads for each that computes.

    A newer wish takes the place of one that waits, and ends the one that runs at its next stage or step. tell: is given `News` on
    that thread.
    """

    def __init__(self, tell: Callable[[News], None], *, device: str | None = None, dtype: str | None = None) -> None:
        self.history: list[Result] = []
        self.lab: Lab | None = None
        self._tell, self._device, self._dtype = tell, device, dtype
        self._ceilings: Ceilings | None = None
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        self._running: _Wish | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastvl-workbench", daemon=True)
        self._thread.start()

    def ask(self, question: Question, recipe: Recipe, *, repeats: int, before: Recipe | None = None) -> None:
        """Wish for an answer, and for it to be measured beside Transformers and the recipe before; returns at once."""
        self._wish_for(question, "running", partial(self._answer, question, recipe, repeats, before))

    def open_up(self, result: Result) -> None:
        """Wish for every block and layer of a result's recipe and of Transformers."""
        self._wish_for(result.question, "timing blocks and layers", partial(self._open_up, result))

    def find_floors(self, result: Result) -> None:
        """Wish for what the stages of a result must cost at least on this device."""
        self._wish_for(result.question, "measuring what the device can do", partial(self._find_floors, result))

    def attribute(self, result: Result, *, repeats: int) -> None:
        """Wish for what each toggle of a result's recipe takes off TTFT, on the way from the baseline."""
        self._wish_for(result.question, "measuring toggle by toggle", partial(self._attribute, result, repeats))

    def stop(self) -> None:
        """End what runs, and forget what waits."""
        with self._changed:
            self._wish = None
            if self._running is not None:
                self._running.stop.set()

    def close(self) -> None:
        """End the thread, and what runs on it."""
        self.stop()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Until there is nothing to do; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._wish is None and self._running is None, seconds)

    def _wish_for(self, question: Question, state: str, work: Work) -> None:
        with self._changed:
            self._wish = _Wish(question=question, state=state, work=work)
            if self._running is not None:
                self._running.stop.set()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wish is not None or self._closed)
                if self._closed:
                    return
                self._running, self._wish = self._wish, None
                wish = self._running
            assert wish is not None
            try:
                result = self._grant(wish)
                self._tell(News(state="idle", text=result.run.text, result=result))
            except RequestCancelledError:
                self._tell(News(state="stopped"))
            except Exception as error:  # said in the panel, which lives on
                self._tell(News(state="failed", error=sentence(error)))
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _grant(self, wish: _Wish) -> Result:
        question = wish.question
        if self.lab is None or self.lab.checkpoint.name != question.checkpoint:
            self._tell(News(state=f"loading {question.checkpoint}"))
            self.lab = None  # first: there may be no room for two models, and the session's length follows from what is free
            gc.collect()
            self.lab = Lab(question.checkpoint, device=self._device, dtype=self._dtype)
            self._ceilings = None
        request = question.request()
        self._tell(News(state=wish.state, preview=_preview(request.image_inputs[0])))
        return wish.work(self.lab, request, wish.stop)

    def _answer(
        self,
        question: Question,
        recipe: Recipe,
        repeats: int,
        before: Recipe | None,
        lab: Lab,
        request: Request,
        stop: threading.Event,
    ) -> Result:
        text: list[str] = []
        stages: list[Span] = []

        def on_chunk(chunk: Chunk) -> None:
            text.append(chunk.text)
            self._tell(News(state="running", text="".join(text)))

        def on_stage(stage: Span) -> None:
            if not text:
                stages.append(stage)
                self._tell(News(state=f"running, {stage.name} is done", stages=tuple(stages)))

        run = lab.run(request, recipe, on_chunk=on_chunk, on_stage=on_stage, stop=stop)
        result = Result(
            number=len(self.history) + 1, question=question, recipe=recipe, run=run, held=_held(lab, recipe), before=before
        )
        self.history.append(result)
        if repeats == 0:
            return result
        self._tell(News(state="measuring", text=run.text, result=result))
        engines: dict[str, EngineLike] = {STOCK: STOCK, **({BEFORE: before} if before else {}), RECIPE: recipe}
        return self._know(replace(result, comparison=compare(lab, request, engines, repeats=repeats, stop=stop)))

    def _open_up(self, result: Result, lab: Lab, request: Request, stop: threading.Event) -> Result:
        layers = {}
        engines: dict[str, EngineLike] = {STOCK: STOCK, RECIPE: result.recipe}
        for label, engine in engines.items():
            for _ in range(2):  # the second is warm
                run = lab.run(request, engine, trace="layers", stop=stop)
            layers[label] = replace(run, engine=label)
        return self._know(replace(result, layers=layers))

    def _find_floors(self, result: Result, lab: Lab, request: Request, _: threading.Event) -> Result:
        found = floor(lab, request, ceilings=self._ceilings)
        self._ceilings = found.ceilings
        return self._know(replace(result, floors={stage: seconds for stage, seconds in found.seconds.items() if seconds > 0}))

    def _attribute(self, result: Result, repeats: int, lab: Lab, request: Request, stop: threading.Event) -> Result:
        return self._know(replace(result, attribution=attribute(lab, request, result.recipe, repeats=repeats, stop=stop)))

    def _know(self, result: Result) -> Result:
        """Remember a result that knows more than it did."""
        self.history[result.number - 1] = result
        return result


def _fitted(picture: str | bytes, box: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the picture's aspect ratio that fits into the box."""
    width, height = read_orientation(open_image(ImageInput.of(photo(picture)))).size
    scale = min(box[0] / width, box[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _held(lab: Lab, recipe: Recipe) -> dict[str, int]:
    """Bytes by what holds them now."""
    held = {"weights": sum(weight.nbytes for weight in lab.checkpoint.model.parameters()), **lab.memory.held()}
    held["CUDA graphs"] = sum(capture.n_bytes for capture in lab.captures(recipe))
    return held


def _preview(image: ImageInput) -> bytes:
    """The picture as it is, small, as JPEG."""
    picture, encoded = rgb_of(image), io.BytesIO()
    picture.thumbnail((_PREVIEW, _PREVIEW))
    picture.save(encoded, "JPEG")
    return encoded.getvalue()
