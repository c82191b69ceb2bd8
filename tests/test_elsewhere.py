"""What other engines have: for every option of the catalogue, spelt as the engines spell it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvl_lab.catalogue import toggles
from fastvl_lab.elsewhere import ELSEWHERE, RELEASES, Counterpart, Way

# Names of flags and environment variables, recorded from each release.
RECORDED = json.loads(Path(__file__).with_name("engine_flags.json").read_text())
VLLM = os.environ.get("FASTVL_LAB_VLLM")


def _counterparts(engine: str) -> Iterator[tuple[str, Counterpart]]:
    return ((path, getattr(there, engine)) for path, there in ELSEWHERE.items())


def _set(engine: str, *kinds: str) -> set[str]:
    return {way.setting[0] for _, there in _counterparts(engine) for way in there.ways.values() if way.kind in kinds}


def test_every_toggle_has_its_counterparts_in_the_order_of_the_catalogue() -> None:
    assert list(ELSEWHERE) == [toggle.path for toggle in toggles()], "what vLLM, SGLang and LMDeploy have there: elsewhere.py"


@pytest.mark.parametrize("engine", RELEASES)
def test_every_way_is_to_an_option_and_says_where_it_was_read(engine: str) -> None:
    values = {toggle.path: set(map(str, toggle.values)) for toggle in toggles()}
    for path, there in _counterparts(engine):
        assert set(there.ways) <= values[path], path
        assert there.source.startswith(f"{engine}/"), path
        assert there.ways or there.rest, f"{path}: nothing is said of {engine}"
        for text in (there.rest, *(way.note for way in there.ways.values())):
            assert "|" not in text  # it stands in a table
            assert "\n" not in text


@pytest.mark.parametrize("engine", RELEASES)
def test_flags_and_variables_are_spelt_as_the_release_spells_them(engine: str) -> None:
    recorded = RECORDED[engine]
    assert recorded["version"] == RELEASES[engine].version
    assert _set(engine, "flag") <= set(recorded["flags"].split())
    assert _set(engine, "variable") <= set(recorded["variables"].split())
    notes = " ".join(text for _, there in _counterparts(engine) for text in (there.rest, *(w.note for w in there.ways.values())))
    assert set(re.findall(r"--[a-z][\w.-]*\w", notes)) <= set(recorded["flags"].split())


@pytest.mark.engine
@pytest.mark.skipif(not VLLM, reason="starts a real engine, and FASTVL_LAB_VLLM names none")
def test_flags_are_in_the_help_of_a_real_vllm() -> None:
    command = [str(VLLM), "serve", "--help=all"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    for flag in _set("vllm", "flag"):
        assert re.search(rf"^  .*{flag.partition('.')[0]}\b", shown, re.MULTILINE), flag


def test_a_way_says_itself_in_words() -> None:
    there = Counterpart(
        source="engine/file.py",
        ways={
            "a": Way(kind="default", how="1.2"),
            "b": Way(kind="flag", how="--b 1", note="a word"),
            "c": Way(kind="variable", how="C=0"),
            "d": Way(kind="none", note="it was removed"),
        },
        rest="nobody asked",
    )
    said = [str(there.way(value)) for value in "abcde"]
    assert said == ["by default since 1.2", "--b 1; a word", "C=0", "none; it was removed", "none; it has `a`; nobody asked"]
    assert [there.way(value).setting for value in "bc"] == [("--b", "1"), ("C", "0")]
