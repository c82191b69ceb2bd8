"""A chat turn by turn: what a turn finds is what its own engine kept of the turns before it, and answers are the same."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastvl_lab import Lab, Recipe, Request, RequestError
from fastvl_lab.cache.memory import BLOCK_SIZE
from fastvl_lab.measure.compare import Conversation, converse

TEXTS = ("What is it?", "And behind?", "Why?")
NOTHING, IMAGES, PREFIXES, BOTH = "nothing kept", "images", "prefixes", "both"
MAX_NEW = 6


@pytest.fixture(scope="module", params=["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def chat(request: pytest.FixtureRequest, labs: dict[str, Lab], picture: bytes) -> Conversation:
    paged = Recipe.parse("fastest, cache.kv=paged")
    engines = {
        "transformers": "transformers",
        NOTHING: paged,
        IMAGES: paged.replace("cache.image_reuse", "on"),
        PREFIXES: paged.replace("cache.prefix_reuse", "on"),
        BOTH: paged.replace({"cache.image_reuse": "on", "cache.prefix_reuse": "on"}),
    }
    return converse(labs[request.param], picture, TEXTS, engines, max_new_tokens=MAX_NEW, repeats=2, warm_up=1)


def test_all_engines_play_all_turns_and_make_the_same_tokens(chat: Conversation) -> None:
    assert chat.reference == "transformers"
    played = {(one.engine, one.round, one.turn) for one in chat.samples}
    assert played == {(engine, number, turn) for engine in chat.engines for number in (-1, 0, 1) for turn in range(3)}
    assert len(played) == len(chat.samples)
    for engine in chat.engines:
        assert chat.tokens_equal(engine), engine
        assert {len(one.run.tokens) for one in chat.samples} <= set(range(1, MAX_NEW + 1))


def test_every_turn_sends_the_history_with_the_references_answers(chat: Conversation) -> None:
    lengths = [{one.run.n_prompt for one in chat.samples if one.turn == turn} for turn in range(3)]
    assert all(len(of_turn) == 1 for of_turn in lengths)  # the same request for every engine in every round
    (first,), (second,), (third,) = lengths
    for turn, (before, after) in enumerate([(first, second), (second, third)]):
        answer = chat.runs(chat.reference, turn)[0].tokens
        assert after - before > len(answer) + len(TEXTS[turn + 1])  # a byte is a token in these checkpoints
    assert all(one.run.visual_tokens == chat.samples[0].run.visual_tokens > 0 for one in chat.samples)


def test_the_first_turn_finds_nothing_in_any_round(chat: Conversation) -> None:
    """Neither what another engine kept, nor the same turn of the round before."""
    for one in chat.samples:
        if one.turn == 0:
            assert not one.run.trace.counts.get("cache: prefix tokens found")
            assert not one.run.trace.counts.get("cache: images found")
            assert one.run.kind == ("cold" if one.round < 0 else "warm")


def test_later_turns_find_what_their_engine_keeps(chat: Conversation) -> None:
    for turn in (1, 2):
        for engine in ("transformers", NOTHING):
            assert (chat.kind(engine, turn), chat.found(engine, turn)) == ("warm", (0, 0))
        assert (chat.kind(IMAGES, turn), chat.found(IMAGES, turn)) == ("cache_hit", (0, 1))
        before = chat.runs(NOTHING, turn - 1)[0]
        gone_through = before.n_prompt + len(before.tokens) - 1  # the last token of an answer has been through no layer
        for engine in (PREFIXES, BOTH):
            assert chat.kind(engine, turn) == "cache_hit"
            tokens, images = chat.found(engine, turn)
            assert gone_through - BLOCK_SIZE < tokens <= gone_through
            assert images == 0  # the picture is inside the prefix
            assert "vit" not in chat.runs(engine, turn)[0].trace.stages()


def test_the_summary_says_it_all_and_is_json(chat: Conversation) -> None:
    rows = chat.summary(NOTHING)
    assert [(row["turn"], row["engine"]) for row in rows] == [(turn, engine) for turn in (1, 2, 3) for engine in chat.engines]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    own = next(row for row in rows if row["engine"] == NOTHING)
    assert own["speedup"] == 1
    assert own["speedup_low"] is None  # two rounds make no interval
    row = next(row for row in rows if (row["turn"], row["engine"]) == (2, BOTH))
    runs = {
        name: [one.run.ttft for one in chat.samples if (one.engine, one.turn) == (name, 1) and one.round >= 0]
        for name in (BOTH, NOTHING)
    }
    ratios = [theirs / mine for mine, theirs in zip(runs[BOTH], runs[NOTHING], strict=True)]
    assert row["speedup"] == pytest.approx(sum(ratios) / 2)  # the median of two
    assert row["kind"] == "cache_hit"


def test_no_speed_up_stands_beside_other_tokens(chat: Conversation) -> None:
    wrong = [
        dataclasses.replace(one, run=dataclasses.replace(one.run, tokens=(1,))) if (one.engine, one.turn) == (BOTH, 2) else one
        for one in chat.samples
    ]
    red = dataclasses.replace(chat, samples=tuple(wrong))
    assert not red.tokens_equal(BOTH)
    assert red.tokens_equal(BOTH, 1)
    assert red.speedup(BOTH, 1, NOTHING) is None
    assert red.speedup(NOTHING, 1, BOTH) is None
    assert red.speedup(PREFIXES, 1, NOTHING) is not None


def test_cold_runs_are_not_pooled_with_others(labs: dict[str, Lab], picture: bytes) -> None:
    lab = labs["tiny-qwen2.5-vl"]
    chat = converse(lab, picture, ["What is the colour of it?"], {"baseline": "baseline"}, max_new_tokens=2, repeats=3, warm_up=0)
    assert [one.run.kind for one in chat.samples] == ["cold", "warm", "warm"]
    assert len(chat.runs("baseline", 0)) == 2
    once = converse(lab, picture, ["What is the colour of it?"], {"baseline": "baseline"}, max_new_tokens=2, repeats=1, warm_up=0)
    assert once.kind("baseline", 0) == "cold"
    assert len(once.runs("baseline", 0)) == 1


def test_a_lab_apart_finds_nothing_of_another_and_forgets_when_told(labs: dict[str, Lab], picture: bytes) -> None:
    recipe = "fastest, cache.kv=paged, cache.image_reuse=on, cache.prefix_reuse=on"
    request = Request(images=[picture], prompt="What is it?", max_new_tokens=3, ignore_eos=True)
    one, other = labs["tiny-qwen2.5-vl"].apart(), labs["tiny-qwen2.5-vl"].apart()
    assert one.checkpoint is other.checkpoint
    runs = [one.run(request, recipe), one.run(request, recipe), other.run(request, recipe)]
    one.memory.forget()
    runs += [one.run(request, recipe), one.run(request, recipe)]
    assert [run.kind for run in runs] == ["cold", "cache_hit", "cold", "warm", "cache_hit"]
    assert len({run.tokens for run in runs}) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"texts": []}, "engines or texts is empty"),
        ({"engines": {}}, "engines or texts is empty"),
        (
            {"texts": "What is this?"},
            r"engines is \{'baseline': 'baseline'\} and texts 'What is this\?'; give label -> engine, and a list",
        ),
        ({"engines": ["baseline"]}, r"engines is \['baseline'\] and texts \['\?'\]; give label -> engine, and a list"),
        ({"repeats": 0}, "repeats is 0 and warm_up 1; repeats must be at least 1"),
        ({"warm_up": -1}, "warm_up at least 0"),
    ],
)
def test_conversations_without_meaning_are_refused(labs: dict[str, Lab], picture: bytes, changes: dict, says: str) -> None:
    arguments = {"texts": ["?"], "engines": {"baseline": "baseline"}, "repeats": 1} | changes
    with pytest.raises(RequestError, match=says):
        converse(labs["tiny-qwen2.5-vl"], picture, **arguments)
