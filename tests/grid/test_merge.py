"""Merging pools nothing across hosts or cards, and names what makes cells unlike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

import fastvl_lab as fl
from fastvl_lab import Lab, Request, compare
from fastvl_lab.grid.__main__ import described, main
from fastvl_lab.grid.merge import GridResult, Merger
from fastvl_lab.grid.plan import Plan, of_mapping
from fastvl_lab.grid.rendezvous import Rendezvous, prepare
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.load import MEASURES
from fastvl_lab.measure.under_load import LoadRound, UnderLoad
from fastvl_lab.view.figures import ttft_against_visual_tokens
from fastvl_lab.view.grid_report import grid_html

SLOW, FAST = [0.0200 + 0.0001 * number for number in range(9)], [0.0100 + 0.0001 * number for number in range(9)]


@pytest.fixture(scope="session")
def record(labs: dict[str, Lab], picture: bytes) -> dict[str, Any]:
    """A comparison of two engines, as a cell gives it."""
    request = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    found = compare(labs["tiny-qwen3-vl"], request, {"transformers": "transformers", "baseline": "baseline"}, repeats=1)
    return found.to_record()


@pytest.fixture
def grid(tmp_path: Path) -> Plan:
    """A plan of four cells, whose folder is made."""
    sizes = [[56, 56], [84, 56], [56, 84], [84, 84]]
    base = {"checkpoints": ["tiny-qwen3-vl"], "recipes": ["transformers", "baseline"], "image_sizes": sizes}
    plan = of_mapping({**base, "device": "cpu", "output_dir": str(tmp_path / "run")})
    prepare(tmp_path / "run", plan.to_dict())
    return plan


@pytest.fixture
def merged(grid: Plan, record: dict[str, Any]) -> Callable[..., GridResult]:
    """Merges what hosts gave: for each cell in turn what is its own of where it was measured, and the reference's seconds."""
    rendezvous = Rendezvous(folder=Path(grid.settings.output_dir), stale=60.0)

    def made(*hosts: tuple[dict[str, Any], list[float]]) -> GridResult:
        for cell, (own, seconds) in zip(grid.cells, hosts, strict=False):
            where = {
                "host": "one",
                "card": "H",
                "card_id": "GPU-1",
                "device": "H",
                "torch": "2",
                "code": "abc",
                "driver": "580",
                "threads": 4,
            } | own
            about = {"worker": "w", "host": where["host"], "claims": 1, "seconds": 10.0}
            result = {"comparisons": [record], "errors": [], "environment": where, "reference": {"seconds": seconds}}
            assert rendezvous.publish(cell.id, result | about)
        return Merger(grid, rendezvous).merge()

    return made


def test_every_row_says_where_it_was_measured_and_what_all_share_is_said_once(
    merged: Callable[..., GridResult], grid: Plan
) -> None:
    result = merged(({}, FAST), ({"host": "two", "card_id": "GPU-2"}, FAST))
    rows, samples = result.summary(), result.samples()
    assert [(row["host"], row["card_id"], row["cell"]) for row in rows] == [
        (host, card, cell.id)
        for host, card, cell in zip(("one", "two"), ("GPU-1", "GPU-2"), grid.cells, strict=False)
        for _ in range(2)
    ]
    assert {(sample["host"], sample["driver"], sample["code"]) for sample in samples} == {
        ("one", "580", "abc"),
        ("two", "580", "abc"),
    }
    assert result.environment["card"] == "H"
    assert "host" not in result.environment
    assert [row["state"] for row in result.cells] == ["done", "done", "not measured", "not measured"]
    assert result.notes == ()
    assert [host.label for host in result.hosts] == ["one (H, GPU-1)", "two (H, GPU-2)"]


def test_a_grid_lasts_as_other_results_do(merged: Callable[..., GridResult], tmp_path: Path) -> None:
    result = merged(({}, FAST), ({"host": "two", "card_id": "GPU-2"}, SLOW))
    opened = fl.open(result.save(tmp_path / "kept"))
    assert isinstance(opened, GridResult)
    assert json.dumps(opened.to_record()) == json.dumps(result.to_record())
    assert opened.hosts == result.hosts


def test_a_host_whose_reference_has_no_interval_lasts_too(merged: Callable[..., GridResult], tmp_path: Path) -> None:
    result = merged(({}, [0.01] * 3))
    opened = fl.open(result.save(tmp_path / "kept"))
    assert opened.hosts[0].reference.known == result.hosts[0].reference.known == "too few rounds for an interval"


def test_a_host_that_is_slower_in_the_reference_by_more_than_its_interval_is_named(merged: Callable[..., GridResult]) -> None:
    other = {"host": "two", "card_id": "GPU-2"}
    result = merged(({}, FAST), (other, SLOW), ({}, FAST), ({"host": "three", "card": "A"}, SLOW))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("two (H, GPU-2) is slow: the reference takes 20.40 ms there (95% CI ")
    assert "10.40 ms on one (H, GPU-1)" in result.notes[0]  # and "three", which has another card, is compared with nobody
    assert result.findings()[0] == result.notes[0]
    assert repr(result).splitlines()[1] == result.notes[0]


def test_a_host_within_the_interval_is_not_named_and_too_few_runs_name_nobody(merged: Callable[..., GridResult]) -> None:
    near = [second + 0.0003 for second in FAST]
    assert merged(({}, FAST), ({"host": "two"}, near), ({"host": "three"}, [0.5] * 3)).notes == ()


def test_what_should_be_the_same_everywhere_and_who_else_was_on_a_card_is_named(merged: Callable[..., GridResult]) -> None:
    others = {"others_on_card": "4711, python"}
    without_gpu = {"card": "A", "card_id": "", "driver": None}
    notes = merged(({}, FAST), ({"code": "def-dirty", "torch": "3", "threads": 8}, FAST), (others, FAST), (without_gpu, FAST)).notes
    assert notes == (
        "one: other processes were on the card GPU-1: 4711, python",
        "the cells were measured with 2 values of code: abc, def-dirty",
        "the cells were measured with 2 values of torch: 2, 3",
        "the cells were measured with 2 values of threads: 4, 8",
    )


def test_what_is_written_can_be_read_and_names_every_cell(merged: Callable[..., GridResult], grid: Plan) -> None:
    result = merged(({}, FAST), ({"host": "two"}, FAST))
    folder = Path(grid.settings.output_dir)
    assert {"results.parquet", "result.json", "report.html", "record.json"} <= {path.name for path in result.write()}
    frame = pandas.read_parquet(folder / "results.parquet")
    assert set(frame.host) == {"one", "two"}
    document = json.loads((folder / "result.json").read_text())
    assert [point["environment"]["host"] for point in document["points"]] == ["one", "two"]
    assert len(document["cells"]) == 4


def test_a_cell_under_a_load_is_a_row_with_its_throughput_and_a_filter_of_the_page(record: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    base = {"checkpoints": ["tiny-qwen3-vl"], "recipes": ["transformers", "baseline"], "image_sizes": [[56, 56]]}
    loads = ["none", {"concurrency": 2, "n": 4}, {"rate": 5, "n": 4}]
    plan = of_mapping({**base, "loads": loads, "device": "cpu", "output_dir": str(folder)})
    prepare(folder, plan.to_dict())
    rendezvous = Rendezvous(folder=folder, stale=60.0)
    values = {of: [0.25] * 4 for of in MEASURES}
    rounds = [
        LoadRound(engine=engine, round=0, values=values, requests=4, failed=0, tokens=8, seconds=seconds)
        for engine, seconds in (("transformers", 2.0), ("baseline", 1.0))
    ]
    under = UnderLoad(comparison=Comparison.from_record(record), rounds=tuple(rounds), failures={}).to_record()
    where = {"host": "one", "card": "H", "card_id": "GPU-1", "device": "H"}
    about = {"worker": "w", "host": "one", "claims": 1, "seconds": 10.0, "environment": where, "reference": {}}
    alone, closed, failed = plan.cells
    rendezvous.publish(alone.id, {"comparisons": [record], "loads": [], "errors": [], **about})
    rendezvous.publish(closed.id, json.loads(json.dumps({"comparisons": [], "loads": [under], "errors": [], **about})))
    rendezvous.publish(failed.id, {"error": "it fails", "worker": "w", "host": "one", "claims": 1, "seconds": 1.0})
    result = Merger(plan, rendezvous).merge()
    assert [(row["load"], row["state"]) for row in result.cells] == [
        ("", "done"),
        ("2 at once, 4 requests", "done"),
        ("5 a second, 4 requests", "failed"),
    ]
    assert result.errors[0]["image"] == "56×56, 5 a second, 4 requests"
    rows = result.load_rows()
    assert [(row["engine"], row["tokens_per_second"], row["ttft_p99_ms"]) for row in rows] == [
        ("transformers", 4.0, 250.0),
        ("baseline", 8.0, 250.0),
    ]
    assert {(row["host"], row["cell"], row["load"]) for row in rows} == {("one", closed.id, "2 at once, 4 requests")}
    opened = fl.open(result.save(tmp_path / "kept"))
    assert opened.load_rows() == rows
    data = json.loads(grid_html(result).partition("id='grid-data'>")[2].partition("</script>")[0])
    at = {name: number for number, name in enumerate(data["columns"])}
    assert [row[at["load"]] for row in data["rows"]] == ["alone"] * 2 + ["2 at once, 4 requests"] * 2
    assert data["rows"][3][at["tokens_per_second"]] == 8.0
    assert "data-column='load'" in grid_html(result)


def test_kinds_of_card_have_panels_of_their_own(merged: Callable[..., GridResult]) -> None:
    figure = ttft_against_visual_tokens(merged(({}, FAST), ({"card": "A"}, FAST)).summary())
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == ["tiny-qwen3-vl · H", "tiny-qwen3-vl · A"]


def test_the_command_merges_what_is_done_and_estimates_the_rest_by_it(
    merged: Callable[..., GridResult], grid: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged(({}, FAST))
    assert "1 done" in described(grid)
    assert "(by what 1 cell took)" in described(grid)
    text = (
        "checkpoints: [tiny-qwen3-vl]\nrecipes: [transformers, baseline]\nimage_sizes: [[56, 56], [84, 56], [56, 84], [84, 84]]\n"
    )
    (tmp_path / "plan.yaml").write_text(f"{text}device: cpu\noutput_dir: {tmp_path / 'run'}\n")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "plan.yaml"), "--merge"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "1 of 4 cells are done" in printed
    assert f"report: {tmp_path / 'run' / 'report.html'}" in printed


def test_a_point_without_an_environment_of_its_own_is_a_sweeps(merged: Callable[..., GridResult]) -> None:
    result = merged(({}, FAST))
    alone = dataclasses.replace(result.points[0], environment={})
    assert "host" not in dataclasses.replace(result, points=(alone,)).summary()[0]
