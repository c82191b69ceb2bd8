"""A recipe in the words of another engine."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import fastvl_lab as fl
from fastvl_lab import Recipe, RecipeError, toggles
from fastvl_lab.elsewhere import RELEASES
from fastvl_lab.equivalents import flags_markdown

RECIPE = "baseline, vit.tower=lean, vit.attention=per_window, cache.kv=paged, cache.prefix_reuse=on, capture.vit=graph"


@pytest.mark.parametrize("engine", RELEASES)
def test_every_toggle_of_a_recipe_has_a_row(engine: str) -> None:
    found = fl.flags(RECIPE, engine)
    assert [row.toggle for row in found.rows] == [toggle.path for toggle in toggles()]
    assert [row.value for row in found.rows] == [found.recipe.value(toggle.path) for toggle in toggles()]
    assert found.recipe == Recipe.parse(RECIPE)
    assert found == fl.flags(found.recipe, engine)
    assert sum(map(int, (word for word in found.title.split() if word.isdigit()))) == 2 * len(found.rows)  # the parts and the whole


@pytest.mark.parametrize(
    ("engine", "words", "without"),
    [
        (
            "vllm",
            [
                "--compilation-config.cudagraph_mm_encoder",
                "true",
                "--mm-encoder-attn-backend",
                "TORCH_SDPA",
                "--no-async-scheduling",
            ],
            ["--model-impl", "--no-enable-prefix-caching", "--enable-prefix-caching"],
        ),
        (
            "sglang",
            ["SGLANG_VIT_ENABLE_CUDA_GRAPH=1", "SGLANG_VLM_CACHE_SIZE_MB=0", "--disable-overlap-schedule"],
            ["--disable-radix-cache", "--mm-attention-backend"],
        ),
        ("lmdeploy", ["--enable-prefix-caching", "--eager-mode"], ["--piecewise-cudagraph-max-tokens"]),
    ],
)
def test_the_command_starts_a_server_with_what_the_recipe_asks_for(engine: str, words: list[str], without: list[str]) -> None:
    command = shlex.split(fl.flags(RECIPE, engine).command)
    assert set(words) <= set(command)
    assert not set(without) & set(command)
    serve = shlex.split(RELEASES[engine].serve)
    start = command.index(serve[0])
    assert all("=" in word and not word.startswith("-") for word in command[:start])  # variables stand before the program
    assert command[start : start + len(serve)] == serve


def test_a_number_that_means_nothing_beside_other_choices_is_no_flag() -> None:
    alone = fl.flags("baseline", "vllm")
    assert {row.toggle: str(row.way) for row in alone.rows}["schedule.max_batch"] == "none; it means nothing here"
    assert "--max-num-seqs 1" in alone.command
    assert "--max-num-batched-tokens" not in alone.command
    together = "baseline, cache.kv=paged, schedule.batching=continuous, schedule.prefill=chunked"
    assert "--max-num-seqs 8 --max-num-batched-tokens 512" in fl.flags(together, "vllm").command
    assert "--chunked-prefill-size 512" in fl.flags(together, "sglang").command
    assert "LMDEPLOY_PT_TTFT_POLICY=fifo" in fl.flags(together, "lmdeploy").command


def test_a_flag_has_one_value_and_who_comes_later_is_told() -> None:
    """vLLM has one flag for the attention of prefill and of decode."""
    one = Recipe.parse("baseline, cache.kv=paged, attention.prefill=varlen, attention.decode=triton")
    rows = {row.toggle: row for row in fl.flags(one, "vllm").rows}
    assert rows["attention.prefill"].way.how == "--attention-backend FLASH_ATTN"
    assert str(rows["attention.decode"].way) == "none; --attention-backend is FLASH_ATTN already, for attention.prefill=varlen"
    assert "TRITON_ATTN" not in fl.flags(one, "vllm").command
    assert "--decode-attention-backend triton" in fl.flags(one, "sglang").command
    alike = fl.flags(one.replace("attention.prefill", "triton"), "vllm")
    assert alike.command.count("--attention-backend TRITON_ATTN") == 1


def test_it_shows_itself() -> None:
    found = fl.flags("baseline", "vllm")
    text, page = repr(found), found._repr_html_()
    assert text.splitlines()[0] == found.title
    assert text.splitlines()[-1] == found.command
    assert "cache.prefix_reuse=off" in text
    assert "<td style='text-align:left'>cache.prefix_reuse=off</td>" in page
    assert 'vllm serve "$MODEL"' in text
    assert "vllm serve &quot;$MODEL&quot;" in page
    frame = found.frame()
    assert list(frame["toggle"]) == [row.toggle for row in found.rows]
    assert frame.set_index("toggle").loc["cache.prefix_reuse"]["how"] == "--no-enable-prefix-caching"


def test_a_text_is_read_for_a_device() -> None:
    assert fl.flags("fastest", "vllm", "cuda").recipe == Recipe.fastest("cuda")
    assert fl.flags("fastest", "vllm").recipe == Recipe.fastest("cpu") != Recipe.fastest("cuda")


def test_an_unknown_engine_and_an_unknown_recipe_name_the_choices() -> None:
    with pytest.raises(RecipeError, match=r"no engine 'trt'; the choices are vllm, sglang, lmdeploy"):
        fl.flags("baseline", "trt")
    with pytest.raises(RecipeError, match=r"no engine \['vllm'\]; the choices are"):
        fl.flags("baseline", ["vllm"])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="the choices are baseline, fastest"):
        fl.flags("quickest", "vllm")
    with pytest.raises(RecipeError, match="a recipe is given as None"):
        fl.flags(None, "vllm")  # type: ignore[arg-type]


def test_the_page_of_flags_is_what_is_known(repository: Path) -> None:
    assert (repository / "docs" / "flags.md").read_text() == flags_markdown() + "\n", "make toggles writes it anew"
    page = flags_markdown()
    for toggle in toggles():
        for option in toggle.options[1:]:
            assert f"| `{option.value}` |" in page
    assert "| `cache.prefix_reuse` | `off` | `--no-enable-prefix-caching` | `--disable-radix-cache` | by default |" in page
