"""Every form of a value in a checkpoint's files: read as Transformers reads it, or refused once, at load, in words."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastvl_lab import CheckpointError, FastvlError, Lab, Recipe, Request
from fastvl_lab.checkpoint import Checkpoint, load, tiny
from fastvl_lab.checkpoint.configs import check_config, default_dtype
from fastvl_lab.checkpoint.image_settings import ImageSettings, read_image_settings, try_image_processor
from fastvl_lab.checkpoint.reading import File
from fastvl_lab.families import family_of
from fastvl_lab.preprocessor import bind

FILE = File(checkpoint="mine", name="preprocessor_config.json")
IMAGE = np.random.default_rng(0).integers(256, size=(61, 90, 3), dtype=np.uint8)
SIZE = {"shortest_edge": 3136, "longest_edge": 8000}
REQUEST = Request(images=[IMAGE], prompt="?")
OWN = ("baseline, preprocessor.resize=pillow", "baseline, preprocessor.resize=pillow, preprocessor.patchify=torch")


def _settings(**values: Any) -> tuple[Any, ImageSettings]:
    processor = Qwen2VLImageProcessorPil(**({"size": dict(SIZE)} | values))
    settings = read_image_settings(processor, FILE)
    try_image_processor(processor, settings, FILE)
    return processor, settings


def _with(checkpoint: Checkpoint, processor: Any) -> Checkpoint:
    return dataclasses.replace(checkpoint, image_processor=processor)


def _as_the_stock_processor_runs_it(checkpoint: Checkpoint, values: dict[str, Any]) -> tuple[Checkpoint, torch.Tensor]:
    """A checkpoint with these settings, whose baseline makes the stock processor's patches of the image; and those patches."""
    processor, _ = _settings(**values)
    changed = _with(checkpoint, processor)
    stock = processor([Image.fromarray(IMAGE)], return_tensors="pt")["pixel_values"]
    assert torch.equal(bind(Recipe.baseline().preprocessor, changed).pixels(REQUEST).patches, stock)
    return changed, stock


@pytest.mark.parametrize(
    "values",
    [
        {"size": {"shortest_edge": 3136.0, "longest_edge": 8000.0}},
        {"size": None},
        {"size": None, "min_pixels": 3136, "max_pixels": 9000},
        {"size": None, "max_pixels": 9000.0},
        {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 3136, "max_pixels": 9000},
        {"size": {"shortest_edge": 3136}, "max_pixels": 8000},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": 0, "image_std": 1},
        {"image_mean": [0, 1, 0.5], "image_std": (1, 2, 3)},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1},
        {"resample": Image.Resampling.BICUBIC},
        {"do_convert_rgb": False},
        {"do_center_crop": False, "crop_size": None, "do_pad": None},
        {"nobody": "knows this"},
        {"image_processor_type": "Qwen2VLImageProcessorFast"},
    ],
    ids=str,
)
def test_forms_that_the_stock_processor_runs_give_its_pixels(labs: dict[str, Lab], values: dict[str, Any]) -> None:
    checkpoint, stock = _as_the_stock_processor_runs_it(labs["tiny-qwen2.5-vl"].checkpoint, values)
    for recipe in OWN:
        patches = bind(Recipe.parse(recipe).preprocessor, checkpoint).pixels(REQUEST).patches
        assert patches.shape == stock.shape
        assert (patches - stock).abs().max() <= 1e-6 * stock.abs().max().clamp(min=1)
    limited = dataclasses.replace(REQUEST, max_pixels=6000)  # with a limit of the request's in place of one of the two
    assert bind(Recipe.fastest().preprocessor, checkpoint).pixels(limited).shapes[0].resized_width > 0


@pytest.mark.parametrize(
    "values",
    [
        {"resample": 2},
        {"resample": 3.0},  # of which Transformers makes bilinear
        {"resample": "bicubic"},
        {"resample": True},
        {"do_rescale": False},
        {"do_normalize": False, "image_mean": None, "image_std": "any"},
        {"do_rescale": "yes", "do_normalize": 1},
    ],
    ids=str,
)
def test_forms_that_only_the_stock_processor_has_are_left_to_it(labs: dict[str, Lab], values: dict[str, Any]) -> None:
    checkpoint, _ = _as_the_stock_processor_runs_it(labs["tiny-qwen2.5-vl"].checkpoint, values)
    key, value = next(iter(values.items()))
    for recipe in (*OWN, "fastest"):
        with pytest.raises(
            CheckpointError, match=f"preprocessor_config.json has {key}={value!r}.*preprocessor.resize=transformers"
        ):
            bind(Recipe.parse(recipe).preprocessor, checkpoint)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"size": {"height": 84, "width": 84}},
            r"has size=\{'height': 84, 'width': 84\} in preprocessor_config.json; .*shortest_edge",
        ),
        ({"size": 8000}, r"has size=\{'shortest_edge': 8000\}"),
        ({"size": [84, 84]}, "has size="),
        ({"size": {"longest_edge": 8000}}, r"has size=\{'longest_edge': 8000\}"),
        ({"size": {"shortest_edge": 3136.5, "longest_edge": 8000}}, "whole numbers of pixels"),
        ({"size": {"shortest_edge": "3136", "longest_edge": "8000"}}, "whole numbers of pixels"),
        ({"size": {"shortest_edge": True, "longest_edge": 8000}}, "whole numbers of pixels"),
        ({"size": {"shortest_edge": 0, "longest_edge": 8000}}, "whole numbers of pixels"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 8000}}, "the smaller first"),
        ({"size": {"shortest_edge": 1, "longest_edge": float("inf")}}, "whole numbers of pixels"),
        ({"image_mean": [0.5]}, r"has image_mean=\(0.5,\).* a number, or a list of 3"),
        ({"image_std": [0.5, 0.5, 0.5, 0.5]}, "has image_std=.* a number, or a list of 3"),
        ({"image_mean": "0.5"}, "has image_mean='0.5'"),
        ({"image_mean": None}, "has image_mean=None"),
        ({"image_std": [0.5, 0, 0.5]}, "has image_std=.* it divides"),
        ({"image_std": float("nan")}, "has image_std=nan"),
        ({"rescale_factor": "0.0039"}, "has rescale_factor='0.0039'"),
        ({"rescale_factor": 0}, "has rescale_factor=0"),
        ({"rescale_factor": True}, "has rescale_factor=True"),
        ({"patch_size": 14.0}, "has patch_size=14.0 .* a whole number of at least 1"),
        ({"merge_size": "2"}, "has merge_size='2'"),
        ({"temporal_patch_size": True}, "has temporal_patch_size=True"),
        ({"do_resize": False}, "has do_resize=False"),
        ({"resample": None}, "image processor fails: ValueError: .*resample"),
        ({"do_center_crop": True}, "image processor fails: ValueError: .*crop_size"),
        ({"image_processor_type": "CLIPImageProcessor"}, "has image_processor_type='CLIPImageProcessor'"),
    ],
    ids=str,
)
def test_forms_that_no_request_could_use_are_refused_in_words(values: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"checkpoint 'mine' has .*{says}" if says.startswith("image") else says):
        _settings(**values)


def test_limits_inside_size_are_read_by_their_older_names(labs: dict[str, Lab]) -> None:
    """Transformers' processor does not take them from there by itself."""
    processor, settings = _settings(size={"min_pixels": 3136, "max_pixels": 8000})
    assert (settings.min_pixels, settings.max_pixels) == (3136, 8000)
    checkpoint = _with(labs["tiny-qwen2.5-vl"].checkpoint, processor)
    expected = processor([Image.fromarray(IMAGE)], size=SIZE, return_tensors="pt")["pixel_values"]
    for recipe in ("baseline", OWN[0]):
        assert torch.equal(bind(Recipe.parse(recipe).preprocessor, checkpoint).pixels(REQUEST).patches, expected)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(tiny.folder("tiny-qwen3-vl"), tmp_path, dirs_exist_ok=True)
    return tmp_path


def _nested(folder: Path) -> None:
    """As newer Transformers save it: the image processor's settings in processor_config.json."""
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {
        "size": {"shortest_edge": 4096.0, "longest_edge": 9000}
    }
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings, "processor_class": "Qwen3VLProcessor"}))


def test_settings_may_stand_in_processor_config(copied: Path) -> None:
    _nested(copied)
    lab = Lab(copied, device="cpu")
    assert (lab.checkpoint.image_settings.min_pixels, lab.checkpoint.image_settings.max_pixels) == (4096, 9000)
    request = Request(images=[IMAGE], prompt="?", max_new_tokens=3)
    assert lab.run(request, "transformers").tokens == lab.run(request, "fastest").tokens
    nested = json.loads((copied / "processor_config.json").read_text())
    (copied / "processor_config.json").write_text(
        json.dumps(nested | {"image_processor": nested["image_processor"] | {"image_std": 0}})
    )
    with pytest.raises(CheckpointError, match=r"has image_std=0 in processor_config\.json"):
        load(copied, device="cpu")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "generation_config.json").write_text("{"), "has a generation_config.json that cannot be read"),
        (lambda f: (f / "generation_config.json").write_text("[]"), r"has a generation_config.json that holds \[\] and no object"),
        (lambda f: _edit(f / "generation_config.json", eos_token_id="258"), "has eos_token_id='258' in generation_config.json"),
        (lambda f: _edit(f / "generation_config.json", eos_token_id=True), "has eos_token_id=True in generation_config.json"),
        (lambda f: _edit(f / "generation_config.json", eos_token_id=[258, None]), r"has eos_token_id=\[258, None\]"),
        (
            lambda f: _edit(f / "generation_config.json", max_new_tokens="x"),
            "has a generation_config.json that Transformers cannot",
        ),
        (lambda f: (f / "preprocessor_config.json").write_text("7"), "has a preprocessor_config.json that holds 7 and no object"),
        (
            lambda f: _edit(f / "preprocessor_config.json", size="large"),
            "has a preprocessor_config.json that Transformers cannot read",
        ),
        (
            lambda f: _edit(f / "preprocessor_config.json", patch_size=14),
            "has patch_size=14 .*it must be 16, as its config.json has it",
        ),
        (lambda f: (f / "tokenizer_config.json").write_text("[1]"), r"has a tokenizer_config.json that holds \[1\] and no object"),
        (lambda f: _edit(f / "tokenizer_config.json", split_special_tokens=True), "tokenizer that takes '<|image_pad|>'"),
        (lambda f: (f / "chat_template.json").write_text("{}"), "has chat templates that Transformers cannot read: KeyError"),
        (lambda f: (f / "chat_template.json").write_text('{"chat_template": 5}'), "has chat templates of type int"),
        (
            lambda f: (f / "chat_template.json").write_text('{"chat_template": {"tool_use": "x"}}'),
            "has chat templates named 'tool_use'",
        ),
        (lambda f: (f / "chat_template.jinja").write_text("{% for %}"), "has a chat template that is no Jinja template: line 1"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ x | unknown }}"), "has a chat template that is no Jinja template"),
        (lambda f: _edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "has quantization_config="),
        (
            lambda f: _edit(f / "config.json", image_token_id=319),
            r"tokenizer that takes '\[319\]', its image_token_id, for several",
        ),
    ],
)
def test_files_that_no_request_could_use_are_refused_in_words(copied: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(copied)
    with pytest.raises(CheckpointError, match=says.replace("<|", r"<\|").replace("|>", r"\|>")):
        load(copied, device="cpu")


def _template_in(place: str, form: Callable[[str], Any]) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").unlink()
        path = folder / place
        data = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(data | {"chat_template": form(template)}))

    return move


def _beside_another(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")


@pytest.mark.parametrize(
    "move",
    [
        _template_in("tokenizer_config.json", lambda template: template),
        _template_in("tokenizer_config.json", lambda template: {"tool_use": "x", "default": template}),
        _template_in("tokenizer_config.json", lambda template: [{"name": "default", "template": template}]),
        _template_in("chat_template.json", lambda template: {"default": template}),
        _template_in(
            "chat_template.json", lambda template: [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
        ),
        _template_in("processor_config.json", lambda template: template),
        _beside_another,
    ],
)
def test_a_chat_template_is_found_wherever_and_however_it_is_written(
    labs: dict[str, Lab], copied: Path, move: Callable[[Path], None]
) -> None:
    move(copied)
    assert load(copied, device="cpu").tokenizer.chat_template == labs["tiny-qwen3-vl"].checkpoint.tokenizer.chat_template


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        (lambda f: _edit(f / "generation_config.json", eos_token_id=258), (258,)),
        (lambda f: _edit(f / "generation_config.json", eos_token_id=[256.0, 258]), (256, 258)),
        (lambda f: _edit(f / "generation_config.json", eos_token_id=None), (258,)),
        (lambda f: _edit(f / "generation_config.json", eos_token_id=[]), (258,)),
        (lambda f: (f / "generation_config.json").unlink(), (258,)),
    ],
)
def test_the_end_of_an_answer_is_read_in_every_form(copied: Path, change: Callable[[Path], object], ids: tuple[int, ...]) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["text_config"]["eos_token_id"]  # so that the tokenizer's is the last to be asked
    (copied / "config.json").write_text(json.dumps(config))
    change(copied)
    assert load(copied, device="cpu").eos_token_ids == ids


def test_without_any_end_an_answer_goes_on(copied: Path) -> None:
    (copied / "generation_config.json").unlink()
    _edit(
        copied / "config.json", text_config=json.loads((copied / "config.json").read_text())["text_config"] | {"eos_token_id": None}
    )
    _edit(copied / "tokenizer_config.json", eos_token=None)
    lab = Lab(copied, device="cpu")
    assert lab.checkpoint.eos_token_ids == ()
    request = Request(prompt="Hello.", max_new_tokens=5)
    assert [len(lab.run(request, engine).tokens) for engine in ("transformers", "fastest")] == [5, 5]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("tiny-qwen2.5-vl", {"vision_config.window_size": 20}, "has vision_config.window_size=20 .* at least 28"),
        ("tiny-qwen2.5-vl", {"vision_config.patch_size": [14, 14]}, r"has vision_config.patch_size=\[14, 14\]"),
        ("tiny-qwen2.5-vl", {"vision_config.in_channels": 1}, "has vision_config.in_channels=1 .* must be 3"),
        ("tiny-qwen2.5-vl", {"vision_config.num_heads": 8}, "has vision_config.num_heads=8 .* 4 times it divides hidden_size, 80"),
        ("tiny-qwen3-vl", {"vision_config.num_heads": 5}, "has vision_config.num_heads=5 .* 4 times it divides hidden_size, 48"),
        ("tiny-qwen3-vl", {"vision_config.out_hidden_size": 64}, "has vision_config.out_hidden_size=64 .* must be 256"),
        ("tiny-qwen3-vl", {"vision_config.deepstack_visual_indexes": [0, 0, 1]}, r"deepstack_visual_indexes=\[0, 0, 1\]"),
        ("tiny-qwen3-vl", {"vision_config.deepstack_visual_indexes": [0, 1, 4]}, "different blocks, 0 to 3"),
        ("tiny-qwen3-vl", {"text_config.num_key_value_heads": 3}, "has num_key_value_heads=3 .* a divisor of 4 heads"),
        ("tiny-qwen3-vl", {"text_config.max_position_embeddings": 0}, "has max_position_embeddings=0"),
        ("tiny-qwen3-vl", {"text_config.rope_parameters": {"rope_type": "spiral", "rope_theta": 1e6}}, "has rope_type='spiral'"),
        ("tiny-qwen3-vl", {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}}, "has rope_theta='1e6'"),
        ("tiny-qwen3-vl", {"image_token_id": 5000}, "has image_token_id=5000 .* of the model's 320"),
        ("tiny-qwen3-vl", {"video_token_id": -1}, "has video_token_id=-1"),
        ("tiny-qwen3-vl", {"video_token_id": 262, "image_token_id": 262}, "has video_token_id=262 .* other than image_token_id"),
        ("tiny-qwen3-vl", {"return_dict": False}, "has return_dict=False"),
        ("tiny-qwen3-vl", {"quantization_config": {"bits": 4}}, r"has quantization_config=\{'bits': 4\}"),
    ],
)
def test_values_of_config_json_that_no_request_could_use_are_refused(name: str, changes: dict[str, Any], says: str) -> None:
    config = copy.deepcopy(AutoConfig.from_pretrained(tiny.folder(name)))
    file = File(checkpoint="mine", name="config.json")
    family = family_of(config.model_type)
    assert family is not None
    check_config(config, family, file)
    for path, value in changes.items():
        part, _, key = path.rpartition(".")
        setattr(getattr(config, part) if part else config, key, value)
    with pytest.raises(CheckpointError, match=f"checkpoint 'mine' .*{says}"):
        check_config(config, family, file)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1000000},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6, "original_max_position_embeddings": 4096},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "mrope_section": [8, 8, 8]},
    ],
)
def test_rotary_settings_are_read_as_transformers_reads_them(copied: Path, rope: dict[str, Any]) -> None:
    """Also without a mrope_section, for which the model's own code has a value."""
    text = json.loads((copied / "config.json").read_text())["text_config"]
    _edit(copied / "config.json", text_config=text | {"rope_parameters": rope})
    lab = Lab(copied, device="cpu", dtype="float32")
    request = Request(images=[IMAGE], prompt="What is this?", max_new_tokens=3, ignore_eos=True, max_pixels=65536)
    assert lab.run(request, "transformers").tokens == lab.run(request, "baseline").tokens


@pytest.mark.parametrize("sections", [[16, 8], [8.0, 8, 8], "888", [4, 4, 4, 4, 4, 4]])
def test_rotary_sections_that_no_request_could_use_are_refused(copied: Path, sections: object) -> None:
    text = json.loads((copied / "config.json").read_text())["text_config"]
    text["rope_parameters"]["mrope_section"] = sections
    _edit(copied / "config.json", text_config=text)
    with pytest.raises(CheckpointError, match=r"has mrope_section=.* in config\.json; it must be three whole numbers, 24 together"):
        load(copied, device="cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float16), (None, torch.bfloat16), (torch.float64, None), (torch.int8, None), (5, None)],
)
def test_the_dtype_of_a_checkpoint_is_one_that_the_lab_has(dtype: object, expected: torch.dtype | None) -> None:
    config, file = AutoConfig.from_pretrained(tiny.folder("tiny-qwen3-vl")), File(checkpoint="mine", name="config.json")
    config.dtype, config.text_config.dtype = dtype, None
    assert default_dtype(config, torch.device("cpu"), file) == torch.float32
    if expected is not None:
        assert default_dtype(config, torch.device("cuda"), file) == expected
    else:
        with pytest.raises(CheckpointError, match=r"has dtype=.* one of float32, bfloat16, float16"):
            default_dtype(config, torch.device("cuda"), file)


def test_a_token_that_the_model_has_not_is_refused_in_the_prompt(copied: Path) -> None:
    """A tokenizer may have been given tokens for which no weights were made; others of its prompts are served."""
    path = copied / "tokenizer.json"
    data = json.loads(path.read_text())
    token = {"content": "hello", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": 320, **token})
    path.write_text(json.dumps(data))
    lab = Lab(copied, device="cpu")
    for engine in ("transformers", "baseline"):
        assert lab.run(Request(prompt="goodbye", max_new_tokens=1), engine).tokens
        with pytest.raises(FastvlError, match="the prompt has the token 'hello', number 320, and the model has 320"):
            lab.run(Request(prompt="hello", max_new_tokens=1), engine)


def _as_bin(folder: Path, shards: int) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    for n, name in enumerate(names):
        torch.save({key: tensor for i, (key, tensor) in enumerate(weights.items()) if i % shards == n}, folder / name)
    placed = {key: names[i % shards] for i, key in enumerate(weights)}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_of_a_bin_are_the_same_weights(labs: dict[str, Lab], copied: Path, shards: int) -> None:
    _as_bin(copied, shards)
    loaded, expected = load(copied, device="cpu", dtype="float32").model, labs["tiny-qwen3-vl"].checkpoint.model
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


class _Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("echo ran > ran",)


def test_a_bin_that_holds_code_is_refused_and_not_run(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    (copied / "model.safetensors").unlink()
    torch.save({"model.weight": _Code()}, copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(copied, device="cpu")
    assert not (copied / "ran").exists()
