"""LMDeploy as a server of the lab's, with its PyTorch engine unless told otherwise. Flags as 0.18 has them (cli/utils.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastvl_lab.peer.programs import MAX_BATCH, Option, Program, Value, Wanted, register


def arguments(wanted: Wanted) -> Sequence[str]:
    return (
        *(wanted.source, "--model-name", wanted.name),
        *("--server-name", "127.0.0.1", "--server-port", str(wanted.port), "--dtype", wanted.dtype),
        *("--session-len", str(wanted.session_len), "--max-batch-size", str(wanted.max_batch)),
        # Of the memory that its weights leave free, for keys and values; prefixes are kept only where that is asked for.
        *("--cache-max-entry-count", "0.4"),
        # Greedy and nothing else.
        *("--generation-config", "lmdeploy"),
    )


def environment(wanted: Wanted) -> Mapping[str, str]:
    return {}


LMDEPLOY = Program(
    word="lmdeploy",
    does="LMDeploy's server on this machine",
    variable="FASTVL_LAB_LMDEPLOY",
    package="lmdeploy",
    serve=("serve", "api_server"),
    arguments=arguments,
    env=environment,
    dtypes=("bfloat16", "float16"),
    devices=("cuda",),
    options=(
        MAX_BATCH,
        Option(
            name="backend",
            does="the engine: in PyTorch and Triton, or in C++",
            values=tuple(Value(name=name, flags=("--backend", name)) for name in ("pytorch", "turbomind")),
        ),
        Option(
            name="graphs",
            does="CUDA graphs of the decoder, which the PyTorch engine can do without",
            values=(Value(name="on"), Value(name="off", flags=("--eager-mode",), needs="backend=pytorch")),
        ),
        Option(
            name="prefill_tokens",
            does="tokens of a prefill at most, which is how long a chunk can be",
            flag="--max-prefill-token-num",
        ),
        Option(name="tower_batch", does="images that the tower takes at once; 1 by default", flag="--vision-max-batch-size"),
    ),
)

register(LMDEPLOY)
