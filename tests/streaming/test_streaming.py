"""How tokens leave: the same ones in every setting, held back only where the recipe says so, and nothing left running."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from fastvl_lab import Chunk, Lab, Recipe, Request, RequestCancelledError, Run, Sampling
from fastvl_lab.catalogue import toggles
from fastvl_lab.streaming.answer import Positions, Steps, host_sync, on_device
from fastvl_lab.streaming.rounds import CountingGate, _Sent
from fastvl_lab.trace import Tracer

CHOICES = {toggle.name: toggle.values for toggle in toggles() if toggle.slot == "streaming"}
SETTINGS = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]
THREADS = ("fastvl-launch", "fastvl-receive", "fastvl-respond")
REPORTED = {"steps_per_round": 16, "gate": "round", "positions": "host_sync"}


def _recipe(settings: dict[str, int | str], preset: str = "fastest") -> Recipe:
    return Recipe.parse(preset).replace({f"streaming.{name}": value for name, value in settings.items()})


def _threads_end(*, seconds: float) -> bool:
    """Whether no thread of an answer is left by then: one that the interruption met at its start ends without being waited for."""
    deadline = time.monotonic() + seconds
    while any(thread.name in THREADS for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _label(settings: dict[str, int | str]) -> str:
    return "-".join(map(str, settings.values()))


def _answer(picture: bytes, n: int = 40, **more: Any) -> Request:
    return Request(images=[picture], prompt="What is this?", max_new_tokens=n, ignore_eos=True, **more)


@pytest.fixture
def answer_of(picture: bytes) -> Callable[..., Request]:
    return partial(_answer, picture)


LENGTHS = (1, 2, 17, 40)


@pytest.fixture(scope="module")
def plain_runs(labs: dict[str, Lab], picture: bytes) -> dict[tuple[str, int], Run]:
    """By checkpoint and length, the answers that every setting is held to."""
    return {(name, n): lab.run(_answer(picture, n), "fastest") for name, lab in labs.items() for n in LENGTHS}


@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_tokens_are_the_same_in_every_setting(
    lab: Lab, answer_of: Callable[..., Request], settings: dict, plain_runs: dict[tuple[str, int], Run]
) -> None:
    """Of answers that end within a round, at its end, at once, and with no decode step at all."""
    for n in LENGTHS:
        run, plain = lab.run(answer_of(n), _recipe(settings)), plain_runs[lab.checkpoint.name, n]
        assert run.tokens == plain.tokens
        assert run.text == plain.text
        assert tuple(token for chunk in run.chunks for token in chunk.tokens) == plain.tokens
        assert [chunk.time for chunk in run.chunks] == sorted(chunk.time for chunk in run.chunks)
        if settings["gate"] == "open":
            assert [chunk.tokens for chunk in run.chunks] == [chunk.tokens for chunk in plain.chunks]


def test_a_sampled_answer_and_its_stop_are_the_same_in_every_setting(
    labs: dict[str, Lab], answer_of: Callable[..., Request]
) -> None:
    """Steps that are launched ahead draw ahead, each from what the step before it drew."""
    lab, asked = labs["tiny-qwen3-vl"], {"temperature": 0.9, "seed": 5, "presence_penalty": 0.5}
    plain = lab.run(answer_of(20, sampling=Sampling(**asked)), "fastest")
    assert plain.tokens != lab.run(answer_of(20), "fastest").tokens
    stop = plain.text[9:12]
    for settings in SETTINGS:
        run = lab.run(answer_of(20, sampling=Sampling(**asked, stop=stop)), _recipe(settings))
        assert (run.text, run.finish_reason) == (plain.text[: plain.text.index(stop)], "stop"), settings
        assert run.tokens == plain.tokens[: len(run.tokens)]


@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_a_token_that_ends_the_answer_ends_it_within_a_round(
    labs: dict[str, Lab], picture: bytes, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=30, ignore_eos=True)
    plain = labs["tiny-qwen3-vl"].run(request, "fastest").tokens
    number = next(n for n in range(4, 30) if plain[n] not in plain[:n])
    lab = labs["tiny-qwen3-vl"].apart()
    monkeypatch.setattr(lab, "checkpoint", dataclasses.replace(lab.checkpoint, eos_token_ids=(plain[number],)))
    run = lab.run(Request(images=[picture], prompt="What is this?", max_new_tokens=30), _recipe(settings))
    assert run.tokens == plain[: number + 1]


@pytest.mark.alone
def test_the_reported_settings_hold_the_answer_to_its_end_and_each_undone_alone_lets_it_go(
    lab: Lab, answer_of: Callable[..., Request]
) -> None:
    request = answer_of(128)

    def warm(settings: dict[str, int | str]) -> Run:
        lab.run(request, _recipe(settings))
        return lab.run(request, _recipe(settings))

    reported = warm(REPORTED)
    assert len(reported.chunks) <= 2
    assert reported.ttft >= 0.9 * reported.chunks[-1].time
    for name, values in CHOICES.items():
        run = warm(REPORTED | {name: values[0]})
        assert run.ttft < 0.5 * run.chunks[-1].time, name
        assert len(run.chunks) > 10, name
    assert warm(REPORTED | {"steps_per_round": 2}).ttft < 0.5 * reported.ttft  # the cure in the affected versions


@pytest.mark.alone
@pytest.mark.parametrize("steps", CHOICES["steps_per_round"])
def test_an_open_gate_costs_the_first_token_nothing(lab: Lab, answer_of: Callable[..., Request], steps: int) -> None:
    """Of the reported settings with an open gate: within a quarter of the plain TTFT, in pairs, which fails if three say no."""
    recipe, ratios = _recipe(REPORTED | {"gate": "open", "steps_per_round": steps}), []
    for _ in range(2):
        lab.run(answer_of(8), recipe), lab.run(answer_of(8), "fastest")
    for _ in range(3):
        pairs = [(lab.run(answer_of(8), recipe).ttft, lab.run(answer_of(8), "fastest").ttft) for _ in range(9)]
        ratios.append(sorted(ours / plain for ours, plain in pairs)[4])
        if ratios[-1] < 1.25:
            return
    pytest.fail(f"TTFT is {ratios} of the plain one's")


@pytest.mark.alone
def test_steps_are_launched_ahead_of_their_results_and_in_lockstep_with_host_sync(
    labs: dict[str, Lab], answer_of: Callable[..., Request]
) -> None:
    """Launches are on the host's lane, the steps on the lane of the device that is played."""
    lab = labs["tiny-qwen2.5-vl"]

    def spans(settings: dict[str, int | str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        found = lab.run(answer_of(17), _recipe(settings)).trace.spans
        lanes = [[(s.start_ns, s.end_ns) for s in found if s.name == "decode" and s.lane == lane] for lane in ("host", "device")]
        assert [len(lane) for lane in lanes] == [16, 16]
        return lanes[0], lanes[1]

    launched, done = spans({"steps_per_round": 16})
    assert launched[-1][1] < done[8][0]  # all of the round is launched before half of it is done
    launched, done = spans({"steps_per_round": 16, "positions": "host_sync"})
    for number in range(1, 16):
        assert launched[number][1] > done[number - 1][1]


@pytest.mark.alone
@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_a_request_that_is_given_up_ends_at_its_next_step(
    labs: dict[str, Lab], answer_of: Callable[..., Request], settings: dict
) -> None:
    lab, stop = labs["tiny-qwen3-vl"], threading.Event()
    recipe = _recipe(settings).replace({"cache.kv": "paged", "cache.prefix_reuse": "on"})
    lab.run(answer_of(2), recipe)
    seen: list[Chunk] = []
    timer = threading.Timer(0.3, stop.set)  # a consumer that goes, though nothing may have reached it yet
    timer.start()
    started = time.monotonic()
    with pytest.raises(RequestCancelledError, match="given up"):
        lab.run(answer_of(20_000), recipe, on_chunk=seen.append, stop=stop)
    assert time.monotonic() - started < 5  # of minutes that all of it would take
    assert not [t for t in threading.enumerate() if t.name in ("fastvl-launch", "fastvl-receive", "fastvl-respond")]
    assert lab.run(answer_of(3), recipe).tokens == lab.run(answer_of(3), "fastest").tokens


@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_what_a_consumer_raises_reaches_the_caller_and_frees_the_request(
    labs: dict[str, Lab], answer_of: Callable[..., Request], settings: dict
) -> None:
    lab = labs["tiny-qwen2.5-vl"]

    def broken(_: Chunk) -> None:
        raise KeyError("the consumer's own")

    with pytest.raises(KeyError, match="the consumer's own"):
        lab.run(answer_of(40), _recipe(settings), on_chunk=broken)
    assert not [t for t in threading.enumerate() if t.name in ("fastvl-launch", "fastvl-receive", "fastvl-respond")]
    assert lab.run(answer_of(3), _recipe(settings)).tokens


@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_what_a_step_raises_reaches_the_caller(
    labs: dict[str, Lab], answer_of: Callable[..., Request], settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, recipe = labs["tiny-qwen2.5-vl"], _recipe(settings)
    stages = lab._bind(lab.engine(recipe)).stages  # type: ignore[attr-defined]
    decode, calls = stages.decode, []

    def fails_at_the_fifth(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError("in a step")
        return decode(*arguments)

    monkeypatch.setattr(stages, "decode", fails_at_the_fifth)
    with pytest.raises(ZeroDivisionError, match="in a step"):
        lab.run(answer_of(40), recipe)
    assert len(calls) == 5  # no later step was taken on what the failed one left


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Python's own answer to an interruption, which a process that began in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.alone
@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("settings", SETTINGS, ids=_label)
def test_an_interruption_by_the_keyboard_leaves_nothing_running(
    labs: dict[str, Lab], answer_of: Callable[..., Request], settings: dict
) -> None:
    lab, recipe = labs["tiny-qwen2.5-vl"], _recipe(settings)
    lab.run(answer_of(2), recipe)
    for number in range(10):
        timer = threading.Timer(0.03 + 0.0037 * number, lambda: signal.raise_signal(signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            lab.run(answer_of(20_000), recipe)
        assert _threads_end(seconds=2)
    assert lab.run(answer_of(3), recipe).tokens == lab.run(answer_of(3), "fastest").tokens


@pytest.mark.alone
@pytest.mark.parametrize("name", THREADS)
def test_an_interruption_while_a_thread_starts_leaves_nothing_running(
    labs: dict[str, Lab], answer_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lab, start, interrupted = labs["tiny-qwen2.5-vl"], threading.Thread.start, []

    def is_interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == name:
            interrupted.append(thread)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", is_interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.run(answer_of(20_000), _recipe(REPORTED))
    assert len(interrupted) == 1
    assert _threads_end(seconds=2)
    assert lab.run(answer_of(3), _recipe(REPORTED)).tokens == lab.run(answer_of(3), "fastest").tokens


def test_on_chunk_is_given_what_the_run_reports(lab: Lab, answer_of: Callable[..., Request]) -> None:
    for engine in ("transformers", "fastest", _recipe(REPORTED)):
        seen: list[Chunk] = []
        run = lab.run(answer_of(20), engine, on_chunk=seen.append)
        assert tuple(seen) == run.chunks


def test_a_peer_can_be_given_up_too(labs: dict[str, Lab], answer_of: Callable[..., Request]) -> None:
    lab, stop = labs["tiny-qwen2.5-vl"], threading.Event()
    with pytest.raises(RequestCancelledError):
        lab.run(answer_of(5000), "transformers", on_chunk=lambda chunk: stop.set(), stop=stop)
    assert not [m for m in lab.checkpoint.model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_gate_opens_when_all_that_raised_it_has_lowered_it() -> None:
    gate, passed = CountingGate(), []

    def consumer() -> None:
        gate.wait()
        passed.append(time.monotonic())

    gate.wait()  # nobody has raised it
    gate.raise_()
    gate.raise_()
    thread = threading.Thread(target=consumer)
    thread.start()
    gate.lower()
    thread.join(0.05)
    assert not passed
    gate.lower()
    gate.raise_()  # closed again at once: who waited has passed all the same
    thread.join(5)
    assert len(passed) == 1
    gate.stay_open()
    gate.raise_()
    gate.wait()


class _Event:
    """A CUDA event in play: it is asked so often before the device is there, or a thread sleeps until it is."""

    def __init__(self, asked: float) -> None:
        self.asks_left, self.slept = asked, 0

    def query(self) -> bool:
        self.asks_left -= 1
        return self.asks_left < 0

    def synchronize(self) -> None:
        self.slept += 1


@pytest.mark.parametrize(("asked", "slept"), [(0, 0), (1, 0), (3, 0), (float("inf"), 1)])
def test_a_token_is_asked_for_a_moment_before_the_thread_sleeps(asked: float, slept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waking up takes tens of microseconds, which would be part of a token that is there by then."""
    now = iter(range(10_000))
    monkeypatch.setattr("fastvl_lab.streaming.rounds.time.perf_counter", lambda: next(now) * 10e-6)  # 10 us pass with each look
    event = _Event(asked)
    assert _Sent(torch.tensor([7]), event).read() == 7
    assert event.slept == slept
    if slept:
        assert next(now) <= 8, "it asked for longer than it takes to wake up"


def test_spans_of_several_threads_nest_by_thread() -> None:
    tracer = Tracer(torch.device("cpu"), "layers")
    tracer.start()

    def other() -> None:
        with tracer.on_device(), tracer.span("decode"), tracer.inner("language.layer.0"):
            pass

    with tracer.span("emit"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    spans = [(s.name, s.lane, s.depth) for s in tracer.finish().spans]
    assert spans == [("emit", "host", 0), ("decode", "device", 0), ("language.layer.0", "device", 1)]


@pytest.mark.parametrize("positions", [on_device, host_sync])
def test_each_answer_of_several_has_positions_of_its_own(positions: Positions) -> None:
    steps = Steps(
        first=torch.tensor([7, 8]),
        next_positions=(3, 10),
        most=4,
        decode=lambda tokens, at: pytest.fail("nothing is decoded"),
        sample=lambda step: pytest.fail("nothing is sampled"),
        tracer=Tracer(torch.device("cpu"), "off"),
    )
    position = positions(steps, lambda: None)
    assert [position(number).tolist() for number in range(4)] == [[3, 10], [4, 11], [5, 12], [6, 13]]
