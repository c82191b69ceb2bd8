"""Records that last: each result comes back from its folder, in another process, without a model; what is damaged is told."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

import fastvl_lab as fl
from fastvl_lab import Comparison, Lab, Request, RequestError, Run, SweepSettings
from fastvl_lab.lasting import Lasting
from fastvl_lab.measure.compare import Attribution


@pytest.fixture(scope="module")
def tiny(labs: dict[str, Lab]) -> Lab:
    return labs["tiny-qwen3-vl"]


@pytest.fixture(scope="module")
def asked(picture: bytes) -> Request:
    return Request(images=[picture], prompt="What is this?", max_new_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def compared(tiny: Lab, asked: Request) -> Comparison:
    return fl.compare(tiny, asked, {"transformers": "transformers", "ours": "fastest"}, repeats=6)


@pytest.fixture(scope="module")
def results(tiny: Lab, asked: Request, compared: Comparison, sweep_settings: Callable[..., SweepSettings]) -> dict[str, Lasting]:
    """One of each kind."""
    only = {"only": ["vit.rope"], "quiet": None, "progress": False, "keep": False}
    return {
        "run": compared.runs("ours")[0],
        "comparison": compared,
        "attribution": Attribution(comparison=compared, steps=compared.engines),
        "load": fl.load(tiny, Request(prompt="Hi", max_new_tokens=3, ignore_eos=True), "fastest", concurrency=2, n=3),
        "sweep": fl.sweep(sweep_settings(checkpoints=["tiny-qwen3-vl", "none"]), progress=False),
        "tune": fl.tune(tiny, asked, 20, **only),
    }


@pytest.fixture(scope="module")
def folder(results: dict[str, Lasting], tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("records")
    for name, result in results.items():
        assert result.save(top / name) == top / name
    return top


DRAWN = """
import json, sys
import fastvl_lab as fl
from fastvl_lab import shown, view
for entry in fl.records(sys.argv[1]):
    found = entry.open()
    drawn = {
        "Run": lambda: [found.waterfall(), view.stage_frame([found])],
        "Comparison": lambda: [found.waterfall(), view.sample_dots(found), found.frame(), found.summary(), found.findings()],
        "Attribution": lambda: [view.step_down(found), view.attribution_frame(found)],
        "Load": lambda: [shown.figure(found), found.frame()],
        "SweepResult": lambda: [view.report_html(found), found.summary(), found.samples(), found.published()],
        "Tuned": lambda: [found.figure(), found.frame(), found.findings()],
    }[entry.kind]()
    made = [one.to_json() if hasattr(one, "to_json") else json.dumps(one) for one in drawn]
    assert all(len(text) > 10 for text in made), entry
    print(json.dumps([entry.kind, repr(found)]))
"""


def test_another_process_draws_each_again_without_a_model(
    folder: Path, results: dict[str, Lasting], forked: Callable[..., str], tmp_path: Path
) -> None:
    script = tmp_path / "drawn.py"
    script.write_text(DRAWN)
    found = dict(map(json.loads, forked(script, str(folder)).splitlines()))
    assert found.keys() == {type(result).__name__ for result in results.values()}
    for result in results.values():
        if type(result).__name__ not in ("SweepResult", "Attribution"):  # whose `repr` is the dataclass's
            assert found[type(result).__name__] == repr(result)


def test_what_is_read_back_is_what_was_kept(folder: Path, results: dict[str, Lasting]) -> None:
    for name, result in results.items():
        again = fl.open(folder / name)
        assert type(again) is type(result)
        assert json.dumps(again.to_record(), default=str) == json.dumps(result.to_record(), default=str), name
    compared = fl.open(folder / "comparison")
    assert compared.summary() == results["comparison"].summary()  # type: ignore[attr-defined]
    assert compared.environment["device"].startswith("CPU")
    again = compared.save(folder.parent / "again")
    assert fl.open(again).environment == compared.environment, "where it was measured, not where it was saved again"


def test_a_folder_has_a_table_and_a_trace_that_perfetto_opens(folder: Path, compared: Comparison) -> None:
    table = pandas.read_parquet(folder / "comparison" / "samples.parquet")
    assert list(table.ttft_ms) == [sample.run.ttft * 1e3 for sample in compared.samples]
    assert set(table.engine) == {"transformers", "ours"}
    assert len(pandas.read_parquet(folder / "load" / "samples.parquet")) == 3
    raced = pandas.read_parquet(folder / "tune" / "samples.parquet")
    assert set(raced.tried) == {"the best so far", *(tried.label for tried in fl.open(folder / "tune").tried if tried.rounds)}
    events = json.loads((folder / "comparison" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"transformers", "ours"}
    starts = [event["ts"] for event in json.loads((folder / "load" / "trace.json").read_text())["traceEvents"] if "ts" in event]
    begun = fl.open(folder / "load").begun
    assert max(starts) / 1e6 > begun[-1] > 0, "requests of a load stand where they came"


def test_without_pandas_samples_are_lines(compared: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    kept = compared.save(tmp_path / "bare")
    assert {path.name for path in kept.iterdir()} == {"record.json", "samples.jsonl", "trace.json"}
    rows = [json.loads(line) for line in (kept / "samples.jsonl").read_text().splitlines()]
    assert [row["ttft_ms"] for row in rows] == [sample.run.ttft * 1e3 for sample in compared.samples]
    assert fl.open(kept).summary() == compared.summary()


def test_a_record_is_whole_or_absent(compared: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = compared.save(tmp_path / "a")
    with pytest.raises(RequestError, match="is there already; name a new folder, or pass replace=True"):
        compared.save(target)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RequestError, match="is there already"):
        compared.save(tmp_path / "mine", replace=True)  # what is no record is never overwritten

    def dies(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastvl_lab.lasting._events", dies)
        for replace, name in ((False, "b"), (True, "a")):
            with pytest.raises(KeyboardInterrupt):
                compared.save(tmp_path / name, replace=replace)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mine"}
    assert fl.open(target).summary() == compared.summary()
    assert fl.open(dataclasses.replace(compared, notes=("new",)).save(target, replace=True)).notes == ("new",)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        compared.save(tmp_path / "file" / "a")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: os.truncate(path / "record.json", 100), "JSONDecodeError"),
        (lambda path: os.truncate(path / "trace.json", 1000), "trace.json has 1000 bytes of "),
        (lambda path: (path / "samples.parquet").unlink(), "FileNotFoundError"),
        (lambda path: (path / "record.json").write_text("[]"), "its format is not 'fastvl_lab record 1'"),
        (lambda path: (path / "record.json").write_text('{"format": "fastvl_lab record 9"}'), "its format is not"),
        (lambda path: _changed(path, kind="Painting"), "its kind is 'Painting'; the choices are Run, Comparison"),
        (lambda path: _changed(path, files=None), "AttributeError"),
        (lambda path: _changed(path, when="yesterday"), "ValueError"),
    ],
)
def test_what_is_truncated_or_foreign_is_told_and_skipped(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], why: str
) -> None:
    for name in ("good", "bad"):
        shutil.copytree(folder / "comparison", tmp_path / name)
    damage(tmp_path / "bad")
    found = fl.records(tmp_path)
    assert [entry.path.name for entry in found] == ["good"]
    (skipped,) = found.skipped
    assert skipped.startswith(f"{tmp_path / 'bad'} (")
    assert why in skipped
    assert "skipped: " in repr(found)
    with pytest.raises(RequestError, match="is no record that can be read: "):
        fl.open(tmp_path / "bad")


def test_a_record_of_options_that_are_no_more_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "old"
    shutil.copytree(folder / "run", kept)
    text = (kept / "trace.json").read_text().replace('"rope"', '"pore"')
    (kept / "trace.json").write_text(text)
    with pytest.raises(RequestError, match=r"is no record that can be read: .*pore"):
        fl.open(kept)
    with pytest.raises(RequestError, match="is no record that can be read: FileNotFoundError"):
        fl.open(tmp_path / "none")
    with pytest.raises(RequestError, match="there is no folder"):
        fl.records(tmp_path / "none")
    for reads in (fl.open, fl.records):
        with pytest.raises(RequestError, match="the folder is None; give its path"):
            reads(None)  # type: ignore[arg-type]


def _changed(path: Path, **changes: Any) -> None:
    (path / "record.json").write_text(json.dumps(json.loads((path / "record.json").read_text()) | changes))


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_ten_thousand_are_listed_in_under_five_seconds(folder: Path, tmp_path: Path, n: int) -> None:
    for number in range(n):
        place = tmp_path / f"{number % 10}" / f"{number}"
        place.mkdir(parents=True)
        for name in ("record.json", "samples.parquet", "trace.json"):
            os.link(folder / "run" / name, place / name)
    began = time.perf_counter()
    found = fl.records(tmp_path)
    took = time.perf_counter() - began
    assert len(found) == n
    assert not found.skipped
    assert took < 5
    assert f"and {n - 50} more" in repr(found)


def test_a_list_is_a_table_too(folder: Path) -> None:
    table = fl.records(folder).frame()
    assert sorted(table["what"]) == ["Attribution", "Comparison", "Load", "Run", "SweepResult", "Tuned"]
    assert fl.records(folder)[0].open().to_record()


def test_a_runs_logits_are_not_kept(folder: Path, results: dict[str, Lasting]) -> None:
    again = fl.open(folder / "run")
    assert isinstance(again, Run)
    assert again.logits.numel() == 0
    assert again.tokens == results["run"].tokens  # type: ignore[attr-defined]


def test_a_folder_that_cannot_be_read_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "run", tmp_path / "mine")
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found = fl.records(tmp_path)
    assert len(found) == 1
    (skipped,) = found.skipped
    assert skipped.startswith(str(tmp_path / "secret"))
    assert "Permission denied" in skipped
