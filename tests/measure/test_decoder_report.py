"""The report on the decoder: nothing wrong gets a time, nothing that fails costs the others theirs, and what it writes is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastvl_lab import Lab, Recipe, toggles
from fastvl_lab.attention import eager, sdpa
from fastvl_lab.cache.slotted import KvShape, SlottedKv
from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import tiny
from fastvl_lab.language.decoder import KvCache
from fastvl_lab.language.rope import MRope
from fastvl_lab.measure import decoder_report
from fastvl_lab.measure.decoding import text_prompt
from fastvl_lab.measure.parity import within_budget, worst_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_report, "TINY", decoder_report.TINY | {"lengths": (40,), "steps": 3})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = decoder_report.variants
    kept = ("transformers", "baseline", "lean", "kv=paged")
    monkeypatch.setattr(decoder_report, "variants", lambda *on: {label: variants(*on)[label] for label in kept})


def _check(lab: Lab, *labels: str, length: int = 40, steps: int = 3) -> dict[str, decoder_report.Check]:
    engines = decoder_report.variants(lab.device, lab.dtype)
    return decoder_report.check(lab, length, steps, {label: engines[label] for label in ("transformers", *labels)})


def _right(lab: Lab, found: dict[str, decoder_report.Check]) -> set[str]:
    return set(within_budget({label: one.error for label, one in found.items()}, "transformers", lab.dtype))


def _blind_to_the_newest_key(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    keys, values = cache.read(layer, 0)
    return eager._attend(q, keys[:-1], values[:-1], None)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_option_of_the_slot_has_a_row_with_what_it_requires(device: torch.device) -> None:
    """What a GPU would be given is known without one."""
    engines = decoder_report.variants(device, torch.bfloat16)
    for toggle in toggles():
        if toggle.slot == "attention" or toggle.path == "cache.kv":
            for option in toggle.options:
                met = {e.value(toggle.path) for e in engines.values() if isinstance(e, Recipe)}
                assert (option.value in met) == (option.needs.unmet(Target(device=device)) is None), (toggle.path, option.value)
    assert {"transformers", "baseline", "lean", "kv=static", "kv=paged", "last of each", "fastest"} <= set(engines)
    assert engines["fastest"] == Recipe.fastest(device)
    alone = {label: e.changes().keys() - engines["lean"].changes().keys() for label, e in engines.items() if "=" in label}
    assert all(changed <= {f"attention.{label.split('=')[0]}", "cache.kv"} for label, changed in alone.items())
    if device == CUDA:
        assert engines["prefill=triton"].cache.kv == engines["rope=fused"].cache.kv == "static"
        assert engines["norms=fused"].cache.kv == "concat"
        assert engines["last of each"].attention.prefill == engines["last of each"].attention.decode == "triton"
        assert "prefill=varlen" not in decoder_report.variants(device, torch.float32)


def test_the_truth_is_the_stock_decoder_in_a_wider_dtype_however_the_prompt_is_cut(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, forced = text_prompt(lab, 40, 3), text_prompt(lab, 3, 1).input_ids
    prompt = decoder_report._with_places_of_an_image(prompt)
    assert prompt.positions.shape == (3, 40)
    assert len({tuple(axis) for axis in prompt.positions.tolist()}) == 3  # the axes differ
    assert prompt.positions[:, -1].tolist() == [prompt.next_position - 1] * 3
    truths = []
    for piece in (7, 40, 1000):
        monkeypatch.setattr(decoder_report, "_PIECE", piece)
        with torch.inference_mode():
            truths.append(decoder_report._truth(lab, prompt, forced))
    assert truths[0].dtype == torch.float64
    assert truths[0].shape == (4, lab.checkpoint.config.text_config.vocab_size)
    text, ids = lab.checkpoint.model.model.language_model, torch.cat([prompt.input_ids, forced])
    after = prompt.next_position + torch.arange(3).expand(3, -1)
    out = text(inputs_embeds=text.embed_tokens(ids)[None], position_ids=torch.cat([prompt.positions, after], dim=1)[:, None])
    whole = lab.checkpoint.model.lm_head(out.last_hidden_state[0, 39:])
    for truth in truths:
        assert worst_error([(whole, truth)]) < 1e-5
        assert worst_error([(truth, truths[1])]) < 1e-5


def test_an_engine_that_is_wrong_in_one_place_is_not_within_the_budget(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("baseline", "lean", "rope=rolled")
    assert _right(lab, _check(lab, *labels)) == {"transformers", *labels}

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", _blind_to_the_newest_key)
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline"}

    halves = MRope.halves
    with monkeypatch.context() as patch:  # right for text, whose three axes agree
        patch.setattr(MRope, "halves", lambda rope, positions: halves(rope, positions[:1]))
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline", "lean"}

    def not_a_number(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        last = cache.segments.lengths[0] == 43
        return eager.decode(q, cache, layer) * (float("nan") if last else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", not_a_number)
        assert _right(lab, _check(lab, *labels)) == {"transformers", "baseline"}


def test_one_option_that_fails_says_why_and_its_cache_is_given_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(sdpa, "decode", fail)
    found = _check(lab, "decode=eager", "kv=paged")
    assert found["kv=paged"].error == "RuntimeError: out of resources"
    assert found["kv=paged"].kv_bytes is None
    assert _right(lab, found) == {"transformers", "decode=eager"}
    assert lab.memory.paged.pool.n_used == 0


def test_nothing_is_within_the_budget_of_a_reference_that_could_not_run() -> None:
    assert within_budget({"stock": "RuntimeError: no", "ours": 0.0}, "stock", torch.float32) == frozenset()
    assert within_budget({"stock": float("nan"), "ours": 0.0}, "stock", torch.float32) == frozenset()
    ones, nan = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [1.0, float("nan")]])
    error = worst_error([(ones, ones), (nan, ones), (ones, ones)])
    assert within_budget({"stock": 0.1, "ours": error}, "stock", torch.float32) == {"stock"}


def test_bytes_of_keys_and_values_are_those_of_what_is_kept(lab: Lab) -> None:
    a_token = KvShape.of(lab.checkpoint).bytes_per_token
    held = {label: one.kv_bytes for label, one in _check(lab, "lean", "kv=static", "kv=paged").items()}
    assert held == {
        "transformers": 43 * a_token,
        "lean": 43 * a_token,
        "kv=static": (lab.checkpoint.session_len + 1) * a_token,
        "kv=paged": 48 * a_token,
    }


def test_the_report_checks_before_it_times_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None
) -> None:
    decoder_report.main(["--tiny", "--repeats", "2", "--out", str(tmp_path / "rows.json")])
    rows, printed = json.loads((tmp_path / "rows.json").read_text(), parse_constant=pytest.fail), capsys.readouterr().out
    assert {row["checkpoint"] for row in rows} == set(tiny.NAMES)
    for row in rows:
        assert row["parity"], row
        assert row["error"] < 1e-4
        for step in ("prefill", "decode"):
            assert row[f"{step}_floor_ms"] / row[f"{step}_ms"] == pytest.approx(row[f"{step}_share"])
            assert f"{row[f'{step}_ms']:.3f} ms" in printed
            assert row[f"{step}_ratio_low"] is None  # of two rounds there is no interval
        assert row["tokens_per_second"] * row["decode_ms"] == pytest.approx(1000)
    options = {"baseline", "lean", "prefill=eager", "projections=fused", "rope=rolled", "kv=static", "last of each", "fastest"}
    of_one = {row["recipe"]: row for row in rows if row["checkpoint"] == tiny.NAMES[0]}
    assert options <= set(of_one)
    assert of_one["fastest"]["settings"] == str(Recipe.fastest())
    assert of_one["last_layer=last_token"]["prefill_floor_ms"] < of_one["lean"]["prefill_floor_ms"]  # less is to be done
    assert of_one["transformers"]["prefill_ratio"] == of_one["transformers"]["decode_ratio"] == 1


def test_what_fails_its_parity_is_red_and_has_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: None, few: None
) -> None:
    def no_room(cache: SlottedKv, layer: int, sequence: int) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(sdpa, "decode", _blind_to_the_newest_key)
    monkeypatch.setattr(SlottedKv, "read", no_room)
    with pytest.raises(SystemExit, match="1"):
        decoder_report.main(["--tiny", "--repeats", "1", "--out", str(tmp_path / "rows.json")])
    lines, rows = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "rows.json").read_text())
    for label, why in (("lean", "parity failed: error "), ("kv=paged", "failed: RuntimeError: no room")):
        written = [line.strip() for line in lines if line.strip().startswith(f"{label} ")]
        assert len(written) == 2
        assert all(why in line and line.endswith("; not timed") for line in written)
        assert not any(key.endswith(("_ms", "_per_second")) for row in rows if row["recipe"] == label for key in row)
    assert all("prefill_ms" in row for row in rows if row["recipe"] in ("transformers", "baseline"))


def test_rows_are_handed_on_after_each_length(few: None) -> None:
    seen: list[int] = []
    settings = {"checkpoints": tiny.NAMES[:1], "lengths": (5, 9), "steps": 1, "device": "cpu", "dtype": "float32"}
    rows = decoder_report.report(**settings, repeats=1, on_rows=lambda rows: seen.append(len(rows)))  # type: ignore[arg-type]
    assert seen == [4, 8]
    assert [row["length"] for row in rows] == [5] * 4 + [9] * 4


def test_the_report_needs_a_gpu_unless_it_is_tiny() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    with pytest.raises(SystemExit, match=r"torch sees no CUDA device.*; on a CPU there is --tiny"):
        decoder_report.main([])
