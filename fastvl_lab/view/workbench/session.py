"""What a workbench runs and remembers: one worker thread, the newest wish first, and every result; no widgets."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from fastvl_lab.errors import RequestCancelledError, sentence
from fastvl_lab.lab import EngineName, Lab
from fastvl_lab.measure.audit import Audit, audit
from fastvl_lab.measure.compare import Comparison, compare
from fastvl_lab.measure.photo import photo
from fastvl_lab.measure.statistics import Interval
from fastvl_lab.preprocessor.decode_image import as_image, open_image, read_orientation, with_pillow
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, ImageInput, Request
from fastvl_lab.run import Run

STOCK = "transformers"

_PREVIEW = 150  # pixels of the longer side


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every recipe: a checkpoint, a picture (a name, a path, or bytes), a prompt, and how many tokens to make."""

    checkpoint: str
    picture: str | bytes
    size: tuple[int, int] | None
    prompt: str
    max_new_tokens: int

    def request(self) -> Request:
        """Raises `ImageError` for a picture that is none."""
        data = photo(self.picture, self.size)
        return Request(images=[data], prompt=self.prompt, max_new_tokens=self.max_new_tokens, ignore_eos=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One answer: what was asked, the recipe's first run, and, once it is measured, how it stands against Transformers."""

    number: int
    question: Question
    recipe: Recipe
    run: Run
    comparison: Comparison | None = None

    @property
    def shown(self) -> Run:
        """The run to look at: of the measured ones the median, else the first."""
        return self.run if self.comparison is None else self.comparison.representative("recipe")

    @property
    def reference(self) -> Run | None:
        return None if self.comparison is None else self.comparison.representative(STOCK)

    @cached_property
    def audit(self) -> Audit:
        return audit(self.shown)

    @cached_property
    def parity(self) -> bool | None:
        """Whether its tokens are those it must make; None before it is measured."""
        return None if self.comparison is None else self.comparison.parity("recipe")

    @cached_property
    def speedup(self) -> Interval | None:
        """How many times as fast as Transformers to the first token, where parity holds and rounds were warm."""
        return self.comparison.speedup("recipe") if self.comparison is not None and self.parity else None


@dataclass(frozen=True, kw_only=True)
class News:
    """What a session tells while it works: its state, and with it a text in progress, a small JPEG of the picture that is asked
    about, a result or a better one, or an error in a sentence.
    """

    state: str
    text: str = ""
    preview: bytes = b""
    result: Result | None = None
    error: str = ""


@dataclass
class _Wish:
    question: Question
    recipe: Recipe
    repeats: int
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
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        self._running: _Wish | None = None
        self._thread = threading.Thread(target=self._work, name="fastvl-workbench", daemon=True)
        self._thread.start()

    def ask(self, question: Question, recipe: Recipe, *, repeats: int) -> None:
        """Wish for an answer; returns at once."""
        with self._changed:
            self._wish = _Wish(question, recipe, repeats)
            if self._running is not None:
                self._running.stop.set()
            self._changed.notify_all()

    def stop(self) -> None:
        """End what runs, and forget what waits."""
        with self._changed:
            self._wish = None
            if self._running is not None:
                self._running.stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until there is nothing to do; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._wish is None and self._running is None, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wish is not None)
                self._running, self._wish = self._wish, None
                wish = self._running
            assert wish is not None
            try:
                self._answer(wish)
            except RequestCancelledError:
                self._tell(News(state="stopped"))
            except Exception as error:  # said in the panel, which lives on
                self._tell(News(state="failed", error=sentence(error)))
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _answer(self, wish: _Wish) -> None:
        question, recipe, text = wish.question, wish.recipe, []
        if self.lab is None or self.lab.checkpoint.name != question.checkpoint:
            self._tell(News(state=f"loading {question.checkpoint}"))
            self.lab = Lab(question.checkpoint, device=self._device, dtype=self._dtype)
        lab, request = self.lab, question.request()
        self._tell(News(state="running", preview=_preview(request.image_inputs[0])))

        def on_chunk(chunk: Chunk) -> None:
            text.append(chunk.text)
            self._tell(News(state="running", text="".join(text)))

        run = lab.run(request, recipe, on_chunk=on_chunk, stop=wish.stop)
        result = Result(number=len(self.history) + 1, question=question, recipe=recipe, run=run)
        self.history.append(result)
        self._tell(News(state="measuring", text=run.text, result=result))
        if wish.repeats > 0:
            engines: dict[str, EngineName] = {STOCK: STOCK, "recipe": recipe}
            comparison = compare(lab, request, engines, repeats=wish.repeats, stop=wish.stop)
            result = replace(result, comparison=comparison)
            self.history[-1] = result
        self._tell(News(state="idle", text=run.text, result=result))


def _preview(image: ImageInput) -> bytes:
    """The picture as it is, small, as JPEG."""
    picture, encoded = as_image(with_pillow(read_orientation(open_image(image)))), io.BytesIO()
    picture.thumbnail((_PREVIEW, _PREVIEW))
    picture.save(encoded, "JPEG")
    return encoded.getvalue()
