"""The caches under real requests: what may be shared and what never is, what the budget holds, and that everything comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastvl_lab import CheckpointError, DeviceError, Lab, Recipe, Request, RequestError, Run, photo
from fastvl_lab.cache import memory
from fastvl_lab.cache.concat import ConcatKv, ConcatSequence
from fastvl_lab.cache.images import ImageStore, image_digest
from fastvl_lab.cache.memory import least_budget
from fastvl_lab.cache.slotted import KvShape, KvStore, SlottedKv, SlottedSequence
from fastvl_lab.measure.samples import Interval, median_interval
from fastvl_lab.request import VisionTokens
from fastvl_lab.trace import Tracer

IMAGES, PREFIX = "cache.image_reuse=on", "cache.kv=paged, cache.prefix_reuse=on"
REUSE = {"images": f"fastest, {IMAGES}", "prefix": f"fastest, {PREFIX}", "both": f"fastest, {PREFIX}, {IMAGES}"}
TINY = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")


@pytest.fixture(params=TINY)
def fresh(request: pytest.FixtureRequest) -> Lab:
    """A lab whose caches nothing was put into."""
    return Lab(request.param, device="cpu", dtype="float32", session_len=4096)


def _request(*images: bytes, prompt: str = "What is this?", tokens: int = 8, **limits: int) -> Request:
    return Request(images=list(images), prompt=prompt, max_new_tokens=tokens, ignore_eos=True, **limits)


def _found(run: Run) -> tuple[int, int]:
    counts = run.trace.counts
    return counts.get("cache: prefix tokens found", 0), counts.get("cache: images found", 0)


def _expected(lab: Lab, request: Request) -> tuple[int, ...]:
    recipe = Recipe.fastest()
    return lab.run(request, recipe.oracle(lab.checkpoint.image_backend)).tokens


FIRST, SECOND = photo("coffee", (224, 168)), photo("rocket", (224, 168))


@pytest.mark.parametrize("kind", REUSE)
def test_a_repeated_request_is_a_hit_with_the_same_answer(fresh: Lab, kind: str) -> None:
    request = _request(FIRST, SECOND, tokens=64)
    expected = _expected(fresh, request)
    first, second = (fresh.run(request, REUSE[kind]) for _ in range(2))
    assert first.kind == "cold"
    assert second.kind == "cache_hit"
    assert first.tokens == second.tokens == expected
    assert (first.logits - second.logits).abs().max() < 1e-4
    assert _found(first) == (0, 0)
    prefix, images = _found(second)
    assert prefix == (second.n_prompt - 1 if kind != "images" else 0)
    assert images == (2 if kind == "images" else 0)  # where the prefix holds them, they are not even looked for
    stages = set(second.trace.stages())
    assert ("vit" in stages, "preprocess" in stages) == (False, False)
    assert second.shapes == first.shapes


def test_bytes_that_were_found_are_in_the_trace(fresh: Lab) -> None:
    request, shape = _request(FIRST), KvShape.of(fresh.checkpoint)
    runs = [fresh.run(request, REUSE["prefix"]) for _ in range(2)]
    counts = runs[1].trace.counts
    assert counts["cache: prefix tokens found"] >= runs[1].n_prompt // 16 * 16  # all blocks that the first run had filled
    assert counts["cache: prefix bytes found"] == counts["cache: prefix tokens found"] * shape.bytes_per_token
    assert "counted: cache: prefix tokens found" in repr(runs[1])
    runs = [fresh.run(request, REUSE["images"]) for _ in range(2)]
    levels = 1 + len(getattr(fresh.checkpoint.config.vision_config, "deepstack_visual_indexes", ()))
    width = fresh.checkpoint.config.text_config.hidden_size
    assert runs[1].trace.counts["cache: image bytes found"] == runs[1].visual_tokens * width * 4 * levels


@pytest.mark.parametrize("kind", REUSE)
def test_other_limits_other_pixels_and_other_places_share_nothing_they_must_not(fresh: Lab, kind: str) -> None:
    """All of them on one lab, in turn: each answer is Transformers' own."""
    same_size = photo("astronaut", (224, 168))
    requests = {
        "first": _request(FIRST, SECOND),
        "smaller limits": _request(FIRST, SECOND, max_pixels=28 * 28 * 12, min_pixels=28 * 28),
        "another picture of the size": _request(same_size, SECOND),
        "the other way round": _request(SECOND, FIRST),
        "one of them": _request(SECOND),
        "in the last place": _request(FIRST, same_size, SECOND),
        "first again": _request(FIRST, SECOND),
    }
    runs = {name: fresh.run(request, REUSE[kind]) for name, request in requests.items()}
    for name, request in requests.items():
        assert runs[name].tokens == _expected(fresh, request), name
    header = runs["one of them"].n_prompt - runs["one of them"].visual_tokens  # all text there is; no image is found in front of it
    assert _found(runs["smaller limits"])[1] == 0
    for name in ("smaller limits", "another picture of the size", "the other way round"):
        assert _found(runs[name])[0] < header, name
    if kind == "images":  # visual tokens do not depend on where the image stands
        assert [_found(runs[name])[1] for name in requests] == [0, 0, 1, 2, 1, 3, 2]
    else:
        assert _found(runs["in the last place"])[0] >= runs["first"].shapes[0].visual_tokens
        assert _found(runs["first again"])[0] == runs["first"].n_prompt - 1


def test_another_question_about_an_image_computes_none_of_its_tokens_again(fresh: Lab) -> None:
    """The image ends within a block: its part is copied."""
    for prompt in ("What is this?", "Where is it? And whose?"):
        run = fresh.run(_request(FIRST, prompt=prompt), REUSE["prefix"])
    assert _found(run)[0] >= run.visual_tokens
    assert "vit" not in run.trace.stages()
    assert run.tokens == _expected(fresh, _request(FIRST, prompt="Where is it? And whose?"))


def test_an_image_found_in_part_is_made_again_and_its_rest_used(fresh: Lab) -> None:
    """The end of a sequence is evicted first, here in the middle of an image."""
    request = _request(FIRST, tokens=1)
    first = fresh.run(request, REUSE["prefix"])
    pool = fresh.memory.paged.pool
    holder = pool.admit([], (pool.n_blocks - 2) * 16)
    pool.extend(holder, (pool.n_blocks - 2) * 16)  # all but the first two blocks of the request
    pool.free(holder)
    again = fresh.run(request, REUSE["prefix"])
    assert 0 < _found(again)[0] < first.visual_tokens
    assert "vit" in again.trace.stages()
    assert (again.logits - first.logits).abs().max() < 1e-4
    assert again.tokens == first.tokens


def test_recipes_and_labs_do_not_share(fresh: Lab) -> None:
    """Another recipe rounds differently, another checkpoint knows other things."""
    request = _request(FIRST)
    for kind in ("images", "prefix"):
        fresh.run(request, REUSE[kind])
        other = Recipe.parse(REUSE[kind]).replace("vit.norms", "eager")
        assert _found(fresh.run(request, other)) == (0, 0)
    elsewhere = Lab(next(name for name in TINY if name != fresh.checkpoint.name), device="cpu", dtype="float32", session_len=4096)
    assert _found(elsewhere.run(request, REUSE["both"])) == (0, 0)
    assert elsewhere.run(request, REUSE["both"]).tokens == _expected(elsewhere, request)


def test_pictures_without_encoded_bytes_are_known_by_their_pixels(fresh: Lab) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (84, 112, 3), dtype=torch.uint8).numpy()
    requests = [
        Request(images=[array], prompt="?", max_new_tokens=2, ignore_eos=True)
        for array in (pixels, pixels.copy(), pixels[::-1].copy(), pixels.reshape(112, 84, 3))
    ]
    runs = [fresh.run(request, REUSE["images"]) for request in requests]
    assert [_found(run)[1] for run in runs] == [0, 1, 0, 0]


def test_answers_stay_right_when_the_caches_are_full(fresh: Lab) -> None:
    """A pool of a few requests and an image store of a few images: everything is evicted again and again."""
    request = _request(FIRST, tokens=4)
    n_prompt = fresh.run(request).n_prompt
    small = Lab(fresh.checkpoint.name, device="cpu", dtype="float32", session_len=n_prompt + 100)
    small.memory.images.max_bytes = 300_000
    pictures = [photo(name, (224, 168 + 28 * more)) for name in ("coffee", "rocket", "astronaut", "cat") for more in (0, 1)]
    expected = {}
    for number in range(24):
        picture = pictures[number * 5 % len(pictures)]
        asked = _request(picture, prompt=f"Number {number % 3}?", tokens=6)
        run = small.run(asked, REUSE["both"])
        key = (picture, number % 3)
        expected.setdefault(key, fresh.run(asked, "fastest").tokens)
        assert run.tokens == expected[key]
        assert small.memory.n_bytes <= small.memory.budget
        assert small.memory.images.n_bytes <= 300_000
        assert small.memory.paged.pool.n_used == 0


@pytest.mark.parametrize("steps", [500, pytest.param(2000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("name", "kind"), [(TINY[0], "static"), (TINY[1], "paged")])
def test_many_steps_leave_memory_as_it_was(shallow_labs: dict[str, Lab], name: str, kind: str, steps: int) -> None:
    fresh = shallow_labs[name].apart()
    recipe = Recipe.parse(f"fastest, cache.kv={kind}")
    fresh.run(Request(prompt="Count.", max_new_tokens=3, ignore_eos=True), recipe)
    held, allocated = fresh.memory.n_bytes, []

    def address() -> int:
        return (fresh.memory.static if kind == "static" else fresh.memory.paged.store).layers[0][0].data_ptr()

    allocated.append(address())
    run = fresh.run(Request(prompt="Count.", max_new_tokens=steps + 1, ignore_eos=True), recipe)
    allocated.append(address())
    assert len(run.tokens) == steps + 1
    assert fresh.memory.n_bytes == held
    assert allocated[0] == allocated[1]
    if kind == "paged":
        assert fresh.memory.paged.pool.n_used == 0


def test_an_over_long_request_is_refused_before_a_pixel_is_read(fresh: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(fresh.checkpoint.name, device="cpu", dtype="float32", session_len=64)
    read = []
    monkeypatch.setattr("fastvl_lab.preprocessor.decode_image.with_pillow", lambda *a: read.append(a))
    monkeypatch.setattr("fastvl_lab.preprocessor.decode_image.with_turbojpeg", lambda *a: read.append(a))
    small = photo("coffee", (112, 84))
    limits = {"min_pixels": 1024, "max_pixels": 112 * 84}
    for engine in ("baseline", "fastest", REUSE["both"]):
        with pytest.raises(RequestError, match=r"max_new_tokens is 64: together over session_len, 64 \(the model's own limit is"):
            lab.run(_request(small, tokens=64, **limits), engine)
        with pytest.raises(RequestError, match=r"the images alone have \d+ visual tokens, over session_len, 64 tokens"):
            lab.run(_request(photo("coffee", (448, 448))), engine)
    assert read == []


def test_the_budget_is_divided_and_kept(fresh: Lab) -> None:
    shape = KvShape.of(fresh.checkpoint)
    least = least_budget(shape, 512)
    lab = Lab(fresh.checkpoint.name, device="cpu", dtype="float32", session_len=512, memory_budget=3 * least)
    for engine in ("fastest", REUSE["both"], REUSE["images"]):
        lab.run(_request(FIRST), engine)
    assert lab.memory.budget == 3 * least
    assert 2 * 512 * shape.bytes_per_token < lab.memory.n_bytes <= lab.memory.budget
    assert lab.memory.paged.pool.n_blocks * 16 > 3 * 512  # all that is left is blocks
    with pytest.raises(
        DeviceError, match=rf"memory_budget is {least - 1} bytes .* a session_len of 512 tokens needs at least {least}"
    ):
        Lab(fresh.checkpoint.name, device="cpu", dtype="float32", session_len=512, memory_budget=least - 1)


def test_the_default_session_leaves_room_for_what_computes_and_for_graphs(fresh: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KvShape.of(fresh.checkpoint)
    for free, reserved, expected in (
        (2 * least_budget(shape, 32_768), 0, 32_768),
        (2 * least_budget(shape, 32_768) - 1, 0, 16_384),
        (2 * least_budget(shape, 32_768), 1_000_000, 16_384),
        (2 * least_budget(shape, 4_096) + 5_000_000, 5_000_000, 4_096),
        (0, 5_000_000, 1_024),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda _, free=free: free)
        assert memory.default_session_len(fresh.checkpoint, reserved=reserved) == expected


@pytest.mark.parametrize(("what", "value"), [("session_len", 0), ("session_len", "many"), ("memory_budget", -5)])
def test_sizes_that_are_no_sizes_are_refused(what: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{what} is {value!r}"):
        Lab(TINY[0], device="cpu", **{what: value})  # type: ignore[arg-type]


def test_a_session_longer_than_the_model_attends_to_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"session_len is 200000; .* attends to 128000 tokens"):
        Lab(TINY[0], device="cpu", session_len=200_000)


def test_room_comes_back_from_requests_that_fail_or_are_left(fresh: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, request = REUSE["both"], _request(FIRST, tokens=200)
    pool = fresh.memory.paged.pool
    stream = fresh.stream(request, recipe)
    next(stream)
    assert pool.n_used > 0
    stream.close()
    assert (pool.n_used, pool.n_available) == (0, pool.n_blocks)

    engine = fresh._bind(fresh.engine(recipe)).stages  # type: ignore[attr-defined]
    for stage in ("encode", "prefill", "decode"):

        def fail(*_: object) -> None:
            raise KeyError("broken on its way")

        with monkeypatch.context() as patched:
            patched.setattr(engine, stage, fail)
            with pytest.raises(KeyError):
                fresh.run(_request(photo("cat", (224, 168)), prompt=stage), recipe)
        assert (pool.n_used, pool.n_available) == (0, pool.n_blocks)
    assert fresh.run(request, recipe).tokens == fresh.run(request, "fastest").tokens


@pytest.mark.benchmark
@pytest.mark.parametrize("name", TINY)
def test_a_second_turn_on_an_image_has_a_quarter_of_the_first_ones_ttft(
    name: str, assert_reaches: Callable[[Callable[[], Interval], float], None]
) -> None:
    lab = Lab(name, device="cpu", dtype="float32", session_len=8192)
    recipe, picture = Recipe.parse(REUSE["prefix"]), photo("coffee", (640, 480))
    numbers = iter(range(1000))

    def measure() -> Interval:
        ratios = []
        for _ in range(7):
            # A system prompt of its own, so that nothing is found of the conversations before.
            messages: list[dict] = [
                {"role": "system", "content": f"{next(numbers)}: answer briefly."},
                {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]},
            ]
            first = lab.run(Request(messages=messages, max_new_tokens=8, ignore_eos=True), recipe)
            messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And where?"}]
            asked = Request(messages=messages, max_new_tokens=8, ignore_eos=True)
            second = lab.run(asked, recipe)
            assert second.kind == "cache_hit"
            assert second.tokens == lab.run(asked, "fastest").tokens
            ratios.append(first.ttft / second.ttft)
        return median_interval(ratios[1:])

    assert_reaches(measure, 4.0)


def test_the_image_store_is_bounded_and_lets_the_oldest_go() -> None:
    store, vision = ImageStore(3 * 400), VisionTokens(embeds=torch.zeros(10, 10))
    for name in (b"a", b"b", b"c"):
        store.put(name, vision)
    assert store.get(b"a") is not None
    store.put(b"d", vision)
    assert [store.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    store.put(b"large", VisionTokens(embeds=torch.zeros(1000, 10)))
    assert (len(store), store.n_bytes) == (3, 1200)
    kept = store.get(b"a")
    assert kept is not None
    assert kept.vision.embeds.data_ptr() != vision.embeds.data_ptr()  # no view into a larger tensor


def test_digests_tell_apart_what_they_are_made_of() -> None:
    digests = {image_digest(*parts) for parts in (("a", "b", b"c"), ("ab", "", b"c"), ("a", "", b"bc"), ("a", "b", b"C"))}
    assert len(digests) == 4


def test_concat_holds_what_was_written() -> None:
    sequence, pieces = ConcatSequence(2), [torch.randn(n, 1, 4) for n in (5, 1, 1)]
    cache = ConcatKv([sequence])
    for piece in pieces:
        cache.extend([len(piece)])
        cache.write(1, piece, -piece)
    keys, values = cache.read(1, 0)
    assert torch.equal(keys, torch.cat(pieces))
    assert torch.equal(values, -torch.cat(pieces))
    assert sequence.n_bytes == 2 * 7 * 4 * 4


@pytest.mark.parametrize("blocks", [[2, 3, 4], [5, 1, 3]], ids=["in one piece", "scattered"])
def test_slots_hold_what_was_written_wherever_they_lie(blocks: list[int]) -> None:
    store = _shape(n_layers=2, n_kv_heads=1, head_dim=4).allocate(23)
    for side in _sides(store):
        side.fill_(float("nan"))
    sequence, pieces = SlottedSequence(store, block_size=4, longest=12), [torch.randn(n, 1, 4) for n in (5, 1, 3)]
    kv = SlottedKv([sequence])
    for piece, new in zip(pieces, ([0, 1], [], [2]), strict=True):
        sequence.add_blocks([blocks[i] for i in new])
        kv.extend([len(piece)])
        kv.write(1, piece, -piece)
        slots = kv.slots(1)
        assert slots.lengths.tolist() == [kv.segments.lengths[0]]
        assert torch.equal(slots.keys[slots.written], piece)
    keys, values = kv.read(1, 0)
    assert torch.equal(keys, torch.cat(pieces))
    assert torch.equal(values, -torch.cat(pieces))
    assert slots.slot_of[0, :9].tolist() == [blocks[i // 4] * 4 + i % 4 for i in range(9)]
    assert sum(int((~side.isnan()).sum()) for side in _sides(store)) == 2 * 9 * 4  # nothing else was touched


def _shape(*, n_layers: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> KvShape:
    return KvShape(n_layers=n_layers, n_kv_heads=n_kv_heads, head_dim=head_dim, dtype=dtype, device=torch.device("cpu"))


def _sides(store: KvStore) -> list[torch.Tensor]:
    return [side for pair in store.layers for side in pair]


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 2, 16), (5, 4, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_tensors_of_its_own_and_all_are_copied_together(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Views of one tensor would be, for torch.compile, one thing that every layer writes."""
    n_layers, n_kv_heads, head_dim = shape
    kv = _shape(n_layers=n_layers, n_kv_heads=n_kv_heads, head_dim=head_dim, dtype=dtype)
    store = kv.allocate(20)
    sides = _sides(store)
    assert len({side.untyped_storage().data_ptr() for side in sides}) == len(sides) == 2 * n_layers
    assert all(side.is_contiguous() and not side.any() for side in sides)
    assert store.nbytes == 21 * kv.bytes_per_token
    assert store.n_slots == 21
    before = [side.normal_().clone() for side in sides]
    store.copy_slots(4, 12, 3)
    for side, old in zip(sides, before, strict=True):
        assert torch.equal(side[12:15], old[4:7])
        side[12:15] = old[12:15]
        assert torch.equal(side, old)


def test_tracing_counts_only_what_happened() -> None:
    tracer = Tracer(torch.device("cpu"), "off")
    tracer.start()
    tracer.count("found", 0)
    tracer.count("found", 3)
    tracer.count("found")
    tracer.count("lost", 0)
    assert dict(tracer.finish().counts) == {"found": 4}
