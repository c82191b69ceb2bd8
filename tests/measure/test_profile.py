"""Operations as torch's profiler sees them: every one once, in the stage whose Python called it."""

from __future__ import annotations

import json

import pytest

from fastvl_lab import Lab, Request
from fastvl_lab.errors import RequestError
from fastvl_lab.measure.profile import Profile, by_kernel, covered, device_idle, profile_request
from fastvl_lab.measure.samples import since_upload
from fastvl_lab.trace import Span, Trace


@pytest.fixture(scope="module", params=["fastest", "transformers"])
def seen(labs: dict[str, Lab], picture: bytes, request: pytest.FixtureRequest) -> Profile:
    asked = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    return profile_request(labs["tiny-qwen2.5-vl"], asked, request.param)


def test_spans_are_ranges_of_the_profiler_and_operations_belong_to_them(seen: Profile) -> None:
    ran = {stage.name for stage in seen.stages}
    assert {"decode_image", "preprocess", "tokenize", "vit", "prefill", "decode", "sample", "emit"} <= ran
    assert {operation.stage for operation in seen.operations} <= ran | {""}
    for stage in ("vit", "prefill", "decode"):
        mine = [operation for operation in seen.operations if operation.stage == stage]
        times = [(other.start_us, other.end_us) for other in seen.stages if other.name == stage]
        assert len(mine) > 20
        for operation in mine:
            assert any(start <= operation.start_us <= operation.end_us <= end for start, end in times)


def test_what_operations_call_is_not_counted_again(seen: Profile) -> None:
    total = sum(operation.end_us - operation.start_us for operation in seen.operations) / 1e6
    assert total == pytest.approx(seen.covered("host"), rel=1e-6)  # they are one after another
    assert 0 < seen.covered("host") < seen.seconds
    assert seen.number("host") == len(seen.operations)
    assert seen.number("device") == seen.covered("device") == 0


def test_blocks_and_layers_are_watched_too_and_it_is_written_and_read_back(labs: dict[str, Lab], picture: bytes) -> None:
    asked = Request(images=[picture], prompt="What?", max_new_tokens=2, ignore_eos=True)
    seen = profile_request(labs["tiny-qwen2.5-vl"], asked, "fastest", trace="layers")
    inside = {layer.name: layer.stage for layer in seen.layers}
    assert inside["vit.block.0"] == "vit"
    assert inside["language.layer.0"] in ("prefill", "decode")
    block = next(layer for layer in seen.layers if layer.name == "vit.block.1")
    mine = [one for one in seen.operations if block.start_us <= one.start_us <= one.end_us <= block.end_us]
    assert len(mine) > 5
    assert {one.stage for one in mine} == {"vit"}
    again = Profile.from_record(json.loads(json.dumps(seen.to_record())))
    assert vars(again) == vars(seen)


def test_one_step_is_cut_out(seen: Profile) -> None:
    step = seen.of("decode", "sample")
    assert step.stages[0].name == "decode"
    assert [stage.name for stage in step.stages].count("decode") == 1
    assert 0 < step.number("host") < seen.number("host") / 2
    assert {operation.stage for operation in step.operations} <= {"decode", "sample", ""}
    with pytest.raises(RequestError, match=r"no stage nonsense ran; those that did are .*vit"):
        seen.of("nonsense")


def test_covered_is_the_length_of_a_union() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2), (5, 8)]) == 6
    assert covered([]) == 0


def _trace(*spans: tuple[str, str, int, int], first_chunk: int) -> Trace:
    made = [Span(name=name, lane=lane, depth=0, start_ns=start, end_ns=end) for name, lane, start, end in spans]  # type: ignore[arg-type]
    return Trace(spans=tuple(made), first_chunk_ns=first_chunk, end_ns=first_chunk)


def test_idle_is_what_no_stage_of_the_device_covers_from_its_first_to_the_first_token() -> None:
    on_host = [("decode_image", "host", 0, 10), ("upload", "host", 10, 14), ("vit", "host", 15, 18)]
    on_device = [("decode_image", "device", 0, 10), ("upload", "device", 11, 15), ("vit", "device", 17, 30)]
    on_device += [("prefill", "device", 29, 50), ("emit", "device", 52, 60), ("decode", "device", 70, 80)]
    trace = _trace(*on_host, *on_device, first_chunk=61)
    assert device_idle(trace) == (17 - 15) + (61 - 50)
    assert since_upload(trace) == 61 - 14
    assert device_idle(_trace(*on_host, first_chunk=61)) is None


def test_kernels_are_summed_by_name_and_their_time_is_counted_once() -> None:
    ran = [("gemm", 0.0, 3000.0), ("copy", 2000.0, 4000.0), ("gemm", 5000.0, 6000.0), ("norm", 6000.0, 6500.0)]
    found = by_kernel(ran)
    assert found["kernels_ms"] == 5.5  # two at once count once, and waiting does not
    assert found["longest"] == [
        {"name": "gemm", "times": 2, "ms": 4.0},
        {"name": "copy", "times": 1, "ms": 2.0},
        {"name": "norm", "times": 1, "ms": 0.5},
    ]
    assert len(by_kernel([(str(n), n, n + 1) for n in range(100)])["longest"]) == 12
    assert by_kernel([]) == {"kernels_ms": None, "longest": []}
