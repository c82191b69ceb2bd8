"""What a workbench runs and remembers: one worker thread, the newest wish first, and every result; no widgets."""

from __future__ import annotations

import gc
import io
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256

import torch

from fastvl_lab.catalogue import OptionValue, Target, toggles
from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import FastvlError, ImageError, RecipeError, RequestCancelledError, RequestError, sentence
from fastvl_lab.lab import Lab
from fastvl_lab.learnt import versions
from fastvl_lab.measure.audit import Audit, audit
from fastvl_lab.measure.compare import Attribution, Comparison, attribute, compare
from fastvl_lab.measure.environment import environment
from fastvl_lab.measure.floors import Ceilings, floor
from fastvl_lab.measure.load import Load, load
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.profile import Profile, profile_request
from fastvl_lab.measure.publish import photo
from fastvl_lab.measure.quiet import Quiet
from fastvl_lab.measure.recipes import STOCK, stages_of
from fastvl_lab.measure.samples import FOR_AN_INTERVAL, Interval, RunSample
from fastvl_lab.preprocessor.decode_image import open_image, read_orientation, rgb_of
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, ImageInput, Request
from fastvl_lab.run import Run
from fastvl_lab.trace import Span, Trace
from fastvl_lab.view.workbench import rivals

BEFORE, RECIPE = "the run before", "this recipe"
UNDER_LOAD = "under load"

_PREVIEW = 128  # pixels of the longer side
_PATIENCE = 20.0  # seconds to wait for the end of a stage
_QUIET = 0.5  # seconds without a wish before the background is worked on
_ROUNDS_QUIET = Quiet(wait=2.0, total=10.0)  # somebody looks on
_IN_BACKGROUND = 120.0  # seconds that what each toggle would save may take to measure


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A photograph's name, a path, or bytes, which `name` is of; two of bytes are equal where names and bytes are.

    digest: SHA-256 of bytes that only an earlier session had; then `source` is empty.
    """

    source: str | bytes
    name: str = ""
    digest: str = ""

    @cached_property
    def _same(self) -> tuple[str, str]:
        if isinstance(self.source, str):
            return self.source, ""
        return self.name, self.digest or sha256(self.source).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self._same == other._same

    def __hash__(self) -> int:
        return hash(self._same)

    def __str__(self) -> str:
        return self.name or (self.source if isinstance(self.source, str) else f"{len(self.source)} bytes")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every recipe.

    size: (width, height) that pictures are resized to first; None leaves them as they are. within: they keep their aspect ratio,
    and the size is that of a box around them. max_pixels: the request's; None is the checkpoint's own.
    """

    checkpoint: str
    pictures: tuple[Picture, ...]
    prompt: str
    max_new_tokens: int
    size: tuple[int, int] | None = None
    within: bool = False
    max_pixels: int | None = None

    def images(self) -> tuple[ImageInput, ...]:
        """The pictures as they are asked about; raises `ImageError` for one that is none, naming it."""
        return tuple(self._image(picture) for picture in self.pictures)

    def request(self, images: Sequence[ImageInput]) -> Request:
        """With pictures that `images` has read."""
        return Request(
            images=list(images),
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            max_pixels=self.max_pixels,
            ignore_eos=True,
        )

    def _image(self, picture: Picture) -> ImageInput:
        if picture.digest:
            raise ImageError(
                f"{picture} is not what it was, or was given as a file, of which only the name was kept; give it again"
            )
        size = _fitted(picture.source, self.size) if self.size and self.within else self.size
        image = ImageInput.of(photo(picture.source, size))
        return replace(image, label=str(picture))

    def about_picture(self) -> str:
        """Which they are, and what is done to them before the request."""
        names = ", ".join(map(str, self.pictures)) or "no picture"
        done = "as it is" if self.size is None else f"{'within' if self.within else 'resized to'} {self.size[0]}×{self.size[1]}"
        return f"{names} {done}" + ("" if self.max_pixels is None else f", max_pixels {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """How the requests of a load arrive: so many at once, or so many a second; and how many there are."""

    concurrency: int | None
    rate: float | None
    n: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One answer, and what has been measured of it since.

    number: from 1 in a session, and below 0 of an earlier one. when: seconds since 1970. where: as `where` has it. run: the first.
    held: bytes by what held them after it. before: the recipe that it was measured beside, if any. comparison: of the bar to beat,
    that one, and its own. layers: a run of Transformers and one of its own with every block timed. floors: stage to seconds.
    attribution: its way from the baseline. profile: its operations, with blocks and layers. loads: many requests of its question,
    with its recipe and others by name.
    """

    number: int
    when: float
    where: Mapping[str, str]
    question: Question
    recipe: Recipe
    run: Run
    held: Mapping[str, int]
    before: Recipe | None = None
    comparison: Comparison | None = None
    layers: Mapping[str, Run] | None = None
    floors: Mapping[str, float] | None = None
    attribution: Attribution | None = None
    profile: Profile | None = None
    loads: Mapping[str, Load] | None = None

    @property
    def shown(self) -> Run:
        """The run to look at: of the measured ones the median, else the first."""
        return self.run if self.comparison is None else self.comparison.representative(RECIPE)

    @property
    def reference(self) -> Run | None:
        """The same of the bar to beat."""
        return None if self.comparison is None else self.comparison.representative(self.comparison.reference)

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
        """How many times as fast as the bar to beat to the first token, where parity holds and rounds were warm."""
        return self.comparison.speedup(RECIPE) if self.comparison is not None and self.parity else None

    @cached_property
    def against_before(self) -> Interval | None:
        """The same over the recipe it was measured beside."""
        if self.comparison is None or BEFORE not in self.comparison.engines:
            return None
        return self.comparison.speedup(RECIPE, BEFORE)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What each toggle would save: path -> (its next value, ms of TTFT beside the recipe), measured for a question and a recipe."""

    question: Question
    recipe: Recipe
    savings: Mapping[str, tuple[OptionValue, Interval]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A request of a load that has ended, by its number. label: of its engine; begun: when it arrived (ns of `perf_counter_ns`)."""

    label: str
    number: int
    begun: int
    trace: Trace


@dataclass(frozen=True, kw_only=True)
class News:
    """What a session tells while it works: its state, and with it any of these.

    progress: counts and seconds. text: the answer so far. began: a stage and its start (ns); ended: one that has ended. sample: a
    round's run. served: a load's. previews: a small JPEG of each picture that is asked about. result: a new one, or one that knows
    more. starting: how far the start of the bar to beat is, "" once it is over; told on a thread of its own. error: in a sentence.
    """

    state: str
    progress: str = ""
    text: str = ""
    began: tuple[str, int] | None = None
    ended: Span | None = None
    sample: RunSample | None = None
    served: Served | None = None
    previews: tuple[bytes, ...] = ()
    result: Result | None = None
    advice: Advice | None = None
    starting: str | None = None
    error: str = ""


# Does what was wished for: (lab, the request, set when it is to end) -> what is known then.
Work = Callable[[Lab, Request, threading.Event], "Result | Advice"]


@dataclass(kw_only=True)
class _Wish:
    question: Question
    state: str
    work: Work
    number: int = 0  # of the result that a view needs it for
    background: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(kw_only=True)
class _Start:
    """A bar to beat whose server starts. then: wishes for what waits for it."""

    lab: Lab
    rival: EngineLike
    then: Callable[[], None]
    stop: threading.Event = field(default_factory=threading.Event)


class Session:
    """Runs what is wished for on one thread that lives as long as it does: torch has a pool of threads for each that computes.

    A question with its recipe takes the place of what waits, and ends what runs at its next stage or step; what a view needs waits
    for its turn. A bar to beat whose server must be started starts on a thread of its own; recipes run meanwhile, and the newest is
    measured once it is ready. What each toggle would save is measured once nothing has been wished for a while, if `advise` is set,
    and gives way to any wish. tell: is given `News`, on either thread. keep: is given each result, and again once more is known of
    it, between runs. borrow: a lab that has the checkpoint, if any has.
    """

    def __init__(
        self,
        tell: Callable[[News], None],
        *,
        device: str | None = None,
        dtype: str | None = None,
        borrow: Callable[[str], Lab | None] = lambda _: None,
        keep: Callable[[Result], None] = lambda _: None,
    ) -> None:
        self.history: list[Result] = []
        self.lab: Lab | None = None
        self.advise = False
        self.advice: Advice | None = None
        self._tell, self._device, self._dtype, self._borrow, self._keep = tell, device, dtype, borrow, keep
        self._where: Mapping[str, str] = {}  # of the lab
        # The pictures that were asked about last: by what they are known, as they were read, and small.
        self._seen: tuple[object, tuple[ImageInput, ...], tuple[bytes, ...]] | None = None
        self._ceilings: Ceilings | None = None
        self._changed = threading.Condition()
        self._wishes: list[_Wish] = []
        self._running: _Wish | None = None
        self._starting: _Start | None = None
        self._numbers = itertools.count(1)
        self._started: set[str] = set()  # bars to beat whose servers have been started for this lab
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastvl-workbench", daemon=True)
        self._thread.start()

    def ask(
        self, question: Question, recipe: Recipe | str, *, repeats: int, before: Recipe | None = None, rival: EngineLike = STOCK
    ) -> None:
        """Wish for an answer, and for it to be measured beside the bar to beat and the recipe before; returns at once.

        recipe: as text where it means the lab's fastest, which is known once there is a lab.
        """
        self._wish_for(question, "running", partial(self._answer, question, recipe, repeats, before, rival), first=True)
        self._give_up_start(unless=rival)

    def open_up(self, result: Result) -> None:
        """Wish for every block and layer of a result's recipe and of Transformers."""
        self._wish_once(result, "timing blocks and layers", partial(self._open_up, result.number))

    def see_operations(self, result: Result) -> None:
        """Wish for every operation of a result's recipe, as torch's profiler sees it."""
        self._wish_once(result, "watching operations", partial(self._see_operations, result.number))

    def find_floors(self, result: Result) -> None:
        """Wish for what the stages of a result must cost at least on this device."""
        self._wish_once(result, "measuring what the device can do", partial(self._find_floors, result.number))

    def attribute(self, result: Result, *, repeats: int) -> None:
        """Wish for what each toggle of a result's recipe takes off TTFT, on the way from the baseline."""
        self._wish_once(result, "measuring toggle by toggle", partial(self._attribute, result.number, repeats))

    def load(self, result: Result, arrivals: Arrivals, beside: Mapping[str, EngineLike]) -> None:
        """Wish for many requests of a result's question: with its recipe, then with each engine of `beside`, by its name."""
        self._wish_for(result.question, UNDER_LOAD, partial(self._load, result.number, arrivals, beside))

    def has_started(self, rival: EngineLike) -> bool:
        """Whether a bar to beat can be asked now: its server has been started, or it has none."""
        with self._changed:
            return str(rival) in self._started or not rivals.must_start(rival)

    def delete(self, number: int) -> None:
        """Forget a result; what is measured of it then is lost."""
        with self._changed:
            self.history.remove(self._result(number))

    def stop(self) -> None:
        """End what runs or starts, and forget what waits."""
        self._give_up_start()
        with self._changed:
            self._wishes.clear()
            if self._running is not None:
                self._running.stop.set()

    def close(self) -> None:
        """End the thread, once what runs on it has come to the end of its stage or step; the weights are let go."""
        self.stop()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_PATIENCE)

    def wake(self) -> None:
        """Look whether there is something to do in the background."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Until there is nothing to do that was wished for; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(self._nothing_to_do, seconds)

    def _nothing_to_do(self) -> bool:
        return not self._wishes and self._starting is None and (self._running is None or self._running.background)

    def _wish_once(self, result: Result, state: str, work: Work) -> None:
        """Wish for what a view needs of a result, unless that waits or runs already."""
        with self._changed:
            wishes = [*self._wishes, *([self._running] if self._running is not None else [])]
            if not any((one.state, one.number) == (state, result.number) and not one.stop.is_set() for one in wishes):
                self._wish_for(result.question, state, work, number=result.number)

    def _wish_for(self, question: Question, state: str, work: Work, *, number: int = 0, first: bool = False) -> None:
        with self._changed:
            if self._closed:
                raise RequestError("this workbench is closed, and runs nothing any more; open another")
            if first:
                self._wishes.clear()
            self._wishes.append(_Wish(question=question, state=state, work=work, number=number))
            if self._running is not None and (first or self._running.background):
                self._running.stop.set()
            self._changed.notify_all()

    def _next(self) -> _Wish | None:
        """The next wish, or once it has been quiet for a while what is to be done in the background; None when closed."""
        with self._changed:
            while not self._wishes and not self._closed:
                in_background = self._for_background()
                if (
                    not self._changed.wait(_QUIET if in_background else None)
                    and in_background
                    and not (self._wishes or self._closed)
                ):
                    self._running = in_background
                    return in_background
            if self._closed:
                return None
            self._running = self._wishes.pop(0)
            return self._running

    def _for_background(self) -> _Wish | None:
        if not self.advise or not self.history or self.history[-1].comparison is None:
            return None
        last = self.history[-1]
        if self.advice is not None and (self.advice.question, self.advice.recipe) == (last.question, last.recipe):
            return None
        question = replace(last.question, max_new_tokens=1)
        return _Wish(question=question, state="idle", work=partial(self._advise, last), background=True)

    def _work(self) -> None:
        while (wish := self._next()) is not None:
            try:
                known = self._grant(wish)
                if isinstance(known, Result):
                    self._tell(News(state="idle", text=known.run.text, result=known))
                    self._keep(known)
                else:
                    self.advice = known
                    self._tell(News(state="idle", advice=known))
            except RequestCancelledError:
                if wish.background and not self._wishes:
                    self.advise = False  # stopped by whoever looks on, not by another wish
                self._tell(News(state="idle" if wish.background else "stopped"))
            except Exception as error:  # said in the panel, which lives on
                self._tell(News(state="failed", error=sentence(error)))
                self.advise = self.advise and not wish.background
            with self._changed:
                self._running = None
                self._changed.notify_all()
        self.lab = None

    def _grant(self, wish: _Wish) -> Result | Advice:
        question = wish.question
        if self.lab is None or self.lab.checkpoint.name != question.checkpoint:
            self._tell(News(state=f"loading {question.checkpoint}"))
            self._give_up_start()
            self._started.clear()
            self.lab = None  # first: there may be no room for two models, and the session's length follows from what is free
            gc.collect()
            borrowed = self._borrow(question.checkpoint)
            self.lab = borrowed or Lab(question.checkpoint, device=self._device, dtype=self._dtype)
            self._where = where(self.lab)
            self._ceilings = None
        images, previews = self._pictures(question)
        if not wish.background:
            self._tell(News(state=wish.state, previews=previews))
        return wish.work(self.lab, question.request(images), wish.stop)

    def _pictures(self, question: Question) -> tuple[tuple[ImageInput, ...], tuple[bytes, ...]]:
        """Those of a question, and small ones of them; read again only where they are others, or a file has changed since."""
        files = tuple(_state(picture) for picture in question.pictures)
        of = (question.pictures, question.size, question.within, files)
        if self._seen is None or self._seen[0] != of:
            images = question.images()
            self._seen = of, images, tuple(map(_preview, images))
        return self._seen[1:]

    def _answer(
        self,
        question: Question,
        asked: Recipe | str,
        repeats: int,
        before: Recipe | None,
        rival: EngineLike,
        lab: Lab,
        request: Request,
        stop: threading.Event,
    ) -> Result:
        recipe, text = lab.recipe(asked), list[str]()

        def on_chunk(chunk: Chunk) -> None:
            text.append(chunk.text)
            self._tell(News(state="running", text="".join(text)))

        def on_begin(name: str, start: int) -> None:
            if not text:
                self._tell(News(state="running", began=(name, start)))

        def on_stage(stage: Span) -> None:
            if not text:
                self._tell(News(state="running", ended=stage))

        run = lab.run(request, recipe, on_chunk=on_chunk, on_begin=on_begin, on_stage=on_stage, stop=stop)
        run = run.without_logits()
        result = Result(
            number=next(self._numbers),
            when=time.time(),
            where=self._where,
            question=question,
            recipe=recipe,
            run=run,
            held=_held(lab, recipe),
            before=before,
        )
        self.history.append(result)
        if repeats == 0:
            return result
        measure = partial(self._measure, result.number, recipe, repeats, before, rival)
        if rivals.must_start(rival) and not self._is_started(lab, rival, partial(self._wish_for, question, "measuring", measure)):
            return result
        self._tell(News(state="measuring", text=run.text, result=result))
        self._keep(result)
        return measure(lab, request, stop)

    def _is_started(self, lab: Lab, rival: EngineLike, then: Callable[[], None]) -> bool:
        """Whether the bar to beat is ready; where it is not it starts, unless it does already, and `then` is done afterwards."""
        with self._changed:
            if str(rival) in self._started:
                return True
            if self._starting is not None and str(self._starting.rival) == str(rival):
                self._starting.then = then
                return False
            self._starting = start = _Start(lab=lab, rival=rival, then=then)
        threading.Thread(target=self._start, args=(start,), name="fastvl-start", daemon=True).start()
        return False

    def _start(self, start: _Start) -> None:
        error = ""
        try:
            rivals.start(start.lab, start.rival, lambda line: self._tell(News(state="starting", starting=line)), start.stop)
        except Exception as failed:  # said in the panel, which lives on
            error = "" if start.stop.is_set() else sentence(failed)
        self._tell(News(state="starting", starting="", error=error))
        with self._changed:
            if self._starting is start:
                self._starting = None
                if not error:
                    self._started.add(str(start.rival))
                    start.then()
            self._changed.notify_all()

    def _give_up_start(self, unless: EngineLike | None = None) -> None:
        with self._changed:
            if self._starting is not None and (unless is None or str(unless) != str(self._starting.rival)):
                self._starting.stop.set()
                self._starting = None
                self._changed.notify_all()

    def _measure(
        self,
        number: int,
        recipe: Recipe,
        repeats: int,
        before: Recipe | None,
        rival: EngineLike,
        lab: Lab,
        request: Request,
        stop: threading.Event,
    ) -> Result:
        if (result := self._result(number)) is not self.history[-1]:  # what came since is measured by itself
            return result
        engines: dict[str, EngineLike] = {str(rival): rival, **({BEFORE: before} if before else {}), RECIPE: recipe}
        told = self._counted("measuring", len(engines) * (repeats + 1))
        measured = compare(lab, request, engines, repeats=repeats, on_sample=told, quiet=_ROUNDS_QUIET, stop=stop)
        return self._know(number, comparison=measured)

    def _counted(self, state: str, runs: int, what: str = "") -> Callable[[RunSample], None]:
        """Tells of each run how many there are, and how long all of them may take."""
        began, seen = time.monotonic(), set[tuple[str, int]]()

        def told(sample: RunSample) -> None:
            seen.add((sample.engine, sample.round))  # one that was disturbed comes again
            said = f"{what}run {_so_far(len(seen), runs, began)}"
            shown = None if state == "idle" else sample
            self._tell(News(state=state, progress=said if len(seen) < runs else "checking parity", sample=shown))

        return told

    def _load(
        self,
        number: int,
        arrivals: Arrivals,
        beside: Mapping[str, EngineLike],
        lab: Lab,
        request: Request,
        stop: threading.Event,
    ) -> Result:
        """One after the other, with the same requests at the same times; one that is stopped is not kept."""
        found = {}
        for label, engine in {RECIPE: self._result(number).recipe, **beside}.items():
            self._tell(News(state=UNDER_LOAD, progress=f"{label}: warming up"))
            told = self._ended_of(label, arrivals.n)
            try:
                found[label] = load(lab, request, engine, **vars(arrivals), on_run=told, stop=stop)
            except FastvlError:
                if not stop.is_set():
                    raise
            if stop.is_set():
                raise RequestCancelledError("the load was stopped")
        return self._know(number, loads=found)

    def _ended_of(self, label: str, n: int) -> Callable[[int, Run | Exception], None]:
        """Tells of each request of a load that ends, how many have, and how long all may take."""
        began, ended = time.monotonic(), itertools.count(1)

        def told(number: int, run: Run | Exception) -> None:
            served = None
            if isinstance(run, Run):
                served = Served(label=label, number=number, begun=time.perf_counter_ns() - run.trace.end_ns, trace=run.trace)
            progress = f"{label}: request {_so_far(next(ended), n, began)}"
            self._tell(News(state=UNDER_LOAD, progress=progress, served=served))

        return told

    def _open_up(self, number: int, lab: Lab, request: Request, stop: threading.Event) -> Result:
        result, layers = self._result(number), {}
        engines: dict[str, EngineLike] = {STOCK: STOCK, RECIPE: result.recipe}
        for label, engine in engines.items():
            for _ in range(2):  # the second is warm
                run = lab.run(request, engine, trace="layers", stop=stop)
            layers[label] = run.without_logits(engine=label)
        return self._know(number, layers=layers)

    def _see_operations(self, number: int, lab: Lab, request: Request, _: threading.Event) -> Result:
        return self._know(number, profile=profile_request(lab, request, self._result(number).recipe, trace="layers"))

    def _find_floors(self, number: int, lab: Lab, request: Request, _: threading.Event) -> Result:
        return self._know(number, floors=self._floors(lab, request))

    def _floors(self, lab: Lab, request: Request) -> dict[str, float]:
        found = floor(lab, request, ceilings=self._ceilings)
        self._ceilings = found.ceilings
        return {stage: seconds for stage, seconds in found.seconds.items() if seconds > 0}

    def _attribute(self, number: int, repeats: int, lab: Lab, request: Request, stop: threading.Event) -> Result:
        recipe = self._result(number).recipe
        told = self._counted("measuring toggle by toggle", (len(_steps(recipe)) + 2) * (repeats + 1))
        found = attribute(lab, request, recipe, repeats=repeats, on_sample=told, quiet=_ROUNDS_QUIET, stop=stop)
        return self._know(number, attribution=found)

    def _advise(self, last: Result, lab: Lab, request: Request, stop: threading.Event) -> Advice:
        """What each toggle saves that the fastest known recipe has elsewhere, alone beside the recipe, in the time there is."""
        if last.floors is None:
            known_of_last = self._know(last.number, floors=self._floors(lab, request))
            self._tell(News(state="idle", result=known_of_last))
            self._keep(known_of_last)
        known = candidates(last, lab.checkpoint.target, lab.fastest)
        a_round = last.shown.ttft * (FOR_AN_INTERVAL + 1)
        engines: dict[str, EngineLike] = {path: recipe for path, (_, recipe) in known[: int(_IN_BACKGROUND / a_round)]}
        if not engines:
            return Advice(question=last.question, recipe=last.recipe, savings={})
        told = self._counted("idle", (len(engines) + 1) * (FOR_AN_INTERVAL + 1), "what each toggle would save, ")
        measured = compare(
            lab, request, {RECIPE: last.recipe, **engines}, repeats=FOR_AN_INTERVAL, on_sample=told, keep_going=True, stop=stop
        )
        found = {path: (value, measured.saving(path, RECIPE)) for path, (value, _) in known if path in measured.engines}
        savings = {path: (value, saved) for path, (value, saved) in found.items() if saved is not None}
        return Advice(question=last.question, recipe=last.recipe, savings=savings)

    def _know(self, number: int, **more: object) -> Result:
        """Remember of a result what has been measured since."""
        with self._changed:
            result = replace(known := self._result(number), **more)  # type: ignore[arg-type]
            self.history[self.history.index(known)] = result
        return result

    def _result(self, number: int) -> Result:
        for result in self.history:
            if result.number == number:
                return result
        raise RequestCancelledError(f"result {number} was deleted")


def candidates(last: Result, target: Target, fastest: Recipe) -> list[tuple[str, tuple[OptionValue, Recipe]]]:
    """Toggles that the fastest known recipe has elsewhere, as the recipe with each; those of the longest stages first."""
    found = {}
    for toggle in toggles():
        if (value := fastest.value(toggle.path)) != last.recipe.value(toggle.path):
            with suppress(RecipeError):
                changed = last.recipe.choose(toggle.path, value)
                changed.check(target)
                found[toggle.path] = (value, changed)
    stages = last.shown.trace.stages()
    return sorted(found.items(), key=lambda one: -sum(stages.get(name, 0) for name in stages_of(one[0])))


def where(lab: Lab) -> dict[str, str]:
    """What is the same for two results that may be compared: device, processor, dtype, versions, weights (by the ends of each)."""
    ends = [w.detach()[(at,) * w.ndim].float() for w in lab.checkpoint.model.parameters() if w.numel() for at in (0, -1)]
    weights = sha256(torch.stack(ends).cpu().numpy().tobytes()).hexdigest()[:12]
    return {name: value for name, value in environment(lab).items() if name != "date"} | versions() | {"weights": weights}


def _so_far(done: int, of: int, began: float) -> str:
    """Counts and seconds of what began then."""
    spent = time.monotonic() - began
    return f"{done} of {of} · {spent:.1f} of about {spent / done * of:.1f} s"


def _steps(recipe: Recipe) -> list[str]:
    """The toggles that are not at the baseline."""
    return [toggle.path for toggle in toggles() if recipe.value(toggle.path) != toggle.values[0]]


def _fitted(picture: str | bytes, box: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the picture's aspect ratio that fits into the box."""
    width, height = read_orientation(open_image(ImageInput.of(photo(picture)))).size
    scale = min(box[0] / width, box[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _held(lab: Lab, recipe: Recipe) -> dict[str, int]:
    """Bytes by what holds them now."""
    held = {"weights": sum(weight.nbytes for weight in lab.checkpoint.model.parameters()), **lab.memory.held()}
    held["weights, packed"] = lab.checkpoint.packed.n_bytes
    held["CUDA graphs"] = sum(capture.n_bytes for capture in lab.captures(recipe))
    return held


def _state(picture: Picture) -> tuple[int, ...]:
    """By what a file is seen to have changed; of bytes and photographs nothing."""
    if isinstance(picture.source, str):
        with suppress(OSError, ValueError):
            file = os.stat(picture.source)
            return file.st_mtime_ns, file.st_size, file.st_ino
    return ()


def _preview(image: ImageInput) -> bytes:
    """The picture as it is, small, as JPEG."""
    picture, encoded = rgb_of(image), io.BytesIO()
    picture.thumbnail((_PREVIEW, _PREVIEW))
    picture.save(encoded, "JPEG")
    return encoded.getvalue()
