"""What other engines have where the lab has a toggle: by default, by a flag, by an environment variable, or not at all.

All of it was read in the released wheels of `RELEASES`, for the two families on CUDA; of LMDeploy it is the PyTorch backend, since
TurboMind's kernels are compiled and have no flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["default", "flag", "variable", "none"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """An engine as it was read. serve: the command that starts its server, in a shell in which MODEL is the checkpoint."""

    name: str
    version: str
    serve: str


RELEASES: Mapping[str, Release] = {
    "vllm": Release(name="vLLM", version="0.33.0", serve='vllm serve "$MODEL"'),
    "sglang": Release(
        name="SGLang", version="0.5.23", serve='python -m sglang.launch_server --model-path "$MODEL" --enable-multimodal'
    ),
    "lmdeploy": Release(name="LMDeploy", version="0.18.0", serve='lmdeploy serve api_server "$MODEL" --backend pytorch'),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an engine is brought to an option. how: the flag or variable as a shell takes it; of a default, the version that made it
    one, where that is known."""

    kind: Kind
    how: str = ""
    note: str = ""

    @property
    def setting(self) -> tuple[str, str]:
        """A flag or a variable, and its value."""
        name, _, value = self.how.replace("=", " ", 1).partition(" ")
        return name, value

    def __str__(self) -> str:
        said = {"default": "by default" + (f" since {self.how}" if self.how else ""), "none": "none"}.get(self.kind, self.how)
        return f"{said}; {self.note}" if self.note else said


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """What an engine has where the lab has a toggle.

    source: the files of its release that say so. ways: by the options' values as texts. rest: a word on those that it has not.
    """

    source: str
    ways: Mapping[str, Way]
    rest: str = ""

    def way(self, value: object) -> Way:
        """That to an option; where there is none, what it has instead."""
        if (way := self.ways.get(str(value))) is not None:
            return way
        defaults = " or ".join(f"`{option}`" for option, way in self.ways.items() if way.kind == "default")
        return Way(kind="none", note="; ".join(filter(None, (defaults and f"it has {defaults}", self.rest))))


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """The counterparts of one toggle."""

    vllm: Counterpart
    sglang: Counterpart
    lmdeploy: Counterpart


def _has(source: str, /, *, rest: str = "", **options: str) -> Counterpart:
    """options: "default", "default since 0.14.0", "none", a flag or a variable, each with a note behind "; " where it needs one."""
    ways = {}
    for value, text in options.items():
        how, _, note = text.partition("; ")
        if how.startswith(("default", "none")):
            kind: Kind = "none" if how == "none" else "default"
            how = how.removeprefix(kind).removeprefix(" since ")
        else:
            kind = "flag" if how.startswith("--") else "variable"
        ways[value] = Way(kind=kind, how=how, note=note)
    return Counterpart(source=source, ways=ways, rest=rest)


# Files that say much.
_V_GRAPHS, _V_QWEN = "vllm/config/compilation.py, vllm/config/vllm.py", "vllm/model_executor/models/qwen2_5_vl.py, qwen3_vl.py"
_S_IMAGES, _S_VISION = "sglang/srt/multimodal/processors/base_processor.py", "sglang/srt/layers/attention/vision.py"
_S_GRAPHS, _S_QWEN = "sglang/srt/model_executor/cuda_graph_config.py", "sglang/srt/models/qwen2_5_vl.py, qwen3_vl.py"
_L_GRAPHS, _L_QWEN = "lmdeploy/pytorch/backends/cuda/graph_runner/", "lmdeploy/pytorch/models/qwen2_5_vl.py, qwen3_vl.py"
_V_SCHEDULE, _S_SCHEDULE = "vllm/config/scheduler.py", "sglang/srt/arg_groups/fields/schedule.py"
_V_WEIGHTS = "vllm/model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm)"
_S_WEIGHTS = "sglang/srt/layers/amx_utils.py"
_L_SCHEDULE = "lmdeploy/cli/utils.py"

# Toggle -> what the engines have there, in the order of the catalogue. vLLM's PR 27614 and LMDeploy's 4265 and 4393 made defaults.
ELSEWHERE: Mapping[str, Elsewhere] = {
    "preprocessor.decode": Elsewhere(
        vllm=_has("vllm/multimodal/media/image.py", pillow="default"),
        sglang=_has("sglang/srt/utils/common.py (_load_image)", gpu="default; JPEG alone; also with --image-processor-backend pil"),
        lmdeploy=_has("lmdeploy/vl/media/image.py", pillow="default"),
    ),
    "preprocessor.threads": Elsewhere(
        vllm=_has(
            "vllm/envs.py, vllm/multimodal/media/connector.py",
            all="default; a thread an image, 8 at most; VLLM_MEDIA_LOADING_THREAD_COUNT says how many",
            one="VLLM_MEDIA_LOADING_THREAD_COUNT=1",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/mm.py, {_S_IMAGES}",
            all="default; a thread an image, 4 at most; --mm-io-worker-num says how many",
            one="--mm-io-worker-num 1",
        ),
        lmdeploy=_has("lmdeploy/serve/processors/multimodal.py", rest="a thread a message, not an image", one="default"),
    ),
    "preprocessor.resize": Elsewhere(
        vllm=_has(
            "vllm/config/multimodal.py (validate_mm_processor_device)",
            transformers="default",
            torch="default; Transformers' processor has its torchvision backend, which vLLM requires",
            device="none; --mm-processor-device cuda is refused where the language model runs too",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/mm.py, {_S_IMAGES} (_fast_image_processor_device)",
            device="default; Transformers' torchvision backend on the GPU",
            transformers="--image-processor-backend pil; by Pillow",
            pillow="--image-processor-backend pil",
        ),
        lmdeploy=_has(
            "lmdeploy/vl/model/qwen2.py, qwen3.py",
            transformers="default",
            torch="default; Transformers' processor has its torchvision backend, which LMDeploy requires",
        ),
    ),
    "preprocessor.patchify": Elsewhere(
        vllm=_has("vllm/multimodal/processing/", torch="default"),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/mm.py, {_S_IMAGES}", torch="default; on the GPU", numpy="--image-processor-backend pil"
        ),
        lmdeploy=_has("lmdeploy/vl/model/qwen2.py, qwen3.py", torch="default"),
    ),
    "preprocessor.payload": Elsewhere(
        vllm=_has(
            "vllm/config/model.py (_resolve_mm_device_do_normalize)",
            uint8="default; not with VLLM_USE_RUST_FRONTEND",
            float32="--no-mm-device-do-normalize",
        ),
        sglang=_has(_S_IMAGES, float32="default"),
        lmdeploy=_has("lmdeploy/vl/model/qwen2.py, qwen3.py", float32="default"),
    ),
    "preprocessor.temporal": Elsewhere(
        vllm=_has(_V_QWEN, rest="PR 44787 is not in this release", duplicated="default"),
        sglang=_has(_S_QWEN, duplicated="default"),
        lmdeploy=_has(_L_QWEN, duplicated="default"),
    ),
    "preprocessor.upload": Elsewhere(
        vllm=_has("vllm/v1/worker/gpu/mm/encoder_runner.py", pinned="default"),
        sglang=_has(
            f"{_S_IMAGES}, {_S_QWEN}",
            rest="--mm-feature-transport cuda_ipc leaves what the GPU has made of an image on it",
            pageable="default",
        ),
        lmdeploy=_has("lmdeploy/pytorch/multimodal/data_type.py", pageable="default"),
    ),
    "vit.tower": Elsewhere(
        vllm=_has(f"vllm/config/model.py, {_V_QWEN}", lean="default", transformers="--model-impl transformers; the decoder too"),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/model.py, {_S_QWEN}",
            lean="default",
            transformers="--model-impl transformers; the decoder too",
        ),
        lmdeploy=_has(_L_QWEN, lean="default"),
    ),
    "vit.patch_embed": Elsewhere(
        vllm=_has("vllm/model_executor/layers/conv.py", linear="default"),
        sglang=_has("sglang/srt/layers/conv.py", linear="default"),
        lmdeploy=_has(_L_QWEN, conv3d="default"),
    ),
    "vit.padding": Elsewhere(
        vllm=_has(_V_QWEN, exact="default"),
        sglang=_has(_S_QWEN, exact="default"),
        lmdeploy=_has(
            f"{_L_QWEN}, lmdeploy/turbomind/models/qwen2_vl.py (_pad_mlp)",
            rest="its TurboMind backend pads the MLPs",
            exact="default",
        ),
    ),
    "vit.weights": Elsewhere(
        vllm=_has(_V_WEIGHTS, rest="its build for CPUs packs them for oneDNN", plain="default"),
        sglang=_has(_S_WEIGHTS, rest="on a CPU with AMX it packs them for kernels of its own", plain="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/default/linear.py", plain="default"),
    ),
    "vit.attention": Elsewhere(
        vllm=_has(
            "vllm/platforms/cuda.py, vllm/v1/attention/ops/vit_attn_wrappers.py",
            rest="windows of equal length are not grouped",
            per_window="--mm-encoder-attn-backend TORCH_SDPA",
            grouped_cudnn="--mm-encoder-attn-backend FLASHINFER; cuDNN by FlashInfer, one call over all windows",
            varlen="--mm-encoder-attn-backend FLASH_ATTN; the default in half precision",
            triton="--mm-encoder-attn-backend TRITON_ATTN",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/mm.py, {_S_VISION}",
            rest="--mm-attention-backend sdpa is one call over the whole image, under a mask",
            grouped_cudnn="--mm-attention-backend flashinfer_cudnn; cuDNN by FlashInfer, one call over all windows",
            varlen="--mm-attention-backend fa3; the default on Hopper; fa4 is that on Blackwell",
            triton="--mm-attention-backend triton_attn; the default on other cards",
        ),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/flash_attention.py", rest="it has one kernel for all", triton="default"),
    ),
    "vit.positions": Elsewhere(
        vllm=_has(_V_QWEN, cached="default; learned positions are interpolated for every request"),
        sglang=_has(
            "sglang/srt/models/utils.py (RotaryPosMixin)",
            cached="default; position ids alone; windows and learned positions are made for every request",
        ),
        lmdeploy=_has(f"{_L_QWEN} (rot_pos_ids)", rest="Qwen3-VL's position ids alone are cached", recomputed="default"),
    ),
    "vit.norms": Elsewhere(
        vllm=_has(
            "vllm/platforms/cuda.py (get_default_ir_op_priority)",
            rest="--ir-op-priority can choose its own kernel, until 0.34",
            eager="default; Qwen3-VL's LayerNorm is torch's own",
        ),
        sglang=_has("sglang/srt/layers/layernorm.py", fused="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/norm.py", fused="default"),
    ),
    "vit.rope": Elsewhere(
        vllm=_has("vllm/model_executor/layers/rotary_embedding/common.py (ApplyRotaryEmb)", fused="default; on a copy of q and k"),
        sglang=_has(
            _S_VISION, fused="default; one kernel, which torch.compile makes; eager operations under SGLANG_VIT_ENABLE_CUDA_GRAPH=1"
        ),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/apply_rotary_emb.py", fused="default"),
    ),
    "vit.activation": Elsewhere(
        vllm=_has(
            "vllm/model_executor/layers/activation.py (get_act_and_mul_fn)", fused="default; one kernel, which torch.compile makes"
        ),
        sglang=_has("sglang/srt/layers/activation.py", fused="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/activation.py", fused="default"),
    ),
    "vit.interpolation": Elsewhere(
        vllm=_has("vllm/model_executor/models/qwen3_vl.py (triton_pos_embed_interpolate)", fused="default"),
        sglang=_has("sglang/srt/models/qwen3_vl.py (fast_pos_embed_interpolate_vectorized)", eager="default"),
        lmdeploy=_has("lmdeploy/pytorch/models/qwen3_vl.py (fast_pos_embed_interpolate)", eager="default"),
    ),
    "attention.prefill": Elsewhere(
        vllm=_has(
            "vllm/platforms/cuda.py, vllm/v1/attention/backends/registry.py",
            rest="torch's scaled_dot_product_attention is no backend of its decoder",
            varlen="--attention-backend FLASH_ATTN; the default up to Hopper",
            triton="--attention-backend TRITON_ATTN",
        ),
        sglang=_has(
            "sglang/srt/arg_groups/choices.py, model_override_base.py",
            rest="no flag names torch's kernel",
            sdpa="--prefill-attention-backend torch_native; a call a sequence, by the kernel that torch chooses",
            varlen="--prefill-attention-backend fa3; the default on Hopper",
            triton="--prefill-attention-backend triton",
        ),
        lmdeploy=_has(
            "lmdeploy/pytorch/backends/cuda/attention/__init__.py",
            varlen="default; where FlashAttention 3 is installed",
            triton="default; elsewhere",
        ),
    ),
    "attention.decode": Elsewhere(
        vllm=_has(
            "vllm/platforms/cuda.py, vllm/v1/attention/backends/registry.py",
            rest="torch's scaled_dot_product_attention is no backend of its decoder",
            sdpa_flash="--attention-backend FLASH_ATTN; FlashAttention over paged blocks",
            triton="--attention-backend TRITON_ATTN",
        ),
        sglang=_has(
            "sglang/srt/arg_groups/choices.py, model_override_base.py",
            rest="no flag names torch's kernel",
            sdpa="--decode-attention-backend torch_native; a call a sequence, by the kernel that torch chooses",
            sdpa_flash="--decode-attention-backend fa3; FlashAttention over pages; the default on Hopper",
            triton="--decode-attention-backend triton",
        ),
        lmdeploy=_has(
            "lmdeploy/pytorch/backends/cuda/attention/__init__.py",
            sdpa_flash="default; FlashAttention 3 over paged blocks, where it is installed",
            triton="default; elsewhere",
        ),
    ),
    "attention.last_layer": Elsewhere(
        vllm=_has(
            "vllm/config/cache.py",
            rest="--kv-sharing-fast-prefill is for models whose layers share keys and values",
            all_tokens="default",
        ),
        sglang=_has(_S_QWEN, rest="PR 37147 is not in this release", all_tokens="default"),
        lmdeploy=_has(_L_QWEN, all_tokens="default"),
    ),
    "attention.projections": Elsewhere(
        vllm=_has("vllm/model_executor/models/qwen2.py, qwen3.py", fused="default"),
        sglang=_has("sglang/srt/models/qwen2.py, qwen3.py", fused="default"),
        lmdeploy=_has("lmdeploy/pytorch/models/qwen2.py, qwen3.py", fused="default"),
    ),
    "attention.weights": Elsewhere(
        vllm=_has(_V_WEIGHTS, rest="its build for CPUs packs them for oneDNN", plain="default"),
        sglang=_has(_S_WEIGHTS, rest="on a CPU with AMX it packs them for kernels of its own", plain="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/default/linear.py", plain="default"),
    ),
    "attention.norms": Elsewhere(
        vllm=_has("vllm/platforms/cuda.py (get_default_ir_op_priority)", fused="default; one kernel, which torch.compile makes"),
        sglang=_has("sglang/srt/layers/layernorm.py", fused="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/norm.py", fused="default"),
    ),
    "attention.rope": Elsewhere(
        vllm=_has(
            "vllm/compilation/passes/fusion/",
            rest="torch.compile makes kernels of norm and rotation; its passes that fuse them with M-RoPE are ROCm's",
        ),
        sglang=_has(
            "sglang/srt/layers/rotary_embedding/mrope.py, sglang/srt/models/qwen3.py",
            rest="a Triton kernel rotates q and k; the fused one is ROCm's",
        ),
        lmdeploy=_has(
            "lmdeploy/pytorch/backends/cuda/apply_rotary_emb.py", rest="a Triton kernel rotates q and k, another writes the cache"
        ),
    ),
    "attention.activation": Elsewhere(
        vllm=_has("vllm/config/compilation.py (custom_ops)", fused="default; one kernel, which torch.compile makes"),
        sglang=_has("sglang/srt/layers/activation.py", fused="default"),
        lmdeploy=_has("lmdeploy/pytorch/backends/cuda/activation.py", fused="default"),
    ),
    "attention.argmax": Elsewhere(
        vllm=_has(
            "vllm/envs.py, vllm/v1/worker/gpu/sample/gumbel.py",
            fused="default",
            eager="VLLM_USE_V2_MODEL_RUNNER=0; and all else of the older model runner",
        ),
        sglang=_has("sglang/srt/layers/sampler.py", eager="default"),
        lmdeploy=_has("lmdeploy/pytorch/engine/logits_process.py", eager="default"),
    ),
    "cache.kv": Elsewhere(
        vllm=_has("vllm/v1/core/kv_cache_manager.py", paged="default"),
        sglang=_has("sglang/srt/arg_groups/fields/schedule.py", paged="default; --page-size says how many tokens a page has"),
        lmdeploy=_has("lmdeploy/cli/utils.py", paged="default; blocks of 64 tokens; --cache-block-seq-len says how many"),
    ),
    "cache.image_reuse": Elsewhere(
        vllm=_has(
            "vllm/renderers/base.py (_process_mm_uuids), vllm/v1/core/encoder_cache_manager.py",
            on="default",
            off="--mm-processor-cache-gb 0; only with cache.prefix_reuse=off",
        ),
        sglang=_has(
            "sglang/srt/environ.py, sglang/srt/arg_groups/model_overrides/qwen3_vl.py",
            off="SGLANG_VLM_CACHE_SIZE_MB=0; the default of Qwen3-VL on large Hoppers",
            on="SGLANG_VLM_CACHE_SIZE_MB=100; 100 MB; the default elsewhere",
        ),
        lmdeploy=_has("lmdeploy/vl/engine.py, lmdeploy/pytorch/engine/inputs_maker.py", off="default"),
    ),
    "cache.prefix_reuse": Elsewhere(
        vllm=_has("vllm/config/cache.py", on="default", off="--no-enable-prefix-caching"),
        sglang=_has("sglang/srt/arg_groups/fields/memory.py", on="default", off="--disable-radix-cache"),
        lmdeploy=_has("lmdeploy/cli/utils.py", off="default", on="--enable-prefix-caching"),
    ),
    "capture.vit": Elsewhere(
        vllm=_has(
            _V_GRAPHS,
            eager="default",
            compile="--compilation-config.compile_mm_encoder true",
            graph="--compilation-config.cudagraph_mm_encoder true; by budgets of visual tokens",
        ),
        sglang=_has(
            "sglang/srt/environ.py, sglang/srt/multimodal/vit_cuda_graph_runner.py",
            eager="default",
            graph="SGLANG_VIT_ENABLE_CUDA_GRAPH=1",
        ),
        lmdeploy=_has(_L_GRAPHS, eager="default"),
    ),
    "capture.prefill": Elsewhere(
        vllm=_has(
            _V_GRAPHS,
            compile="default",
            eager="--compilation-config.mode 0; a decode step is not compiled either, and still a graph",
            graph="--max-cudagraph-capture-size 8192; compiled pieces, for prompts of up to so many tokens",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/exec_.py, {_S_GRAPHS}",
            rest="torch.compile of pieces was removed",
            graph="default; pieces, broken where the host decides; `full` is one graph a size",
            eager="--cuda-graph-backend-prefill disabled",
        ),
        lmdeploy=_has(
            f"lmdeploy/cli/utils.py, {_L_GRAPHS}",
            eager="default",
            graph="--piecewise-cudagraph-max-tokens 8192; pieces, for prompts of up to so many tokens",
        ),
    ),
    "capture.decode": Elsewhere(
        vllm=_has(
            _V_GRAPHS,
            graph="default",
            eager="--compilation-config.cudagraph_mode NONE; with capture.prefill=eager; else it is compiled",
            compile="--compilation-config.cudagraph_mode NONE; as prefill is",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/exec_.py, {_S_GRAPHS}",
            graph="default",
            eager="--cuda-graph-backend-decode disabled",
            compile="--enable-torch-compile; inside its graphs",
        ),
        lmdeploy=_has(
            f"lmdeploy/cli/utils.py, lmdeploy/pytorch/envs.py, {_L_GRAPHS}",
            graph="default",
            eager="--eager-mode; prefill too",
            compile="LMDEPLOY_ENABLE_DECODE_TORCH_COMPILE=1; inside its graphs",
        ),
    ),
    "capture.first_token": Elsewhere(
        vllm=_has(_V_GRAPHS, per_stage="default"),
        sglang=_has(_S_GRAPHS, per_stage="default"),
        lmdeploy=_has(_L_GRAPHS, per_stage="default"),
    ),
    "capture.shapes": Elsewhere(
        vllm=_has(
            _V_GRAPHS,
            rest="--compilation-config.encoder_cudagraph_token_budgets takes any list of sizes",
            exact="default; where it has no graph",
            powers_of_two="--compilation-config.cudagraph_mm_encoder true; visual tokens alone",
        ),
        sglang=_has(
            f"sglang/srt/arg_groups/fields/exec_.py, {_S_GRAPHS}",
            rest="--cuda-graph-bs-prefill takes any list of sizes, for prefill alone",
            exact="default; of the tower; prefill's graphs have sizes",
        ),
        lmdeploy=_has(_L_GRAPHS, exact="default; of the tower; prefill's graphs have sizes"),
    ),
    "streaming.steps_per_round": Elsewhere(
        vllm=_has(
            "vllm/config/vllm.py, vllm/config/scheduler.py",
            rest="--stream-interval 16 only holds text back",
            **{"2": "default since 0.14.0", "1": "--no-async-scheduling"},
        ),
        sglang=_has(
            "sglang/srt/arg_groups/fields/schedule.py",
            rest="--num-continuous-decode-steps is taken, and read nowhere",
            **{"2": "default", "1": "--disable-overlap-schedule"},
        ),
        lmdeploy=_has(
            "lmdeploy/pytorch/engine/engine_loop.py, inputs_maker.py",
            rest="0.9.0 to 0.11.1 had rounds of 16; prefill_interval now says how often prefill has its turn",
            **{"2": "default; the next step's inputs are sent before a step's result is awaited"},
        ),
    ),
    "streaming.gate": Elsewhere(
        vllm=_has("vllm/config/scheduler.py", rest="--stream-interval 16 holds text back, 16 tokens at a time", open="default"),
        sglang=_has(
            "sglang/srt/arg_groups/fields/serving.py",
            rest="--stream-interval 16 holds text back, 16 tokens at a time",
            open="default",
        ),
        lmdeploy=_has("lmdeploy/pytorch/engine/engine_loop.py", rest="0.9.0 to 0.11.1 had it", open="default since 0.12.0"),
    ),
    "streaming.positions": Elsewhere(
        vllm=_has("vllm/v1/worker/gpu/mm/rope.py", on_device="default"),
        sglang=_has(
            "sglang/srt/model_executor/forward_batch_info.py (_compute_mrope_positions_decode)",
            host_sync="default; the offsets of M-RoPE are copied from a list in every step",
        ),
        lmdeploy=_has("lmdeploy/pytorch/model_inputs.py", rest="0.12.2 and before had it", on_device="default since 0.12.3"),
    ),
    "schedule.batching": Elsewhere(
        vllm=_has(_V_SCHEDULE, continuous="default", one_at_a_time="--max-num-seqs 1"),
        sglang=_has(_S_SCHEDULE, continuous="default", one_at_a_time="--max-running-requests 1"),
        lmdeploy=_has(_L_SCHEDULE, continuous="default", one_at_a_time="--max-batch-size 1"),
    ),
    "schedule.max_batch": Elsewhere(
        vllm=_has(_V_SCHEDULE, **{n: f"--max-num-seqs {n}" for n in ("8", "1", "4", "32")}),
        sglang=_has(_S_SCHEDULE, **{n: f"--max-running-requests {n}" for n in ("8", "1", "4", "32")}),
        lmdeploy=_has(_L_SCHEDULE, **{n: f"--max-batch-size {n}" for n in ("8", "1", "4", "32")}),
    ),
    "schedule.prefill": Elsewhere(
        vllm=_has(_V_SCHEDULE, chunked="default", whole="--no-enable-chunked-prefill"),
        sglang=_has(
            _S_SCHEDULE, chunked="default; decode steps run between pieces, not beside them", whole="--chunked-prefill-size -1"
        ),
        lmdeploy=_has(
            "lmdeploy/messages.py, lmdeploy/pytorch/engine/inputs_maker.py",
            whole="default; a prompt over --max-prefill-token-num tokens, 8,192, is cut",
        ),
    ),
    "schedule.budget": Elsewhere(
        vllm=_has(_V_SCHEDULE, **{n: f"--max-num-batched-tokens {n}" for n in ("512", "128", "2048")}),
        sglang=_has(_S_SCHEDULE, **{n: f"--chunked-prefill-size {n}" for n in ("512", "128", "2048")}),
        lmdeploy=_has(_L_SCHEDULE, **{n: f"--max-prefill-token-num {n}" for n in ("512", "128", "2048")}),
    ),
    "schedule.vision": Elsewhere(
        vllm=_has(
            "vllm/v1/engine/async_llm.py, vllm/renderers/, vllm/v1/worker/gpu_model_runner.py (_execute_mm_encoder)",
            ahead="default; in the server's process, beside the engine's",
            batched="default; up to the encoder's budget of a step",
        ),
        sglang=_has(
            "sglang/srt/managers/tokenizer_manager.py, mm_schedule.py (_batch_encode_per_image_misses)",
            ahead="default; in the tokenizer's process, beside the scheduler's",
            batched="default; an image that several show is encoded once",
        ),
        lmdeploy=_has(
            f"lmdeploy/serve/processors/multimodal.py, {_L_QWEN}",
            ahead="default; on threads beside the engine's loop",
            batched="default; of prompts that are computed together",
        ),
    ),
    "schedule.tower": Elsewhere(
        vllm=_has("vllm/v1/core/sched/scheduler.py (_try_schedule_encoder_inputs)", whole="default"),
        sglang=_has("sglang/srt/managers/mm_schedule.py", whole="default"),
        lmdeploy=_has(_L_QWEN, whole="default"),
    ),
    "schedule.order": Elsewhere(
        vllm=_has(
            "vllm/v1/core/sched/request_queue.py", fifo="default", rest="--scheduling-policy priority takes its order from requests"
        ),
        sglang=_has(_S_SCHEDULE, fifo="default", shortest_first="--schedule-policy shortest-prefill-first; without ageing"),
        lmdeploy=_has(
            "lmdeploy/pytorch/envs.py",
            shortest_first="default; a request ages in 2 s, as LMDEPLOY_PT_TTFT_AGING_SEC has it",
            fifo="LMDEPLOY_PT_TTFT_POLICY=fifo",
        ),
    ),
    "schedule.overlap": Elsewhere(
        vllm=_has("vllm/v1/engine/async_llm.py, vllm/renderers/", off="default; a request comes with all of its images unpacked"),
        sglang=_has("sglang/srt/managers/tokenizer_manager.py", off="default; a request comes with all of its images unpacked"),
        lmdeploy=_has("lmdeploy/serve/processors/multimodal.py", off="default; a request comes with all of its images unpacked"),
    ),
}
