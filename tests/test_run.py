"""A run shows itself everywhere, and survives its record."""

from __future__ import annotations

import json

import pytest

from fastvl_lab import Lab, Request, Run
from fastvl_lab.request import UNNAMED, Chunk


@pytest.fixture(scope="module")
def run(labs: dict[str, Lab]) -> Run:
    from fastvl_lab import photo

    request = Request(images=[photo("astronaut", (168, 140))] * 2, prompt="What <b>is</b> this?", max_new_tokens=6, ignore_eos=True)
    return labs["tiny-qwen2.5-vl"].run(request, "fastest")


def test_the_stage_table_adds_up(run: Run) -> None:
    rows = {row["stage"]: row["host_ms"] for row in run.stage_table()}
    total = rows.pop("TTFT")
    assert sum(rows.values()) == pytest.approx(total, rel=1e-6)
    assert total == pytest.approx(run.ttft * 1e3)
    assert sum(row["share"] for row in run.stage_table()) == pytest.approx(2)


def test_the_subtitle_tells_what_became_of_the_images(run: Run) -> None:
    assert run.subtitle() == (
        f"image 168×140 and 1 more → resized 168×140 → 240 patches → 60 visual tokens → {run.n_prompt} prompt tokens"
    )


def test_text_form_has_each_stage_where_it_happened(run: Run) -> None:
    lines = repr(run).splitlines()
    assert lines.pop() == "counted: vit.positions built 1"
    stages = [line.split()[0] for line in lines[3:]]
    assert stages == [*run.trace.stages(), "unaccounted", "TTFT"]
    bars = {line.split()[0]: line.partition("%")[2] for line in lines[3:]}
    first = {name: len(bar) - len(bar.lstrip()) for name, bar in bars.items() if bar.strip()}
    assert first["decode_image"] < first["vit"] < first["prefill"]


def test_mimebundle_has_a_figure_a_table_and_text(run: Run) -> None:
    bundle = run._repr_mimebundle_()
    json.dumps(bundle)
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.plotly.v1+json"}
    figure = bundle["application/vnd.plotly.v1+json"]
    assert {bar["type"] for bar in figure["data"]} == {"bar"}
    assert "sendChartToCloud" in figure["config"]["modeBarButtonsToRemove"]
    assert bundle["text/html"].count("<tr>") == len(run.stage_table()) + 1
    assert "<script" not in bundle["text/html"]


def test_a_run_survives_its_record(run: Run) -> None:
    again = Run.from_record(json.loads(json.dumps(run.to_record())))
    assert again.to_record() == run.to_record()
    assert repr(again) == repr(run)
    assert again.recipe == run.recipe


def test_of_runs_without_logits_many_can_be_kept(run: Run) -> None:
    assert run.logits.untyped_storage().nbytes() > 0
    kept = run.without_logits()
    assert kept.logits.untyped_storage().nbytes() == 0
    assert kept.tokens == run.tokens


def test_tpot_counts_the_tokens_after_the_first_chunk(run: Run) -> None:
    import dataclasses

    chunks = (
        Chunk(text="a", tokens=(1, 2), time=1.0),
        Chunk(text="b", tokens=(3,), time=1.5),
        Chunk(text="c", tokens=(4, 5, 6), time=3.0),
    )
    assert dataclasses.replace(run, chunks=chunks).tpot == pytest.approx(0.5)
    assert dataclasses.replace(run, chunks=chunks[:1]).tpot is None


def test_a_run_whose_reuse_nobody_tells_says_so(run: Run) -> None:
    import dataclasses

    unsaid = dataclasses.replace(run, kind="unknown")
    assert unsaid.title().endswith("· reuse unknown")
    assert dataclasses.replace(run, kind="cache_hit").title().endswith("· cache hit")
    assert Run.from_record(unsaid.to_record()).kind == "unknown"
    elsewhere = dataclasses.replace(unsaid, remote=True)
    assert elsewhere.subtitle() == f"{run.n_prompt} prompt tokens, as the endpoint counts them"
    assert dataclasses.replace(elsewhere, n_prompt=0).subtitle() == "prompt tokens not counted"


def test_tokens_that_nobody_names_are_held_to_their_text(run: Run) -> None:
    import dataclasses

    tokens, text = run.tokens, run.text
    assert run.made(tokens, text)
    assert run.made(tokens, "another, as of a special token that is written or not")
    assert not run.made((*tokens[:-1], tokens[-1] + 1), text)
    unnamed = dataclasses.replace(run, tokens=(UNNAMED, *tokens[1:]))
    assert unnamed.made(tokens, text)
    assert run.made(unnamed.tokens, text)
    assert not unnamed.made(tokens, text + "?")
    assert not unnamed.made((*tokens, 1), text)
