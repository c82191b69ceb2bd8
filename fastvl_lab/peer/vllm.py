"""vLLM as a server of the lab's. Flags as `vllm serve --help=all` of 0.32 prints them and 0.33 has them (engine/arg_utils.py)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from fastvl_lab.peer.programs import MAX_BATCH, Option, Program, Wanted, among, register, switch
from fastvl_lab.request import MAX_IMAGES


def arguments(wanted: Wanted) -> Sequence[str]:
    return (
        wanted.source,
        *("--host", "127.0.0.1", "--port", str(wanted.port), "--served-model-name", wanted.name),
        *("--dtype", wanted.dtype, "--max-model-len", str(wanted.session_len), "--max-num-seqs", str(wanted.max_batch)),
        *("--kv-cache-memory-bytes", str(wanted.kv_bytes)),
        # Of a GPU's memory, what must be free when it starts; how much it takes is said in bytes.
        *("--gpu-memory-utilization", "0.05"),
        *("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
        *("--limit-mm-per-prompt", json.dumps({"image": MAX_IMAGES, "video": 0})),
        # Greedy and nothing else; what ends an answer stays the checkpoint's.
        *("--override-generation-config", json.dumps({"repetition_penalty": 1.0})),
        *("--enable-per-request-metrics", "--enable-prompt-tokens-details"),
        # Its room for keys and values is given, so the largest image need not be tried first: minutes on a CPU.
        *(("--skip-mm-profiling",) if wanted.device.type == "cpu" else ()),
    )


def environment(wanted: Wanted) -> Mapping[str, str]:
    """No telemetry, nothing that listens beside loopback, and on a CPU the cores that this process may use."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if wanted.device.type == "cpu":
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return env


VLLM = Program(
    word="vllm",
    does="vLLM's server on this machine",
    variable="FASTVL_LAB_VLLM",
    package="vllm",
    serve=("serve",),
    arguments=arguments,
    env=environment,
    options=(
        MAX_BATCH,
        switch("graphs", "torch.compile and CUDA graphs of the decoder", "on", "off", off=("--enforce-eager",)),
        switch(
            "tower_graphs",
            "CUDA graphs of the vision tower",
            *("off", "on"),
            on=("--compilation-config", '{"cudagraph_mm_encoder": true}'),
        ),
        switch(
            "chunked_prefill",
            "a long prompt in several steps",
            *("auto", "on", "off"),
            on=("--enable-chunked-prefill",),
            off=("--no-enable-chunked-prefill",),
        ),
        Option(
            name="step_tokens", does="tokens of a step at most, which is how long a chunk can be", flag="--max-num-batched-tokens"
        ),
        switch(
            "async_scheduling",
            "the next step is scheduled while one runs",
            *("auto", "on", "off"),
            on=("--async-scheduling",),
            off=("--no-async-scheduling",),
        ),
        among(
            "attention",
            "the decoder's attention",
            "--attention-backend",
            {name: name.upper() for name in ("flash_attn", "flashinfer", "triton_attn", "flex_attention")},
        ),
        among(
            "tower_attention",
            "the vision tower's attention",
            "--mm-encoder-attn-backend",
            {name: name.upper() for name in ("flash_attn", "torch_sdpa", "triton_attn", "flashinfer")},
        ),
    ),
)

register(VLLM)
