"""torch.nn.functional.scaled_dot_product_attention. On CUDA an option names the kernel that it runs on; a CPU has one fused kernel.

Left to itself torch prefers cuDNN on Hopper and Blackwell, which makes a plan for every new shape: one for every decode step, one
for every length of a prompt (`check_prefer_cudnn_attention` in ATen's sdp_utils.cpp).
Shape letters: N new tokens, L tokens of the sequence, H heads, K key heads, G queries that share a key head, D head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import causal_lower_right

from fastvl_lab.decoder.layers import Attend, KvCache, once_a_forward
from fastvl_lab.decoder.segments import Segments

# An option of the catalogue -> the kernel that it names. "sdpa" is a CPU's, where there is no choice.
BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}

Mask = dict[str, Any]


def bind_prefill(option: str) -> Attend:
    """Causal attention by an option's kernel."""
    backend = BACKENDS[option]
    # The memory-efficient kernel knows no grouped heads, and torch would fall to the one that keeps all scores; a view helps.
    grouped = backend != SDPBackend.EFFICIENT_ATTENTION
    # It and flash know the causal mask of the last queries alone; the others are given it as a tensor.
    in_memory = backend not in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION)
    masks_of = once_a_forward(partial(_masks, in_memory=in_memory))
    return lambda q, cache, layer: prefill(q, cache, layer, masks_of(cache, q.device), grouped=grouped)


def prefill(q: torch.Tensor, cache: KvCache, layer: int, masks: list[Mask], *, grouped: bool) -> torch.Tensor:
    """A call a sequence. grouped: whether the kernel takes fewer key heads than heads.

    Where it does not, a key head and the queries that share it stand as one batch, over which the keys are a view.
    """
    parts = []
    for number, q_NHD in enumerate(q.split(cache.segments.new)):
        k_KLD, v_KLD = (x.transpose(0, 1) for x in cache.read(layer, number))
        q_HND = q_NHD.transpose(0, 1)
        if cache.segments.lengths[number] == 1:  # its one value is the answer, of which cuDNN has no kernel
            out = v_KLD.repeat_interleave(len(q_HND) // len(v_KLD), dim=0)
        elif grouped:
            shared = len(q_HND) != len(k_KLD)
            out = F.scaled_dot_product_attention(q_HND[None], k_KLD[None], v_KLD[None], enable_gqa=shared, **masks[number])
        else:
            q_KGND = q_HND.unflatten(0, (len(k_KLD), -1))
            k_KGLD, v_KGLD = (x[:, None].expand(-1, q_KGND.shape[1], -1, -1) for x in (k_KLD, v_KLD))
            out = F.scaled_dot_product_attention(q_KGND, k_KGLD, v_KGLD, **masks[number])
        parts.append(out.reshape(q_HND.shape).transpose(0, 1))  # kernels lay their results out as they like
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _masks(segments: Segments, device: torch.device, *, in_memory: bool) -> list[Mask]:
    """How each sequence's new tokens are kept from the later ones, without a tensor where the kernel knows the pattern."""
    masks: list[Mask] = []
    for new, before, length in zip(segments.new, segments.before, segments.lengths, strict=True):
        if before == 0:
            masks.append({"is_causal": True})  # which lets the first query see the first key alone
        elif in_memory or torch.compiler.is_compiling():  # torch.compile does not know the mask that is no tensor
            masks.append({"attn_mask": torch.ones(new, length, dtype=torch.bool, device=device).tril(before)})
        else:
            masks.append({"attn_mask": causal_lower_right(new, length)})
    return masks


def decode(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
    """One query a sequence against all of its keys; one call for all sequences whose keys are read to one width.

    The queries that share a key head stand as rows of one head: they need no causal mask, and keys are read once a group.
    """
    biases = _biases(cache, q.dtype)
    if len(q) == 1:
        k_LKD, v_LKD = cache.read(layer, 0)
        return _call(q, k_LKD[None], v_LKD[None], biases)
    read = [cache.read(layer, number) for number in range(len(q))]
    if biases is not None:
        k_BLKD, v_BLKD = (torch.stack(x) for x in zip(*read, strict=True))
        return _call(q, k_BLKD, v_BLKD, biases)
    return torch.cat([_call(q_1HD, k[None], v[None], None) for q_1HD, (k, v) in zip(q.split(1), read, strict=True)])


def _call(q_BHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor, biases: torch.Tensor | None) -> torch.Tensor:
    k_BKLD, v_BKLD = k_BLKD.transpose(1, 2), v_BLKD.transpose(1, 2)
    q_BKGD = q_BHD.view(len(q_BHD), k_BKLD.shape[1], -1, q_BHD.shape[2])
    bias = None if biases is None else biases.expand(-1, -1, q_BKGD.shape[2], -1)
    return F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, attn_mask=bias).reshape(q_BHD.shape)


def _biases(cache: KvCache, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to scores [B, 1, 1, L], made once a step: of a mask of bools every kernel would make it anew in every layer."""
    if cache.visible is None:
        return None
    if _biases not in cache.made:
        biases = torch.zeros_like(cache.visible, dtype=dtype).masked_fill_(~cache.visible, float("-inf"))
        cache.made[_biases] = biases[:, None, None]
    made: torch.Tensor = cache.made[_biases]
    return made
