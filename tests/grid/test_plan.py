"""A plan is read whole, and whatever is wrong with it is one sentence before any work."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvl_lab import FastvlError, SweepSettings
from fastvl_lab.grid.__main__ import described, main
from fastvl_lab.grid.plan import Plan, estimate, of_mapping, of_settings, read, runs

SMALL = """
checkpoints: [tiny-qwen2.5-vl, tiny-qwen3-vl]
recipes: [transformers, baseline]
image_sizes: [[56, 56], [84, 56]]
device: cpu
"""


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    """Reads a plan from its text; by default a small one, and what follows it."""

    def made(more: str = "", text: str = SMALL) -> Plan:
        (tmp_path / "plan.yaml").write_text(text + more)
        return read(tmp_path / "plan.yaml", output_dir=str(tmp_path / "run"))

    return made


def test_cells_are_checkpoints_by_sizes_and_their_ids_are_of_what_decides_their_numbers(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    assert [cell.label for cell in plan.cells] == [
        f"{checkpoint} · {size}" for checkpoint in ("tiny-qwen2.5-vl", "tiny-qwen3-vl") for size in ("56×56", "84×56")
    ]
    ids = [cell.id for cell in plan.cells]
    assert len(set(ids)) == 4
    assert [cell.id for cell in plan_of("quiet: 5\nworkers: 2\ncell_seconds: 60").cells] == ids
    for changed in ("repeats: 7", "seed: 1", "dtype: bfloat16", "image: cat", "prompt: Why?", "max_new_tokens: 3", "warm_up: 2"):
        assert not {cell.id for cell in plan_of(changed).cells} & set(ids), changed
    assert json.loads(json.dumps(plan.to_dict()))["cells"][ids[0]]["settings"]["image_sizes"] == [[56, 56]]
    # What a cell's process is given are settings that a sweep takes.
    assert SweepSettings(**plan.to_dict()["cells"][ids[0]]["settings"]).recipes == ["transformers", "baseline"]


def test_a_grid_and_a_zip_of_toggles_spell_recipes(plan_of: Callable[..., Plan]) -> None:
    toggles = "base: baseline, vit.tower=lean\ngrid: {vit.rope: [halves, eager], streaming.steps_per_round: [1, 2]}\n"
    plan = plan_of(toggles, SMALL.replace("recipes: [transformers, baseline]", "recipes: [transformers]"))
    assert plan.settings.recipes == [
        "transformers",
        *(f"baseline, vit.tower=lean, vit.rope={r}, streaming.steps_per_round={n}" for r in ("halves", "eager") for n in (1, 2)),
    ]
    zipped = plan_of("zip: {vit.rope: [eager, halves], attention.rope: [rolled, eager]}\n").settings.recipes[2:]
    assert zipped == ["fastest, vit.rope=eager, attention.rope=rolled", "fastest, vit.rope=halves, attention.rope=eager"]


def test_on_and_off_are_values_though_yaml_has_them_for_truth(plan_of: Callable[..., Plan]) -> None:
    assert plan_of("grid: {schedule.overlap: [off, on]}").settings.recipes[2:] == [
        "fastest, schedule.overlap=off",
        "fastest, schedule.overlap=on",
    ]


def test_scenarios_are_named_and_take_the_rest_from_the_plan(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("scenarios:\n  short: {}\n  long: {max_new_tokens: 64, recipes: [fastest]}\n")
    assert [cell.label for cell in plan.cells][3:5] == ["short · tiny-qwen3-vl · 84×56", "long · tiny-qwen2.5-vl · 56×56"]
    assert [cell.settings["max_new_tokens"] for cell in plan.cells] == [16] * 4 + [64] * 4
    assert plan.settings.recipes == ["transformers", "baseline", "fastest"]
    paired = of_mapping(
        {
            "recipes": ["fastest"],
            "zip": {
                "checkpoints": ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl"],
                "image_sizes": [[64, 64], [32, 32], [96, 96]],
            },
        }
    )
    assert [cell.label for cell in paired.cells] == ["tiny-qwen3-vl · 64×64", "tiny-qwen2.5-vl · 32×32", "tiny-qwen3-vl · 96×96"]


def test_scenarios_may_spell_one_thing_in_two_ways(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        "scenarios:\n  short: {loads: [{rate: 2}], max_new_tokens: 1}\n"
        "  long: {loads: [{rate: 2.0, n: 32}], recipes: ['baseline ']}\n"
    )
    assert [cell.scenario for cell in plan.cells] == ["short"] * 4 + ["long"] * 4
    assert (plan.settings.recipes, plan.settings.loads) == (["transformers", "baseline"], [{"rate": 2}])


def test_a_load_is_an_axis_of_cells_and_those_without_one_keep_their_ids(plan_of: Callable[..., Plan]) -> None:
    alone = plan_of()
    plan = plan_of("loads: [none, {concurrency: 2}, {rate: 2.5, n: 10, seed: 1}]")
    assert [cell.label for cell in plan.cells][:3] == [
        "tiny-qwen2.5-vl · 56×56",
        "tiny-qwen2.5-vl · 56×56 · 2 at once, 8 requests",
        "tiny-qwen2.5-vl · 56×56 · 2.5 a second, 10 requests, seed 1",
    ]
    assert [cell.id for cell in plan.cells][::3] == [cell.id for cell in alone.cells]
    assert len({cell.id for cell in plan.cells}) == 12
    spelled = plan_of("loads: [{n: 8, concurrency: 2, seed: 0}]")
    assert [cell.id for cell in spelled.cells] == [cell.id for cell in plan.cells][1::3]  # however it is spelled
    given = [cell["settings"] for cell in json.loads(json.dumps(plan.to_dict()))["cells"].values()]
    assert [runs(settings) for settings in given[:3]] == [2 * 7, 2 * (1 + 7 * 8), 2 * (1 + 7 * 10)]
    assert SweepSettings(**given[1]).loads == [{"concurrency": 2, "rate": None, "n": 8, "seed": 0}]
    seconds = estimate(plan, {})
    assert seconds[plan.cells[1].id] > seconds[plan.cells[0].id]
    both = plan_of("scenarios: {a: {}, b: {loads: [{rate: 1}]}}")
    assert [cell.load for cell in both.cells] == [""] * 4 + ["1 a second, 32 requests"] * 4


def test_a_sweeps_settings_are_a_plan(sweep_settings: Callable[..., SweepSettings], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    settings = sweep_settings(checkpoints=["tiny-qwen3-vl", str(tmp_path / "mine" / ".." / "mine")], image_sizes=[])
    first, second = of_settings(settings).cells
    assert (first.label, second.settings["checkpoints"]) == ("tiny-qwen3-vl · as given", [str(tmp_path / "mine")])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("repeat: 3", r"plan: key 'repeat' is unknown \(did you mean 'repeats'\?\); the choices are checkpoints, recipes"),
        ("recipe: [fastest]", "key 'recipe' is unknown"),
        ("grid: {vit.attention: [tritn]}", "vit.attention is 'tritn'; the choices are "),
        (
            "grid: {vit.attentoin: [grouped]}",
            r"toggle 'vit.attentoin' is unknown \(did you mean 'vit.attention'\?\); the choices are ",
        ),
        ("vit.attention: [grouped]", "plan has the toggle 'vit.attention'; put it under grid or under zip"),
        ("grid: {vit.attention: []}", "grid: vit.attention is empty; give a list of at least one"),
        ("grid: {vit.attention: grouped}", "grid: vit.attention is 'grouped'; give a list"),
        ("grid: {vit.rope: [eager, eager]}", "recipes names one twice: 'fastest, vit.rope=eager'"),
        ("grid: {streaming.steps_per_round: [.nan]}", "streaming.steps_per_round is nan; the choices are"),
        ("grid: {vit.attention: [varlen]}", "it needs a CUDA device"),
        ("zip: {vit.rope: [eager], attention.rope: [eager, rolled]}", "zip: vit.rope has 1, attention.rope has 2; lists"),
        ("zip: {image_sizes: [[5, 5]]}", "zip has image_sizes and nothing to go with it"),
        ("base: quickest\ngrid: {vit.rope: [eager]}", "the choices are baseline, fastest"),
        ("base: fastest", "base is given, and neither grid nor zip has a toggle"),
        ("checkpoints: []", "key 'checkpoints' stands twice"),
        ("repeats: .nan", "repeats is nan; it must be a whole number"),
        ("quiet: .nan", "quiet is nan; it must be a number of seconds"),
        ("cell_seconds: .nan", "cell_seconds is nan; it must be a number of seconds above 0"),
        ("stale: 1", "stale is 1 and beat 5; a heartbeat must come more often"),
        ("launcher: slurn", "launcher is 'slurn'; the choices are local, ray, submitit"),
        ("workers: -1", "workers is -1"),
        ("scenarios: {}", "scenarios is empty"),
        ("scenarios: {a: {}, b: {}}", r"two cells are equal: a · tiny-qwen2.5-vl · 56×56 and b · tiny-qwen2.5-vl · 56×56"),
        ("scenarios: {a: {recipes: []}}", "scenario 'a': recipes is empty"),
        ("scenarios: {a: {workers: 2}}", "scenario 'a': key 'workers' is unknown"),
        ("scenarios: {a: 5}", "scenario 'a' is 5; give a mapping"),
        ("reference: {recipe: transformers}", "reference: recipe is 'transformers'; it must be one of the lab's own"),
        ("reference: {recipes: baseline}", "reference: key 'recipes' is unknown"),
        ("loads: [{concurrency: 2, rate: 1}]", "concurrency and rate say when requests arrive"),
        ("loads: [{rate: .nan}]", "rate is nan; it must be a finite number"),
        ("loads: [{concurency: 2}]", "loads has the key 'concurency'; the choices are concurrency, rate, n, seed"),
        ("loads: [none, none]", "loads names one twice"),
        ("loads: {concurrency: 2}", r"loads is \{'concurrency': 2\}; give a list"),
        ("image: no/such.jpg", "image 'no/such.jpg' does not exist"),
        ("prompt: [", "is no YAML: "),
    ],
)
def test_every_fault_of_a_plan_is_one_sentence(more: str, says: str, plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(FastvlError, match=says) as caught:
        plan_of(more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is None; it must be a mapping"),
        ("- a", "it must be a mapping with keys such as"),
        ("recipes: [fastest]", "checkpoints is missing"),
        ("checkpoints: [tiny-qwen3-vl]", "recipes is missing"),
        (SMALL.replace("[transformers, baseline]", "[]"), "recipes is empty"),
        (SMALL.replace("56]]", "56], [56, 56]]"), r"image_sizes names one twice: \[56, 56\]"),
        (SMALL.replace("56]]", ".nan]]"), "image_sizes has"),
        (SMALL.replace("tiny-qwen3-vl", "tiny-qwen2.5-vl"), "checkpoints names one twice"),
        (SMALL.replace("cpu", "'cuda:1'"), "device"),
    ],
)
def test_a_plan_without_what_it_needs_is_refused(text: str, says: str, plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(FastvlError, match=says):
        plan_of(text=text)


def test_the_command_prints_the_plan_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(SMALL)
    main([str(path), "--dry-run", "--output-dir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert re.search(r"tiny-qwen3-vl · 84×56 +2 recipes +14 runs", printed)
    assert f"4 cells in {tmp_path / 'run'}, 0 done; launcher local, a worker a device" in printed
    assert "(a guess until a cell is done)" in printed
    assert list((tmp_path / "run").iterdir()) == []  # nothing was started
    for arguments, says in (
        (["--output-dir", "/dev/null/x"], "output_dir '/dev/null/x' cannot be made: Not a directory"),
        (["--workers", "1000"], "error: workers is 1000, and this machine has "),
        (["--launcher", "ray"], "error: workers is 0; say how many launcher 'ray' shall start"),
    ):
        with pytest.raises(SystemExit, match=says):
            main([str(path), "--dry-run", *arguments])
    with pytest.raises(SystemExit, match=r"plan 'none\.yaml' cannot be read: No such file"):
        main(["none.yaml"])


def test_an_estimate_learns_from_cells_that_are_done(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of()
    guess = estimate(plan, {})
    first, second = plan.cells[0].id, plan.cells[1].id
    learnt = estimate(plan, {first: 10 * guess[first]})
    assert learnt[first] == 10 * guess[first]
    assert learnt[second] == pytest.approx(10 * guess[second])
    assert "from 1 cells" not in described(plan)


def test_a_plans_keys_are_the_notebooks_parameters(plan_of: Callable[..., Plan]) -> None:
    """That those are the fields of the settings is held by a test of the notebook."""
    given: dict[str, Any] = dataclasses.asdict(plan_of().settings)
    assert of_mapping(given).settings == plan_of().settings


def test_the_plan_in_the_docs_can_be_read(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "grids.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "plan.yaml").write_text(text)
    plan = read(tmp_path / "plan.yaml", output_dir=str(tmp_path / "run"), launcher="ray")
    assert len(plan.cells) == 2 * 2 * 2 * 3  # scenarios, checkpoints, sizes, loads
    assert len(plan.settings.recipes) == 3 + 2 * 2 * 2
