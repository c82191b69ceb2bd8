"""Every notebook runs headless, and what it publishes holds together.

The sweep and the panel run as users run them, by papermill in a kernel of their own; the others cell by cell in this process, which
has loaded torch already.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import fastvl_lab
from fastvl_lab import Lab, SweepSettings
from fastvl_lab.errors import FastvlError
from fastvl_lab.measure.compare import Comparison
from fastvl_lab.measure.load import Load
from fastvl_lab.measure.publish import MIME_TYPE
from fastvl_lab.trace import STAGES

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))

CHECKPOINTS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")

RunCells = Callable[[Path, dict[str, Any]], list[dict[str, Any]]]

# Small parameters, so that each notebook runs in seconds.
SMALL: dict[str, dict[str, Any]] = {
    "attention": {"image_size": [168, 140], "max_new_tokens": 4, "length": 64, "lengths": [32, 64, 128], "steps": 2, "repeats": 2},
    "cache": {
        "image_size": [168, 140],
        "texts": ["What is it?", "And behind?"],
        "max_new_tokens": 4,
        "session_len": 1024,
        "lengths": [32, 64],
        "length": 30,
        "steps": 8,
        "repeats": 2,
    },
    "engines": {"image_size": [168, 140], "max_new_tokens": 4, "repeats": 2, "quiet": 0},
    "graph_capture": {"sizes": [[112, 112], [168, 140]], "max_new_tokens": 3, "repeats": 2},
    "load": {
        "image_size": [56, 56],
        "larger_size": [112, 84],
        "max_new_tokens": 3,
        "concurrency": 2,
        "n": 4,
        "rates": [0.5, 1.5],
        "repeats": 2,
    },
    "ttft_sweep": {"image_sizes": [[168, 140], [336, 280]], "max_new_tokens": 4, "repeats": 2},
    "preprocessor": {"image_size": [640, 480], "sizes": [[168, 140], [640, 480]], "max_pixels": 100_000, "repeats": 2},
    "tune": {"image_sizes": [[168, 140]], "max_new_tokens": 2, "seconds": 6, "only": ["vit.rope"], "keep": False, "repeats": 2},
    "vit": {"image_size": [336, 280], "sizes": [[112, 112], [224, 224], [336, 336]], "repeats": 2},
    "workbench": {"image_size": [168, 140], "max_new_tokens": 6, "repeats": 2},
    "workbench_from_cells": {"image_size": [168, 140], "max_new_tokens": 6, "repeats": 2},
}


def _execute(path: Path, out: Path, parameters: dict[str, Any]) -> nbformat.NotebookNode:
    unknown = set(parameters) - set(papermill.inspect_notebook(str(path)))
    assert not unknown, f"{path.name} has no parameters {unknown}"
    return papermill.execute_notebook(
        str(path), str(out), parameters, kernel_name="python3", progress_bar=False, store_widget_state=False, cwd=str(out.parent)
    )


def _shown(notebook: nbformat.NotebookNode) -> list[dict[str, Any]]:
    return [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]


def _published(shown: list[dict[str, Any]]) -> dict[str, Any]:
    results = [bundle[MIME_TYPE] for bundle in shown if MIME_TYPE in bundle]
    assert len(results) == 1, "a notebook publishes one result"
    return results[0]


@pytest.fixture
def run_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_lab: Callable[..., Lab]) -> Iterator[RunCells]:
    """Run a notebook's cells in this process, the parameters after their cell as papermill does; what they showed comes back.

    Built-in checkpoints are shallow, and loaded once.
    """
    for module in ("fastvl_lab", "fastvl_lab.measure.sweep", "fastvl_lab.view.workbench.session"):
        monkeypatch.setattr(f"{module}.Lab", quick_lab)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))

    def run(path: Path, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        assert set(parameters) <= set(papermill.inspect_notebook(str(path)))
        with capture_output() as captured:
            for cell in (cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"):
                shell.run_cell(cell.source, store_history=True).raise_error()
                if "parameters" in cell.metadata.get("tags", []):
                    shell.push(parameters)
        return [output.data for output in captured.outputs]

    yield run
    if "bench" in shell.user_ns:
        shell.user_ns["bench"].close()
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()


# Those of compiled stages, of streaming and of loads have tests of their own below, and panels are a page of their own.
BY_THEMSELVES = ("graph_capture", "streaming", "load", "workbench", "workbench_from_cells", "ttft_sweep")
OF_A_SLOT = [path for path in NOTEBOOKS if path.stem not in BY_THEMSELVES]
# A notebook runs on one family, the next on the other; by night each on both.
WITH_A_FAMILY = [
    pytest.param(path, checkpoint, id=f"{path.stem}-{checkpoint}", marks=() if (number + other) % 2 == 0 else pytest.mark.nightly)
    for number, path in enumerate(OF_A_SLOT)
    for other, checkpoint in enumerate(CHECKPOINTS)
]


@pytest.mark.parametrize(("path", "checkpoint"), WITH_A_FAMILY)
def test_a_notebook_runs_headless_and_its_result_is_consistent(path: Path, checkpoint: str, run_cells: RunCells) -> None:
    _check(_published(run_cells(path, SMALL[path.stem] | {"checkpoint": checkpoint})))


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["as read", "inductor"])
@pytest.mark.parametrize("checkpoint", [pytest.param(CHECKPOINTS[0], marks=pytest.mark.nightly), CHECKPOINTS[1]])
def test_the_notebook_of_compiled_stages_runs_headless(
    checkpoint: str, inductor: bool, run_cells: RunCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch has read them: a test of capture holds what Inductor compiles to Transformers."""
    if inductor:
        monkeypatch.setattr(fastvl_lab, "Lab", Lab)
    else:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs: graph)
    path = REPOSITORY / "notebooks" / "graph_capture.ipynb"
    _check(_published(run_cells(path, SMALL[path.stem] | {"checkpoint": checkpoint})))


def test_papermill_runs_the_sweep_in_a_kernel_of_its_own(tmp_path: Path) -> None:
    """It has both families by itself."""
    path = REPOSITORY / "notebooks" / "ttft_sweep.ipynb"
    _check(_published(_shown(_execute(path, tmp_path / path.name, SMALL[path.stem]))))


@pytest.mark.nightly
def test_papermill_has_workers_measure_the_cells_of_a_sweep(tmp_path: Path) -> None:
    """Each in a process of its own, which loads torch; the summary grows while cells come in."""
    path = REPOSITORY / "notebooks" / "ttft_sweep.ipynb"
    parameters = SMALL[path.stem] | {
        "image_sizes": [[168, 140]],
        "launcher": "local",
        "workers": min(2, len(os.sched_getaffinity(0))),
    }
    shown = _shown(_execute(path, tmp_path / path.name, parameters))
    result = _published(shown)
    _check(result)
    assert [row["state"] for row in result["cells"]] == ["done", "done"]
    assert len({point["environment"]["cell"] for point in result["points"]}) == 2


def test_the_panel_is_used_from_cells(run_cells: RunCells) -> None:
    path = REPOSITORY / "notebooks" / "workbench_from_cells.ipynb"
    _check(_published(run_cells(path, SMALL[path.stem])))


@pytest.mark.parametrize("checkpoint", [CHECKPOINTS[0], pytest.param(CHECKPOINTS[1], marks=pytest.mark.nightly)])
def test_a_load_says_whether_its_tokens_are_those_of_one_at_a_time(checkpoint: str, run_cells: RunCells) -> None:
    result = _published(run_cells(REPOSITORY / "notebooks" / "load.ipynb", SMALL["load"] | {"checkpoint": checkpoint}))
    _check(result)
    assert result["same_tokens"] == dict.fromkeys(("one at a time", "continuous", "inline", "ahead"), 4)
    loads = result["loads"]
    pieces = ["whole", "chunked, 512", "chunked, 128", "and by blocks"]
    assert list(loads) == ["one at a time", "continuous", *pieces, "inline", "ahead"]
    assert {row["failed"] for row in loads.values()} == {0}
    assert [row["requests"] for row in loads.values()] == [4, 4, 2, 2, 2, 2, 4, 4]
    assert [row["arrivals"].endswith(" a second") for rows in result["rates"].values() for row in rows] == [True] * 4


def test_a_load_whose_answers_have_one_token_and_of_which_one_failed_is_summed_up(
    run_cells: RunCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no time between chunks then, and each answer is held against that to the same request."""
    measure, failed = fastvl_lab.load, []

    def load(*args: Any, **settings: Any) -> Load:
        made = measure(*args, **settings)
        if not failed:
            failed.append(0)
            made = dataclasses.replace(made, runs=(None, *made.runs[1:]), failures={0: "it left"})
        runs = [run and dataclasses.replace(run, tokens=(number,)) for number, run in enumerate(made.runs)]
        return dataclasses.replace(made, runs=tuple(runs))

    monkeypatch.setattr(fastvl_lab, "load", load)
    result = _published(run_cells(REPOSITORY / "notebooks" / "load.ipynb", SMALL["load"] | {"max_new_tokens": 1}))
    assert result["same_tokens"] == dict.fromkeys(("one at a time", "continuous", "inline", "ahead"), 3)


@pytest.mark.parametrize(("notebook", "label"), [("vit", "all of them"), ("preprocessor", "torch, as bytes")])
def test_what_fails_parity_is_not_timed(notebook: str, label: str, run_cells: RunCells, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = fastvl_lab.compare

    def compare(*args: Any, **settings: Any) -> Comparison:
        made = measure(*args, **settings)
        checks = {name: dataclasses.replace(check, holds=check.holds and name != label) for name, check in made.checks.items()}
        return dataclasses.replace(made, checks=checks)

    monkeypatch.setattr(fastvl_lab, "compare", compare)
    run_cells(REPOSITORY / "notebooks" / f"{notebook}.ipynb", SMALL[notebook])
    timed = InteractiveShell.instance().user_ns["rounds"].engines
    assert "stock" in timed
    assert label not in timed


def _check(result: dict[str, Any]) -> None:
    """Tokens, stages and sums of every point and engine."""
    assert result["errors"] == []
    assert result["points"]
    for point in result["points"]:
        engines = point["engines"]
        assert len(engines) > 1
        expected = engines[point["reference"]]
        for name, engine in engines.items():
            assert engine["tokens_equal"], name
            if engine["oracle"] == point["reference"]:  # else its pixels are its own, and so may its tokens be
                assert engine["tokens"] == expected["tokens"], name
                assert engine["text"] == expected["text"], name
            *stages, unaccounted, ttft = engine["stages"]
            if name != point["reference"]:  # a peer has an order of its own; a gate that holds tokens puts decode before emit
                ran = [row["stage"] for row in stages if row["stage"] != "decode"]
                assert ran == [stage for stage in STAGES if stage in ran]
            assert {"decode_image", "preprocess", "tokenize", "vit", "merge", "prefill", "sample", "emit"} <= {
                r["stage"] for r in stages
            }
            assert (unaccounted["stage"], ttft["stage"]) == ("unaccounted", "TTFT")
            total = sum(row["host_ms"] for row in stages) + unaccounted["host_ms"]
            assert total == pytest.approx(ttft["host_ms"], rel=0.01)


def test_the_panels_notebook_runs_headless(run_cells: RunCells) -> None:
    """Tests of the browser run it in a kernel of its own."""
    path = REPOSITORY / "notebooks" / "workbench.ipynb"
    *_, last = run_cells(path, SMALL["workbench"])
    assert "application/vnd.jupyter.widget-view+json" in last  # nothing stands below the panel
    assert all(cell.metadata["jupyter"]["source_hidden"] for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


@pytest.mark.nightly
def test_papermill_runs_the_panels_notebook_in_a_kernel_of_its_own(tmp_path: Path) -> None:
    path = REPOSITORY / "notebooks" / "workbench.ipynb"
    cells = _execute(path, tmp_path / path.name, SMALL["workbench"]).cells
    assert "application/vnd.jupyter.widget-view+json" in cells[-1].outputs[-1]["data"]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("checkpoint", "tokens"),
    [(CHECKPOINTS[0], 96), *(pytest.param(checkpoint, 128, marks=pytest.mark.nightly) for checkpoint in CHECKPOINTS)],
)
def test_the_report_is_reproduced_named_and_cured_in_a_notebook(
    checkpoint: str, tokens: int, run_cells: RunCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process, and from outside through a server, which has the whole model."""
    monkeypatch.setattr(fastvl_lab, "Lab", Lab)
    parameters = {"checkpoint": checkpoint, "image_size": [168, 140], "max_new_tokens": tokens, "repeats": 6}
    result = _published(run_cells(REPOSITORY / "notebooks" / "streaming.ipynb", parameters))
    _check(result)
    answers = result["answers"]
    assert all(answer["same_tokens"] for answer in answers.values())
    for label in ("as reported", "as reported, through HTTP"):
        assert answers[label]["chunks"] <= 2
        assert answers[label]["ttft_share"] >= 0.9
        assert {"ttft_is_the_answer", "bursts"} <= set(answers[label]["audit"])
    for label in ("plain", "as reported, but gate=open", "plain, through HTTP"):
        assert answers[label]["chunks"] == answers["plain"]["chunks"] > 0.78 * tokens
        assert answers[label]["audit"] == []
    for undone in ("steps_per_round=1", "gate=open", "positions=on_device"):
        assert answers[f"as reported, but {undone}"]["ttft_share"] < 0.5
    engines = result["points"][0]["engines"]
    open_gate, plain = engines["open gate, rounds of 16"], engines["plain"]
    assert open_gate["ttft_low_ms"] <= 1.25 * plain["ttft_high_ms"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals_with_a_type_and_an_explanation(path: Path) -> None:
    """So that `papermill --help-notebook` explains every one of them."""
    source = next(c.source for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))
    declared = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}  # type: ignore[attr-defined]
    inspected = papermill.inspect_notebook(str(path))
    assert set(inspected) == set(declared)
    for name, parameter in inspected.items():
        assert parameter["inferred_type_name"] == type(declared[name]).__name__
        assert len(parameter["help"]) > 10, name


def test_the_sweeps_parameters_are_the_settings_fields() -> None:
    inspected = papermill.inspect_notebook(str(REPOSITORY / "notebooks" / "ttft_sweep.ipynb"))
    fields = dataclasses.fields(SweepSettings)
    assert list(inspected) == [field.name for field in fields]
    defaults = {field.name: field.default for field in fields if isinstance(field.default, str | int | float)}
    assert defaults == {name: ast.literal_eval(inspected[name]["default"]) for name in defaults}  # a plan leaves them out


def test_an_unknown_parameter_is_an_error_before_any_work(
    tmp_path: Path, run_cells: RunCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    """papermill itself warns of it, writes it in, and goes on."""
    path, asked = REPOSITORY / "notebooks" / "ttft_sweep.ipynb", tmp_path / "asked.ipynb"
    papermill.execute_notebook(str(path), str(asked), {"repeat": 1}, prepare_only=True, progress_bar=False)
    monkeypatch.setattr(fastvl_lab, "sweep", pytest.fail)
    with pytest.raises(ValueError, match=r"parameter 'repeat' is unknown \(did you mean 'repeats'\?\)"):
        run_cells(asked, {})


def test_an_unknown_recipe_is_an_error_before_any_work(run_cells: RunCells) -> None:
    with pytest.raises(ValueError, match="the choices are baseline, fastest"):
        run_cells(REPOSITORY / "notebooks" / "ttft_sweep.ipynb", {"recipes": ["quickest"]})


def test_a_sweep_that_measured_nothing_fails_after_saying_why(tmp_path: Path, run_cells: RunCells) -> None:
    parameters = {"checkpoints": ["no-such"], "output_dir": str(tmp_path / "run")}
    with pytest.raises(FastvlError, match="no point could be measured"):
        run_cells(REPOSITORY / "notebooks" / "ttft_sweep.ipynb", parameters)
    report = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert "checkpoint 'no-such' is unknown" in report
    assert json.loads((tmp_path / "run" / "result.json").read_text())["points"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_tree_carries_no_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert "papermill" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")
