"""The sweep: errors are recorded and it goes on; what it keeps can be read back."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
import pytest
from PIL import Image

from fastvl_lab import CheckpointError, DeviceError, FastvlError, ImageError, RecipeError, RequestError, SweepSettings, photo, sweep
from fastvl_lab.errors import MissingExtraError
from fastvl_lab.measure.publish import PHOTOGRAPHS, notebook_parameters
from fastvl_lab.measure.sweep import SweepResult, sweep as alone
from fastvl_lab.view.__main__ import main as print_table


@pytest.fixture
def settings_of(sweep_settings: Callable[..., SweepSettings]) -> Callable[..., SweepSettings]:
    """Makes those of two engines at one size, with what a test changes."""
    return partial(sweep_settings, recipes=["transformers", "baseline"], image_sizes=[[96, 64]], max_new_tokens=3)


def test_failures_are_recorded_and_the_sweep_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings_of: Callable[..., SweepSettings]
) -> None:
    sizes = [[96, 64], [2100, 10], [64, 96]]
    changes = {"checkpoints": ["no-such", "tiny-qwen3-vl"], "image_sizes": sizes, "output_dir": str(tmp_path)}
    settings = settings_of(**changes)
    result = sweep(settings, progress=False)
    assert [(e["checkpoint"], e["image"], e["engine"]) for e in result.errors] == [
        ("no-such", "", ""),
        ("tiny-qwen3-vl", "2100×10", "transformers"),
        ("tiny-qwen3-vl", "2100×10", "baseline"),
    ]
    assert "aspect ratio" in result.errors[1]["error"]
    assert [point.size for point in result.points] == [(96, 64), (64, 96)]

    assert (tmp_path / "results.parquet").exists()  # kept as points finish, not only at the end
    written = result.write()
    assert {path.name for path in written} >= {"results.parquet", "result.json", "report.html"}
    assert all(path.stat().st_size > 0 for path in written)
    frame = pandas.read_parquet(tmp_path / "results.parquet")
    assert len(frame) == 2 * 2 * 2  # points, engines, rounds
    assert set(frame.kind) == {"cold", "warm"}
    stages = [c for c in frame if c.endswith("_ms") and c not in ("ttft_ms", "tpot_ms")]
    assert frame[stages].sum(axis=1).tolist() == pytest.approx(frame.ttft_ms.tolist(), rel=0.01)
    for path in (tmp_path / "traces").iterdir():
        assert json.loads(path.read_text())["traceEvents"]
    assert len(list((tmp_path / "traces").iterdir())) == 8  # one a run
    dataclasses.replace(result, points=result.points[1:]).write()
    assert len(list((tmp_path / "traces").iterdir())) == 4, "none of an earlier sweep"
    result.write()
    assert json.loads((tmp_path / "result.json").read_text())["schema"] == 1
    first, *lines = repr(result).splitlines()
    assert (first, lines[:4]) == ("2 points", result.findings())
    assert lines[4].startswith("failed: no-such: checkpoint 'no-such' is unknown")

    print_table([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "failed: no-such: checkpoint 'no-such' is unknown" in printed
    assert printed.count("tiny-qwen3-vl ") >= 4
    assert f"report: {tmp_path / 'report.html'}" in printed


def test_an_error_that_nobody_foresaw_costs_its_point_only(
    monkeypatch: pytest.MonkeyPatch, settings_of: Callable[..., SweepSettings]
) -> None:
    settings = settings_of(image_sizes=[[96, 64], [64, 96]])
    real = photo

    def breaks_once(image: str, size: tuple[int, int]) -> bytes:
        if size == (96, 64):
            raise ZeroDivisionError("surprise")
        return real(image, size)

    monkeypatch.setattr("fastvl_lab.measure.sweep.photo", breaks_once)
    result = sweep(settings, progress=False)
    assert [e["error"] for e in result.errors] == ["ZeroDivisionError: surprise"]
    assert [point.size for point in result.points] == [(64, 96)]


def test_a_missing_image_is_recorded_at_every_point(settings_of: Callable[..., SweepSettings]) -> None:
    result = sweep(settings_of(image="no/such.jpg"), progress=False)
    assert [e["error"].partition(";")[0] for e in result.errors] == ["image 'no/such.jpg' does not exist"]
    assert result.points == ()


def test_an_image_as_it_is(tmp_path: Path, picture: bytes, settings_of: Callable[..., SweepSettings]) -> None:
    (tmp_path / "photo.jpg").write_bytes(picture)
    settings = settings_of(image=str(tmp_path / "photo.jpg"), image_sizes=[], recipes=["fastest"])
    result = sweep(settings, progress=False)
    assert result.points[0].comparison.representative("fastest").shapes[0].width == 168
    assert result.points[0].label == "tiny-qwen3-vl · as given"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"recipes": ["baseline", "quickest"]}, RecipeError, "the choices are baseline, fastest"),
        ({"recipes": "baseline"}, RequestError, "give a list"),
        ({"recipes": None}, RequestError, "give a list"),
        ({"recipes": [1]}, RecipeError, "a recipe is given as 1"),
        ({"recipes": [["a"]]}, RecipeError, "a recipe is given as"),
        ({"image_sizes": [5]}, RequestError, r"image_sizes has 5; each is \[width, height\]"),
        ({"image_sizes": [[70000, 400]]}, RequestError, "from 1 to 65500"),
        ({"repeats": 2.5}, RequestError, "repeats is 2.5; it must be a whole number"),
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens is 0"),
        ({"prompt": 2024}, RequestError, r"prompt is 2024; it must be a text \(papermill: -r prompt"),
        ({"dtype": "int4"}, CheckpointError, "dtype is 'int4'"),
        ({"device": "gpu"}, DeviceError, "the choices are 'cpu' and 'cuda'"),
        ({"output_dir": "/dev/null/x"}, RequestError, "cannot be made"),
        ({"checkpoints": []}, RequestError, "is empty"),
        ({"checkpoints": ["tiny-qwen3-vl", None]}, CheckpointError, "checkpoints has None; each is a text"),
        ({"image_sizes": [[10]]}, RequestError, r"image_sizes has \[10\]"),
        ({"image_sizes": [[0, 5]]}, RequestError, "in whole pixels"),
        ({"repeats": 0}, RequestError, "repeats is 0"),
    ],
)
def test_what_can_be_known_before_any_work_is_refused_then(
    changes: dict, error: type[FastvlError], says: str, settings_of: Callable[..., SweepSettings]
) -> None:
    with pytest.raises(error, match=says):
        settings_of(**changes)


@pytest.mark.parametrize(
    ("name", "values", "error", "says"),
    [
        ("recipes", ["baseline", "baseline"], RecipeError, "'baseline' and 'baseline'"),
        ("recipes", ["fastest", "fastest,vit.tower=lean", "fastest, vit.tower=lean"], RecipeError, "'fastest, vit.tower=lean'"),
        ("checkpoints", ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"], CheckpointError, "'tiny-qwen3-vl'"),
        ("checkpoints", ["random:Qwen/Qwen3-VL-2B-Instruct"] * 2, CheckpointError, "random:Qwen"),
        ("checkpoints", ["mine", "other", "./mine/"], CheckpointError, "'mine' and './mine/'"),
        ("checkpoints", ["mine", "link"], CheckpointError, "'mine' and 'link'"),
        ("checkpoints", ["~/mine", "mine"], CheckpointError, "'~/mine' and 'mine'"),
        ("image_sizes", [[64, 96], [96, 64], [64, 96]], RequestError, r"\[64, 96\]"),
        ("image_sizes", [[64, 96], (64, 96)], RequestError, r"\[64, 96\] and \(64, 96\)"),
    ],
)
def test_what_is_named_twice_is_refused_however_it_is_spelled(
    name: str,
    values: list,
    error: type[FastvlError],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings_of: Callable[..., SweepSettings],
) -> None:
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(error, match=f"{name} names one twice: .*{says}"):
        settings_of(**{name: values})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("checkpoints", ["tiny-qwen3-vl", "./tiny-qwen3-vl"]),  # the built-in one, and a folder of that name
        ("checkpoints", ["Qwen/Qwen3-VL-2B-Instruct", "random:Qwen/Qwen3-VL-2B-Instruct"]),
        ("image_sizes", [[64, 96], [96, 64]]),
        ("recipes", ["baseline", "baseline, vit.tower=transformers"]),  # one recipe under two names: how far noise goes
    ],
)
def test_what_has_two_names_to_be_told_apart_by_is_not_refused(
    name: str, values: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings_of: Callable[..., SweepSettings]
) -> None:
    (tmp_path / "tiny-qwen3-vl").mkdir()
    monkeypatch.chdir(tmp_path)
    settings_of(**{name: values})


def test_notebook_parameters_know_what_papermill_injected(settings_of: Callable[..., SweepSettings]) -> None:
    settings = vars(settings_of())
    namespace = {**settings, "In": ["", "repeats: int = 5", "# Parameters\nrepeats = 1\n"], "layers": []}
    assert notebook_parameters(namespace, list(settings)) == settings
    namespace["In"].append("# Parameters\nrepeat = 1\n")  # type: ignore[attr-defined]
    with pytest.raises(
        RequestError, match=r"parameter 'repeat' is unknown \(did you mean 'repeats'\?\); the choices are checkpoints"
    ):
        notebook_parameters(namespace, list(settings))
    assert notebook_parameters({**settings, "In": ["# Parameters\nrepeats = float('nan')\n"]}, list(settings)) == settings
    with pytest.raises(RequestError, match="parameters seed have no value"):
        notebook_parameters({k: v for k, v in settings.items() if k != "seed"}, list(settings))


def test_settings_are_settings() -> None:
    with pytest.raises(RequestError, match=r"the settings are a dict; give fastvl_lab.SweepSettings"):
        sweep({"recipes": ["baseline"]})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_built_in_photographs_have_the_size_asked_for(decode: Callable[[list[bytes]], list[Image.Image]], name: str) -> None:
    data = photo(name, (123, 45))
    assert data[:2] == b"\xff\xd8"
    assert decode([data])[0].size == (123, 45)
    assert decode([photo(name)])[0].width > 123
    assert photo(data) == data
    for wrong in ((0, 5), 5, (1, 2, 3), (1.5, 2)):
        with pytest.raises(ImageError, match=r"size is .*; it must be \(width, height\) in whole pixels from 1 up"):
            photo(name, wrong)  # type: ignore[arg-type]


def test_what_is_kept_on_disk_needs_its_packages_before_any_work(
    tmp_path: Path, settings_of: Callable[..., SweepSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ran: list[None] = []
    with pytest.raises(MissingExtraError, match=r"needs the package pyarrow"):
        alone(settings_of(output_dir=str(tmp_path)), progress=False, on_run=lambda: ran.append(None))
    assert ran == []


def test_samples_that_cannot_be_written_cost_no_point(
    tmp_path: Path, settings_of: Callable[..., SweepSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: SweepResult) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(SweepResult, "write_samples", fails)
    result = sweep(settings_of(image_sizes=[[96, 64], [64, 96]], output_dir=str(tmp_path)), progress=False)
    assert [point.size for point in result.points] == [(96, 64), (64, 96)]
    assert ["planted" in error["error"] for error in result.errors] == [True, True]
