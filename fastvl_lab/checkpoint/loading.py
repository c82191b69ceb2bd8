"""Load a checkpoint once: weights, tokenizer, image processor and limits, whatever its origin."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available, logging as transformers_logging

from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.configs import (
    check_config,
    check_files,
    check_model,
    check_tokenizer,
    default_dtype,
    read_chat_template,
    read_eos_token_ids,
)
from fastvl_lab.checkpoint.fused import fuse_projections
from fastvl_lab.checkpoint.image_settings import ImageSettings, read_image_settings, try_image_processor
from fastvl_lab.checkpoint.memory import available_bytes, gigabytes
from fastvl_lab.checkpoint.packed import PackedWeights
from fastvl_lab.checkpoint.padded import pad_widths
from fastvl_lab.checkpoint.random_weights import RANDOM_PREFIX, published, random_model, write_published_folder
from fastvl_lab.checkpoint.reading import DTYPES, File, read_json
from fastvl_lab.errors import CheckpointError, DeviceError, FastvlError
from fastvl_lab.families import FAMILIES, Family, Patches, family_of, names
from fastvl_lab.families.text import Text, head_dim
from fastvl_lab.families.vision import Vision

# Transformers changes torch for the whole process while it loads: a load beside another finds weights missing.
_ONE_LOAD_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model in memory, ready for any engine.

    `model` is the stock Transformers module in eval mode, whose parameters every engine shares. `image_processor` and `tokenizer`
    are the checkpoint's own. `max_length` is how many tokens, prompt and answer together, the model can attend to
    (`max_position_embeddings`), and `session_len`, no larger, how many a request may have. `eos_token_ids` end an answer
    (generation_config.json). source: the folder or hub id that its weights were read from; None for weights that are nowhere else.
    packed: what recipes hold of the weights a second time.
    """

    name: str
    family: Family
    model: Any
    tokenizer: Any
    image_processor: Any
    eos_token_ids: tuple[int, ...]
    max_length: int
    session_len: int
    device: torch.device
    dtype: torch.dtype
    image_processor_file: str = "preprocessor_config.json"
    source: str | None = None
    packed: PackedWeights = field(default_factory=PackedWeights)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def target(self) -> Target:
        """What options are to run on."""
        return Target(
            device=self.device,
            dtype=self.dtype,
            tower_head_dim=self.vision.hidden_size // self.vision.n_heads,
            decoder_head_dim=head_dim(self.config.get_text_config()),
        )

    @property
    def image_token_id(self) -> int:
        return int(getattr(self.config, self.family.placeholders[0]))

    @cached_property
    def patches(self) -> Patches:
        """How images are cut."""
        return self.family.patches(self.config)

    @property
    def merge_size(self) -> int:
        """Patches along one side of a visual token."""
        return self.patches.merge_size

    @cached_property
    def vision(self) -> Vision:
        """The stock vision tower by what its parts are for."""
        return self.family.vision(self.model)

    @cached_property
    def text(self) -> Text:
        """The stock decoder by what its parts are for."""
        return self.family.text(self.model)

    @cached_property
    def longest_token(self) -> int | None:
        """The most bytes of text, in NFC, that a token stands for; None for a tokenizer that may drop or rewrite others."""
        normalizer, added = self.tokenizer.backend_tokenizer.normalizer, self.tokenizer.added_tokens_decoder
        rewrites = normalizer is not None and type(normalizer).__name__ != "NFC"
        if rewrites or any(token.lstrip or token.rstrip for token in added.values()):
            return None
        # Byte-level BPE writes a character for each byte; added tokens stand as they are.
        vocabulary = self.tokenizer.get_vocab().items()
        return max(len(text.encode()) if token in added else len(text) for text, token in vocabulary)

    @property
    def image_backend(self) -> Literal["pillow", "torchvision"]:
        """Which of Transformers' image backends the checkpoint's image processor is here."""
        return "pillow" if isinstance(self.image_processor, Qwen2VLImageProcessorPil) else "torchvision"

    @cached_property
    def image_settings(self) -> ImageSettings:
        """What the image processor does to an image; raises `CheckpointError` for settings that cannot be used."""
        return read_image_settings(self.image_processor, File(checkpoint=self.name, name=self.image_processor_file))


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    families: Sequence[Family] = FAMILIES,
) -> Checkpoint:
    """Load `name` onto a device in a dtype.

    name: a folder in Hugging Face format, a hub id, a built-in one (`tiny.names`), or "random:<hub id>".
    device: "cpu", "cuda", "cuda:1", …; by default CUDA where present. dtype: by default the checkpoint's own on CUDA and
    float32 on a CPU. families: those that it may be of. Loads of other threads are waited for. Raises `CheckpointError` and
    `DeviceError`.
    """
    with _ONE_LOAD_AT_A_TIME:
        return _load(str(name), resolve_device(device), resolve_dtype(dtype), families)


def _load(name: str, on: torch.device, of_type: torch.dtype | None, families: Sequence[Family]) -> Checkpoint:
    _settle_vector_math()
    if name in tiny.names(families):
        with _quiet():
            return _from_pretrained(name, str(tiny.folder(name, families)), on, of_type, families)
    if name.startswith(RANDOM_PREFIX):
        return _random(name, on, of_type, families)
    path = Path(os.path.expanduser(name))  # pathlib's raises for an unknown user
    if path.is_dir():
        _check_folder(name, path, families)
        return _from_pretrained(name, str(path), on, of_type, families)
    if path.exists() or name.startswith(("/", "./", "../", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"checkpoint {name!r} is unknown; give a folder in Hugging Face format, a hub id such as "
            f"Qwen/Qwen2.5-VL-3B-Instruct, one of {', '.join(tiny.names(families))}, or random:<hub id> with one of "
            f"{', '.join(published(families))}"
        )
    return _from_pretrained(name, name, on, of_type, families)


def _settle_vector_math() -> None:
    """Let torch choose its vector math functions on one thread, before several can race for their first call.

    With MKL up to 2024.2 such a race leaves one thread's share of that call at a low accuracy, 1.5e-4 off for a cosine: the rotary
    tables of a process's first request were wrong now and then (pytorch/pytorch 188792).
    """
    for dtype in (torch.float32, torch.float64):
        for function in (torch.cos, torch.sin, torch.exp, torch.sqrt, torch.tanh, torch.erf):
            function(torch.zeros(1, dtype=dtype))


def _from_pretrained(
    name: str, source: str, device: torch.device, dtype: torch.dtype | None, families: Sequence[Family]
) -> Checkpoint:
    with as_checkpoint_error(name):
        file = File(checkpoint=name, name="config.json")
        check_files(name, source)
        with file.unread():
            config = AutoConfig.from_pretrained(source)
        family = _family(name, config, families)
        check_config(config, family, file)
        dtype = dtype or default_dtype(config, device, file)
        _check_memory(name, config, {torch.device("cpu"), device}, dtype)  # weights reach a GPU through the host
        model, report = AutoModelForImageTextToText.from_pretrained(  # safetensors, or tensors of a .bin and nothing else of it
            source,
            dtype=dtype,
            attn_implementation="sdpa",  # Transformers' own default; named, so that a changed default can't change the bar
            ignore_mismatched_sizes=True,  # they are reported, and refused in words
            output_loading_info=True,
        )
        _check_report(name, model, report)
        where = str(Path(source).absolute()) if Path(source).is_dir() else source
        return replace(_checkpoint(name, family, model.to(device), source), source=where)


# What older versions of the models saved though they compute it anew, by the last part of its name: tables of rotary positions.
_COMPUTED = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids")


def _check_report(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for weights that are not the model's, where Transformers would go on with some that it made up."""
    computed = {*_COMPUTED, *(buffer.rpartition(".")[2] for buffer, _ in model.named_buffers())}
    faults = {
        "missing_keys": "its files do not hold all the parameters of the model that its config.json describes",
        "mismatched_keys": "they are of other shapes than those of the model that its config.json describes",
        "unexpected_keys": "the model that its config.json describes has no such parameters",
    }
    for fault, meaning in faults.items():
        keys = sorted(key if isinstance(key, str) else f"{key[0]}, {list(key[1])} for {list(key[2])}" for key in report[fault])
        if fault == "unexpected_keys":
            keys = [key for key in keys if key.rpartition(".")[2] not in computed]
        if keys:
            raise CheckpointError(f"checkpoint {name!r} has {len(keys)} {fault.replace('_', ' ')}, the first {keys[0]}: {meaning}")


def _random(name: str, device: torch.device, dtype: torch.dtype | None, families: Sequence[Family]) -> Checkpoint:
    """The real geometry with random weights made on the device; nothing of their size touches the disk."""
    hub_id = name.removeprefix(RANDOM_PREFIX)
    if hub_id not in published(families):
        raise CheckpointError(f"no geometry is published here for {hub_id!r}; the choices are {', '.join(published(families))}")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    with _quiet(), as_checkpoint_error(name):
        source = str(write_published_folder(hub_id, families))
        config = AutoConfig.from_pretrained(source)
        family = _family(name, config, families)
        check_config(config, family, File(checkpoint=name, name="config.json"))
        _check_memory(name, config, {device}, dtype)
        model = random_model(family, config, device=device, dtype=dtype, seed=0)
        return _checkpoint(name, family, model, source)


def _checkpoint(name: str, family: Family, model: Any, source: str) -> Checkpoint:
    """Gather what stands beside the weights; `source` holds tokenizer, image processor and generation config."""
    check_model(model, family, File(checkpoint=name, name="config.json"))
    with File(checkpoint=name, name="tokenizer").unread():
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = read_chat_template(name, source, tokenizer)
    check_tokenizer(name, tokenizer, model, family)
    image_processor, file = _image_processor(name, source)
    _check_image_processor(image_processor, file, family.patches(model.config))
    eos_token_ids = read_eos_token_ids(name, source, model.config, tokenizer)
    # Greedy and nothing else: the published generation configs carry sampling settings and a repetition penalty.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id)
    fuse_projections(family.text(model))
    pad_widths(family.vision(model).module)
    max_length = model.config.get_text_config().max_position_embeddings
    return Checkpoint(
        name=name,
        family=family,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        image_processor=image_processor,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        session_len=max_length,
        device=next(model.parameters()).device,
        dtype=model.dtype,
        image_processor_file=file.name,
    )


def _check_image_processor(processor: Any, file: File, patches: Patches) -> None:
    """Raise `CheckpointError` for settings that cannot be used, and for patches that the model cannot take."""
    settings = read_image_settings(processor, file)
    for key, value in asdict(patches).items():
        if getattr(settings, key) != value:
            raise file.refused(key, getattr(settings, key), f"{value}, as its config.json has it")
    try_image_processor(processor, settings, file)


def _image_processor(name: str, source: str) -> tuple[Any, File]:
    """Transformers' default image processor for this machine, and the file that its settings stand in; raises `CheckpointError`.

    That is torchvision's backend where it is installed, else Pillow's. The choice is `AutoImageProcessor`'s; named here because
    some supported versions cannot import that class without torchvision.
    """
    chosen = AutoImageProcessor if is_torchvision_available() else Qwen2VLImageProcessorPil
    file = File(checkpoint=name, name="preprocessor_config.json")
    if isinstance(read_json(source, "processor_config.json", name).get("image_processor"), dict):  # which goes before
        file = File(checkpoint=name, name="processor_config.json")
    elif not read_json(source, file.name, name):
        raise file.fails("that is missing or empty")
    with file.unread():
        return chosen.from_pretrained(source), file


def _check_folder(name: str, path: Path, families: Sequence[Family]) -> None:
    """Refuse a folder that is no checkpoint of these families before anything large is read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"folder {name!r} has no config.json; it is no checkpoint in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"folder {name!r} has a broken config.json: {error}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if family_of(model_type, families) is None:
        raise CheckpointError(f"folder {name!r} holds a {model_type!r} model; the lab runs {names(families)}")


def _family(name: str, config: Any, families: Sequence[Family]) -> Family:
    family = family_of(config.model_type, families)
    if family is None:
        raise CheckpointError(f"checkpoint {name!r} is a {config.model_type!r} model; the lab runs {names(families)}")
    return family


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device meant, CUDA where present by default; raises `DeviceError` for one that is unknown or absent."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device {device!r} is unknown; the choices are 'cpu' and 'cuda' (or 'cuda:1', …)") from None
    if resolved.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is not supported; the choices are 'cpu' and 'cuda'")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {str(resolved)!r} was asked for, and torch sees no CUDA device; choose device='cpu'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r} was asked for, and torch sees {torch.cuda.device_count()} CUDA device(s)")
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype meant, None for the checkpoint's default; raises `CheckpointError` for one that is not offered."""
    if dtype is None or isinstance(dtype, torch.dtype):
        if dtype is None or dtype in DTYPES.values():
            return dtype
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; the choices are {', '.join(DTYPES)}, or None for the default")
    return DTYPES[dtype]


def _check_memory(name: str, config: Any, devices: set[torch.device], dtype: torch.dtype) -> None:
    """Raise `DeviceError` if the weights alone cannot fit on one of the devices; activations and cache come on top."""
    with torch.device("meta"), File(checkpoint=name, name="config.json").unread():
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    needed = sum(p.numel() * p.element_size() for p in empty.parameters())
    for device in devices:
        available = available_bytes(device)
        if available is not None and needed > available:
            raise DeviceError(
                f"checkpoint {name!r} needs {gigabytes(needed)} for its weights in {str(dtype).removeprefix('torch.')}, and "
                f"{device} has {gigabytes(available)} free; choose a smaller checkpoint or dtype, or another device"
            )


@contextmanager
def as_checkpoint_error(name: str) -> Iterator[None]:
    """Turn whatever the loading libraries raise for files that are missing, broken or at odds into one sentence."""
    try:
        yield
    except FastvlError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"checkpoint {name!r} did not fit into memory; choose a smaller one, or a smaller dtype") from error
    except Exception as error:  # safetensors, huggingface_hub and config validation each have their own types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no detail"]
        raise CheckpointError(
            f"checkpoint {name!r} cannot be loaded: {type(error).__name__}: {' '.join(lines[:3])} (give a complete folder, a hub "
            f"id that can be reached, or one of {', '.join(tiny.NAMES)})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for checkpoints that load in a moment."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
