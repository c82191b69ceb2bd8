"""The decoder on this device, in one command: parity first, then prefill and decode by option against Transformers and the floor.

    python -m fastvl_lab.measure.decoder_report [--tiny] [--out decoder.json]

Without arguments it needs a GPU: the published 3B and 4B geometries with random weights in bfloat16, prompts of 300, 1600 and 8000
tokens. `--tiny` runs the built-in checkpoints in float32 on short prompts anywhere. torch, transformers and triton are enough.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastvl_lab.engine import EngineLike
from fastvl_lab.errors import sentence
from fastvl_lab.lab import Lab, device_name
from fastvl_lab.measure.decoding import BoundDecoder, text_prompt, time_decoding
from fastvl_lab.measure.floors import copy_ceiling, decode_bytes, matmul_ceiling, prefill_flops
from fastvl_lab.measure.parity import wider, within_budget, worst_error
from fastvl_lab.measure.rounds import Rounds
from fastvl_lab.measure.slot_report import Row, command, runnable, table
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Prompt

FULL = {
    "checkpoints": ("random:Qwen/Qwen2.5-VL-3B-Instruct", "random:Qwen/Qwen3-VL-4B-Instruct"),
    "lengths": (300, 1600, 8000),
    "steps": 32,
    "device": "cuda",
    "dtype": "bfloat16",
}
TINY = {
    "checkpoints": ("tiny-qwen2.5-vl", "tiny-qwen3-vl"),
    "lengths": (40, 130),
    "steps": 8,
    "device": None,
    "dtype": "float32",
}

STOCK = "transformers"

# The truth takes its prompt in pieces, because in float32 torch may write the scores of all of it out.
_PIECE = 1024


def variants(device: torch.device, dtype: torch.dtype) -> dict[str, EngineLike]:
    """What is compared, by label.

    Transformers, the baseline, and the lean decoder with SDPA: plain; with each other option of its slot that can run here alone,
    and what that requires; with each KV cache; with the last options of all toggles together. Then the fastest recipe known.
    """
    sdpa = "sdpa_efficient" if device.type == "cuda" else "sdpa"
    lean = last = Recipe.parse(f"baseline, attention.prefill={sdpa}, attention.decode={sdpa}")
    engines: dict[str, EngineLike] = {STOCK: STOCK, "baseline": Recipe.baseline(), "lean": lean}
    for toggle, option in runnable("attention", device, dtype):
        if option.value != lean.value(toggle.path):
            engines[f"{toggle.name}={option.value}"] = lean.choose(toggle.path, option.value)
        last = last.choose(toggle.path, option.value)
    for toggle, option in runnable("cache", device, dtype):
        if toggle.name == "kv" and option.value != lean.cache.kv:
            engines[f"kv={option.value}"] = lean.choose(toggle.path, option.value)
    engines["last of each"] = last
    if last.attention.prefill == "triton":
        engines["last of each, sdpa"] = last.replace({"attention.prefill": sdpa, "attention.decode": sdpa})
        if dtype != torch.float32:
            engines["last of each, varlen"] = last.replace("attention.prefill", "varlen")
    engines["fastest"] = Recipe.fastest(device)
    return engines


class Check(NamedTuple):
    """How an engine came through: its worst step's relative error, or why it could not run; bytes of keys and values at the end."""

    error: float | str
    kv_bytes: int | None = None


def check(lab: Lab, length: int, steps: int, engines: Mapping[str, EngineLike]) -> dict[str, Check]:
    """Every engine's logits of a prompt's last token and after each of `steps` tokens that are forced on all of them alike.

    Against the stock decoder in a wider dtype. Positions are those of a prompt with an image in it, so that each axis counts.
    """
    return lab.compute(lambda: _check(lab, length, steps, engines))


@torch.inference_mode()
def _check(lab: Lab, length: int, steps: int, engines: Mapping[str, EngineLike]) -> dict[str, Check]:
    prompt, forced = _with_places_of_an_image(text_prompt(lab, length, steps)), text_prompt(lab, steps, 1).input_ids
    found: dict[str, Check] = {}
    truth = _truth(lab, prompt, forced)
    for label, engine in engines.items():
        try:
            if (recipe := lab.engine(engine).recipe) is not None:
                logits, kv_bytes = _ours(lab, recipe, prompt, forced)
            else:
                stock = lab.checkpoint.text
                logits, kv_bytes = _stock(stock.module, stock.head.weight, prompt, forced, length)
            found[label] = Check(worst_error([(logits, truth)]), kv_bytes)
        except Exception as error:  # one option that a device cannot run must not cost the others their rows
            found[label] = Check(sentence(error))
    return found


def _with_places_of_an_image(prompt: Prompt) -> Prompt:
    """The prompt with its middle half at the positions of a square of visual tokens (arXiv 2409.12191, M-RoPE)."""
    n, device = prompt.n_tokens, prompt.positions.device
    side = math.isqrt(n // 2)
    first = (n - side * side) // 2
    row, column = (x.flatten() for x in torch.meshgrid(*[torch.arange(side, device=device)] * 2, indexing="ij"))
    image = first + torch.stack([torch.zeros_like(row), row, column])
    rest = first + side + torch.arange(n - first - side * side, device=device)
    positions = torch.cat([prompt.positions[:, :first], image, rest.expand(3, -1)], dim=1)
    return dataclasses.replace(prompt, positions=positions, next_position=first + side + len(rest))


def _truth(lab: Lab, prompt: Prompt, forced: torch.Tensor) -> torch.Tensor:
    """The stock decoder's logits in a wider dtype; the copy of its weights is gone on return."""
    stock, wide = lab.checkpoint.text, wider(lab.dtype)
    return _stock(copy.deepcopy(stock.module).to(wide), stock.head.weight.to(wide), prompt, forced, _PIECE)[0]


def _stock(text: Any, head: torch.Tensor, prompt: Prompt, forced: torch.Tensor, piece: int) -> tuple[torch.Tensor, int]:
    """Logits [1 + forced, vocab] by stock modules, the prompt in pieces of up to `piece` tokens, and bytes of their cache."""
    n, ids = prompt.n_tokens, torch.cat([prompt.input_ids, forced])
    positions = torch.cat([prompt.positions, _positions_after(prompt, len(forced)).expand(3, -1)], dim=1)
    starts, kept, logits = [*range(0, n, piece), *range(n, len(ids))], None, []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        embeds, at = text.embed_tokens(ids[None, start:end]), positions[:, None, start:end]
        out = text(inputs_embeds=embeds, position_ids=at, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        if end >= n:
            logits.append(F.linear(out.last_hidden_state[0, -1], head))
    assert kept is not None
    return torch.stack(logits), sum(x.nbytes for layer in kept.layers for x in (layer.keys, layer.values))


def _ours(lab: Lab, recipe: Recipe, prompt: Prompt, forced: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same by a recipe's decoder."""
    bound = BoundDecoder.of(lab, recipe)
    place = bound.cache.admit(prompt, len(forced) + 1, tuple)
    try:
        logits = [bound.prefill(prompt, place)]
        for token, position in zip(forced.split(1), _positions_after(prompt, len(forced)).split(1), strict=True):
            logits.append(bound.step(token, position, place))
        return torch.stack(logits), place.n_bytes
    finally:
        place.close()


def _positions_after(prompt: Prompt, n: int) -> torch.Tensor:
    return prompt.next_position + torch.arange(n, device=prompt.positions.device)


def report(
    checkpoints: Sequence[str],
    lengths: Sequence[int],
    steps: int,
    device: str | None,
    dtype: str,
    *,
    repeats: int = 10,
    on_rows: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """One row a checkpoint, length and engine: error, and where it is within twice Transformers' own, times, ratios and floors.

    on_rows is called with all rows so far after each length.
    """
    rows: list[Row] = []
    for name in checkpoints:
        lab = Lab(name, device=device, dtype=dtype)
        engines = variants(lab.device, lab.dtype)
        matmul, copied = matmul_ceiling(lab.device, lab.dtype), copy_ceiling(lab.device)
        for length in lengths:
            found = check(lab, length, steps, engines)
            right = within_budget({label: checked.error for label, checked in found.items()}, STOCK, lab.dtype)
            good = {label: engine for label, engine in engines.items() if label in right}
            rounds = time_decoding(lab, length, good, steps=steps, repeats=repeats) if good else None
            read = decode_bytes(lab.checkpoint, length + (steps + 1) // 2)  # by the step in the middle
            for label, engine in engines.items():
                row: Row = {"checkpoint": name, "length": length, "steps": steps, "recipe": label, "settings": str(engine)}
                row |= {"device": device_name(lab.device), "dtype": dtype, "parity": label in good, **found[label]._asdict()}
                if rounds is not None and label in good:
                    recipe = lab.engine(engine).recipe
                    alone = recipe is not None and recipe.attention.last_layer == "last_token"
                    flops = prefill_flops(lab.checkpoint, length, last_token_alone=alone).total
                    row |= _timed(rounds, label, "prefill", flops / matmul) | _timed(rounds, label, "decode", read / copied)
                    row["tokens_per_second"] = 1e3 / row["decode_ms"]
                rows.append(row)
            on_rows(rows)
        del lab
    return rows


def _timed(rounds: Rounds, label: str, step: str, floor: float) -> Row:
    """A step's entries in a row; floor: seconds that the device's ceiling allows it at least."""
    seconds, ratio = rounds.median(label, step).median, rounds.ratio(label, STOCK, step)
    times = {"ms": seconds * 1e3, "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
    return {f"{step}_{key}": value for key, value in (times | {"floor_ms": floor * 1e3, "share": floor / seconds}).items()}


def text(rows: Sequence[Row]) -> str:
    """The rows as text, a block a checkpoint and length; matmul and copy: shares of those ceilings."""
    heads = f"{'prefill':>12}  {'ratio':<19}{'matmul':>7}  | {'a step':>11}{'tokens/s':>10}  {'ratio':<19}{'copy':>7}"

    def title(row: Row) -> str:
        place = f"{row['checkpoint']}, {row['length']} tokens and {row['steps']} steps, {row['device']} {row['dtype']}"
        return f"{place}\n  {'':<26} {heads}  | {'KV, MB':>9}    error"

    def line(row: Row) -> str:
        prefill, step = (f"  {_interval(row, of):<19}{row[f'{of}_share']:7.0%}" for of in ("prefill", "decode"))
        decode = f"{row['decode_ms']:8.3f} ms{row['tokens_per_second']:10.1f}{step}"
        return f"{row['prefill_ms']:9.3f} ms{prefill}  | {decode}  | {row['kv_bytes'] / 1e6:9.2f}  {row['error']:.1e}"

    return table(rows, title, line)


def _interval(row: Row, step: str) -> str:
    ratio, low, high = (row[f"{step}_{name}"] for name in ("ratio", "ratio_low", "ratio_high"))
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    command(report, text, full=FULL, tiny=TINY, about=__doc__, repeats=10, arguments=arguments)


if __name__ == "__main__":
    main()
