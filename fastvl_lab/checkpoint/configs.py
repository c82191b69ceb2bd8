"""What the lab reads of a checkpoint's config.json, generation_config.json, tokenizer and chat template, checked when it is loaded.

Transformers reads these files loosely: some values that it takes fail only once a request meets them. Each is read here in every
form in which a request would run, and refused in words in all others.
"""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from transformers import GenerationConfig, ProcessorMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastvl_lab.checkpoint.reading import DTYPES, File, read_json
from fastvl_lab.errors import CheckpointError, is_number, quoted, shortened
from fastvl_lab.families.family import Family, whole_number
from fastvl_lab.families.text import head_dim


def check_files(name: str, source: str) -> None:
    """Raise `CheckpointError` for JSON files that hold no object, which Transformers passes over or fails on in its own words."""
    optional = ("generation_config", "preprocessor_config", "processor_config", "tokenizer_config", "chat_template")
    for file in optional:
        read_json(source, f"{file}.json", name)
    generation = File(checkpoint=name, name="generation_config.json")
    if read_json(source, generation.name, name):
        with generation.unread():
            GenerationConfig.from_pretrained(source)


def check_config(config: Any, family: Family, file: File) -> None:
    """Raise `CheckpointError` for values with which the model could be built and would then fail."""
    if getattr(config, "quantization_config", None) is not None:
        raise file.refused(
            "quantization_config", config.quantization_config, "left out: the lab computes with weights as they were trained"
        )
    vision, text = config.vision_config, config.get_text_config()
    for part in (config, vision, text):
        if not getattr(part, "return_dict", True):
            raise file.refused("return_dict", part.return_dict, "true: what a model returns is read by name")
    rope = text.rope_parameters or {}
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    if (kind := rope.get("rope_type", "default")) not in kinds:
        raise file.refused("rope_type", kind, f"one of {', '.join(kinds)}")
    theta = rope.get("rope_theta")
    if not is_number(theta) or theta <= 0:
        raise file.refused("rope_theta", theta, "a number over 0")
    for fault in family.config_faults(config):
        raise file.refused(*fault)
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        file.count(key, getattr(text, key))
    if text.num_attention_heads % text.num_key_value_heads:
        raise file.refused("num_key_value_heads", text.num_key_value_heads, f"a divisor of {text.num_attention_heads} heads")
    for key in family.placeholders:
        token = getattr(config, key)
        if whole_number(token) is None or not 0 <= token < text.vocab_size:
            raise file.refused(
                key, token, f"a token of the model's {text.vocab_size}; where it is left out, Transformers has this one"
            )
        if key != (image := family.placeholders[0]) and token == getattr(config, image):
            raise file.refused(key, token, f"other than {image}")


def check_model(model: Any, family: Family, file: File) -> None:
    """Raise `CheckpointError` for a rotary embedding that does not fit the heads, as stock code finds in its first request."""
    for fault in family.model_faults(model):
        raise file.refused(*fault)
    text, half = model.config.get_text_config(), len(family.text(model).inv_freq)
    if 2 * half != (width := head_dim(text)):
        raise file.refused("rope_parameters", text.rope_parameters, f"such that all {width} values of a head are rotated")


def default_dtype(config: Any, device: torch.device, file: File) -> torch.dtype:
    """The dtype where the user names none: float32 on a CPU, elsewhere the checkpoint's own; raises `CheckpointError`."""
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    if own not in DTYPES.values():
        raise file.refused("dtype", own, f"one of {', '.join(DTYPES)}; or name one of them yourself: dtype='bfloat16'")
    assert isinstance(own, torch.dtype)
    return own


def read_eos_token_ids(name: str, source: str, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's, else config.json's, else the tokenizer's; raises `CheckpointError`.

    None at all where no file names one, as with Transformers.
    """
    generation = File(checkpoint=name, name="generation_config.json")
    candidates = (
        (generation, read_json(source, generation.name, name).get("eos_token_id")),
        (File(checkpoint=name, name="config.json"), getattr(config.get_text_config(), "eos_token_id", None)),
        (File(checkpoint=name, name="tokenizer_config.json"), tokenizer.eos_token_id),
    )
    file, value = next(((file, value) for file, value in candidates if value is not None and value != []), (generation, []))
    ids = [whole_number(one) for one in (value if isinstance(value, list | tuple) else [value])]
    if None in ids:
        raise file.refused("eos_token_id", value, "a token's number, or a list of them")
    return tuple(one for one in ids if one is not None)


def read_chat_template(name: str, source: str, tokenizer: Any) -> str:
    """The template that writes prompts: the processor's, which goes before the tokenizer's; raises `CheckpointError`.

    Transformers finds the processor's: in processor_config.json, chat_template.json, or chat_template.jinja and the folder beside
    it. Of several named ones it is the one named "default".
    """
    has = f"checkpoint {quoted(name)} has"
    try:
        processor, _ = ProcessorMixin.get_processor_dict(source)
    except (ValueError, KeyError, OSError) as error:
        why = shortened(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{has} chat templates that Transformers cannot read: {why}") from None
    template = processor.get("chat_template") or tokenizer.chat_template
    if not template:
        raise CheckpointError(f"{has} no chat template; the lab writes prompts with the checkpoint's own")
    if isinstance(template, list | tuple) and all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in template):
        template = {one["name"]: one["template"] for one in template}
    named = template.get("default") if isinstance(template, dict) else template
    if not isinstance(named, str):
        what = f"named {', '.join(map(quoted, template))}" if isinstance(template, dict) else f"of type {type(template).__name__}"
        raise CheckpointError(f"{has} chat templates {what}; it must be one text, or named texts of which one is 'default'")
    if (fault := _syntax_error(tokenizer, named)) is not None:
        raise CheckpointError(f"{has} a chat template that is no Jinja template: line {fault.lineno}: {shortened(str(fault))}")
    return named


def _syntax_error(tokenizer: Any, template: str) -> TemplateSyntaxError | SyntaxError | None:
    """What keeps a template from being compiled, with the extensions that Transformers gives templates."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=template, tokenize=False)
    except (TemplateSyntaxError, SyntaxError) as error:  # Python's own for what Jinja translates and Python does not take
        return error
    except Exception:  # the template is one, and has no use for this message
        return None
    return None


def check_tokenizer(name: str, tokenizer: Any, model: Any, family: Family) -> None:
    """Raise `CheckpointError` for a tokenizer without the placeholders, or one that is not byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        raise CheckpointError(
            f"checkpoint {quoted(name)} has a tokenizer that is not byte-level BPE, as both Qwen-VL families' are"
        )
    for key in family.placeholders:
        token = getattr(model.config, key)
        text = tokenizer.convert_ids_to_tokens(token)
        if not text:
            raise CheckpointError(
                f"checkpoint {quoted(name)} has a tokenizer without token {token}, which is the {key} of its config.json, or "
                f"Transformers' own where that names none"
            )
        if tokenizer(text, add_special_tokens=False).input_ids != [token]:
            raise CheckpointError(f"checkpoint {quoted(name)} has a tokenizer that takes {text!r}, its {key}, for several tokens")
