"""The next token as a request asks for it: Transformers' own logits processors, in its `generate`'s order, then a draw.

All of it is launched after a step's program, on the logits that this gives out, so captured and compiled steps stay as they are.
Each request has a generator of its own and is chosen for by itself: its draws are the same whoever shares its step. Nothing here
waits for the device, so steps can be launched ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastvl_lab.sampling import Sampling


class CountPenalty:
    """OpenAI's frequency and presence penalties, as a logits processor: of tokens behind the first `n_prompt`."""

    def __init__(self, n_prompt: int, frequency: float, presence: float) -> None:
        self._n_prompt, self._frequency, self._presence = n_prompt, frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [1, n], scores float32 [1, vocab]."""
        made = input_ids[:, self._n_prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, made, torch.ones_like(made, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def count_penalties(sampling: Sampling, n_prompt: int) -> list[CountPenalty]:
    """The processors that Transformers does not have; `generate` puts such behind its own penalties, before its warpers."""
    penalties = (sampling.frequency_penalty, sampling.presence_penalty)
    return [CountPenalty(n_prompt, *penalties)] if any(penalties) else []


def processors(sampling: Sampling, n_prompt: int, ends: Sequence[int], device: torch.device) -> LogitsProcessorList:
    """What `generate` would do to logits (transformers/generation/utils.py, _get_logits_processor), in its order.

    n_prompt: tokens of the prompt. ends: ids that end the answer.
    """
    found = LogitsProcessorList()
    if sampling.logit_bias:
        found.append(SequenceBiasLogitsProcessor({(token,): by for token, by in sampling.logit_bias.items()}))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.min_tokens and ends:
        found.append(MinNewTokensLengthLogitsProcessor(n_prompt, sampling.min_tokens, list(ends), device=device))
    found += count_penalties(sampling, n_prompt)
    if not sampling.draws:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


class Grammar(Protocol):
    """What one answer must be."""

    def allowed(self, token: int | None) -> torch.Tensor | None:
        """Which tokens may follow its last one (None: the first): int32 [ceil(vocab / 32)] of bits, on the host; None: any."""


class Sampler:
    """Chooses the tokens of one answer, one call a token, in order.

    prompt: its ids, int64 [n_prompt] on the device. most: how many tokens the answer may have. ends: ids that end it. grammar: of
    which tokens is chosen; it must know the token before, for which the host then waits, while the device is at the step after it.
    """

    def __init__(
        self, sampling: Sampling, prompt: torch.Tensor, *, most: int, ends: Sequence[int], grammar: Grammar | None = None
    ) -> None:
        n_prompt, device = len(prompt), prompt.device
        self._processors = processors(sampling, n_prompt, ends, device)
        self._generator = _generator(sampling.seed, device) if sampling.draws else None
        self._ids = torch.cat([prompt, prompt.new_zeros(most)])[None]  # [1, n_prompt + most]
        self._n_known, self._n_made = n_prompt, 0
        self._allowed = None if grammar is None else Allowed(grammar, device)
        self._n_top = sampling.top_logprobs
        # Of each token its logprob, then those of the likeliest and their ids; page-locked, as the copy must not be waited for.
        self._told = torch.empty(most, 1 + 2 * self._n_top, pin_memory=device.type == "cuda") if sampling.logprobs else None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [1, vocab] to the next token, int64 [1] on the device."""
        among = logits if self._allowed is None else self._allowed.among(logits)
        scores = self._processors(self._ids[:, : self._n_known], among)
        token = scores.argmax(dim=-1) if self._generator is None else drawn(scores, self._generator)
        if self._told is not None:
            self._told[self._n_made].copy_(self._logprobs(logits, token), non_blocking=True)
        self._ids[0, self._n_known : self._n_known + 1] = token
        self._n_known += 1
        self._n_made += 1
        if self._allowed is not None:
            self._allowed.note(token)
        return token

    def logprobs(self, number: int, token: int) -> list[tuple[int, float]]:
        """Of the answer's token of that number, which the host has read; then of the likeliest in its place: ids and logprobs."""
        assert self._told is not None
        chosen, *others = self._told[number].tolist()
        top, ids = others[: self._n_top], others[self._n_top :]
        return [(token, chosen), *((int(one), logprob) for one, logprob in zip(ids, top, strict=True))]

    def _logprobs(self, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """float32 [1 + 2 * n_top]; float32 holds ids exactly, of which there are fewer than 2**24."""
        logprobs = logits[0].log_softmax(dim=-1)
        top = logprobs.topk(self._n_top)
        return torch.cat([logprobs[token], top.values, top.indices.to(logprobs.dtype)])


class Allowed:
    """The tokens that a grammar allows, as the device learns of them, and those that were chosen, as the host does."""

    def __init__(self, grammar: Grammar, device: torch.device) -> None:
        self._grammar, self._device = grammar, device
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        on_cuda = device.type == "cuda"
        self._last = torch.empty(1, dtype=torch.int64, pin_memory=on_cuda)
        self._arrived = torch.cuda.Event() if on_cuda else None
        self._is_first = True

    def among(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [1, vocab], minus infinity where a token may not be."""
        if self._arrived is not None and not self._is_first:
            self._arrived.synchronize()
        words = self._grammar.allowed(None if self._is_first else int(self._last))
        if words is None:
            return logits
        if self._arrived is not None:
            words = words.pin_memory().to(self._device, non_blocking=True)
        forbidden = (words[:, None] >> self._bits & 1).flatten()[: logits.shape[-1]] == 0
        return logits.masked_fill(forbidden, -torch.inf)

    def note(self, token: torch.Tensor) -> None:
        """The token that was chosen, int64 [1] on the device."""
        self._is_first = False
        self._last.copy_(token, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()


def drawn(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token of softmax(scores), float32 [B, vocab]: int64 [B]. The same as torch.multinomial draws.

    That waits for the device to see whether probabilities are numbers; logits that are none make a token that means nothing.
    """
    probabilities = scores.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(dim=-1)


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**64)
    return generator
