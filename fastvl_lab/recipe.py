"""The catalogue: every slot, every toggle, every option, with what it does, who does it, and what it needs.

A slot is a frozen dataclass; its fields are the toggles; a field's metadata carries the options, and its default is the first of
them. A `Recipe` holds one of each slot. The panel, the sweep's grid, the parity tests, the README's table and the error that
lists the choices all read these fields: no list of options is written anywhere else. Options are named by value; no slot is
imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from fastvl_lab.errors import RecipeError

OptionValue = str | int
PRESETS = ("baseline", "fastest")  # the first words of a recipe's text
ImageBackend = Literal["pillow", "torchvision"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to do the work of a toggle.

    `exact` options give the same tokens as Transformers up to rounding. `needs` names "cuda", "cpu", "half precision" (bfloat16 or
    float16), "a C++ compiler" or packages.
    `decides` names the other toggles of the slot that this option takes over: they must stay at their first option, or the recipe
    means nothing. `requires` names choices elsewhere, "slot.toggle=value" or "slot.toggle=value|value", without which this one
    cannot work. `pixels` says whose resized pixels the option makes, where it touches them: "pillow" or "torchvision"
    (Transformers' image backends: which of them is the stock one depends on what is installed), or "own". `within` is by how many
    levels of 255 the pixels of an exact option may differ from those of the stock backend, where they are not the same.
    """

    value: OptionValue
    does: str
    exact: bool = True
    needs: tuple[str, ...] = ()
    decides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    pixels: ImageBackend | Literal["own"] | None = None
    within: int = 0

    def required(self) -> Iterator[tuple[str, list[str]]]:
        """`requires`, read: the path of another toggle, and the values (as texts) it may have."""
        for requirement in self.requires:
            path, _, values = requirement.partition("=")
            yield path, values.split("|")

    @property
    def exactness(self) -> str:
        """In a word or three, for tables."""
        if not self.exact:
            return "no"
        if self.within:
            return f"pixels within {self.within} of 255"
        return "yes" if self.pixels is None else f"with {self.pixels.capitalize()}'s pixels"

    def unavailable(self, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
        """Why this option cannot run on the device here, or None if it can; dtype: the model's, where it is known."""
        for need in self.needs:
            if need == "half precision":
                if dtype == torch.float32:
                    return "it needs the model in bfloat16 or float16, and it is in float32"
            elif need == "cpu":
                if device.type != "cpu":
                    return f"on {device.type} the kernel is chosen by name: sdpa_flash, sdpa_cudnn, sdpa_efficient or sdpa_math"
            elif need == "cuda":
                if device.type != "cuda":
                    return f"it needs a CUDA device, and the lab runs on {device.type}"
            elif need == "a C++ compiler":
                if not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))):
                    return "it needs a C++ compiler, and neither c++, g++ nor clang++ is found"
            elif importlib.util.find_spec(need) is None:
                return f"it needs the package {need}, which is not installed"
            elif need == "triton":
                compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
                if not any(map(shutil.which, compilers)):
                    return f"Triton needs a C compiler for what launches its kernels, and found none ({', '.join(compilers)})"
        return None


# What padded stages are programs over.
_PADDING = ("vit.tower=lean", "cache.kv=static|paged")


def _toggle(*options: Option) -> Any:
    return dataclasses.field(default=options[0].value, metadata={"options": options})


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Image bytes to patches."""

    decode: str = _toggle(
        Option(value="pillow", does="Pillow decodes each image in full; Transformers, vLLM and SGLang do so by default"),
        Option(
            value="turbojpeg",
            does=(
                "JPEG by libjpeg-turbo straight into an array, bit-equal to Pillow; other formats by Pillow; NVIDIA Dynamo 11157, "
                "SGLang 32397"
            ),
            needs=("simplejpeg",),
        ),
        Option(
            value="draft",
            does="JPEG decoded at 1/2, 1/4 or 1/8 where that is enough for the resize; other formats in full; SGLang 32397",
            exact=False,
            pixels="own",
            requires=("preprocessor.resize=pillow|torch|device",),
        ),
        Option(
            value="gpu",
            does=(
                "JPEG by nvJPEG on the device, other formats by Pillow; SGLang 19749; chroma that is stored at half size may be "
                "enlarged by nearest neighbour, which has cost accuracy (SGLang 34163)"
            ),
            exact=False,
            needs=("cuda", "torchvision"),
            pixels="own",
            requires=("preprocessor.resize=device",),
        ),
    )
    threads: str = _toggle(
        Option(value="one", does="images are decoded, and by Pillow resized, one after another; Transformers"),
        Option(
            value="all",
            does=(
                "a thread a core: images of up to 32 megapixels together are decoded at once, Pillow's passes cut into strips; "
                "vLLM 22710 and TensorRT-LLM 15598 decode so, the strips are the lab's own"
            ),
        ),
    )
    resize: str = _toggle(
        Option(
            value="transformers",
            does="the checkpoint's stock image processor resizes, rescales, normalises and patchifies; Transformers, vLLM, SGLang",
            decides=("patchify", "payload", "temporal"),
        ),
        Option(
            value="pillow",
            does="Pillow's bicubic resize on the decoded image, with no copy through float or channels-first; vLLM 47416 (Kimi)",
            pixels="pillow",
        ),
        Option(
            value="torch",
            does=(
                "torch's antialiased bicubic on bytes, as Transformers' torchvision backend; where Pillow's backend is the stock "
                "one, in its order of passes and at most 2 of 255 off it"
            ),
            pixels="torchvision",
            within=2,
        ),
        Option(
            value="device",
            does="the whole image goes to the device as bytes and is resized there in float32; vLLM 21995, 50390, SGLang 33349",
            exact=False,
            pixels="own",
            requires=("preprocessor.patchify=torch|triton",),
        ),
    )
    patchify: str = _toggle(
        Option(
            value="numpy",
            does="rescale, normalise and patchify as numpy passes over a float32 image; Transformers' Pillow backend",
        ),
        Option(
            value="torch",
            does="the same in torch: bytes go into patch order, then are scaled in one pass; Transformers' torchvision backend",
        ),
        Option(
            value="triton",
            does="the resized image goes to the device as bytes, where one kernel makes patches of it; TensorRT Edge-LLM, with two",
            needs=("cuda", "triton"),
            decides=("payload",),
        ),
    )
    payload: str = _toggle(
        Option(value="float32", does="patches are normalised on the host and sent as float32; Transformers"),
        Option(
            value="uint8",
            does="patches are sent as bytes, a quarter of the size, and normalised on the device; vLLM 50411, the default of 0.33",
        ),
        Option(
            value="uint8_folded",
            does=(
                "patches stay bytes until the patch embedding, whose weight and bias hold rescale and normalise; old for "
                "classifiers, among engines the lab's own"
            ),
            requires=("vit.tower=lean",),
        ),
    )
    temporal: str = _toggle(
        Option(value="duplicated", does="an image is a clip of two equal frames, and both are sent; Transformers"),
        Option(
            value="folded",
            does="it is sent once, to the sum of the patch embedding's temporal slices: half the bytes and products; vLLM 44787",
            requires=("vit.tower=lean",),
        ),
    )
    upload: str = _toggle(
        Option(value="pageable", does="tensors are copied to the device from ordinary memory, and the host waits; Transformers"),
        Option(
            value="pinned",
            does="tensors are copied from page-locked memory while the host goes on; vLLM, SGLang",
            needs=("cuda",),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Vit:
    """Patches to visual tokens: the vision tower and its merger."""

    tower: str = _toggle(
        Option(
            value="transformers",
            does="the stock module, called as it is; LMDeploy's TurboMind backend ran it so (InternLM/lmdeploy issue 4195)",
            decides=("patch_embed", "padding", "attention", "positions", "norms", "rope", "activation", "interpolation"),
        ),
        Option(value="lean", does="our own forward over the same weights, every step below a toggle; vLLM, SGLang"),
    )
    patch_embed: str = _toggle(
        Option(value="conv3d", does="Conv3d whose kernel is its stride; the published modelling code"),
        Option(value="linear", does="the same product as one matrix multiply; vLLM 27418, SGLang 19788, Transformers 45041"),
    )
    padding: str = _toggle(
        Option(value="exact", does="widths of products are the checkpoint's own; Transformers, vLLM, SGLang"),
        Option(
            value="aligned",
            does=(
                "rows of MLPs and of patches are padded with zeros to whole 64 bytes, such as 3,420 to 3,424, over the same "
                "weights; patches are copied once more; FlashRT"
            ),
            requires=("vit.patch_embed=linear",),
        ),
    )
    attention: str = _toggle(
        Option(
            value="per_window",
            does="an attention call a window or frame, in a Python loop, on CUDA by torch's memory-efficient kernel; Transformers",
        ),
        Option(
            value="grouped",
            does="windows of a kind stand together, and those of equal length are a batch of such a call; tt-metal 37866",
        ),
        Option(
            value="grouped_flash",
            does="the same calls by torch's flash kernel, in half precision; FlashAttention 2 (arXiv 2307.08691)",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="grouped_cudnn",
            does="the same calls by cuDNN, in half precision, which plans each new size; vLLM 34580, SGLang 19003",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="varlen",
            does="torch's variable-length flash attention: one call over all windows, in half precision; vLLM and SGLang alike",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="triton",
            does="a Triton kernel over exactly the blocks that hold queries; SGLang 29677, for its decoder",
            needs=("cuda", "triton"),
        ),
    )
    positions: str = _toggle(
        Option(value="recomputed", does="orders, rotary tables and learned positions are made for every request; Transformers"),
        Option(value="cached", does="they are kept for the grids met last, bounded in number and bytes; vLLM 17973, SGLang 14292"),
    )
    norms: str = _toggle(
        Option(value="eager", does="RMSNorm as its formula, an operation at a time; the published modelling code"),
        Option(value="native", does="torch's own rms_norm and layer_norm; Transformers 42461"),
        Option(
            value="fused",
            does="residual add and norm in one Triton kernel; vLLM, SGLang 15640",
            needs=("cuda", "triton"),
        ),
    )
    rope: str = _toggle(
        Option(value="eager", does="q and k rotated one after the other, their halves concatenated; the published modelling code"),
        Option(value="halves", does="q and k rotated together, half by half, into contiguous heads; vLLM rotates both at once"),
        Option(
            value="fused",
            does="one Triton kernel on the packed projection, in place; vLLM 24511",
            needs=("cuda", "triton"),
        ),
    )
    activation: str = _toggle(
        Option(value="eager", does="SiLU, then the product; the published modelling code"),
        Option(
            value="fused",
            does="both in one Triton kernel (Qwen2.5-VL alone); vLLM, SGLang 15640",
            needs=("cuda", "triton"),
        ),
    )
    interpolation: str = _toggle(
        Option(value="eager", does="learned positions gathered, weighted and summed (Qwen3-VL); vLLM 25337, Transformers"),
        Option(value="fused", does="one Triton kernel; vLLM 37948", needs=("cuda", "triton")),
    )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The decoder's attention, and the operations around it."""

    prefill: str = _toggle(
        Option(value="eager", does="scores, mask and softmax written out, scores kept in memory; Transformers' eager attention"),
        Option(
            value="sdpa",
            does="torch's scaled_dot_product_attention with a CPU's fused causal kernel; Transformers' default",
            needs=("cpu",),
        ),
        Option(
            value="sdpa_efficient",
            does="the same on CUDA by its memory-efficient kernel, in every dtype, over views where heads are grouped; xFormers",
            needs=("cuda",),
        ),
        Option(
            value="sdpa_flash",
            does="the same by its flash kernel, in half precision; FlashAttention 2, gpt-fast, which names its kernel too",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="sdpa_cudnn",
            does="the same by cuDNN, in half precision, which plans each new length; what torch prefers on Hopper",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="sdpa_math",
            does="the same as plain products with all scores in memory; what torch falls to where no other kernel will do",
            needs=("cuda",),
        ),
        Option(
            value="varlen",
            does="torch's variable-length flash attention: one call over all sequences, in half precision; vLLM and SGLang alike",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="triton",
            does=(
                "a Triton kernel that reads keys and values where the cache keeps them, so that paged blocks are not gathered: to "
                "read and to change, no rival of FlashAttention 3 on Hopper; vLLM 16828, SGLang"
            ),
            needs=("cuda", "triton"),
            requires=("cache.kv=static|paged",),
        ),
    )
    decode: str = _toggle(
        Option(value="eager", does="one query against all keys, written out; Transformers' eager attention"),
        Option(
            value="sdpa",
            does=(
                "torch's scaled_dot_product_attention on a CPU, with the heads of a group as queries of one head; FlashAttention, "
                "ExecuTorch 18513"
            ),
            needs=("cpu",),
        ),
        Option(
            value="sdpa_efficient",
            does="the same on CUDA by its memory-efficient kernel, in every dtype; xFormers",
            needs=("cuda",),
        ),
        Option(
            value="sdpa_flash",
            does="the same by its flash kernel, in half precision, which takes no mask, and so no padded keys; FlashAttention 2",
            needs=("cuda", "half precision"),
            requires=("capture.decode=eager|compile", "capture.shapes=exact"),
        ),
        Option(
            value="sdpa_cudnn",
            does="the same by cuDNN, in half precision, which plans each new number of keys; torch on Hopper",
            needs=("cuda", "half precision"),
        ),
        Option(
            value="sdpa_math", does="the same as plain products with all scores in memory; torch's last resort", needs=("cuda",)
        ),
        Option(
            value="triton",
            does="a Triton kernel with the keys split among programs, read where the cache keeps them; Flash-Decoding, SGLang",
            needs=("cuda", "triton"),
            requires=("cache.kv=static|paged",),
        ),
    )
    last_layer: str = _toggle(
        Option(value="all_tokens", does="prefill's last layer is computed for every token, as the others are; Transformers"),
        Option(
            value="last_token",
            does="it is computed for the token whose logits are read; of the others, keys and values alone; SGLang 37147, 38189",
        ),
    )
    projections: str = _toggle(
        Option(value="separate", does="q, k, v, gate and up are a product each; Transformers"),
        Option(value="fused", does="q with k and v, and gate with up, are one product, over the same weights; vLLM, SGLang"),
    )
    norms: str = _toggle(
        Option(value="eager", does="RMSNorm as its formula, an operation at a time; the published modelling code"),
        Option(value="native", does="torch's own rms_norm; Transformers 42461"),
        Option(
            value="by_length",
            does="RMSNorm from each row's length, torch's vector_norm, in five operations; its authors' code (arXiv 1910.07467)",
        ),
        Option(value="fused", does="residual add and norm in one Triton kernel; vLLM, SGLang", needs=("cuda", "triton")),
    )
    rope: str = _toggle(
        Option(value="eager", does="angles of all three axes, q and k rotated one after the other; the published modelling code"),
        Option(value="rolled", does="each angle made once, heads rotated by rolling their halves; among engines the lab's own"),
        Option(
            value="fused",
            does="norm of heads, rotation and the write into the cache in one Triton kernel; vLLM 49744",
            needs=("cuda", "triton"),
            requires=("cache.kv=static|paged",),
        ),
    )
    activation: str = _toggle(
        Option(value="eager", does="SiLU, then the product; the published modelling code"),
        Option(value="fused", does="both in one Triton kernel; vLLM, SGLang 15640", needs=("cuda", "triton")),
    )
    argmax: str = _toggle(
        Option(value="eager", does="torch's argmax over the vocabulary; Transformers"),
        Option(value="fused", does="two Triton kernels over many programs; vLLM 57770", needs=("cuda", "triton")),
    )


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What is kept between steps, and between requests."""

    kv: str = _toggle(
        Option(value="concat", does="keys and values grow by concatenation at every step; Transformers' DynamicCache"),
        Option(value="static", does="room for a whole session is allocated once and written in place; gpt-fast, StaticCache"),
        Option(value="paged", does="blocks of 16 tokens are taken as a sequence grows; vLLM (arXiv 2309.06180), SGLang"),
    )
    image_reuse: str = _toggle(
        Option(value="off", does="every request's images go through the vision tower; Transformers"),
        Option(value="on", does="visual tokens are kept by the image's bytes and all that shapes them; vLLM 29621, SGLang 21123"),
    )
    prefix_reuse: str = _toggle(
        Option(value="off", does="every prompt is computed from its first token; Transformers"),
        Option(
            value="on",
            does="blocks are shared by the tokens and images that fill them, up to the first that differs; vLLM 11187, SGLang",
            requires=("cache.kv=paged",),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Capture:
    """How a stage is executed."""

    vit: str = _toggle(
        Option(value="eager", does="one kernel launch an operation, from Python; Transformers"),
        Option(
            value="compile",
            does="torch.compile of the whole tower but its attention, for any image size; vLLM 23207, 40116",
            needs=("a C++ compiler",),
            requires=("vit.tower=lean",),
        ),
        Option(
            value="graph",
            does="one CUDA graph for each size of its inputs; vLLM 35963, 40830, SGLang 14422, 15320",
            needs=("cuda",),
            requires=("vit.tower=lean",),
        ),
    )
    prefill: str = _toggle(
        Option(value="eager", does="one kernel launch an operation, from Python; Transformers"),
        Option(
            value="compile",
            does="torch.compile of the whole decoder, for any length of the prompt; gpt-fast, vLLM",
            needs=("a C++ compiler",),
            requires=("cache.kv=static|paged",),
        ),
        Option(
            value="graph",
            does="one CUDA graph for each length of the prompt, from its first token; SGLang 13055",
            needs=("cuda",),
            requires=("cache.kv=static|paged", "cache.prefix_reuse=off"),
        ),
    )
    decode: str = _toggle(
        Option(value="eager", does="one kernel launch an operation, from Python; Transformers"),
        Option(
            value="compile",
            does="torch.compile of the whole decoder, for any number of keys; gpt-fast, vLLM",
            needs=("a C++ compiler",),
            requires=("cache.kv=static|paged",),
        ),
        Option(
            value="graph",
            does="CUDA graphs by the number of keys, rounded up: to a power of two where shapes are exact; Transformers 45323",
            needs=("cuda",),
            requires=("cache.kv=static|paged",),
        ),
    )
    first_token: str = _toggle(
        Option(value="per_stage", does="vision tower, merge, prefill and argmax one after another; Transformers, vLLM, SGLang"),
        Option(
            value="single_graph",
            does="all from the patches to the first token as one CUDA graph: one launch and one wait; FlashRT",
            needs=("cuda",),
            decides=("vit", "prefill"),
            requires=("vit.tower=lean", "cache.kv=static|paged", "cache.image_reuse=off", "cache.prefix_reuse=off"),
        ),
    )
    shapes: str = _toggle(
        Option(value="exact", does="every stage computes what is there; Transformers"),
        Option(
            value="multiples_of_64",
            does=(
                "visual tokens, prompt and keys are padded to the next multiple of 64, and masked, so that sizes share a program; "
                "vLLM on Gaudi"
            ),
            requires=_PADDING,
        ),
        Option(
            value="multiples_of_256",
            does="the same with multiples of 256: fewer programs, more padding; budgets of vLLM 35963, keys of llama.cpp 16812",
            requires=_PADDING,
        ),
        Option(
            value="powers_of_two",
            does="the same with powers of two from 64 on: fewest programs, up to half of the work padding; Transformers 45323",
            requires=_PADDING,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How tokens leave."""

    steps_per_round: int = _toggle(
        Option(value=1, does="a decode step is launched when the token before it has been read and sent; Transformers"),
        Option(
            value=2,
            does="two are launched before the first is read, so the device need not wait for the host; LMDeploy with "
            "prefill_interval=2, asynchronous scheduling of vLLM and SGLang",
        ),
        Option(
            value=16,
            does="sixteen are launched before the first is read; what follows the end of an answer is thrown away; LMDeploy "
            "0.9.0 to 0.11.1",
        ),
    )
    gate: str = _toggle(
        Option(value="open", does="a token leaves as soon as it has been read; LMDeploy since 0.12.0 (PR 4265)"),
        Option(
            value="round",
            does="tokens are held while a round of steps is being launched, and in the second half of its results; LMDeploy 0.9.0 "
            "to 0.11.1 (issue 4114)",
        ),
    )
    positions: str = _toggle(
        Option(value="on_device", does="positions of all steps are made on the device at once; LMDeploy since 0.12.3 (PR 4393)"),
        Option(
            value="host_sync",
            does="each step's is copied from a Python list, for which the host waits for the device; LMDeploy up to 0.12.2",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Toggle:
    """One row of the catalogue: `slot.name` and its options, the first of which is the baseline."""

    slot: str
    name: str
    options: tuple[Option, ...]

    @property
    def path(self) -> str:
        return f"{self.slot}.{self.name}"

    @property
    def values(self) -> tuple[OptionValue, ...]:
        return tuple(option.value for option in self.options)

    def option(self, value: OptionValue) -> Option:
        """The option of that value; raises `RecipeError` naming the choices."""
        for option in self.options:
            if type(option.value) is type(value) and option.value == value:
                return option
        raise RecipeError(f"{self.path} is {value!r}; the choices are {', '.join(map(repr, self.values))}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One choice for every toggle; immutable and hashable.

    `Recipe()` is the baseline. Raises `RecipeError` on an unknown value or a combination without meaning; whether the options
    can run on a device is asked by `check`.
    """

    preprocessor: Preprocessor = Preprocessor()
    vit: Vit = Vit()
    attention: Attention = Attention()
    cache: Cache = Cache()
    capture: Capture = Capture()
    streaming: Streaming = Streaming()

    def __post_init__(self) -> None:
        for slot_field in dataclasses.fields(self):
            slot, expected = getattr(self, slot_field.name), type(slot_field.default)
            if not isinstance(slot, expected):
                raise RecipeError(f"{slot_field.name} is {slot!r}; it must be a {expected.__name__}")
        # All values first: a name that is mistyped is not a choice that another would not go with.
        for option, toggle in [(self.option(toggle), toggle) for toggle in toggles()]:
            for path, allowed in option.required():
                if str(self.value(path)) not in allowed:
                    needed = f"{path}={' or '.join(allowed)}"
                    raise RecipeError(f"{toggle.path}={option.value} needs {needed}, and {path} is {self.value(path)!r}")
            for other in option.decides:
                path, first = f"{toggle.slot}.{other}", _toggle_at(f"{toggle.slot}.{other}").values[0]
                if self.value(path) != first:
                    raise RecipeError(
                        f"{path} is {self.value(path)!r}, but {toggle.path}={option.value} does that step itself; "
                        f"leave it at {first!r} or choose another {toggle.path}: "
                        f"{', '.join(repr(v) for v in toggle.values if v != option.value)}"
                    )

    @classmethod
    def baseline(cls) -> Recipe:
        """What a straightforward PyTorch backend does: the first option everywhere."""
        return cls()

    @classmethod
    def fastest(cls, device: torch.device | str = "cpu") -> Recipe:
        """The best exact recipe known for the device type, from side-by-side measurements, that this installation can run.

        What depends on the installation is `preprocessor.decode`: turbojpeg where simplejpeg is installed. On CPU: `make sweep`,
        both built-in checkpoints. On CUDA nothing is measured yet, so it is a guess: torch's own kernels in any dtype, copies that
        the host does not wait for, and decode steps as graphs, since their launches take longer than their work.
        """
        with suppress(RuntimeError):  # of what torch has no device
            device = torch.device(device)
        if not isinstance(device, torch.device) or device.type not in ("cpu", "cuda"):
            raise RecipeError(f"no fastest recipe is known for device {str(device)!r}; the choices are 'cpu' and 'cuda'")
        turbojpeg = _toggle_at("preprocessor.decode").option("turbojpeg").unavailable(device) is None
        cuda = device.type == "cuda"
        attention = "sdpa_efficient" if cuda else "sdpa"
        return cls(
            preprocessor=Preprocessor(
                decode="turbojpeg" if turbojpeg else "pillow",
                resize="torch",
                patchify="torch",
                payload="uint8_folded",
                temporal="folded",
                upload="pinned" if cuda else "pageable",
            ),
            vit=Vit(tower="lean", patch_embed="linear", attention="grouped", positions="cached", norms="native", rope="halves"),
            attention=Attention(
                prefill=attention,
                decode=attention,
                last_layer="last_token",
                projections="fused",
                norms="native" if cuda else "by_length",
                rope="rolled",
            ),
            cache=Cache(kv="static"),
            capture=Capture(decode="graph" if cuda else "eager"),
        )

    @classmethod
    def parse(cls, text: str, device: torch.device | str = "cpu") -> Recipe:
        """Read "baseline" or "fastest", then changes: "fastest, vit.patch_embed=conv3d". Raises `RecipeError`."""
        if not isinstance(text, str):
            raise RecipeError(f"a recipe is given as {text!r}; give a text such as 'baseline' or 'fastest, vit.tower=lean'")
        name, *changes = [part.strip() for part in text.split(",")]
        if name not in PRESETS:
            raise RecipeError(
                f"recipe {text!r} starts with {name!r}; the choices are {', '.join(PRESETS)}, "
                f"each optionally followed by changes such as ', vit.tower=lean'"
            )
        changed: dict[str, OptionValue] = {}
        for change in changes:
            path, equals, value = change.partition("=")
            if not equals:
                raise RecipeError(f"recipe {text!r} has {change!r}; a change reads slot.toggle=value")
            toggle = _toggle_at(path.strip())
            value = value.strip()
            if toggle.path in changed:
                raise RecipeError(f"recipe {text!r} sets {toggle.path} twice")
            changed[toggle.path] = next((v for v in toggle.values if str(v) == value), value)
        return (cls.fastest(device) if name == "fastest" else cls.baseline()).replace(changed)

    def value(self, path: str) -> OptionValue:
        """The value at "slot.toggle"; raises `RecipeError` naming the toggles."""
        toggle = _toggle_at(path)
        value: OptionValue = getattr(getattr(self, toggle.slot), toggle.name)
        return value

    def option(self, toggle: Toggle) -> Option:
        """The option that the recipe has chosen at a toggle."""
        return toggle.option(self.value(toggle.path))

    def replace(self, path: str | Mapping[str, OptionValue], value: OptionValue | None = None) -> Recipe:
        """A new recipe with one toggle changed, or several at once: `replace({"vit.tower": "lean", …})`."""
        changes: Mapping[str, Any] = path if isinstance(path, Mapping) else {path: value}
        data = self.to_dict()
        for at, new in changes.items():
            toggle = _toggle_at(at)
            data[toggle.slot][toggle.name] = new
        return Recipe.from_dict(data)

    def choose(self, path: str, value: OptionValue) -> Recipe:
        """As `replace`, and with it the changes elsewhere without which the option would mean nothing.

        What it requires is set to the first choice that will do; what it takes over, and what could not stay with it, goes back to
        the first option; and an option that took this step over makes room for the next that does not.
        """
        changes: dict[str, OptionValue] = {}
        pending = [(path, value)]
        while pending:
            path, value = pending.pop()
            toggle, changes[path] = _toggle_at(path), value
            option = toggle.option(value)
            for other, allowed in option.required():
                if str(changes.get(other, self.value(other))) not in allowed:
                    pending.append((other, next(v for v in _toggle_at(other).values if str(v) == allowed[0])))
            for other_toggle in toggles():
                current = other_toggle.option(changes.get(other_toggle.path, self.value(other_toggle.path)))
                if other_toggle.slot == toggle.slot and toggle.name in current.decides and value != toggle.values[0]:
                    room = next(o for o in other_toggle.options if toggle.name not in o.decides)
                    pending.append((other_toggle.path, room.value))
            for name in option.decides:
                changes.setdefault(f"{toggle.slot}.{name}", _toggle_at(f"{toggle.slot}.{name}").values[0])
        for toggle in toggles():
            for other, allowed in self.option(toggle).required():
                if toggle.path not in changes and str(changes.get(other, self.value(other))) not in allowed:
                    changes[toggle.path] = toggle.values[0]
        return self.replace(changes)

    def to_dict(self) -> dict[str, dict[str, OptionValue]]:
        """Plain nested data, ready for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, OptionValue]]) -> Recipe:
        """Read `to_dict`'s form; a toggle left out is at its baseline, an unknown key or value is a `RecipeError`."""
        slots: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is given as {data!r}; give a mapping with the slots {', '.join(slots)}")
        values = {}
        for slot, choices in data.items():
            if slot not in slots:
                raise RecipeError(f"slot {slot!r} is unknown; the choices are {', '.join(slots)}")
            if not isinstance(choices, Mapping):
                raise RecipeError(f"slot {slot!r} is {choices!r}; give a mapping from its toggles to their values")
            for name in choices:
                _toggle_at(f"{slot}.{name}")
            values[slot] = slots[slot](**choices)
        return cls(**values)

    def changes(self) -> dict[str, OptionValue]:
        """The toggles that differ from the baseline, by path."""
        return {t.path: self.value(t.path) for t in toggles() if self.value(t.path) != t.values[0]}

    def check(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Raise `RecipeError` for the first option that cannot run on the device, in the dtype, with the reason."""
        for toggle in toggles():
            option = self.option(toggle)
            if (reason := option.unavailable(device, dtype)) is not None:
                raise RecipeError(f"{toggle.path}={option.value} cannot run here: {reason}")

    @property
    def exact(self) -> bool:
        """Whether every option promises the same tokens as Transformers does with one of its image backends."""
        return all(self.option(toggle).exact for toggle in toggles())

    def oracle(self, image_backend: ImageBackend) -> str:
        """The engine whose tokens the recipe must make, where `image_backend` is Transformers' own here.

        It is "transformers" where the recipe's pixels are the stock ones; else Transformers' model on the recipe's pixels, such as
        "transformers, preprocessor.resize=torch": differing pixels are no fault of what comes after them.
        """
        decode, resize = (self.option(_toggle_at(path)) for path in ("preprocessor.decode", "preprocessor.resize"))
        if {decode.pixels, resize.pixels} <= {None, image_backend}:
            return "transformers"
        on_its_pixels = Recipe.baseline().choose("preprocessor.resize", resize.value)
        if decode.pixels is not None:
            on_its_pixels = on_its_pixels.choose("preprocessor.decode", decode.value)
        return ", ".join(["transformers", *(f"{path}={value}" for path, value in on_its_pixels.changes().items())])

    def within(self, image_backend: ImageBackend) -> int | None:
        """How many levels of 255 its pixels may be from the stock ones, or None where it promises nothing of the kind."""
        bounds = [o.within for o in map(self.option, toggles()) if o.pixels not in (None, image_backend)]
        return max(bounds, default=0) if self.exact and all(bounds) else None

    def text(self, device: torch.device | str = "cpu") -> str:
        """The shortest text that `parse` reads as this recipe on the device: a preset, and what is changed of it."""
        texts = []
        for name, preset in (("baseline", Recipe.baseline()), ("fastest", Recipe.fastest(device))):
            changed = [f"{t.path}={self.value(t.path)}" for t in toggles() if self.value(t.path) != preset.value(t.path)]
            texts.append(", ".join([name, *changed]))
        return min(texts, key=len)

    def __str__(self) -> str:
        """As changes of the baseline, which read the same on every device and installation."""
        return ", ".join(["baseline", *(f"{path}={value}" for path, value in self.changes().items())])


@cache
def toggles() -> tuple[Toggle, ...]:
    """The whole catalogue, in the order a request meets it."""
    return tuple(
        Toggle(slot=slot.name, name=field.name, options=field.metadata["options"])
        for slot in dataclasses.fields(Recipe)
        for field in dataclasses.fields(slot.default)  # type: ignore[arg-type]
    )


def _toggle_at(path: str) -> Toggle:
    for toggle in toggles():
        if toggle.path == path:
            return toggle
    raise RecipeError(f"toggle {path!r} is unknown; the choices are {', '.join(t.path for t in toggles())}")


def catalogue_markdown() -> str:
    """The catalogue as a Markdown table, one row an option; the README's section is this text."""
    lines = ["| toggle | option | exact | what it does; who does it |", "|---|---|---|---|"]
    for toggle in toggles():
        for option in toggle.options:
            first = f"`{toggle.path}`" if option is toggle.options[0] else ""
            needs = f" (needs {', '.join(option.needs)})" if option.needs else ""
            lines.append(f"| {first} | `{option.value}`{needs} | {option.exactness} | {option.does} |")
    return "\n".join(lines)
