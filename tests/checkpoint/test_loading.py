"""Every origin of a checkpoint, and one clear sentence for each that is none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvl_lab import CheckpointError, DeviceError, Lab, Request, compare
from fastvl_lab.checkpoint import load, memory, tiny, user_cache
from fastvl_lab.checkpoint.random_weights import published, random_model, write_published_folder
from fastvl_lab.families import FAMILIES, qwen3_vl


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_built_in_checkpoint_is_an_ordinary_folder_and_always_the_same(name: str, own_cache: Path) -> None:
    folder = tiny.folder(name)
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    } <= set(_digest(folder))
    first = _digest(folder)
    shutil.rmtree(folder)
    assert _digest(tiny.folder(name)) == first


@pytest.mark.parametrize("name", [name for name in tiny.names() if name not in tiny.NAMES])
def test_a_small_checkpoint_is_answered_as_transformers_answers_it(name: str, picture: bytes) -> None:
    lab, request = Lab(name, device="cpu"), Request(images=[picture], prompt="What is this?", max_new_tokens=24, ignore_eos=True)
    comparison = compare(lab, request, {"stock": "transformers", "fastest": "fastest"}, repeats=1, warm_up=0)
    assert len(set(comparison.representative("stock").tokens)) > 4, "nothing varies, so nothing is compared"
    assert comparison.parity("stock", "fastest"), comparison.checks
    assert lab.checkpoint.config.text_config.num_hidden_layers == 8


def test_built_in_models_have_what_makes_the_families_what_they_are(labs: dict[str, Lab]) -> None:
    first, second = (labs[name].checkpoint for name in tiny.NAMES)
    assert 0 < len(first.config.vision_config.fullatt_block_indexes) < first.config.vision_config.depth
    assert first.model.model.language_model.layers[0].self_attn.q_proj.bias is not None
    assert len(second.config.vision_config.deepstack_visual_indexes) == 3
    assert second.model.model.language_model.layers[0].self_attn.q_norm.weight.shape == (48,)
    assert second.config.text_config.head_dim != second.config.text_config.hidden_size // 4  # given, not derived
    for checkpoint in (first, second):
        assert checkpoint.model.lm_head.weight is checkpoint.model.model.language_model.embed_tokens.weight
        assert checkpoint.eos_token_ids == (258, 256)
        assert checkpoint.tokenizer.convert_tokens_to_ids("<|image_pad|>") == checkpoint.image_token_id
        assert not any(p.requires_grad for p in checkpoint.model.parameters())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_folder_in_shards_loads_like_the_built_in(name: str, labs: dict[str, Lab], tmp_path: Path, picture: bytes) -> None:
    shutil.copytree(tiny.folder(name), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    labs[name].checkpoint.model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=8)
    run, expected = Lab(str(tmp_path), device="cpu").run(request), labs[name].run(request)
    assert torch.allclose(run.logits, expected.logits, atol=1e-5)  # other addresses, other rounding
    assert run.tokens == expected.tokens


def test_dtype_is_chosen(picture: bytes) -> None:
    lab = Lab("tiny-qwen3-vl", device="cpu", dtype="bfloat16")
    assert lab.dtype == torch.bfloat16
    assert Lab("tiny-qwen3-vl", device="cpu").dtype == torch.float32
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=4)
    for engine in ("transformers", "baseline", "fastest"):
        run = lab.run(request, engine)
        assert run.dtype == "bfloat16"
        assert run.logits.dtype == torch.float32
        assert run.logits.isfinite().all()
    with pytest.raises(CheckpointError, match="dtype is 'int4'; the choices are float32, bfloat16, float16"):
        Lab("tiny-qwen3-vl", dtype="int4")
    with pytest.raises(CheckpointError, match="dtype is 'float64'"):
        Lab("tiny-qwen3-vl", dtype=torch.float64)


def test_a_half_written_cache_is_never_used(own_cache: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        user_cache.whole_folder("some-model", dies)
    assert list((own_cache / "fastvl_lab").iterdir()) == []
    folder = user_cache.whole_folder("some-model", lambda path: (path / "config.json").write_text("{}") and None)
    assert (folder / "config.json").read_text() == "{}"


def test_threads_load_one_after_another() -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda name: load(name, device="cpu"), [*tiny.NAMES, *tiny.NAMES]))
    assert [checkpoint.name for checkpoint in loaded] == [*tiny.NAMES, *tiny.NAMES]


def test_two_processes_that_write_at_once_end_with_one_whole_folder(own_cache: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "file").write_text("mine")
        if not (own_cache / "fastvl_lab" / "model").exists():  # the other process gets there first
            user_cache.whole_folder("model", lambda path: (path / "file").write_text("theirs") and None)

    folder = user_cache.whole_folder("model", write)
    assert (folder / "file").read_text() == "theirs"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written .*; set XDG_CACHE_HOME"):
        Lab("tiny-qwen3-vl")


def test_a_home_that_nobody_knows_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")  # as where HOME is not set and the user has no entry
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME to a folder that can be written"):
        user_cache.cache_root()


def test_random_weights_of_a_geometry_run_like_any_checkpoint(own_cache: Path, picture: bytes) -> None:
    """A published geometry, with fewer and narrower layers, under a name of its own."""
    whole = qwen3_vl.FAMILY.published["Qwen/Qwen3-VL-2B-Instruct"]
    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}
    vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    small = dataclasses.replace(whole, text={**whole.text, **text}, vision={**whole.vision, **vision})
    families = [dataclasses.replace(qwen3_vl.FAMILY, published={"Test/Small-VL": small})]
    lab = Lab("random:Test/Small-VL", device="cpu", families=families)
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=8, ignore_eos=True)
    expected, run = lab.run(request, "transformers"), lab.run(request, "fastest")
    assert run.tokens == expected.tokens == Lab("random:Test/Small-VL", device="cpu", families=families).run(request).tokens
    assert len(set(run.tokens)) > 2
    assert run.text
    assert sum(path.stat().st_size for path in own_cache.rglob("*") if path.is_file()) < 50e6


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Qwen's model cards round these; the exact counts are the hub's safetensors metadata where tied weights count once.
    [("Qwen/Qwen2.5-VL-3B-Instruct", 3.75e9), ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29e9), ("Qwen/Qwen3-VL-4B-Instruct", 4.44e9)],
)
def test_published_geometries_have_the_published_size(name: str, parameters: float) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(write_published_folder(name))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.005)


def test_random_models_keep_the_rotary_frequencies_of_stock_ones() -> None:
    """`to_empty` blanks buffers; they must come back as the stock model has them."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    for name, family in zip(tiny.NAMES, FAMILIES, strict=True):
        config = AutoConfig.from_pretrained(tiny.folder(name))
        made = random_model(family, config, device=torch.device("cpu"), dtype=torch.float32, seed=1)
        stock = dict(AutoModelForImageTextToText.from_config(config).named_buffers())
        assert stock
        assert all(torch.equal(buffer, stock[key]) for key, buffer in made.named_buffers())


def test_every_published_geometry_is_known() -> None:
    assert set(published()) == {
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny-qwen4-vl", "checkpoint 'tiny-qwen4-vl' is unknown; give a folder .* tiny-qwen2.5-vl, tiny-qwen3-vl"),
        ("./no/such/folder", "is unknown; give a folder"),
        ("~nosuchuser/model", "is unknown; give a folder"),
        ("random:Qwen/Nothing", "no geometry is published here for 'Qwen/Nothing'; the choices are Qwen/"),
        ("Qwen/Not-There", "checkpoint 'Qwen/Not-There' cannot be loaded: "),
    ],
)
def test_unknown_checkpoints_are_refused(name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Lab(name, device="cpu")


def test_folders_that_are_no_qwen_vl_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Lab(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"has a broken config.json"):
        Lab(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds a 'llama' model; the lab runs qwen2_5_vl and qwen3_vl"):
        Lab(str(tmp_path))


def test_a_folder_without_weights_or_template_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny.folder("tiny-qwen3-vl"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template"):
        Lab(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded: "):
        Lab(str(tmp_path))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder("tiny-qwen3-vl"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_weights_that_do_not_belong_to_the_config_are_refused(copied: Path) -> None:
    """Transformers would fill what is missing with fresh values, and every engine would agree on them."""
    weights = load_file(copied / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.2." not in name}
    assert len(kept) < len(weights)
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has \d+ missing keys, the first model.language_model.layers.2"):
        Lab(str(copied), device="cpu")
    save_file(weights | {"model.extra": torch.zeros(3)}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 1 unexpected keys, the first model.extra: the model .* has no such parameters"):
        Lab(str(copied), device="cpu")
    wide = {name: torch.zeros(7, 3) if name.endswith("embed_tokens.weight") else tensor for name, tensor in weights.items()}
    save_file(wide, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 1 mismatched keys, the first .*embed_tokens.weight, \[7, 3\] for \[320, 256\]"):
        Lab(str(copied), device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "model.visual.rotary_pos_emb.inv_freq",
        "visual.rotary_pos_emb.inv_freq",
        "model.language_model.rotary_emb.original_inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.language_model.layers.3.self_attn.rotary_emb.cos_cached",
        "model.visual.embeddings.position_ids",
    ],
)
def test_tables_that_older_libraries_saved_are_passed_over(copied: Path, name: str) -> None:
    """They are computed anew, as Transformers does; the values in the file do not count."""
    weights = load_file(copied / "model.safetensors")
    save_file(weights | {name: torch.full((10,), 5.0)}, copied / "model.safetensors", metadata={"format": "pt"})
    loaded, expected = load(copied, device="cpu").model, load("tiny-qwen3-vl", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), expected.buffers(), strict=True))


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000]),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "preprocessor_config.json").write_text("[]"),
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        lambda folder: _edit(folder / "preprocessor_config.json", patch_size=14),
        lambda folder: _edit(folder / "preprocessor_config.json", do_resize=False),
        lambda folder: _edit(folder / "config.json", text_config="text"),
        lambda folder: _edit(folder / "config.json", image_token_id=5000),
        lambda folder: _edit(folder / "config.json", vision_config={"depth": "four"}),
        lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "qwen3_vl", "\xff'),
        lambda folder: (folder / "config.json").write_text("[]"),
    ],
)
def test_a_spoilt_folder_is_one_sentence(copied: Path, spoil: Callable[[Path], object]) -> None:
    spoil(copied)
    with pytest.raises(CheckpointError, match=r"(checkpoint|folder) '.*' (cannot be loaded|has|holds)"):
        Lab(str(copied), device="cpu")


def _as_published(folder: Path) -> None:
    """Rewrite config, preprocessor config and template in the form of the hub's Qwen2.5-VL and Qwen3-VL repositories."""
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    config["vision_config"] |= {"model_type": config["model_type"]}
    del config["vision_config"]["rope_parameters"]
    rope = config["text_config"].pop("rope_parameters")
    if config["model_type"] == "qwen2_5_vl":  # text settings at the top, and limits under their own names
        text = config.pop("text_config")
        del text["model_type"], text["layer_types"]
        config |= {**text, "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16"}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        size = processor.pop("size")
        processor |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    else:
        scaling = {"rope_type": "default", "mrope_section": rope["mrope_section"], "mrope_interleaved": True}
        config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        processor["image_processor_type"] = "Qwen2VLImageProcessorFast"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_folder_in_the_published_form_is_the_same_checkpoint(
    name: str, labs: dict[str, Lab], tmp_path: Path, picture: bytes
) -> None:
    shutil.copytree(tiny.folder(name), tmp_path, dirs_exist_ok=True)
    _as_published(tmp_path)
    lab = Lab(tmp_path, device="cpu", dtype="float32")
    request = Request(images=[picture], prompt="What is this?", max_new_tokens=8, max_pixels=28 * 28 * 200)
    for engine in ("transformers", "baseline", "fastest"):
        run, expected = lab.run(request, engine), labs[name].run(request, engine)
        assert run.tokens == expected.tokens
        assert run.shapes == expected.shapes


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    assert memory._control_group_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 600\nactive_file 300\n")
    assert memory._control_group_left(tmp_path) == 3900  # cached files give way
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._control_group_left(tmp_path) is None


def test_too_little_memory_is_refused_before_loading_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvl_lab.checkpoint.loading.available_bytes", lambda _: 1_000_000_000)
    with pytest.raises(DeviceError, match=r"needs 7.5 GB for its weights in bfloat16, and cpu has 1.0 GB free"):
        Lab("random:Qwen/Qwen2.5-VL-3B-Instruct", device="cpu", dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_asked_for_and_absent_is_refused() -> None:
    with pytest.raises(DeviceError, match="torch sees no CUDA device; choose device='cpu'"):
        Lab("tiny-qwen3-vl", device="cuda")


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", 0.5])
def test_devices_the_lab_has_no_code_for_are_refused(device: Any) -> None:
    with pytest.raises(DeviceError, match=r"the choices are 'cpu' and 'cuda'"):
        Lab("tiny-qwen3-vl", device=device)
