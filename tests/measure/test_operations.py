"""Operations as torch's profiler sees them: every one once, in the stage whose Python called it."""

from __future__ import annotations

import pytest

from fastvl_lab import Lab, Request
from fastvl_lab.errors import RequestError
from fastvl_lab.measure.operations import Operations, covered, profile_request


@pytest.fixture(scope="module", params=["fastest", "transformers"])
def seen(labs: dict[str, Lab], picture: bytes, request: pytest.FixtureRequest) -> Operations:
    asked = Request(images=[picture], prompt="What?", max_new_tokens=3, ignore_eos=True)
    return profile_request(labs["tiny-qwen2.5-vl"], asked, request.param)


def test_spans_are_ranges_of_the_profiler_and_operations_belong_to_them(seen: Operations) -> None:
    ran = {stage.name for stage in seen.stages}
    assert {"decode_image", "preprocess", "tokenize", "vit", "prefill", "decode", "sample", "emit"} <= ran
    assert {operation.stage for operation in seen.operations} <= ran | {""}
    for stage in ("vit", "prefill", "decode"):
        mine = [operation for operation in seen.operations if operation.stage == stage]
        times = [(other.start_us, other.end_us) for other in seen.stages if other.name == stage]
        assert len(mine) > 20
        for operation in mine:
            assert any(start <= operation.start_us <= operation.end_us <= end for start, end in times)


def test_what_operations_call_is_not_counted_again(seen: Operations) -> None:
    total = sum(operation.end_us - operation.start_us for operation in seen.operations) / 1e6
    assert total == pytest.approx(seen.covered("host"), rel=1e-6)  # they are one after another
    assert 0 < seen.covered("host") < seen.seconds
    assert seen.number("host") == len(seen.operations)
    assert seen.number("device") == seen.covered("device") == 0


def test_one_step_is_cut_out(seen: Operations) -> None:
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
