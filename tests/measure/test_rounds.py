"""Functions side by side: interleaving, pairing, and what the notebooks draw of it."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from fastvl_lab import Lab, Recipe, Request, photo, view
from fastvl_lab.measure.preprocessing import STEPS, model_pictures, pixel_differences, time_preprocessing
from fastvl_lab.measure.rounds import Rounds, Timing, time_rounds


def test_rounds_are_interleaved_and_warm_up_is_not_kept() -> None:
    seen: list[str] = []
    tasks = {name: (lambda name=name: seen.append(name) or {"a": 1.0, "b": 2.0}) for name in "xyz"}
    rounds = time_rounds(tasks, repeats=4, warm_up=2, seed=1)
    assert [sorted(seen[i : i + 3]) for i in range(0, 18, 3)] == [["x", "y", "z"]] * 6
    assert len({tuple(seen[i : i + 3]) for i in range(0, 18, 3)}) > 1
    assert rounds.labels == ("x", "y", "z")
    assert rounds.seconds("y") == [3.0] * 4
    assert rounds.seconds("y", "b") == [2.0] * 4


def test_ratios_are_paired_by_round_whatever_the_order_of_timings() -> None:
    times = {"a": [1.0, 2.0, 4.0, 8.0, 100.0, 6.0, 8.0], "b": [0.5, 1.0, 1.0, 8.0, 10.0, 3.0, 4.0]}
    timings = [Timing(label=label, round=i, steps={"s": t}) for label, ts in times.items() for i, t in enumerate(ts)]
    rounds = Rounds(timings=tuple(reversed(timings)))
    ratio = rounds.ratio("b", "a")
    assert ratio == (2, 1, 10)  # of 2, 2, 4, 1, 10, 2, 2
    assert math.isnan(Rounds(timings=tuple(t for t in timings if t.round < 3)).ratio("b", "a").low)


@pytest.fixture(scope="module")
def request_() -> Request:
    return Request(images=[photo("coffee", (301, 203))], prompt="?", max_pixels=80_000)


def test_the_models_picture_is_what_pillow_resizes_to(lab: Lab, request_: Request) -> None:
    """For floats and bytes, frames sent twice and once."""
    recipes = ["baseline", "baseline, preprocessor.resize=pillow", "fastest, preprocessor.resize=pillow"]
    pictures = [model_pictures(lab, request_, Recipe.parse(recipe))[0] for recipe in recipes]
    shape = lab.run(request_, "baseline").shapes[0]
    whole = Image.open(io.BytesIO(request_.image_inputs[0].data))
    expected = np.asarray(whole.resize((shape.resized_width, shape.resized_height), Image.Resampling.BICUBIC))
    for picture in pictures:
        assert np.array_equal(picture, expected)
    drafted = model_pictures(lab, request_, Recipe.parse("fastest, preprocessor.decode=draft"))
    (difference,) = pixel_differences(drafted, [expected])
    assert difference.largest == difference.levels.max()
    assert difference.levels.shape == expected.shape


def test_preprocessing_is_timed_in_its_three_steps_and_drawn(labs: dict[str, Lab], request_: Request) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    recipes = {"stock": Recipe.baseline(), "<fast>": Recipe.fastest()}
    rounds = time_preprocessing(lab, request_, recipes, repeats=5, warm_up=1)
    assert all(tuple(timing.steps) == STEPS and min(timing.steps.values()) >= 0 for timing in rounds.timings)
    table = view.rounds_frame(rounds, "stock", "preprocess")
    assert list(table.variant) == ["stock", "<fast>"]
    assert table.iloc[0, -1] == "reference"
    assert float(table["in all ms"][1]) == pytest.approx(rounds.median("<fast>").median * 1e3, abs=0.01)
    bars = view.step_bars(rounds, "a title")
    assert [trace.name for trace in bars.data] == list(STEPS)
    assert bars.data[1].x[-1] == pytest.approx(rounds.median("stock", "preprocess").median * 1e3)
    assert "<fast>" not in bars.to_json()
    lines = view.cost_against_size({1.0: rounds, 2.0: rounds}, x_title="x", y_title="y")
    assert [len(trace.x) for trace in lines.data] == [2, 2]


def test_difference_maps_show_each_map_once_and_none_for_equal_pixels(labs: dict[str, Lab], request_: Request) -> None:
    lab, stock = labs["tiny-qwen2.5-vl"], Recipe.baseline()
    recipes = {
        "equal": Recipe.parse("fastest, preprocessor.resize=pillow"),
        "torch": Recipe.fastest(),
        "torch again": Recipe.parse("baseline, preprocessor.resize=torch"),
        "device": Recipe.parse("fastest, preprocessor.resize=device"),
    }
    reference = model_pictures(lab, request_, stock)
    differences = {name: pixel_differences(model_pictures(lab, request_, recipe), reference)[0] for name, recipe in recipes.items()}
    assert differences["equal"].largest == 0 < differences["torch"].largest <= 2
    figure = view.difference_maps(reference[0], differences)
    assert len(figure.data) == 3
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles[1].startswith(f"torch; torch again:<br>at most {differences['torch'].largest} of 255")
    assert not any("equal" in title for title in titles)
