"""A chat about one image, turn by turn: every engine answers the same turns, and finds what it kept itself of those before."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import RequestError
from fastvl_lab.lab import Lab
from fastvl_lab.measure.statistics import Interval, median_interval
from fastvl_lab.request import ImageInput, ImageSource, Request
from fastvl_lab.run import Kind, Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One run of one engine at one turn, counted from 0; warm-up rounds have negative numbers."""

    engine: str
    round: int
    turn: int
    run: Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """What `converse` measured.

    texts: what the user says, a text a turn. reference: the engine whose answers are in the history, and whose tokens are expected.
    """

    texts: tuple[str, ...]
    reference: str
    played: tuple[Turn, ...]

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(turn.engine for turn in self.played))

    def kind(self, engine: str, turn: int) -> Kind:
        """What the engine's last run of a turn was: with a warm-up, what all of its timed ones were."""
        return self._mine(engine, turn)[-1].run.kind

    def runs(self, engine: str, turn: int) -> list[Run]:
        """The timed runs of a turn that are of its kind: cold ones are not pooled with others."""
        return [played.run for played in self._of_its_kind(engine, turn)]

    def ttft(self, engine: str, turn: int) -> Interval:
        """Seconds to the first token, with the interval of the median."""
        return median_interval([run.ttft for run in self.runs(engine, turn)])

    def found(self, engine: str, turn: int) -> tuple[int, int]:
        """How many of a turn's prompt tokens were found in the KV cache, and how many images' visual tokens were known."""
        counts = self.runs(engine, turn)[-1].trace.counts
        return counts.get("cache: prefix tokens found", 0), counts.get("cache: images found", 0)

    def tokens_equal(self, engine: str, turn: int | None = None) -> bool:
        """Whether every run of the engine, at that turn or at all, made the tokens that the reference made at that turn."""
        expected: dict[int, Run] = {}
        for played in self.played:
            if played.engine == self.reference:
                expected.setdefault(played.turn, played.run)
        mine = (played for played in self.played if played.engine == engine and turn in (None, played.turn))
        return all(p.run.made(expected[p.turn].tokens, expected[p.turn].text) for p in mine)

    def speedup(self, engine: str, turn: int, over: str) -> Interval | None:
        """How many times as fast as another engine a turn's first token comes, paired by round.

        None where either's tokens are not the reference's, or no round has timed both.
        """
        mine, theirs = ({p.round: p.run.ttft for p in self._of_its_kind(name, turn)} for name in (engine, over))
        rounds = [number for number in mine if number in theirs]
        if not rounds or not self.tokens_equal(engine) or not self.tokens_equal(over):
            return None
        return median_interval([theirs[number] / mine[number] for number in rounds])

    def summary(self, over: str) -> list[dict[str, Any]]:
        """One row a turn and engine: TTFT median (ms), what it found, tokens, and the speed-up over the engine of that label."""
        rows = []
        for turn in range(len(self.texts)):
            for engine in self.engines:
                run, ttft, speedup = self.runs(engine, turn)[-1], self.ttft(engine, turn), self.speedup(engine, turn, over)
                tokens, images = self.found(engine, turn)
                row = {
                    "turn": turn + 1,
                    "engine": engine,
                    "kind": run.kind,
                    "prompt_tokens": run.n_prompt,
                    "tokens_found": tokens,
                    "images_found": images,
                    "ttft_ms": ttft.median * 1e3,
                    "tokens_equal": self.tokens_equal(engine, turn),
                    "speedup": speedup.median if speedup else None,
                    "speedup_low": _known(speedup.low) if speedup else None,
                    "speedup_high": _known(speedup.high) if speedup else None,
                }
                rows.append(row)
        return rows

    def _mine(self, engine: str, turn: int) -> list[Turn]:
        """The timed runs of a turn, in order of rounds."""
        return [played for played in self.played if played.round >= 0 and (played.engine, played.turn) == (engine, turn)]

    def _of_its_kind(self, engine: str, turn: int) -> list[Turn]:
        kind = self.kind(engine, turn)
        return [played for played in self._mine(engine, turn) if played.run.kind == kind]


def converse(
    lab: Lab,
    image: ImageSource,
    texts: Sequence[str],
    engines: Mapping[str, EngineLike],
    *,
    max_new_tokens: int = 32,
    repeats: int = 6,
    warm_up: int = 1,
    seed: int = 0,
) -> Conversation:
    """Play a chat `warm_up + repeats` times on every engine: the image and the first text, an answer, the next text, and so on.

    engines: label -> recipe, recipe text, or peer. Every turn sends the whole history, with the first engine's answers of the first
    round, so all engines are asked the same in every round; at each turn all of them run, in an order shuffled by `seed`.

    What a turn finds is what its own engine kept of the turns before it in the same round: every engine has caches of its own
    (`Lab.apart`), so that none finds what another left behind, and they forget everything before a round begins
    (`Memory.forget`), so that a repeated turn does not find itself. Raises `RequestError` for a turn that no session has room for.
    """
    if not engines or not texts:
        raise RequestError("engines or texts is empty; a conversation takes at least one of each")
    if repeats < 1 or warm_up < 0:
        raise RequestError(f"repeats is {repeats} and warm_up {warm_up}; repeats must be at least 1, and warm_up at least 0")
    keys = {label: lab.engine(engine) for label, engine in engines.items()}
    labs = {label: lab.apart() for label in keys}
    reference, order, shuffled = next(iter(engines)), list(engines), random.Random(seed)
    first: list[dict[str, Any]] = [{"type": "image", "image": ImageInput.of(image)}, {"type": "text", "text": texts[0]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": first}]
    requests, played = [Request(messages=messages, max_new_tokens=max_new_tokens)], []
    for number in range(-warm_up, repeats):
        for own in labs.values():
            own.memory.forget()
        for turn in range(len(texts)):
            shuffled.shuffle(order)
            for label in order:
                run = labs[label].run(requests[turn], keys[label])
                run = dataclasses.replace(run, engine=label, logits=run.logits[:0])  # logits may be half a megabyte
                played.append(Turn(engine=label, round=number, turn=turn, run=run))
                if label == reference and turn + 1 == len(requests) < len(texts):
                    messages += [{"role": "assistant", "content": run.text}, {"role": "user", "content": texts[turn + 1]}]
                    requests.append(Request(messages=messages, max_new_tokens=max_new_tokens))
    in_order = [one for label in engines for one in played if one.engine == label]
    return Conversation(texts=tuple(texts), reference=reference, played=tuple(in_order))


def _known(value: float) -> float | None:
    """NaN has no JSON form; an interval that does not exist is None."""
    return None if value != value else value
