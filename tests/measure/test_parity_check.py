"""The one parity check: right engines pass in every dtype, wrong ones do not, and what is not finite is in parity with nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvl_lab import EndpointError, Lab, Recipe, Request, audit, compare, photo, toggles
from fastvl_lab.catalogue import Target
from fastvl_lab.checkpoint import tiny
from fastvl_lab.checkpoint.wider import in_wider_dtype
from fastvl_lab.decoder import eager, sdpa
from fastvl_lab.decoder.layers import KvCache
from fastvl_lab.decoder.rope import MRope
from fastvl_lab.measure.parity import Oracles, Parity, Truth, check, truth_along, within_budget
from fastvl_lab.measure.recipes import cannot_run
from fastvl_lab.measure.report import Case
from fastvl_lab.measure.tasks import text_tokens
from fastvl_lab.schedule import in_flight

TINY = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")


@pytest.fixture(scope="module", params=TINY)
def half(request: pytest.FixtureRequest) -> Lab:
    """A lab in bfloat16, on the CPU."""
    return Lab(request.param, device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def asked() -> Request:
    return Request(images=[photo("coffee", (201, 133))], prompt="What is this?", max_new_tokens=10, ignore_eos=True)


def _exact_recipes(target: Target) -> dict[str, Recipe]:
    """The presets, and every exact option that runs on a CPU, on top of the fastest recipe."""
    recipes = {"baseline": Recipe.baseline(), "fastest": Recipe.fastest(target)}
    for toggle in toggles():
        for option in toggle.options:
            compiled = option.value == "compile"  # tested by itself, and takes a minute
            if option.exact and not compiled and option.needs.unmet(Target(device=torch.device("cpu"))) is None:
                recipes[f"{toggle.path}={option.value}"] = Recipe.fastest(target).choose(toggle.path, option.value)
    return recipes


# By night all, and of the other family too, whose options test_parity.py holds to half precision's own error one by one.
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.nightly)], ids=["every second", "all"])
@pytest.mark.parametrize("half", [pytest.param(TINY[0], marks=pytest.mark.nightly), TINY[1]], indirect=True)
def test_in_half_precision_exact_recipes_are_green(half: Lab, asked: Request, every: int) -> None:
    """Also where near-ties have it choose other tokens."""
    oracles, other = Oracles(half, asked), []
    recipes = dict(itertools.islice(_exact_recipes(half.checkpoint.target).items(), 0, None, every))
    for label, recipe in {**recipes, "transformers": "transformers"}.items():
        if (reason := cannot_run(recipe, half.checkpoint.target)) is not None:
            assert "oneDNN" in reason  # this CPU's; whatever else runs in float32 runs in bfloat16
            continue
        run = half.run(asked, recipe)
        found = check(oracles, half.engine(recipe), [run], run.logits, "transformers")
        assert found.holds, (label, found.why)
        if found.other_from is not None:
            other.append(label)
    assert other, "no recipe has chosen other tokens: the test has lost its point"


@pytest.mark.parametrize("engine", ["baseline", "fastest", "baseline, vit.tower=lean"])
def test_in_half_precision_a_block_scaled_by_a_twentieth_is_red(half: Lab, asked: Request, engine: str) -> None:
    blocks, oracles = half.checkpoint.model.model.visual.blocks, Oracles(half, asked)
    base = oracles.of(half.engine(engine))
    oracles.run(base)
    oracles.truth(base, text_tokens(half, 8))  # before anything is wrong
    for block in (blocks[0], blocks[-1]):
        kept = [parameter.data.clone() for parameter in block.parameters()]
        try:
            for parameter in block.parameters():
                parameter.data.mul_(1.05)
            wrong = half.apart()
            run = wrong.run(asked, engine)
            found = check(_of(wrong, oracles), half.engine(engine), [run], run.logits, base)
        finally:
            for parameter, value in zip(block.parameters(), kept, strict=True):
                parameter.data.copy_(value)
        assert not found.holds
        assert "twice the error of transformers" in found.why
        assert found.error is not None
        assert found.budget is not None
        assert found.error > 1.5 * found.budget


def test_a_check_says_in_words_what_it_has_found() -> None:
    good = Parity(oracle="transformers", holds=True, by="logits", error=0.013, budget=0.02, other_from=16)
    assert good.says == "yes, 1.3× the dtype's own error"
    assert good.sentence == "within 1.3× of this dtype's own error, beside Transformers; tokens differ from number 17 on"
    pixels = Parity(oracle="transformers, preprocessor.resize=torch", holds=True, moved=0.01)
    assert (pixels.says, pixels.sentence) == ("yes, on its pixels", "same tokens as Transformers on this recipe's pixels")
    red = Parity(oracle="transformers", holds=False, why="its logits are not finite")
    assert (red.says, red.sentence) == ("NO", "its logits are not finite: its time is not compared")


def _of(lab: Lab, oracles: Oracles) -> Oracles:
    """The same answers about another lab."""
    other = Oracles(lab, oracles.request)
    other.__dict__.update(oracles.__dict__ | {"lab": lab})
    return other


def test_in_half_precision_a_token_that_is_not_nearly_the_best_is_red(half: Lab, asked: Request) -> None:
    """Whoever made it, and where the logits of the check itself are right."""
    oracles, run = Oracles(half, asked), half.run(asked, "fastest")
    worst = int(run.logits.argmin())
    for at in (0, 4, 9):
        wrong = dataclasses.replace(run, tokens=(*run.tokens[:at], worst, *run.tokens[at + 1 :]))
        found = check(oracles, half.engine("fastest"), [run, wrong], run.logits, "transformers")
        assert not found.holds
        assert "short of the best one's logit" in found.why
    assert found.other_from is not None


def test_in_float32_logits_count_beside_the_tokens(labs: dict[str, Lab], asked: Request) -> None:
    lab = labs["tiny-qwen3-vl"]
    oracles, run = Oracles(lab, asked), lab.run(asked, "baseline")
    assert check(oracles, Recipe.baseline(), [run], run.logits, "transformers").holds
    for off, holds in ((1e-6, True), (1e-2, False)):
        found = check(oracles, Recipe.baseline(), [run], run.logits + off, "transformers")
        assert found.holds == holds
        assert found.other_from is None
    assert "its logits differ from those of transformers by" in found.why
    other = dataclasses.replace(run, tokens=(*run.tokens[:3], 7, *run.tokens[4:]))
    found = check(oracles, Recipe.baseline(), [run, other], run.logits, "transformers")
    assert (found.holds, found.why, found.other_from) == (False, "its tokens differ from those of transformers", 3)
    shorter = dataclasses.replace(run, tokens=run.tokens[:-1])
    assert check(oracles, Recipe.baseline(), [shorter], run.logits, "transformers").other_from == 9


# What is not finite


def _broken(edit: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path, name: str) -> str:
    folder = tmp_path / "broken"
    shutil.copytree(tiny.folder(name), folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _set(end: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if key.endswith(end))
        weights[key] = torch.full_like(weights[key], value)

    return edit


@pytest.mark.parametrize(
    ("name", "end", "value", "dtype"),
    [
        ("tiny-qwen2.5-vl", "model.norm.weight", float("nan"), "float32"),
        ("tiny-qwen3-vl", "layers.0.self_attn.o_proj.weight", float("inf"), "float32"),
        ("tiny-qwen2.5-vl", "blocks.2.norm1.weight", float("nan"), "bfloat16"),
        ("tiny-qwen3-vl", "layers.2.mlp.down_proj.weight", 3e4, "float16"),  # finite, and too much for float16
    ],
)
def test_what_is_not_finite_is_in_parity_with_nothing(tmp_path: Path, name: str, end: str, value: float, dtype: str) -> None:
    lab = Lab(_broken(_set(end, value), tmp_path, name), device="cpu", dtype=dtype)
    asked = Request(images=[photo("coffee", (112, 84))], prompt="?", max_new_tokens=4, ignore_eos=True)
    compared = compare(lab, asked, {"stock": "transformers", "ours": "fastest"}, repeats=6)
    for engine in ("stock", "ours"):
        assert not compared.parity(engine)
        assert compared.checks[engine].why.endswith("logits are not finite")
    assert compared.speedup("ours") is None
    assert "no time is compared with stock: its logits are not finite" in compared.findings()[1]
    run = lab.run(asked, "fastest")
    assert not run.finite
    assert "its tokens mean nothing" in repr(run)
    audited = audit(run)
    assert not audited.ok
    assert "logits_not_finite" in {finding.verdict for finding in audited.findings}
    assert not type(run).from_record(json.loads(json.dumps(run.to_record()))).finite


# The truth


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_the_wider_model_is_a_converted_copy_that_holds_no_weights(name: str, dtype: str, asked: Request) -> None:
    lab = Lab(name, device="cpu", dtype=dtype)
    live, wide = lab.checkpoint.model, in_wider_dtype(lab.checkpoint)
    held = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in wide.model.parameters()}
    assert sum(held.values()) < 10_000
    whole = Lab(name, device="cpu", dtype=dtype).checkpoint.model.to(wide.dtype)
    tokens = text_tokens(lab, 5)
    truth = truth_along(lab, asked, "transformers", tokens)
    theirs = _by(dataclasses.replace(lab.checkpoint, model=whole, dtype=wide.dtype), lab, asked, tokens)
    assert truth.logits.dtype == wide.dtype
    assert torch.equal(truth.logits, theirs)
    assert all(parameter.dtype == lab.dtype for parameter in live.parameters())
    assert not [m for m in live.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert 0 < truth.own_error < (1e-5 if dtype == "float32" else 0.1)


def _by(checkpoint: object, lab: Lab, asked: Request, tokens: tuple[int, ...]) -> torch.Tensor:
    from fastvl_lab.peer.transformers import TransformersPeer

    peer = TransformersPeer(checkpoint)  # type: ignore[arg-type]
    return lab.compute(lambda: peer.logits_along(asked, torch.tensor(tokens)))


def test_a_shortfall_is_what_the_worst_token_lacks(labs: dict[str, Lab], asked: Request) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 4.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    truth = Truth(request=asked, oracle="transformers", tokens=(1, 2), logits=logits, own_error=0.0, own_off=0.0)
    assert truth.shortfall() == 0.5
    lab = labs["tiny-qwen2.5-vl"]
    assert truth_along(lab, asked, "transformers", lab.run(asked, "transformers").tokens).shortfall() == 0.0


def test_an_endpoint_shows_no_logits(labs: dict[str, Lab], asked: Request, served: str) -> None:
    with pytest.raises(EndpointError, match="shows no logits"):
        labs["tiny-qwen3-vl"].logits_along(asked, served, [1, 2])


@pytest.fixture
def served() -> Iterator[str]:
    """An endpoint that lists a model, and does nothing else."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"data": [{"id": "m"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_budget_is_twice_the_references_error_and_rounding() -> None:
    found: dict[str, float | str] = {"stock": 0.01, "a": 0.02, "b": 0.02 + 2e-2, "c": float("nan"), "d": "RuntimeError: no"}
    assert within_budget(found, "stock", torch.bfloat16) == {"stock", "a"}
    assert within_budget({**found, "stock": "failed"}, "stock", torch.bfloat16) == frozenset()


# Along forced steps

STEPS = 3


@pytest.fixture
def truth(lab: Lab) -> Truth:
    request = Case.of("main", 112, 84, {}).request
    return truth_along(lab, request, "transformers", text_tokens(lab, STEPS))


def _within(lab: Lab, truth: Truth, recipe: str) -> bool:
    error = truth.error(lab.apart().logits_along(truth.request, recipe, truth.tokens))  # bound anew, to what is there now
    return "ours" in within_budget({"stock": truth.own_error, "ours": error}, "stock", lab.dtype)


def test_the_truth_is_stock_generate_in_a_wider_dtype_whatever_its_own_tokens(lab: Lab, truth: Truth) -> None:
    run = lab.run(truth.request, "transformers")
    assert truth.logits.dtype == torch.float64
    assert truth.logits.shape == (1 + STEPS, lab.checkpoint.config.text_config.vocab_size)
    assert (truth.logits[0] - run.logits).abs().max() < 1e-4
    assert truth.tokens != run.tokens[:STEPS]
    kept: list[torch.Tensor] = []

    def prefer(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        """`generate` step by step, made to go on with the truth's tokens."""
        kept.append(logits[0, -1].clone())
        forced = torch.full_like(logits, -torch.inf)
        forced[..., truth.tokens[min(len(kept), STEPS) - 1]] = 0.0
        return forced

    handle = lab.checkpoint.model.lm_head.register_forward_hook(prefer)
    try:
        request = dataclasses.replace(truth.request, max_new_tokens=1 + STEPS, ignore_eos=True)
        assert lab.run(request, "transformers").tokens[:STEPS] == truth.tokens
    finally:
        handle.remove()
    assert (truth.logits - torch.stack(kept)).abs().max() < 1e-4


def test_every_engine_goes_on_with_the_text_tokens(lab: Lab, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.parse("fastest, preprocessor.resize=pillow")  # the truth's pixels
    right = lab.logits_along(truth.request, recipe, truth.tokens)
    assert truth.error(right) < 1e-5
    monkeypatch.setattr(in_flight.InFlight, "choose", lambda self, step: torch.zeros(1, dtype=torch.int64))  # its own are ignored
    assert torch.equal(lab.logits_along(truth.request, recipe, truth.tokens), right)
    in_rounds = lab.logits_along(truth.request, recipe.replace("streaming.steps_per_round", 16), truth.tokens)
    assert in_rounds.shape == right.shape
    assert truth.error(in_rounds) < 1e-5


def test_an_engine_that_is_wrong_in_one_step_is_not_within_the_budget(
    lab: Lab, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _within(lab, truth, "baseline")
    assert _within(lab, truth, "baseline, attention.decode=sdpa")

    def blind(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        keys, values = cache.read(layer, 0)
        return eager._attend(q, keys[:-1], values[:-1], None)

    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", blind)
        assert not _within(lab, truth, "baseline, attention.decode=sdpa")

    halves = MRope.halves
    with monkeypatch.context() as patch:  # right for text, whose three axes agree
        patch.setattr(MRope, "halves", lambda rope, positions: halves(rope, positions[:1]))
        assert not _within(lab, truth, "baseline, attention.rope=rolled")

    def not_a_number(q: torch.Tensor, cache: KvCache, layer: int) -> torch.Tensor:
        last = cache.segments.lengths[0] == lab_length + STEPS
        return eager.decode(q, cache, layer) * (float("nan") if last else 1.0)

    lab_length = lab.run(truth.request).n_prompt
    with monkeypatch.context() as patch:
        patch.setattr(sdpa, "decode", not_a_number)
        assert not _within(lab, truth, "baseline, attention.decode=sdpa")
