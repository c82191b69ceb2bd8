"""SGLang as a server of the lab's. Flags as 0.5.23 has them (srt/arg_groups/fields/)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastvl_lab.peer.programs import MAX_BATCH, Option, Program, Value, Wanted, among, register, switch
from fastvl_lab.request import MAX_IMAGES


def arguments(wanted: Wanted) -> Sequence[str]:
    return (
        *("--model-path", wanted.source, "--served-model-name", wanted.name),
        *("--host", "127.0.0.1", "--port", str(wanted.port), "--device", wanted.device.type, "--dtype", wanted.dtype),
        *("--context-length", str(wanted.session_len), "--max-running-requests", str(wanted.max_batch)),
        *("--max-total-tokens", str(2 * wanted.session_len)),
        *("--disable-radix-cache", "--mm-preprocess-cache-size-mb", "0", "--enable-multimodal"),
        *("--limit-mm-data-per-request", json.dumps({"image": MAX_IMAGES})),
        # Greedy and nothing else; what ends an answer stays the checkpoint's.
        *("--sampling-defaults", "openai"),
        # An idle scheduler would keep a core awake beside whoever is measured next.
        "--sleep-on-idle",
        *("--enable-metrics", "--enable-cache-report"),
    )


def environment(wanted: Wanted) -> Mapping[str, str]:
    """Visual tokens of earlier images are not kept."""
    return {"SGLANG_VLM_CACHE_SIZE_MB": "0"}


SGLANG = Program(
    word="sglang",
    does="SGLang's server on this machine",
    variable="FASTVL_LAB_SGLANG",
    package="sglang",
    serve=("serve",),
    module=("-m", "sglang.launch_server"),
    arguments=arguments,
    env=environment,
    options=(
        MAX_BATCH,
        switch(
            "graphs",
            "CUDA graphs of the decoder",
            *("on", "off"),
            off=("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"),
        ),
        Option(
            name="tower_graphs",
            does="CUDA graphs of the vision tower",
            values=(Value(name="off"), Value(name="on", env=("SGLANG_VIT_ENABLE_CUDA_GRAPH=1",))),
        ),
        switch("chunked_prefill", "a long prompt in several steps", "auto", "off", off=("--chunked-prefill-size", "-1")),
        switch("overlap", "the next step is scheduled while one runs", "on", "off", off=("--disable-overlap-schedule",)),
        switch("compile", "torch.compile of the decoder", "off", "on", on=("--enable-torch-compile",)),
        among(
            "attention",
            "the decoder's attention",
            "--attention-backend",
            {name: name for name in ("fa3", "fa4", "flashinfer", "triton", "torch_native", "intel_amx")},
        ),
        among(
            "tower_attention",
            "the vision tower's attention",
            "--mm-attention-backend",
            {name: name for name in ("sdpa", "fa3", "fa4", "triton_attn", "amx_attn")},
        ),
    ),
)

register(SGLANG)
