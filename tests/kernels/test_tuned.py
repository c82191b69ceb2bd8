"""Launch settings: which are measured, what is done with those that fail, and what compiled code has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fastvl_lab.kernels import tuned
from fastvl_lab.kernels.tuned import Launch, Tuned, bucket, launches_of


class Played:
    """A kernel in play: what it was launched with; a benchmark of it takes as long as `costs` says of the settings."""

    def __init__(self, costs: Callable[[Launch, int], float]) -> None:
        self.launched: list[Launch] = []
        self.measured = 0
        self.costs = costs

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda q, *arguments, **options: self.launched.append(
            Launch(options["block_k"], options["num_warps"], options["num_stages"])
        )

    @staticmethod
    def fn() -> None:
        """What a record is of."""

    def benchmark(self, launch: Callable[[], None], return_mode: str) -> float:
        assert return_mode == "median"
        launch()
        self.measured += 1
        return self.costs(self.launched[-1], len(self.launched))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Played, Tuned]]:
    monkeypatch.setattr(tuned, "card_of", lambda device: "a card")
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False), cache=SimpleNamespace(dir=str(tmp_path)))
    monkeypatch.setattr(tuned, "knobs", knobs)

    def make(costs: Callable[[Launch, int], float]) -> tuple[Played, Tuned]:
        kernel = Played(costs)
        monkeypatch.setattr(tuned, "do_bench", kernel.benchmark)
        return kernel, Tuned(kernel, sizes=("head_dim",), lengths=("queries", "keys"))

    return make


HALF = torch.zeros(1, dtype=torch.bfloat16)


def _launch(kernel: Tuned, q: torch.Tensor = HALF, *, head_dim: int = 64, lengths: tuple[int, int] = (70, 70)) -> None:
    kernel.launch((1,), q, sizes=(head_dim,), lengths=lengths)


def test_buckets_are_powers_of_four_from_64_on() -> None:
    expected = {1: 64, 64: 64, 65: 256, 256: 256, 257: 1024, 1024: 1024, 1025: 4096, 5000: 16_384, 16_385: 65_536}
    assert {length: bucket(length) for length in expected} == expected


def test_each_dtype_size_and_bucket_is_measured_once_and_has_the_fastest(play: Callable[..., tuple[Played, Tuned]]) -> None:
    candidates = launches_of(torch.bfloat16)
    kernel, of = play(lambda launch, _: launch != candidates[3])
    cases: list[dict[str, Any]] = [{}, {"head_dim": 128}, {"lengths": (70, 300)}, {"lengths": (300, 300)}]
    for number, case in enumerate(cases):
        _launch(of, **case)
        assert kernel.measured == (number + 1) * len(candidates)
        assert kernel.launched[-1] == candidates[3]
    for case in (*cases, {"lengths": (256, 200)}, {"lengths": (100, 1000)}):
        _launch(of, **case)
        assert kernel.launched[-1] == candidates[3]
    assert kernel.measured == len(cases) * len(candidates)
    _launch(of, torch.zeros(1))
    assert kernel.measured == len(cases) * len(candidates) + len(launches_of(torch.float32))
    described = of.launches()
    assert described[2] == ({"dtype": "bfloat16", "head_dim": "64", "queries": "256", "keys": "1024"}, candidates[3]._asdict())


def test_settings_without_room_on_the_card_are_left_out_and_none_at_all_is_an_error(
    play: Callable[..., tuple[Played, Tuned]],
) -> None:
    candidates = launches_of(torch.bfloat16)
    has_room = {candidates[5]}

    def costs(launch: Launch, _: int) -> float:
        if launch not in has_room:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return 1.0

    kernel, of = play(costs)
    _launch(of)
    assert kernel.launched[-1] == candidates[5]
    has_room.clear()
    with pytest.raises(OutOfResources, match="300000"):
        _launch(of, head_dim=72)


@pytest.mark.parametrize("error", [RuntimeError("illegal address"), ValueError("no such block"), KeyError("grid"), TypeError("q")])
def test_an_error_of_a_launch_is_told_and_removes_no_record(
    error: Exception, play: Callable[..., tuple[Played, Tuned]], tmp_path: Path
) -> None:
    _, of = play(lambda launch, _: 1.0)
    _launch(of)
    before = list(tmp_path.rglob("*.json"))
    assert len(before) == 1

    def fails(launch: Launch, _: int) -> float:
        raise error

    kernel, of = play(fails)
    with pytest.raises(type(error), match=str(error.args[0])):
        _launch(of, head_dim=128)
    assert len(kernel.launched) == 1, "measured again"
    _launch(of)  # what is known of other sizes is known still
    assert list(tmp_path.rglob("*.json")) == before


DAMAGED: dict[str, Callable[[dict[str, Any]], str]] = {
    "half of it": lambda record: json.dumps(record)[: len(json.dumps(record)) // 2],
    "empty": lambda record: "",
    "no settings": lambda record: "{}",
    "not a record": lambda record: "[1, 2]",
    "bytes": lambda record: "\x00\ufffd",
    "settings that are none of ours": lambda record: json.dumps(record | {"launch": record["launch"] | {"block_k": 7}}),
    "settings of another version": lambda record: json.dumps(record | {"launch": record["launch"] | {"clusters": 2}}),
    "another card's": lambda record: json.dumps(record | {"asked": record["asked"] | {"card": "another"}}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_record_is_measured_again_and_no_other(
    damage: str, play: Callable[..., tuple[Played, Tuned]], tmp_path: Path
) -> None:
    candidates = launches_of(torch.bfloat16)
    _, of = play(lambda launch, _: launch != candidates[2])
    _launch(of)
    (record,) = tmp_path.rglob("*.json")
    known = record.read_text()
    _launch(of, head_dim=128)
    _launch(of, lengths=(70, 3000))
    others = {path: path.read_bytes() for path in tmp_path.rglob("*.json") if path != record}
    assert len(others) == 2
    record.write_text(DAMAGED[damage](json.loads(known)))
    for measured in (len(candidates), 0):  # as in two other processes
        kernel, of = play(lambda launch, _: launch != candidates[2])
        _launch(of)
        _launch(of, head_dim=128)
        _launch(of, lengths=(70, 3000))
        assert kernel.measured == measured
        assert set(kernel.launched[measured:]) == {candidates[2]}
    assert json.loads(record.read_text())["launch"] == json.loads(known)["launch"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json") if path != record} == others


def test_each_card_is_measured_for_itself(play: Callable[..., tuple[Played, Tuned]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also two of one architecture, and a slice of a card."""
    cards = ("NVIDIA H100 80GB HBM3, 132", "NVIDIA H100 PCIe, 114", "NVIDIA H100 80GB HBM3, 60")
    for measured in (len(launches_of(torch.bfloat16)), 0):
        for card in cards:
            monkeypatch.setattr(tuned, "card_of", lambda device, card=card: card)
            kernel, of = play(lambda launch, _: 1.0)
            _launch(of)
            assert kernel.measured == measured


def test_a_folder_that_cannot_be_written_is_no_obstacle(play: Callable[..., tuple[Played, Tuned]], tmp_path: Path) -> None:
    (tmp_path / "fastvl_lab").write_text("a file")
    kernel, of = play(lambda launch, _: 1.0)
    for _ in range(2):
        _launch(of)
    assert kernel.measured == len(launches_of(torch.bfloat16))


def test_compiled_code_has_what_was_measured_for_the_longest_lengths_and_measures_nothing(
    play: Callable[..., tuple[Played, Tuned]], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = launches_of(torch.bfloat16)
    kernel, of = play(lambda launch, number: (number - 1) // len(candidates) != candidates.index(launch))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    _launch(of)
    assert (kernel.measured, kernel.launched[-1]) == (0, candidates[0])
    kernel.launched.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    for lengths in ((70, 70), (5000, 5000), (300, 300)):  # the n-th measured has the n-th of the settings
        kernel.launched = kernel.launched[: kernel.measured]
        _launch(of, lengths=lengths)
    n = kernel.measured
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    _launch(of, lengths=(9, 9))
    assert (kernel.measured, kernel.launched[-1]) == (n, candidates[1])
    _launch(of, head_dim=128)
    assert (kernel.measured, kernel.launched[-1]) == (n, candidates[0])
