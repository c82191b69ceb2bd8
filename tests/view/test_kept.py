"""What a session leaves on disk: results of a workbench as they come, and what another session makes of them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvl_lab import Recipe, RecipeError, RequestError, workbench
from fastvl_lab.measure.compare import Attribution
from fastvl_lab.measure.load import Load
from fastvl_lab.measure.profile import Operation, Profile
from fastvl_lab.view.workbench import Workbench, kept, link, showing
from fastvl_lab.view.workbench.messages import to_json
from fastvl_lab.view.workbench.session import Picture, Result

pytest.importorskip("anywidget")
pytestmark = pytest.mark.usefixtures("quick_panels")

opened = partial(workbench, "tiny-qwen3-vl", "coffee", image_size=(112, 84), max_new_tokens=4, repeats=1, device="cpu")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, quick_panels: None) -> Workbench:
    """A panel that has measured two recipes, marked the first, and was closed."""
    bench = opened(folder=tmp_path_factory.mktemp("kept"))
    bench.choose("vit.attention", "grouped")  # the first waits for nobody
    assert bench.wait(60)
    bench.choose("attention.prefill", "sdpa")
    assert bench.wait(60)
    bench.mark(bench.history[0].number, note="the first one")
    bench.close()
    return bench


@pytest.fixture
def folder(before: Workbench, tmp_path: Path) -> Path:
    """A copy of what it has left."""
    return Path(shutil.copytree(before._folder, tmp_path / "kept"))


def newest(folder: Path) -> str:
    return kept.listed(folder)[0][0].name


def clicked(bench: Workbench, kind: str, **fields: Any) -> None:
    bench.widget._handle_custom_msg({"kind": kind, **fields}, [])


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what a list tells of a result."""
    head, body = gzip.decompress(path.read_bytes()).split(b"\n", 1)
    path.write_bytes(gzip.compress(json.dumps(change(json.loads(head))).encode() + b"\n" + body))


def test_a_result_is_kept_whole(before: Workbench) -> None:
    """All that the page is told of it is the same when it is read again, and every view draws the same."""
    listed, skipped = kept.listed(before._folder)
    assert skipped == ""
    assert [one.name for one in listed] == [f"{before._name}-{result.number:03d}" for result in before.history[::-1]]
    for one, result in zip(listed, before.history[::-1], strict=True):
        again = dataclasses.replace(kept.read(one, -1), number=result.number)
        say = partial(showing.shown, other=None, view="waterfall", against=0, pending=False)
        assert to_json(say(again)) == to_json(say(result))
        assert again.comparison is not None
        assert (again.comparison.summary(), again.held) == (result.comparison.summary(), result.held)  # type: ignore[union-attr]
        for view in before._views.values():
            assert view.lacks(again) == view.lacks(result)
            if not view.lacks(result):
                assert view.draw(again, None)[0].to_json() == view.draw(result, None)[0].to_json()
        row = showing.row(result, None, pinned=False, note="")
        assert (one.ttft, one.ratio, one.parity, one.spread) == (row.ttft, row.ratio, row.parity, showing.spread(result))
    assert [(one.pinned, one.note) for one in listed][-1] == (True, "the first one")


def test_blocks_floors_attribution_and_loads_are_kept_too(before: Workbench, tmp_path: Path) -> None:
    result = before.history[-1]
    comparison = result.comparison
    assert comparison is not None
    attribution = Attribution(comparison=comparison, steps=comparison.engines)
    stage = Operation(name="vit", lane="host", stage="", start_us=0.0, end_us=9.0)
    load = Load(engine="x", begun=(0.0,), runs=(result.run,), failures={}, steps=(), seconds=1.0, concurrency=1)
    more = dataclasses.replace(
        result,
        floors={"vit": 1e-3},
        layers={"transformers": result.run},
        attribution=attribution,
        profile=Profile(stages=(stage,), operations=()),
        loads={"this recipe": load},
    )
    path = kept.path_of(tmp_path, "20261126-101500-ab12", 1)
    kept.write(path, more, pinned=False, note="")
    again = kept.read(kept.listed(tmp_path)[0][0], -1)
    assert again.floors == {"vit": 1e-3}
    assert again.layers is not None
    assert again.layers["transformers"].trace == result.run.trace
    assert again.attribution is not None
    assert again.attribution.steps == comparison.engines
    assert again.attribution.comparison.summary() == comparison.summary()
    assert again.profile is not None
    assert again.profile.stages == (stage,)
    assert again.loads is not None
    assert again.loads["this recipe"].summary() == load.summary()


def test_an_earlier_result_is_shown_without_running_held_against_and_forgotten(folder: Path) -> None:
    name = newest(folder)
    path = folder / f"{name}.json.gz"
    bench = workbench(device="cpu", folder=folder, result=name)  # all else is what the result says
    assert bench.wait(5)
    assert bench.history == []
    shown = bench.widget.shown
    assert (shown["number"], shown["recipe"]["label"]) == (-1, "this recipe")
    assert shown["earlier"].startswith("of an earlier session, ")
    assert "elsewhere" not in shown["earlier"]
    assert (bench.widget.asked["checkpoint"], bench.widget.asked["size"]) == ("tiny-qwen3-vl", "112×84")
    assert bench.recipe.attention.prefill == "sdpa"
    rows = bench.widget.earlier["rows"]
    assert [row["number"] for row in rows] == [-number for number in range(1, len(rows) + 1)]
    assert (rows[-1]["pinned"], rows[-1]["note"]) == (True, "the first one")
    assert rows[0]["question"] == "tiny-qwen3-vl · coffee resized to 112×84 · “Describe this picture.” · 4 tokens"
    clicked(bench, "Look", against=-2)
    assert bench.widget.shown["before"]["label"].startswith("the result of ")
    clicked(bench, "Look", view="ViT blocks")
    assert bench.widget.shown["lacks"] == "ViT blocks was not measured in that session"
    clicked(bench, "Mark", number=-1, pinned=False, note="again")
    assert kept.listed(folder)[0][0].note == "again"
    clicked(bench, "Delete", number=-1)
    assert not path.exists()
    assert [row["number"] for row in bench.widget.earlier["rows"]] == [row["number"] for row in rows[1:]]
    clicked(bench, "Look", number=-1)
    assert "there is no result -1 of an earlier session" in bench.widget.live["error"]
    clicked(bench, "Press", button="forget")
    assert [one.note for one in kept.listed(folder)[0]] == ["the first one"]  # which is pinned
    bench.close()


def test_only_what_was_measured_in_the_same_place_is_held_against(folder: Path) -> None:
    one = kept.listed(folder)[0][1]
    rewritten(one.path, lambda head: head | {"where": head["where"] | {"torch": "1.0"}})
    bench = opened(folder=folder)
    assert bench.wait(60)
    first, second = bench.widget.earlier["rows"][:2]
    assert first["elsewhere"] == ""
    assert second["elsewhere"] == f"torch 1.0, not {torch.__version__}"
    bench.look(number=1, against=-1)
    shown = bench.widget.shown
    assert shown["before"]["label"].startswith(f"{showing.called(bench.result(-1))} (")
    assert shown["before"]["label"].endswith("attention.prefill=sdpa), measured at another time")
    assert [run["label"] for run in (shown["recipe"], shown["rival"])] == ["this recipe", "transformers"]
    bench.look(number=1, against=-2)
    assert bench.widget.shown["before"] is None
    assert f"it was measured elsewhere (torch 1.0, not {torch.__version__})" in bench.widget.shown["no_before"]
    bench.look(number=-2, against=0)
    assert f"measured elsewhere (torch 1.0, not {torch.__version__})" in bench.widget.shown["earlier"]
    clicked(bench, "Use", number=-1)
    assert bench.wait(60)
    assert bench.result().recipe.attention.prefill == "sdpa"
    assert bench.widget.shown["number"] == 2  # the newest again
    bench.delete(2)
    assert [one.name for one in kept.listed(folder)[0] if one.name.startswith(bench._name)] == [f"{bench._name}-001"]
    bench.close()


def test_damaged_and_foreign_files_are_skipped_with_a_word(folder: Path) -> None:
    good, *_ = kept.listed(folder)[0]
    n_good = len(kept.listed(folder)[0])
    (folder / "notes.txt").write_text("mine")
    for number, data in enumerate(
        (b"", b"no gzip", gzip.compress(b"no json"), gzip.compress(b"[" * 10**5), gzip.compress(b'{"format": "another"}'))
    ):
        (folder / f"other-{number}.json.gz").write_bytes(data)
    whole = good.path.read_bytes()
    rewritten(good.path, lambda head: head | {"recipe": {"vit": {"attention": "of tomorrow"}}})
    listed, skipped = kept.listed(folder)
    assert len(listed) == n_good - 1
    assert skipped.startswith("skipped, not a result that can be read: other-4.json.gz (ValueError: its format is 'another', not ")
    assert skipped.endswith(" and 5 more")
    head, body = gzip.decompress(whole).split(b"\n", 1)
    good.path.write_bytes(gzip.compress(head + b"\n" + body[: len(body) // 2]))
    bench = opened(folder=folder, result=good.name, repeats=0)  # what a list tells of it is whole
    assert "is damaged" in bench.widget.live["error"]
    assert bench.widget.live["error"].endswith("forget it; what was asked for with it is measured anew")
    assert bench.widget.earlier["skipped"].endswith(" and 4 more")
    assert bench.wait(60)
    assert bench.widget.shown["number"] == 1
    clicked(bench, "Press", button="open")  # a page that comes later reads it too
    assert "is damaged" in bench.widget.live["error"]
    bench.close()
    good.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="cannot be read"):
        kept.read(good, -1)
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_oldest_go_first_and_pinned_ones_last(before: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aaa.json.gz").write_bytes(b"somebody else's")
    damaged = kept.path_of(tmp_path, "20251126-101500-ab12", 1)
    damaged.write_bytes(b"damaged")

    def write(number: int, *, pinned: bool = False) -> None:
        kept.write(kept.path_of(tmp_path, "20261126-101500-ab12", number), before.history[-1], pinned=pinned, note="")

    def there() -> list[int]:
        return sorted(int(path.name[21:24]) for path in tmp_path.glob("2026*"))

    monkeypatch.setattr(kept, "MOST", 3)
    for number in range(1, 6):
        write(number, pinned=number == 1)
    assert there() == [1, 4, 5]
    size = (tmp_path / "20261126-101500-ab12-005.json.gz").stat().st_size
    monkeypatch.setattr(kept, "MOST_BYTES", int(2.5 * size))
    write(6)
    assert there() == [1, 6]
    for number in (7, 8):
        write(number, pinned=True)
    assert there() == [7, 8]  # where all that is left is pinned, the oldest of it goes
    assert (tmp_path / "aaa.json.gz").exists()
    assert damaged.exists()
    monkeypatch.setattr(kept, "_LARGEST", 1000)
    with pytest.raises(RequestError, match="is not kept: the limit is"):
        write(9)
    assert there() == [7, 8]
    assert not list(tmp_path.glob(".*"))  # nothing is left that was not finished


def test_a_folder_that_cannot_be_written_is_said_and_the_panel_lives_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    bench = opened(folder=tmp_path / "file", repeats=0)
    assert bench.wait(60)
    assert "results are not kept: the folder " in bench.widget.live["error"]
    assert bench.widget.shown["number"] == 1
    clicked(bench, "Press", button="run")
    assert bench.wait(60)
    assert len(bench.history) == 2
    assert bench.widget.live["error"] == ""  # it is said once
    bench.close()


def test_of_pictures_only_names_and_digests_are_kept(before: Workbench, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture)
    taken, path = Picture(source=picture, name="mine.jpg"), Picture(source=str(tmp_path / "a.jpg"))
    question = dataclasses.replace(before.history[-1].question, pictures=(taken, path))
    file = kept.path_of(tmp_path, "20261126-101500-ab12", 1)

    def again() -> Result:
        return kept.read(kept.listed(tmp_path)[0][0], -1)

    kept.write(file, dataclasses.replace(before.history[-1], question=question), pinned=False, note="")
    assert picture[100:200] not in gzip.decompress(file.read_bytes())
    assert again().question == question  # whoever gives the same picture again asks the same
    assert again().question.pictures[0] != Picture(source=picture + b"x", name="mine.jpg")
    with pytest.raises(
        RequestError, match=r"mine\.jpg is not what it was, or was given as a file, of which only the name was kept"
    ):
        again().question.images()
    (tmp_path / "a.jpg").write_bytes(picture + b"x")
    assert again().question != question  # another picture under the same path
    kept.write(file, again(), pinned=False, note="")  # and again, as when it is noted
    assert again().question.pictures[0] == taken


def test_a_link_asks_for_the_same_again(before: Workbench) -> None:
    question, recipe, device = before.history[-1].question, before.history[-1].recipe, torch.device("cpu")
    odd = dataclasses.replace(
        question,
        pictures=(Picture(source="coffee"), Picture(source="a, b&c.jpg")),
        size=(640, 480),
        within=True,
        max_pixels=70_000,
        prompt="Why “this” & not that = 1? ✓",
        max_new_tokens=7,
    )
    bare = dataclasses.replace(question, pictures=(), prompt="", size=None)
    for asked in (question, odd, bare):
        query = link.write(asked, recipe, "name")
        other = dataclasses.replace(question, pictures=(Picture(source="cat"),), prompt="Else?", size=(1, 1), max_pixels=9)
        assert link.read(query[1:], other, Recipe.baseline(), device) == (asked, recipe, "name")
        assert link.read(query[1:] + "&token=secret&theme=dark", other, Recipe.baseline(), device)[0] == asked  # these are Voila's


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("size=large", "size is 'large'; write width and height in pixels"),
        ("tokens=0", "tokens is '0'; write a whole number of at least 1"),
        ("recipe=quick", "recipe 'quick' starts with 'quick'; the choices are baseline, fastest"),
        ("recipe=baseline, vit.tower=lean, vit.attention=triton", "it needs a CUDA device"),
        ("recipes=baseline", "the link has 'recipes'; the choices are checkpoint, size"),
        ("size=8x8&size=9x9", "the link has size 2 times"),
        ("checkpoint=evil/model", "the link asks for checkpoint 'evil/model', which is not here; the choices are tiny-qwen2.5-vl"),
        ("&".join(["picture=cat"] * 99), "the link cannot be read"),
    ],
)
def test_a_link_that_cannot_be_read_is_a_sentence(before: Workbench, query: str, says: str) -> None:
    with pytest.raises((RequestError, RecipeError), match=r".") as failed:
        link.read(query, before.history[-1].question, Recipe.baseline(), torch.device("cpu"))
    assert says in str(failed.value)


def test_a_page_says_what_its_link_lacks_and_a_line_opens_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = opened(folder=folder, repeats=0, query="size=large")
    assert "size is 'large'" in bench.widget.live["error"]
    assert bench.widget.asked["size"] == "112×84"  # as without a link
    assert bench.wait(60)
    assert bench.widget.shown["link"].startswith("?checkpoint=tiny-qwen3-vl&")
    bench.close()
    name = bench.widget.shown["link"].rpartition("result=")[2].partition("&")[0]
    again = opened(folder=folder, query=bench.widget.shown["link"][1:])
    assert again.history == []
    assert again.widget.shown["number"] == -1
    assert again._earlier[-1].name == name
    again.close()
    gone = opened(folder=folder, repeats=0, query="tokens=2&result=20200101-000000-abcd-001")
    assert "the result '20200101-000000-abcd-001' is not kept in " in gone.widget.live["error"]
    assert gone.wait(60)
    assert len(gone.result().run.tokens) == 2
    gone.close()

    scope: dict[str, Any] = {}
    exec("import fastvl_lab as fl\n" + again.widget.shown["line"], scope)  # the folder stands in it
    assert scope["bench"].widget.shown["number"] == -2  # of what was kept since
    assert scope["bench"]._earlier[-2].name == name
    assert scope["bench"].widget.shown["link"] == ""  # a notebook has none
    scope["bench"].close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastvl_lab").mkdir()
    folder.rename(tmp_path / "fastvl_lab" / "workbench")
    usual = workbench(device="cpu", result=name)
    assert "folder=" not in usual.widget.shown["line"]
    usual.close()
