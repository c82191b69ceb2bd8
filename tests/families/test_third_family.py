"""A family that the package does not know, in one file: the lab takes it as it is, and equals its own plain forward.

Its tower has blocks of another kind (RMSNorm, squared ReLU, q, k and v apart), no windows, no DeepStack, and a merger that takes
means; its decoder rotates by one position a token; its modules and settings have names of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastvl_lab import CheckpointError, Lab, Recipe, Request, families, toggles
from fastvl_lab.checkpoint import tiny
from fastvl_lab.families import Family, Fault, Geometry, Patches
from fastvl_lab.families.family import not_counts
from fastvl_lab.families.qwen import SPECIAL_TOKENS
from fastvl_lab.families.text import Text, read_text
from fastvl_lab.families.vision import Between, Block, Function, TowerOperations, Vision
from fastvl_lab.measure.floors import stage_works, vit_flops
from fastvl_lab.request import Grid, VisionTokens

# The model, as its authors would publish it.


class ToyVisionConfig(PreTrainedConfig):
    model_type = "toy_vl_vision"
    base_config_key = "vision_config"
    side: int = 8
    joined: int = 3
    width: int = 32
    heads: int = 2
    n_blocks: int = 3
    out: int = 64


class ToyConfig(PreTrainedConfig):
    model_type = "toy_vl"
    sub_configs = {"vision_config": ToyVisionConfig, "text_config": LlamaConfig}  # noqa: RUF012
    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    picture_token: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in self.sub_configs.items():
            if isinstance(part := getattr(self, name), dict):
                setattr(self, name, kind(**part))
        super().__post_init__(**kwargs)


class ToyNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale


class ToyBlock(nn.Module):
    def __init__(self, config: ToyVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.before, self.between = ToyNorm(width), ToyNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 3 * width - 1), nn.Linear(3 * width - 1, width)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        normed = self.before(x)
        q, k, v = (linear(normed).unflatten(1, (self.heads, -1)).transpose(0, 1) for linear in (self.to_q, self.to_k, self.to_v))
        q, k = (_turned(one, angles) for one in (q, k))
        images = zip(*(one.split(list(lengths), dim=1) for one in (q, k, v)), strict=True)
        attended = torch.cat([(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in images], dim=1)
        x = x + self.to_out(attended.transpose(0, 1).flatten(1))
        return x + self.narrow(F.relu(self.wide(self.between(x))) ** 2)


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class ToyTower(nn.Module):
    def __init__(self, config: ToyVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Conv3d(3, config.width, (1, config.side, config.side), (1, config.side, config.side), bias=False)
        self.blocks = nn.ModuleList([ToyBlock(config) for _ in range(config.n_blocks)])
        self.after = nn.Sequential(ToyNorm(config.width), nn.Linear(config.width, config.out))

    def forward(self, patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Patches in merge order to [n_visual, out]."""
        m, side = self.config.joined, self.config.side
        x = self.embed(patches.view(-1, 3, 1, side, side)).flatten(1)
        places = []
        for _, h, w in grids.tolist():
            places.append(np.indices((h, w)).reshape(2, h // m, m, w // m, m).transpose(1, 3, 2, 4, 0).reshape(-1, 2))
        turns = torch.from_numpy(np.concatenate(places)).to(x)[:, :, None] * _frequencies(self.config).to(x)
        for block in self.blocks:
            x = block(x, turns.flatten(1), [h * w for _, h, w in grids.tolist()])
        return self.after(x.view(-1, m**2, x.shape[1]).mean(1))


def _frequencies(config: ToyVisionConfig) -> torch.Tensor:
    quarter = config.width // config.heads // 4
    return 100.0 ** -(torch.arange(quarter, device="cpu") / quarter)


class ToyModel(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.eye, self.tongue = ToyTower(config.vision_config), LlamaModel(config.text_config)

    def forward(self, ids: torch.Tensor, pictures: torch.Tensor | None, grids: torch.Tensor | None, **settings: Any) -> Any:
        embeds, places = self.tongue.embed_tokens(ids), ids == self.config.picture_token
        if pictures is not None and places.any():  # a decode step has none
            embeds[places] = self.eye(pictures, grids)
        return self.tongue(inputs_embeds=embeds, **settings)


class ToyForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = ToyConfig
    _supports_sdpa = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.speak = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        pictures: torch.Tensor | None = None,
        grids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, pictures, grids, past_key_values=past_key_values, use_cache=use_cache)
        logits = self.speak(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


# The family, as the lab is told of it.


def config_faults(config: Any) -> Iterator[Fault]:
    return not_counts(config.vision_config, "vision_config.", "side", "joined", "width", "heads", "n_blocks")


def patches(config: Any) -> Patches:
    return Patches(patch_size=config.vision_config.side, temporal_patch_size=1, merge_size=config.vision_config.joined)


def vision(model: Any) -> Vision:
    tower = model.model.eye
    return Vision(
        module=tower,
        patch_embed=tower.embed,
        blocks=tower.blocks,
        full_attention=(True,) * len(tower.blocks),
        merger=tower.after,
        deepstack={},
        inv_freq=_frequencies(tower.config).to(tower.embed.weight.device),
        hidden_size=tower.config.width,
        n_heads=tower.config.heads,
    )


def text(model: Any) -> Text:
    decoder = model.model.tongue
    axis = torch.zeros(len(decoder.rotary_emb.inv_freq), dtype=torch.int64)
    return read_text(decoder, model.speak, head_norms=False, axis=axis)


def blocks(vision: Vision, operations: TowerOperations, between: Between) -> tuple[Block, ...]:
    return tuple(_block(block, operations, between) for block in vision.blocks)


def _block(block: Any, operations: TowerOperations, between: Between) -> Block:
    (wide,), narrow = between((block.wide,), block.narrow)
    return Block(
        norm1=operations.rms_norm(block.before.scale, 1e-5),
        qkv=lambda x: torch.cat([block.to_q(x), block.to_k(x), block.to_v(x)], dim=1),
        proj=operations.linear(block.to_out),
        norm2=operations.rms_norm(block.between.scale, 1e-5),
        mlp=lambda x: narrow(F.relu(wide(x)) ** 2),
    )


def merger(after: Any, operations: TowerOperations, _: Between) -> Function:
    norm = operations.rms_norm(after[0].scale, 1e-5)
    return lambda x: after[1](norm(x.view(-1, 9, x.shape[1]).mean(1), None)[1])


def positions(is_image: np.ndarray, grids: Sequence[Grid], merge_size: int) -> tuple[np.ndarray, int]:
    n = len(is_image) + sum(grid.visual_tokens(merge_size) - 1 for grid in grids)
    return np.tile(np.arange(n), (3, 1)), n


GEOMETRY = Geometry(
    text={
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    vision={"side": 8, "joined": 3, "width": 32, "heads": 2, "n_blocks": 3, "out": 64},
    tie_word_embeddings=False,
    min_pixels=576,
    max_pixels=576 * 400,
    mean=[0.4, 0.5, 0.6],
    std=[0.3, 0.2, 0.25],
)

TOY = Family(
    model_type="toy_vl",
    placeholders=("picture_token",),
    special_tokens=SPECIAL_TOKENS,
    config_tokens={"picture_token": "<|image_pad|>"},
    config_faults=config_faults,
    model_faults=lambda model: iter(()),
    patches=patches,
    vision=vision,
    text=text,
    stock_vision=lambda module, patches, grids: VisionTokens(embeds=module(patches, grids)),
    stock_inputs=lambda is_image, patches, grids: {"pictures": patches, "grids": grids},
    blocks=blocks,
    merger=merger,
    positions=positions,
    chat_template=(
        "{%- for message in messages %}{{- message['role'] + ': ' }}{%- if message['content'] is string %}{{- message['content'] }}"
        "{%- else %}{%- for part in message['content'] %}{{- part['text'] if part['type'] == 'text' else '<|image_pad|>' }}"
        "{%- endfor %}{%- endif %}{{- '\n' }}{%- endfor %}"
    ),
    tiny={"tiny-toy-vl": GEOMETRY},
)
FAMILIES = (*families.FAMILIES, TOY)


@pytest.fixture(scope="module")
def toy() -> Lab:
    """A lab that is told of the family, once Transformers has been, as its authors would do it."""
    AutoConfig.register("toy_vl", ToyConfig)
    AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration)
    return Lab("tiny-toy-vl", device="cpu", dtype="float32", families=FAMILIES)


def _picture(width: int, height: int, seed: int) -> np.ndarray:
    """Of a size that needs no resizing, which the image backends round differently."""
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


REQUESTS: dict[str, tuple[list[np.ndarray], str]] = {
    "no image": ([], "Count to ten."),
    "one image": ([_picture(72, 120, 0)], "What is this?"),
    "three images": ([_picture(24, 240, 1), _picture(96, 48, 2), _picture(24, 24, 3)], "Which differs?"),
}
ENGINES = (
    "transformers",
    "baseline",
    "baseline, preprocessor.resize=pillow, vit.tower=lean",
    "fastest",
    "fastest, vit.padding=exact, attention.rope=eager, cache.kv=paged, cache.prefix_reuse=on, cache.image_reuse=on",
    "fastest, preprocessor.payload=uint8_folded, preprocessor.temporal=folded, vit.positions=recomputed",
)


@torch.inference_mode()
def _plainly(lab: Lab, images: list[np.ndarray], prompt: str, n: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt's last token and n greedy tokens, by the model's own forward and nothing of the lab's."""
    model, tokenizer, token = lab.checkpoint.model, lab.checkpoint.tokenizer, lab.checkpoint.config.picture_token
    patches, grids = None, torch.zeros(0, 3, dtype=torch.int64)
    if images:
        made = lab.checkpoint.image_processor(images, return_tensors="pt")
        patches, grids = made["pixel_values"], made["image_grid_thw"]
    visual_tokens = iter((grids.prod(1) // 9).tolist())
    ids = []
    for one in tokenizer(f"user: {'<|image_pad|>' * len(images)}{prompt}\n", add_special_tokens=False).input_ids:
        ids += [one] * (next(visual_tokens) if one == token else 1)
    n_prompt, logits = len(ids), []
    for _ in range(n):
        logits.append(model(torch.tensor([ids]), patches, grids).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
    return logits[0], ids[n_prompt:]


@pytest.mark.parametrize("case", REQUESTS)
def test_every_engine_equals_the_models_own_forward(toy: Lab, case: str) -> None:
    images, prompt = REQUESTS[case]
    logits, tokens = _plainly(toy, images, prompt, 24)
    assert len(set(tokens)) > 4  # else equal tokens would prove little
    request = Request(images=images, prompt=prompt, max_new_tokens=24, ignore_eos=True)
    for engine in ENGINES:
        for _ in range(2 if "reuse" in engine else 1):
            run = toy.run(request, engine)
            assert (run.logits - logits).abs().max() < 1e-4, engine
            assert list(run.tokens) == tokens, engine
    along = [toy.logits_along(request, engine, tokens[:5]) for engine in ("transformers", "fastest")]
    assert (along[0] - along[1]).abs().max() < 1e-4
    assert _plainly(toy, images[1:], prompt, 1)[0].allclose(logits, atol=1e-2) == (not images)


def test_every_exact_option_equals_it_too(toy: Lab) -> None:
    """Each alone on the lean baseline, but for torch.compile, which takes its time."""
    images, prompt = REQUESTS["three images"]
    logits, tokens = _plainly(toy, images, prompt, 4)
    request = Request(images=images, prompt=prompt, max_new_tokens=4, ignore_eos=True)
    lean, target = Recipe.parse("baseline, preprocessor.resize=pillow, vit.tower=lean"), toy.checkpoint.target
    options = [(toggle.path, option) for toggle in toggles() for option in toggle.options if option.exact]
    recipes = {lean.choose(path, o.value) for path, o in options if o.needs.unmet(target) is None and o.value != "compile"}
    assert len(recipes) > 20
    for recipe in recipes:
        run = toy.run(request, recipe)
        assert (run.logits - logits).abs().max() < 1e-4, recipe
        assert list(run.tokens) == tokens, recipe


def test_operations_are_counted_from_what_the_family_says(toy: Lab) -> None:
    """Against torch's own count of the stock tower, which multiplies each image's queries with its keys."""
    grids = [Grid(1, 9, 15), Grid(1, 6, 3)]
    patches = torch.zeros(sum(grid.n_patches for grid in grids), 3 * 8 * 8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        toy.checkpoint.vision.module(patches, torch.tensor(grids))
    assert vit_flops(toy.checkpoint, grids).total == counter.get_total_flops()
    works = stage_works(toy.checkpoint, grids, 200)
    weights = sum(weight.nbytes for weight in toy.checkpoint.model.model.eye.parameters())
    assert works["vit"].moved == weights + patches.numel() + 17 * 64 * 4  # an image of each byte, and 17 visual tokens of float32
    assert works["prefill"].flops < stage_works(toy.checkpoint, grids, 201)["prefill"].flops


@pytest.mark.usefixtures("toy")
def test_a_lab_that_was_not_told_of_the_family_names_those_that_it_runs() -> None:
    with pytest.raises(CheckpointError, match="holds a 'toy_vl' model; the lab runs qwen2_5_vl and qwen3_vl"):
        Lab(tiny.folder("tiny-toy-vl", FAMILIES), device="cpu")
    with pytest.raises(CheckpointError, match="checkpoint 'tiny-toy-vl' is unknown"):
        Lab("tiny-toy-vl", device="cpu")


@pytest.mark.parametrize(
    ("part", "key", "value"), [("vision_config", "joined", 0), ("vision_config", "side", 2.5), (None, "picture_token", 9000)]
)
@pytest.mark.usefixtures("toy")
def test_what_the_family_asks_of_a_checkpoint_is_asked(tmp_path: Path, part: str | None, key: str, value: Any) -> None:
    shutil.copytree(tiny.folder("tiny-toy-vl", FAMILIES), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"has {f'{part}.' if part else ''}{key}={value} in config.json; it must be"):
        Lab(tmp_path, device="cpu", families=(TOY,))
