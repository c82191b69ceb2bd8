"""The catalogue: every slot, every toggle, every option, with what it does, who does it, and what it needs.

A slot is a frozen dataclass; its fields are the toggles; a field's metadata carries the options, and its default is the first of
them. The panel, the sweep's grid, the parity tests, the README's table, the errors that list the choices and the refusals of what
cannot run all read these fields: no list of options, and no need of one, is written anywhere else. No slot is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch

from fastvl_lab.errors import RecipeError, meant
from fastvl_lab.kernels.packed import takes

OptionValue = str | int
ImageBackend = Literal["pillow", "torchvision"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an option is to run on: a device, and the checkpoint's dtype and widths of heads; None where they are not known yet.

    here: whether that is this machine, whose packages and compilers count.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    tower_head_dim: int | None = None
    decoder_head_dim: int | None = None
    here: bool = True


@dataclass(frozen=True, kw_only=True)
class HeadDims:
    """The widths of heads that a kernel takes, in values, of the vision tower or of the decoder."""

    of: Literal["tower", "decoder"]
    multiple_of: int
    most: int

    def __str__(self) -> str:
        return f"heads of a multiple of {self.multiple_of} up to {self.most}"

    def unmet(self, target: Target) -> str | None:
        width = target.tower_head_dim if self.of == "tower" else target.decoder_head_dim
        if width is None or (width % self.multiple_of == 0 and width <= self.most):
            return None
        return f"it takes {self}, and the {self.of}'s have {width}"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an option cannot do without.

    half: the model in bfloat16 or float16. package: an installed one; with Triton comes a C compiler, which builds what launches
    its kernels. compiler: one of C++, for torch.compile. onednn: it, in torch, with packed weights in the model's dtype.
    """

    device: Literal["cuda", "cpu"] | None = None
    half: bool = False
    head_dims: HeadDims | None = None
    package: str | None = None
    compiler: bool = False
    onednn: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """For tables."""
        half, compiler = ("half precision" if self.half else None), ("a C++ compiler" if self.compiler else None)
        onednn = "oneDNN" if self.onednn else None
        heads = None if self.head_dims is None else str(self.head_dims)
        return tuple(word for word in (self.device, half, self.package, heads, compiler, onednn) if word)

    def unmet(self, target: Target) -> str | None:
        """Why the target will not do, in a sentence, or None; what is not known of it is taken to be as needed."""
        device = target.device.type
        if self.device not in (None, device):
            return f"it needs a {'CUDA device' if self.device == 'cuda' else 'CPU'}, and the lab runs on {device}"
        if self.half and target.dtype == torch.float32:
            return "it needs the model in bfloat16 or float16, and it is in float32"
        if self.head_dims is not None and (reason := self.head_dims.unmet(target)) is not None:
            return reason
        if not target.here:
            return None
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"it needs the package {self.package}, which is not installed"
        if self.package == "triton":
            compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
            if not any(map(shutil.which, compilers)):
                return f"Triton needs a C compiler for what launches its kernels, and found none ({', '.join(compilers)})"
        if self.compiler and not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))):
            return "it needs a C++ compiler, and neither c++, g++ nor clang++ is found"
        if self.onednn and not takes(dtype := target.dtype or torch.float32):
            return f"it needs a torch whose oneDNN packs weights in {str(dtype).removeprefix('torch.')} for this CPU"
        return None


_CUDA = Needs(device="cuda")
_HALF = Needs(device="cuda", half=True)
_TRITON = Needs(device="cuda", package="triton")
_CXX = Needs(compiler=True)
_ONEDNN = Needs(device="cpu", onednn=True)
_TOWER_HEADS = HeadDims(of="tower", multiple_of=8, most=128)
_DECODER_HEADS = HeadDims(of="decoder", multiple_of=8, most=128)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to do the work of a toggle.

    `exact` options give the same tokens as Transformers up to rounding. `decides` names the other toggles of the slot that this
    option takes over: they must stay at their first option, or the recipe means nothing. `requires` names choices elsewhere,
    "slot.toggle=value" or "slot.toggle=value|value", without which this one cannot work. `pixels` says whose resized pixels the
    option makes, where it touches them: "pillow" or "torchvision" (Transformers' image backends: which of them is the stock one
    depends on what is installed), or "own". `within` is by how many levels of 255 the pixels of an exact option may differ from
    those of the stock backend, where they are not the same.
    """

    value: OptionValue
    does: str
    exact: bool = True
    needs: Needs = Needs()
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
            needs=Needs(package="simplejpeg"),
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
            needs=Needs(device="cuda", package="torchvision"),
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
            needs=_TRITON,
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
            needs=_CUDA,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Vit:
    """Patches to visual tokens: the vision tower and its merger."""

    tower: str = _toggle(
        Option(
            value="transformers",
            does="the stock module, called as it is; LMDeploy's TurboMind backend ran it so (InternLM/lmdeploy issue 4195)",
            decides=("patch_embed", "padding", "weights", "attention", "positions", "norms", "rope", "activation", "interpolation"),
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
    weights: str = _toggle(
        Option(value="plain", does="products of blocks and mergers read the weights as the checkpoint has them; Transformers"),
        Option(
            value="packed",
            does=(
                "they read a second copy, made once a checkpoint, in oneDNN's blocked layout, which torch.compile cannot be given; "
                "small products stay as they are; vLLM on a CPU"
            ),
            needs=_ONEDNN,
            requires=("vit.padding=exact", "capture.vit=eager"),
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
            does="the same calls by torch's flash kernel; FlashAttention 2 (arXiv 2307.08691)",
            needs=_HALF,
        ),
        Option(
            value="grouped_cudnn",
            does="the same calls by cuDNN, which plans each new size; vLLM 34580, SGLang 19003",
            needs=_HALF,
        ),
        Option(
            value="varlen",
            does="torch's variable-length flash attention: one call over all windows; vLLM and SGLang alike",
            needs=Needs(device="cuda", half=True, head_dims=_TOWER_HEADS),
        ),
        Option(
            value="triton",
            does="a Triton kernel over exactly the blocks that hold queries; SGLang 29677, for its decoder",
            needs=Needs(device="cuda", package="triton", head_dims=_TOWER_HEADS),
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
            needs=_TRITON,
        ),
    )
    rope: str = _toggle(
        Option(value="eager", does="q and k rotated one after the other, their halves concatenated; the published modelling code"),
        Option(value="halves", does="q and k rotated together, half by half, into contiguous heads; vLLM rotates both at once"),
        Option(
            value="fused",
            does="one Triton kernel on the packed projection, in place; vLLM 24511",
            needs=_TRITON,
        ),
    )
    activation: str = _toggle(
        Option(value="eager", does="SiLU, then the product; the published modelling code"),
        Option(
            value="fused",
            does="both in one Triton kernel (Qwen2.5-VL alone); vLLM, SGLang 15640",
            needs=_TRITON,
        ),
    )
    interpolation: str = _toggle(
        Option(value="eager", does="learned positions gathered, weighted and summed (Qwen3-VL); vLLM 25337, Transformers"),
        Option(value="fused", does="one Triton kernel; vLLM 37948", needs=_TRITON),
    )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The decoder's attention, and the operations around it."""

    prefill: str = _toggle(
        Option(value="eager", does="scores, mask and softmax written out, scores kept in memory; Transformers' eager attention"),
        Option(
            value="sdpa",
            does="torch's scaled_dot_product_attention with a CPU's fused causal kernel; Transformers' default",
            needs=Needs(device="cpu"),
        ),
        Option(
            value="sdpa_efficient",
            does="the same on CUDA by its memory-efficient kernel, in every dtype, over views where heads are grouped; xFormers",
            needs=_CUDA,
        ),
        Option(
            value="sdpa_flash",
            does="the same by its flash kernel; FlashAttention 2, gpt-fast, which names its kernel too",
            needs=_HALF,
        ),
        Option(
            value="sdpa_cudnn",
            does="the same by cuDNN, which plans each new length; what torch prefers on Hopper",
            needs=_HALF,
        ),
        Option(
            value="sdpa_math",
            does="the same as plain products with all scores in memory; what torch falls to where no other kernel will do",
            needs=_CUDA,
        ),
        Option(
            value="varlen",
            does="torch's variable-length flash attention: one call over all sequences; vLLM and SGLang alike",
            needs=Needs(device="cuda", half=True, head_dims=_DECODER_HEADS),
        ),
        Option(
            value="triton",
            does=(
                "a Triton kernel that reads keys and values where the cache keeps them, so that paged blocks are not gathered: to "
                "read and to change, no rival of FlashAttention 3 on Hopper; vLLM 16828, SGLang"
            ),
            needs=Needs(device="cuda", package="triton", head_dims=_DECODER_HEADS),
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
            needs=Needs(device="cpu"),
        ),
        Option(
            value="sdpa_efficient",
            does="the same on CUDA by its memory-efficient kernel, in every dtype; xFormers",
            needs=_CUDA,
        ),
        Option(
            value="sdpa_flash",
            does="the same by its flash kernel, which takes no mask, and so no padded keys; FlashAttention 2",
            needs=_HALF,
            requires=("capture.decode=eager|compile", "capture.shapes=exact"),
        ),
        Option(
            value="sdpa_cudnn",
            does="the same by cuDNN, which plans each new number of keys; torch on Hopper",
            needs=_HALF,
        ),
        Option(value="sdpa_math", does="the same as plain products with all scores in memory; torch's last resort", needs=_CUDA),
        Option(
            value="triton",
            does="a Triton kernel with the keys split among programs, read where the cache keeps them; Flash-Decoding, SGLang",
            needs=Needs(device="cuda", package="triton", head_dims=_DECODER_HEADS),
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
    weights: str = _toggle(
        Option(value="plain", does="products of layers read the weights as the checkpoint has them; Transformers"),
        Option(
            value="packed",
            does=(
                "of two rows and more, they read a second copy, made once a checkpoint, in oneDNN's blocked layout, which "
                "torch.compile cannot be given; oneDNN's product of one row, and the LM head's, reads the first on all threads; "
                "small products stay as they are; vLLM on a CPU"
            ),
            needs=_ONEDNN,
            requires=("capture.prefill=eager", "capture.decode=eager"),
        ),
    )
    norms: str = _toggle(
        Option(value="eager", does="RMSNorm as its formula, an operation at a time; the published modelling code"),
        Option(value="native", does="torch's own rms_norm; Transformers 42461"),
        Option(
            value="by_length",
            does="RMSNorm from each row's length, torch's vector_norm, in five operations; its authors' code (arXiv 1910.07467)",
        ),
        Option(value="fused", does="residual add and norm in one Triton kernel; vLLM, SGLang", needs=_TRITON),
    )
    rope: str = _toggle(
        Option(value="eager", does="angles of all three axes, q and k rotated one after the other; the published modelling code"),
        Option(value="rolled", does="each angle made once, heads rotated by rolling their halves; among engines the lab's own"),
        Option(
            value="fused",
            does="norm of heads, rotation and the write into the cache in one Triton kernel; vLLM 49744",
            needs=_TRITON,
            requires=("cache.kv=static|paged",),
        ),
    )
    activation: str = _toggle(
        Option(value="eager", does="SiLU, then the product; the published modelling code"),
        Option(value="fused", does="both in one Triton kernel; vLLM, SGLang 15640", needs=_TRITON),
    )
    argmax: str = _toggle(
        Option(value="eager", does="torch's argmax over the vocabulary; Transformers"),
        Option(value="fused", does="two Triton kernels over many programs; vLLM 57770", needs=_TRITON),
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
            needs=_CXX,
            requires=("vit.tower=lean",),
        ),
        Option(
            value="graph",
            does="one CUDA graph for each size of its inputs; vLLM 35963, 40830, SGLang 14422, 15320",
            needs=_CUDA,
            requires=("vit.tower=lean",),
        ),
    )
    prefill: str = _toggle(
        Option(value="eager", does="one kernel launch an operation, from Python; Transformers"),
        Option(
            value="compile",
            does="torch.compile of the whole decoder, for any length of the prompt; gpt-fast, vLLM",
            needs=_CXX,
            requires=("cache.kv=static|paged",),
        ),
        Option(
            value="graph",
            does="one CUDA graph for each length of the prompt, from its first token; SGLang 13055",
            needs=_CUDA,
            requires=("cache.kv=static|paged", "cache.prefix_reuse=off"),
        ),
    )
    decode: str = _toggle(
        Option(value="eager", does="one kernel launch an operation, from Python; Transformers"),
        Option(
            value="compile",
            does="torch.compile of the whole decoder, for any number of keys; gpt-fast, vLLM",
            needs=_CXX,
            requires=("cache.kv=static|paged",),
        ),
        Option(
            value="graph",
            does="CUDA graphs by the number of keys, rounded up: to a power of two where shapes are exact; Transformers 45323",
            needs=_CUDA,
            requires=("cache.kv=static|paged",),
        ),
    )
    first_token: str = _toggle(
        Option(value="per_stage", does="vision tower, merge, prefill and argmax one after another; Transformers, vLLM, SGLang"),
        Option(
            value="single_graph",
            does="all from the patches to the first token as one CUDA graph: one launch and one wait; FlashRT",
            needs=_CUDA,
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


_CONTINUOUS = ("schedule.batching=continuous",)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which requests share a step."""

    batching: str = _toggle(
        Option(value="one_at_a_time", does="a request is served to its end before the next begins; Transformers"),
        Option(
            value="continuous",
            does="requests join and leave between decode steps, which they share; Orca (OSDI 2022), vLLM, SGLang, LMDeploy",
            requires=(
                "cache.kv=paged|concat",
                "capture.first_token=per_stage",
                "streaming.steps_per_round=1",
                "streaming.gate=open",
                "streaming.positions=on_device",
            ),
        ),
    )
    max_batch: int = _toggle(
        Option(value=8, does="so many requests are under way at most, and the rest wait; LMDeploy's max_batch_size in issue 4114"),
        Option(value=1, does="the same with one: what joining costs where nobody joins; vLLM's max-num-seqs", requires=_CONTINUOUS),
        Option(value=4, does="the same with four; vLLM's max-num-seqs", requires=_CONTINUOUS),
        Option(value=32, does="the same with 32; vLLM's max-num-seqs", requires=_CONTINUOUS),
    )
    prefill: str = _toggle(
        Option(
            value="whole", does="a prompt is computed in one step, which all answers under way wait for; nano-vllm, vLLM before 0.8"
        ),
        Option(
            value="chunked",
            does="a step computes decode rows and pieces of prompts up to its budget; Sarathi-Serve (arXiv 2403.02310), vLLM V1",
            requires=_CONTINUOUS,
        ),
    )
    budget: int = _toggle(
        Option(value=512, does="of a step with pieces of prompts: tokens, decode rows included; Sarathi-Serve's"),
        Option(
            value=128, does="the same with 128: shorter steps, more of them; the lab's own", requires=("schedule.prefill=chunked",)
        ),
        Option(value=2048, does="the same with 2,048; vLLM's max-num-batched-tokens", requires=("schedule.prefill=chunked",)),
    )
    vision: str = _toggle(
        Option(value="inline", does="a request's images are unpacked and resized when it is admitted; Transformers"),
        Option(
            value="ahead",
            does="threads unpack and resize the images of requests that wait while the device steps; vLLM's frontend processes",
            requires=_CONTINUOUS,
        ),
        Option(
            value="batched",
            does="as ahead, and the images of all requests that a step admits go through the tower in one call; SGLang (PR 24013), "
            "vLLM, LMDeploy",
            requires=_CONTINUOUS,
        ),
    )
    tower: str = _toggle(
        Option(
            value="whole", does="images go through the vision tower in one step, which all answers under way wait for; vLLM, SGLang"
        ),
        Option(
            value="by_blocks",
            does="a step computes as many of the tower's blocks as its budget of tokens is worth, so images are cut as prompts "
            "are; the lab's own",
            requires=(
                "schedule.prefill=chunked",
                "schedule.vision=inline|ahead",
                "vit.tower=lean",
                "capture.vit=eager",
                "capture.shapes=exact",
            ),
        ),
    )
    order: str = _toggle(
        Option(value="fifo", does="who came first is admitted first; vLLM, SGLang"),
        Option(
            value="shortest_first",
            does="the shortest prompt is admitted first, and each second of waiting counts as 1,000 tokens less; LMDeploy, and "
            "without ageing SGLang's shortest-prefill-first",
            requires=_CONTINUOUS,
        ),
    )
    overlap: str = _toggle(
        Option(value="off", does="a request's images are unpacked and encoded before its prompt is computed; Transformers, vLLM"),
        Option(
            value="on",
            does=(
                "a thread unpacks the next image while the tower encodes this one and the prompt is computed up to it, piece by "
                "piece; RServe (arXiv 2509.24381)"
            ),
            requires=(
                "schedule.batching=one_at_a_time",
                "capture.first_token=per_stage",
                "capture.prefill=eager|compile",
            ),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Toggle:
    """One row of the catalogue: `slot.name` and its options, the first of which is the baseline."""

    slot: str
    name: str
    options: tuple[Option, ...]

    @cached_property  # every look-up of a toggle compares it
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

    def check(self, value: OptionValue, target: Target) -> None:
        """Raise `RecipeError` for an option that cannot run on the target, with the reason and those that can."""
        if (reason := self.option(value).needs.unmet(target)) is not None:
            can = ", ".join(repr(option.value) for option in self.options if option.needs.unmet(target) is None)
            raise RecipeError(f"{self.path}={value} cannot run here: {reason}; the choices here are {can}")


# The slots, in the order a request meets them.
SLOTS: dict[str, type[Any]] = {
    "preprocessor": Preprocessor,
    "vit": Vit,
    "attention": Attention,
    "cache": Cache,
    "capture": Capture,
    "streaming": Streaming,
    "schedule": Schedule,
}


@cache
def toggles() -> tuple[Toggle, ...]:
    """The whole catalogue, in the order a request meets it."""
    return tuple(
        Toggle(slot=slot, name=field.name, options=field.metadata["options"])
        for slot, kind in SLOTS.items()
        for field in dataclasses.fields(kind)
    )


def toggle_at(path: str) -> Toggle:
    """The toggle at "slot.toggle"; raises `RecipeError` naming them all."""
    for toggle in toggles():
        if toggle.path == path:
            return toggle
    known = [toggle.path for toggle in toggles()]
    raise RecipeError(f"toggle {path!r} is unknown{meant(path, known)}; the choices are {', '.join(known)}")


_PAGE = """\
# Every slot, toggle and option

The first option of a toggle is the reference that the others are held against. A number is an issue or pull request of the
project before it, merged or not; *the lab's own* is what a search of engines and papers found nowhere else. *Exact* is what gives
the tokens of Transformers up to rounding: [recipes.md](recipes.md). `make toggles` writes this page from `fastvl_lab/catalogue.py`.
"""


def catalogue_markdown() -> str:
    """The catalogue as docs/toggles.md has it: a Markdown table, one row an option."""
    lines = [_PAGE, "| toggle | option | exact | what it does; who does it |", "|---|---|---|---|"]
    for toggle in toggles():
        for option in toggle.options:
            first = f"`{toggle.path}`" if option is toggle.options[0] else ""
            words = option.needs.words
            needs = f" (needs {', '.join(words)})" if words else ""
            lines.append(f"| {first} | `{option.value}`{needs} | {option.exactness} | {option.does} |")
    return "\n".join(lines)
