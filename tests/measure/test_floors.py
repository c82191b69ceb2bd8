"""What the decoder must cost at least, against what torch counts and what is in its tensors; ceilings on a clock of our own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvl_lab import Lab
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.measure import floors
from fastvl_lab.measure.floors import copy_ceiling, decode_bytes, matmul_ceiling, prefill_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [1, 50])
def test_operations_are_those_that_torch_counts_in_the_stock_decoder(lab: Lab, length: int) -> None:
    model, width = lab.checkpoint.model, lab.checkpoint.config.text_config.hidden_size
    embeds, positions = torch.zeros(1, length, width), torch.arange(length).expand(3, 1, -1)
    # Written out, attention is two batched products, of every query with every key.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model.lm_head(model.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state[:, -1:])
    counted = counter.get_flop_counts()["Global"]
    square = sum(n for op, n in counted.items() if "bmm" in str(op))
    flops = prefill_flops(lab.checkpoint, length)
    assert flops.linear == sum(counted.values()) - square
    assert flops.attention * 2 * length == square * (length + 1)  # the half that is causal, with the diagonal


def test_operations_by_hand(labs: dict[str, Lab]) -> None:
    """tiny-qwen2.5-vl: 4 layers, 4 heads and 1 key head of 64, widths 256 and 704, a vocabulary of 320."""
    checkpoint, layer, keys_values = labs["tiny-qwen2.5-vl"].checkpoint, 2 * 256 * 256 + 3 * 256 * 704, 2 * 256 * 64
    flops = prefill_flops(checkpoint, 3)
    assert flops.linear == 2 * (3 * 4 * (layer + keys_values) + 256 * 320)
    assert flops.attention == 4 * 4 * 4 * 64 * (1 + 2 + 3)
    alone = prefill_flops(checkpoint, 3, last_token_alone=True)
    assert alone.linear == 2 * (3 * 3 * layer + layer + 3 * 4 * keys_values + 256 * 320)
    assert alone.attention == 4 * 4 * 64 * (3 * (1 + 2 + 3) + 3)
    assert prefill_flops(checkpoint, 1, last_token_alone=True) == prefill_flops(checkpoint, 1)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
def test_bytes_are_those_of_the_tensors(labs: dict[str, Lab], other_checkpoint: Callable[..., Checkpoint], name: str) -> None:
    tied, untied = labs[name].checkpoint, other_checkpoint(name, tie_word_embeddings=False)
    config, text = tied.config.text_config, tied.model.model.language_model
    row, head_dim = config.hidden_size * 4, text.layers[0].self_attn.head_dim
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4
    assert decode_bytes(tied, 7) == sum(p.nbytes for p in text.parameters()) + row + 7 * a_token  # the table is the head
    assert decode_bytes(untied, 7) == decode_bytes(tied, 7)  # of two tables, one is read
    assert decode_bytes(other_checkpoint(name, dtype=torch.bfloat16), 7) * 2 == decode_bytes(tied, 7)


def test_ceilings_count_what_is_done_between_two_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(floors, "now", lambda device: next(ticks) / 4)
    assert copy_ceiling(CPU, n_bytes=4096) == 4 * 2 * 4096  # read and written
    assert matmul_ceiling(CPU, torch.float32, size=8) == 4 * 2 * 8**3  # a multiply and an add each


def test_a_copy_takes_time() -> None:
    assert 1e8 < copy_ceiling(CPU, n_bytes=2**26, repeats=3) < 1e13
