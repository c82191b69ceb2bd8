"""The decoder against the stock modules: every option, packed sequences, and geometries other than the built-in ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from covering import covering

from fastvl_lab import CheckpointError, Lab, Recipe, RecipeError, toggles
from fastvl_lab.cache import together
from fastvl_lab.cache.blocks import BlockPool
from fastvl_lab.cache.concat import ConcatSequence
from fastvl_lab.cache.slotted import KvShape, SlottedSequence
from fastvl_lab.catalogue import Attention, Target
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.decoder import bind_decoder
from fastvl_lab.decoder.layers import Decoder
from fastvl_lab.decoder.segments import Segments
from fastvl_lab.decoder.steps import decode, merge, prefill, sample
from fastvl_lab.decoder.weights import decoder_weights
from fastvl_lab.request import Prompt, VisionTokens

KINDS = ("concat", "static", "paged")
BLOCK = 4
CPU = torch.device("cpu")


def _inner(_: str) -> nullcontext[None]:
    return nullcontext()


class _Kv:
    """Some sequences in a cache of one kind, given what they need before every forward."""

    def __init__(self, kind: str, checkpoint: Checkpoint, n: int = 1, longest: int = 96) -> None:
        self.pool, self.tables = BlockPool(n * longest, BLOCK), []
        if kind == "concat":
            self.sequences: list[Any] = [ConcatSequence(checkpoint.config.text_config.num_hidden_layers) for _ in range(n)]
        else:
            store = KvShape.of(checkpoint).allocate(n * longest * BLOCK)
            for pair in store.layers:
                for side in pair:
                    side.fill_(float("nan"))  # nothing may be read that was not written
            self.sequences = [SlottedSequence(store, block_size=BLOCK, longest=longest) for _ in range(n)]
        if kind == "static":
            for number, sequence in enumerate(self.sequences):
                sequence.add_blocks(range(number * longest // BLOCK, (number + 1) * longest // BLOCK))
        elif kind == "paged":
            self.tables = [self.pool.admit([], longest) for _ in range(n)]
        self.kv = together(self.sequences)

    def extend(self, new: Sequence[int]) -> None:
        for sequence, table, n in zip(self.sequences, self.tables, new, strict=False):
            while len(table.blocks) * BLOCK < sequence.length + n:  # block by block in turn: no sequence lies in one piece
                sequence.add_blocks(self.pool.extend(table, len(table.blocks) * BLOCK + 1))
                self.pool.extend(self.pool.admit([], BLOCK), 1)
        self.kv.extend(new)


def _attention(**options: str) -> Iterator[Attention]:
    """Every combination of options that plain PyTorch can run on a CPU, or of those given."""
    values = {
        toggle.name: options.get(toggle.name, [o.value for o in toggle.options if o.needs.unmet(Target(device=CPU)) is None])
        for toggle in toggles()
        if toggle.slot == "attention"
    }
    for combination in itertools.product(*values.values()):
        yield Attention(**dict(zip(values, combination, strict=True)))


def _prompt(n_tokens: int, seed: int = 1, visual: Sequence[int] = (2, 3, 5)) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        input_ids=torch.randint(0, 256, (n_tokens,), generator=generator),
        positions=torch.randint(0, 900, (3, n_tokens), generator=generator),
        visual_index=torch.tensor([i for i in visual if i < n_tokens], dtype=torch.int64),
        next_position=901,
        images=(),
    )


def _vision(checkpoint: Checkpoint, n: int, seed: int = 2) -> VisionTokens:
    generator, width = torch.Generator().manual_seed(seed), checkpoint.config.text_config.hidden_size
    levels = 2 if checkpoint.name == "tiny-qwen3-vl" else 0
    features = [torch.randn(n, width, generator=generator) for _ in range(1 + levels)]
    return VisionTokens(embeds=features[0], deepstack=tuple(features[1:]))


def _stock(checkpoint: Checkpoint, prompt: Prompt, vision: VisionTokens, tokens: Sequence[int]) -> list[torch.Tensor]:
    """Logits of the prompt's last token, and after each of the tokens, by the stock modules."""
    text, head = checkpoint.model.model.language_model, checkpoint.model.lm_head
    embeds = text.embed_tokens(prompt.input_ids)
    embeds = embeds.index_copy(0, prompt.visual_index, vision.embeds)
    mask = torch.zeros(1, prompt.n_tokens, dtype=torch.bool)
    mask[0, prompt.visual_index] = True
    extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(vision.deepstack)} if vision.deepstack else {}
    out = text(inputs_embeds=embeds[None], position_ids=prompt.positions[:, None], use_cache=True, **extra)
    logits = [head(out.last_hidden_state[0, -1])]
    for number, token in enumerate(tokens):
        out = text(
            inputs_embeds=text.embed_tokens(torch.tensor([[token]])),
            position_ids=torch.full((3, 1, 1), prompt.next_position + number),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits.append(head(out.last_hidden_state[0, -1]))
    return logits


def _ours(decoder: Decoder, kv: _Kv, prompt: Prompt, vision: VisionTokens | None, tokens: Sequence[int]) -> list[torch.Tensor]:
    """The same by the lean decoder."""
    kv.extend([prompt.n_tokens])
    logits = [prefill(merge(prompt, vision, decoder.weights.embed), prompt, vision, decoder, kv.kv, _inner)[0]]
    for number, token in enumerate(tokens):
        kv.extend([1])
        position = torch.tensor([prompt.next_position + number])
        logits.append(decode(torch.tensor([token]), position, decoder, kv.kv, _inner)[0])
    return logits


GEOMETRIES = [
    ("tiny-qwen2.5-vl", {}),
    ("tiny-qwen2.5-vl", {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512, "tie_word_embeddings": False}),
    ("tiny-qwen2.5-vl", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 384, "num_hidden_layers": 1}),
    ("tiny-qwen3-vl", {}),
    ("tiny-qwen3-vl", {"head_dim": 64, "num_key_value_heads": 1, "num_hidden_layers": 6, "hidden_size": 192}),
    ("tiny-qwen3-vl", {"num_key_value_heads": 4, "tie_word_embeddings": False, "intermediate_size": 100}),
    ("tiny-qwen3-vl", {"num_hidden_layers": 2}),  # as many layers as DeepStack levels: the last one is needed for all tokens
]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["pairs", "every"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "changes"), GEOMETRIES)
@torch.inference_mode()
def test_combinations_of_options_equal_the_stock_decoder(
    other_checkpoint: Callable[..., Checkpoint], name: str, changes: dict, kind: str, every: bool
) -> None:
    """Random M-RoPE positions, visual tokens in the prompt, DeepStack where the family has it; then tokens on top.

    Every two options that go together, and every combination by night.
    """
    checkpoint, tokens = other_checkpoint(name, **changes), (7, 250, 31)
    prompt, vision = _prompt(40), _vision(checkpoint, 3)
    expected, weights = _stock(checkpoint, prompt, vision, tokens), decoder_weights(checkpoint)
    given = {} if not changes else {"prefill": ["sdpa"], "norms": ["eager", "by_length"]}
    packed = _attention(weights=["packed"], prefill=["sdpa"], norms=["eager"], rope=["rolled"])  # meets `projections` alone
    combinations = [*_attention(weights=["plain"], **given), *packed]
    assert len(combinations) >= 16
    for slot in combinations if every else [Attention(**row) for row in covering([dataclasses.asdict(s) for s in combinations])]:
        ours = _ours(bind_decoder(slot, weights), _Kv(kind, checkpoint), prompt, vision, tokens)
        for step, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert (one - other).abs().max() < 1e-4, (slot, step)


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 17])
@torch.inference_mode()
def test_the_shortest_prompts(other_checkpoint: Callable[..., Checkpoint], n_tokens: int) -> None:
    for name in ("tiny-qwen2.5-vl", "tiny-qwen3-vl"):
        checkpoint = other_checkpoint(name)
        prompt, vision = _prompt(n_tokens, visual=()), _vision(checkpoint, 0)
        expected = _stock(checkpoint, prompt, VisionTokens(embeds=vision.embeds), (9, 8))
        for slot in _attention(norms=["eager"], rope=["rolled"], projections=["fused"]):
            ours = _ours(bind_decoder(slot, decoder_weights(checkpoint)), _Kv("paged", checkpoint), prompt, None, (9, 8))
            assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) < 1e-4


TRITON = {"norms": ["fused"], "rope": ["fused"], "activation": ["fused"], "argmax": ["fused"], "weights": ["plain"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@pytest.mark.parametrize(
    ("kind", "projections", "last_layer"), [("static", "fused", "last_token"), ("paged", "separate", "all_tokens")]
)
@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl"])
@torch.inference_mode()
def test_the_triton_options_equal_the_stock_decoder(
    other_checkpoint: Callable[..., Checkpoint], name: str, kind: str, projections: str, last_layer: str
) -> None:
    checkpoint, tokens = other_checkpoint(name, num_hidden_layers=3), (7, 250)
    prompt, vision = _prompt(11), _vision(checkpoint, 3)
    expected, weights = _stock(checkpoint, prompt, vision, tokens), decoder_weights(checkpoint)
    (slot,) = _attention(**TRITON, prefill=["triton"], decode=["triton"], projections=[projections], last_layer=[last_layer])
    decoder = bind_decoder(slot, weights)
    ours = _ours(decoder, _Kv(kind, checkpoint), prompt, vision, tokens)
    assert max((a - b).abs().max() for a, b in zip(ours, expected, strict=True)) < 1e-4
    assert sample(torch.stack(ours), decoder).tolist() == [int(logits.argmax()) for logits in expected]


PACKED = [
    Attention(),
    Attention(prefill="sdpa", decode="sdpa", last_layer="last_token", projections="fused", norms="by_length", rope="rolled"),
    *_attention(**TRITON, prefill=["triton"], decode=["triton"], projections=["fused"], last_layer=["last_token"]),
]


def _packed_cases() -> Iterator[Any]:
    """Every slot and kind of cache in both families; of Triton's, which take its interpreter seconds, by day a kind a family."""
    slots = dict(zip(("eager", "fast", "triton"), PACKED, strict=True))
    for name, (label, slot), kind in itertools.product(("tiny-qwen2.5-vl", "tiny-qwen3-vl"), slots.items(), KINDS):
        by_day = label != "triton" or (name, kind) in (("tiny-qwen2.5-vl", "static"), ("tiny-qwen3-vl", "paged"))
        if label != "triton" or kind != "concat":  # Triton's kernels read slots
            yield pytest.param(name, slot, kind, marks=() if by_day else pytest.mark.nightly, id=f"{name}-{label}-{kind}")


@pytest.mark.parametrize(("name", "slot", "kind"), list(_packed_cases()))
@torch.inference_mode()
def test_packed_sequences_do_not_see_each_other(
    other_checkpoint: Callable[..., Checkpoint], name: str, slot: Attention, kind: str
) -> None:
    """Three prompts at once, then another piece of each on top, then steps of all three, against each alone."""
    if slot.prefill == "triton" and torch.cuda.is_available():
        pytest.skip("runs the kernels in Triton's interpreter")
    checkpoint = other_checkpoint(name, num_hidden_layers=2)
    decoder, lengths = bind_decoder(slot, decoder_weights(checkpoint)), (5, 9, 1)
    wholes = [_prompt(n + 6, seed=n, visual=()) for n in lengths]
    alone = []
    for whole in wholes:
        (last,) = _ours(decoder, _Kv(kind, checkpoint), whole, None, ())
        alone.append(last)

    kv = _Kv(kind, checkpoint, n=3)
    pieces = [
        ([0, 0, 0], list(lengths)),
        (list(lengths), [4, 4, 4]),
        ([n + 4 for n in lengths], [1] * 3),
        ([n + 5 for n in lengths], [1] * 3),
    ]
    for starts, new in pieces:
        cut = [slice(start, start + n) for start, n in zip(starts, new, strict=True)]
        ids = torch.cat([whole.input_ids[c] for whole, c in zip(wholes, cut, strict=True)])
        positions = torch.cat([whole.positions[:, c] for whole, c in zip(wholes, cut, strict=True)], dim=1)
        packed = Prompt(
            input_ids=ids, positions=positions, visual_index=torch.empty(0, dtype=torch.int64), next_position=0, images=()
        )
        kv.extend(new)
        logits = prefill(merge(packed, None, decoder.weights.embed), packed, None, decoder, kv.kv, _inner)
    assert logits.shape == (3, checkpoint.config.text_config.vocab_size)
    for ours, expected in zip(logits, alone, strict=True):
        assert (ours - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_decode_steps_of_packed_sequences(other_checkpoint: Callable[..., Checkpoint]) -> None:
    """`decode` takes one token of each sequence, at one position for all three axes."""
    checkpoint = other_checkpoint("tiny-qwen2.5-vl")
    for slot, kind in itertools.product(PACKED[:2], KINDS):
        decoder, kv = bind_decoder(slot, decoder_weights(checkpoint)), _Kv(kind, checkpoint, n=2)
        prompts = [_prompt(n, seed=n, visual=()) for n in (8, 11)]
        expected = [_ours(decoder, _Kv(kind, checkpoint), prompt, None, (5,))[1] for prompt in prompts]
        packed = Prompt(
            input_ids=torch.cat([p.input_ids for p in prompts]),
            positions=torch.cat([p.positions for p in prompts], dim=1),
            visual_index=torch.empty(0, dtype=torch.int64),
            next_position=0,
            images=(),
        )
        kv.extend([8, 11])
        prefill(merge(packed, None, decoder.weights.embed), packed, None, decoder, kv.kv, _inner)
        kv.extend([1, 1])
        logits = decode(torch.tensor([5, 5]), torch.tensor([901, 901]), decoder, kv.kv, _inner)
        assert (logits - torch.stack(expected)).abs().max() < 1e-4


def test_segments_count_rows_and_tokens() -> None:
    segments = Segments.of([3, 1, 2], [0, 7, 5])
    assert segments.starts == (0, 3, 4, 6)
    assert segments.lengths == (3, 8, 7)
    assert segments.last_rows == (2, 3, 5)


def test_rope_equals_the_stock_modules(lab: Lab) -> None:
    positions = torch.randint(0, 5000, (3, 33), generator=torch.Generator().manual_seed(0))
    stock, rope = lab.checkpoint.model.model.language_model.rotary_emb, decoder_weights(lab.checkpoint).rope
    cos, sin = stock(torch.zeros(1, dtype=torch.float32), positions[:, None])
    ours, halves = rope.cos_sin(positions, torch.float32), rope.halves(positions)
    for expected, whole, half in zip((cos[0], sin[0]), ours, halves, strict=True):
        assert torch.equal(whole, expected)
        assert torch.equal(torch.cat([half, half], dim=-1), expected)
    one = rope.halves(positions[:1])
    assert torch.equal(one[0], rope.halves(positions[:1].expand(3, -1))[0])


def test_merge_puts_visual_tokens_in_their_places_and_leaves_the_table_alone() -> None:
    table = torch.arange(12.0).reshape(6, 2)
    prompt = SimpleNamespace(input_ids=torch.tensor([1, 5, 5, 2]), visual_index=torch.tensor([1, 2]))
    merged = merge(prompt, VisionTokens(embeds=torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])), table)  # type: ignore[arg-type]
    assert merged.tolist() == [[2, 3], [-1, -2], [-3, -4], [4, 5]]
    assert torch.equal(table, torch.arange(12.0).reshape(6, 2))


def test_what_remains_of_a_prompt_behind_some_tokens() -> None:
    prompt = _prompt(8)
    rest = prompt.after(4)
    assert torch.equal(rest.input_ids, prompt.input_ids[4:])
    assert torch.equal(rest.positions, prompt.positions[:, 4:])
    assert rest.visual_index.tolist() == [1]  # of 2, 3 and 5
    assert rest.next_position == prompt.next_position
    assert prompt.after(0) is prompt


def test_the_decoder_copies_no_parameter(lab: Lab) -> None:
    weights, model = decoder_weights(lab.checkpoint), lab.checkpoint.model
    assert weights.embed is weights.lm_head.weight is model.lm_head.weight
    text, layer = model.model.language_model, weights.layers[0]
    fused = {id(layer.qkv.weight): text.layers[0].self_attn, id(layer.gate_up.weight): text.layers[0].mlp}
    assert len(fused) == 2
    before = layer.qkv.weight.clone()
    n_q = layer.q.weight.shape[0]
    assert torch.equal(before[:n_q], text.layers[0].self_attn.q_proj.weight)
    assert layer.qkv.weight.untyped_storage().data_ptr() == layer.k.weight.untyped_storage().data_ptr()
    assert layer.gate_up.weight.untyped_storage().data_ptr() == layer.up.weight.untyped_storage().data_ptr()


def test_fused_projections_take_no_more_memory_than_the_plain_model(lab: Lab) -> None:
    """Each storage counted once, against the parameters as published: within 1%."""
    model = lab.checkpoint.model
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    weights = decoder_weights(lab.checkpoint)
    for layer in weights.layers:
        for linear in (layer.qkv, layer.gate_up):
            storages[linear.weight.untyped_storage().data_ptr()] = linear.weight.untyped_storage().nbytes()
    plain = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    assert sum(storages.values()) <= 1.01 * plain


def test_geometries_without_code_are_refused(other_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = other_checkpoint("tiny-qwen2.5-vl")
    checkpoint.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(CheckpointError, match="sliding-window attention"):
        decoder_weights(checkpoint)
    checkpoint = other_checkpoint("tiny-qwen2.5-vl")
    checkpoint.model.model.language_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(CheckpointError, match="dynamic RoPE"):
        decoder_weights(checkpoint)
    checkpoint = other_checkpoint("tiny-qwen2.5-vl")
    checkpoint.config.text_config.hidden_act = "gelu"
    with pytest.raises(CheckpointError, match="hidden_act='gelu'"):
        decoder_weights(checkpoint)


@pytest.mark.parametrize(("toggle", "option"), [("decode", "triton"), ("prefill", "triton"), ("prefill", "varlen")])
@pytest.mark.parametrize("width", [132, 136, 60])
def test_heads_that_a_kernel_has_not_are_refused(
    other_checkpoint: Callable[..., Checkpoint], toggle: str, option: str, width: int
) -> None:
    checkpoint = other_checkpoint("tiny-qwen3-vl", head_dim=width)
    target = dataclasses.replace(checkpoint.target, device=torch.device("cuda"), dtype=torch.bfloat16)
    recipe = Recipe.baseline().choose(f"attention.{toggle}", option)
    why = (
        f"attention.{toggle}={option} cannot run here: it takes heads of a multiple of 8 up to 128, and the decoder's have {width}"
    )
    with pytest.raises(RecipeError, match=f"{why}; the choices here are 'eager', 'sdpa_efficient'"):
        recipe.check(target)
    recipe.check(dataclasses.replace(target, decoder_head_dim=128, tower_head_dim=1))
