"""A checkpoint that is written as a folder is the same when it is loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from fastvl_lab import CheckpointError
from fastvl_lab.checkpoint import load
from fastvl_lab.checkpoint.saved import write_folder


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_loads_to_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    """Though parameters are views of fused and padded tensors in memory."""
    made = load(name, device="cpu", dtype=dtype)
    write_folder(made, tmp_path)
    again = load(tmp_path, device="cpu", dtype=dtype)
    assert again.source == str(tmp_path)
    ours, theirs = made.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert (again.eos_token_ids, again.max_length, again.image_settings) == (
        made.eos_token_ids,
        made.max_length,
        made.image_settings,
    )
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == made.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == list(made.eos_token_ids)
    assert 'Qwen2VLImageProcessor"' in (tmp_path / "preprocessor_config.json").read_text()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load("tiny-qwen3-vl", device="cpu")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs \d+\.\d MB on disk for other engines to read it, .* set TMPDIR to a folder"):
        write_folder(made, tmp_path)
    assert not list(tmp_path.iterdir())
