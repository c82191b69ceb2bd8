"""Lab: cold and warm, streams that may be left, and errors that reach the caller."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvl_lab import DeviceError, ImageError, Lab, Recipe, RecipeError, Request, RequestError, Sampling
from fastvl_lab.engine import Engine
from fastvl_lab.engine_thread import EngineThread
from fastvl_lab.lab import MAX_ENGINES, TF32
from fastvl_lab.request import UNNAMED
from fastvl_lab.run import Run
from fastvl_lab.schedule.inbox import Inbox
from fastvl_lab.streaming.answer import Answer
from fastvl_lab.trace import Trace, Tracer


@pytest.fixture
def request_(picture: bytes) -> Request:
    return Request(images=[picture], prompt="What is this?", max_new_tokens=12, ignore_eos=True)


def test_the_first_run_of_an_engine_and_shape_is_cold(picture: bytes) -> None:
    lab = Lab("tiny-qwen3-vl", device="cpu")
    small = Request(images=[picture], prompt="What is this?", max_new_tokens=2, ignore_eos=True)
    other_prompt = Request(images=[picture], prompt="And this one here?", max_new_tokens=2, ignore_eos=True)
    kinds = [
        lab.run(r, e).kind
        for r, e in [(small, "baseline"), (small, "baseline"), (small, "transformers"), (other_prompt, "baseline")]
    ]
    assert kinds == ["cold", "warm", "cold", "cold"]
    longer = Request(images=[picture], prompt="What is this?", max_new_tokens=3, ignore_eos=True)
    assert [lab.run(r, "baseline").kind for r in (longer, small, longer)] == ["cold", "warm", "warm"]  # a step reads more keys
    elsewhere: list[str] = []
    thread = threading.Thread(target=lambda: elsewhere.append(lab.run(small, "baseline").kind))
    thread.start()
    thread.join()
    assert elsewhere == ["warm"]  # the lab computes on a thread of its own, whoever asks


def test_cuda_without_a_number_is_the_card_that_is_current_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the lab's own thread, which loads and computes, it would be the first."""
    caller = threading.current_thread()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(threading.current_thread() is caller))

    def load(name: str, *, device: torch.device, **_: object) -> None:
        raise DeviceError(f"loaded on {device}")

    monkeypatch.setattr("fastvl_lab.lab.checkpoints.load", load)
    for device, meant in ((None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")):
        with pytest.raises(DeviceError, match=f"loaded on {meant}$"):
            Lab("tiny-qwen3-vl", device=device)


def test_shapes_unseen_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server that runs for weeks does not remember every length there was; what was forgotten is called cold."""
    monkeypatch.setattr("fastvl_lab.lab.MAX_SHAPES", 2)
    lab = Lab("tiny-qwen2.5-vl", device="cpu", dtype="float32")
    kinds = [lab.run(Request(prompt="x" * n, max_new_tokens=1)).kind for n in (1, 2, 1, 3, 1, 2)]
    assert kinds == ["cold", "cold", "warm", "cold", "warm", "cold"]
    sampled = Request(prompt="x" * 2, max_new_tokens=1, sampling=Sampling(temperature=1))
    assert [lab.run(sampled).kind for _ in range(2)] == ["cold", "warm"], "which launches what greedy ones do not"


def test_engines_unused_for_longest_are_let_go_and_cold_when_they_come_back(picture: bytes) -> None:
    lab = Lab("tiny-qwen3-vl", device="cpu")
    request = Request(prompt="Hi.", max_new_tokens=1)
    sizes = ["multiples_of_64", "multiples_of_256", "powers_of_two"]
    recipes = [f"fastest, vit.norms={norms}, capture.shapes={size}" for norms in ("eager", "native") for size in sizes]
    recipes += [f"fastest, attention.norms={norms}" for norms in ("eager", "native")]
    assert len(recipes) == MAX_ENGINES
    with lab.hold(["baseline"]):
        for recipe in ("fastest", "baseline", *recipes):
            lab.run(request, recipe)
        assert lab.run(request, "baseline").kind == "warm"  # held
        assert lab.run(request, recipes[0]).kind == "warm"
        assert lab.run(request, "fastest").kind == "cold"  # one too many
        assert lab.run(request, recipes[1]).kind == "cold"
    for recipe in recipes:
        lab.run(request, recipe)
    assert lab.run(request, "baseline").kind == "cold"  # no longer held


def test_a_lab_is_gone_when_its_last_user_is_whatever_the_device_computes(labs: dict[str, Lab]) -> None:
    """So that a checkpoint has left the memory before the next is loaded."""
    lab, go = labs["tiny-qwen2.5-vl"].apart(), threading.Event()
    busy = EngineThread.of(lab.device).submit(go.wait)
    with lab.hold(["baseline"]):
        seen = weakref.ref(lab)
    del lab
    gc.collect()
    assert seen() is None
    go.set()
    busy.result()


def test_an_engine_may_be_a_recipe_its_text_or_a_peer(labs: dict[str, Lab], request_: Request) -> None:
    lab = labs["tiny-qwen3-vl"]
    runs = [lab.run(request_, engine) for engine in (None, Recipe.baseline(), "baseline", "transformers")]
    assert [run.recipe for run in runs] == [Recipe.baseline()] * 3 + [None]
    assert [run.engine for run in runs] == ["baseline", "baseline", "baseline", "transformers"]
    with pytest.raises(RecipeError, match=r"the choices are baseline, fastest.*or a peer: vllm, sglang, lmdeploy, transformers"):
        lab.run(request_, "quickest")


def test_what_no_request_is_is_refused(lab: Lab) -> None:
    for asked in (lab.run, lambda what: next(lab.stream(what))):
        with pytest.raises(RequestError, match=r"the request is a str; give a fastvl_lab.Request"):
            asked("What is this?")
    with pytest.raises(RequestError, match="trace is 'layer'; the choices are off, stages, layers"):
        lab.run(Request(prompt="x"), trace="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["fastest", "fastest, streaming.steps_per_round=16, streaming.gate=round"])
def test_a_request_within_a_callback_is_refused_and_not_waited_for(lab: Lab, request_: Request, engine: str) -> None:
    """Whichever thread the callback comes on, and of whichever lab of the device; what is asked afterwards is served as ever."""
    refused, other = [], Lab("tiny-qwen2.5-vl", device="cpu", dtype="float32")

    def ask(_: object) -> None:
        for asked in (
            lab.run,
            lambda what: next(lab.stream(what)),
            lab.apart().run,
            other.run,
            lambda what: next(other.stream(what)),
        ):
            with pytest.raises(RequestError, match="in which the lab serves no other"):
                asked(request_)
            refused.append(asked)

    run = lab.run(request_, engine, on_chunk=ask, on_stage=ask)
    assert len(refused) > 9
    assert lab.run(request_, engine).tokens == run.tokens


def test_chunks_are_in_the_consumers_hands_in_order(lab: Lab, request_: Request) -> None:
    for engine in ("transformers", "fastest"):
        run = lab.run(request_, engine)
        times = [chunk.time for chunk in run.chunks]
        assert times == sorted(times)
        assert run.ttft == pytest.approx(times[0], abs=1e-6)
        assert [token for chunk in run.chunks for token in chunk.tokens] == list(run.tokens)
        assert len(run.chunks) > 6
        assert run.tpot == pytest.approx((times[-1] - times[0]) / (12 - len(run.chunks[0].tokens)))


def test_a_stream_gives_what_a_run_gives(lab: Lab, request_: Request) -> None:
    for engine in ("transformers", "fastest"):
        chunks = list(lab.stream(request_, engine))
        assert "".join(map(str, chunks)) == lab.run(request_, engine).text
        assert [c.time for c in chunks] == sorted(c.time for c in chunks)


def test_leaving_a_stream_stops_the_engine(labs: dict[str, Lab], picture: bytes) -> None:
    lab = labs["tiny-qwen3-vl"]
    endless = Request(images=[picture], prompt="Go on.", max_new_tokens=20_000, ignore_eos=True)
    for engine in ("transformers", "fastest"):
        for count, _ in enumerate(lab.stream(endless, engine), start=1):
            if count == 3:
                break
        hooks = [m for m in lab.checkpoint.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooks, engine
        lab.run(Request(prompt="Next.", max_new_tokens=1), engine)  # the lab is free again


@pytest.mark.parametrize("engine", ["fastest", "fastest, streaming.steps_per_round=16"])
def test_a_stream_that_is_collected_by_the_engine_does_not_wait_for_itself(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """One that is left in a cycle, as an error's traceback is, goes with the next collection, on whichever thread that comes."""
    dropped, collected, take = threading.Event(), threading.Event(), Answer.take

    def collecting(answer: Answer, token: int) -> bool:
        if len(answer.tokens) == 3:
            assert dropped.wait(20)
            gc.collect()
            collected.set()
        return take(answer, token)

    monkeypatch.setattr(Answer, "take", collecting)
    gc.disable()
    try:
        held: list[Any] = [lab.stream(Request(prompt="Go on.", max_new_tokens=100, ignore_eos=True), engine)]
        next(held[0])
        held.append(held)
        del held
        dropped.set()
        assert collected.wait(20)
    finally:
        gc.enable()
    monkeypatch.undo()
    assert lab.run(Request(prompt="Next.", max_new_tokens=1), engine).tokens, "it is served"


def test_an_error_inside_a_stream_reaches_its_consumer(lab: Lab) -> None:
    request = Request(images=[b"no image"], prompt="What is this?")
    for engine in ("transformers", "baseline"):
        with pytest.raises(ImageError, match="not an image of a supported type"):
            next(lab.stream(request, engine))
        with pytest.raises(ImageError):
            lab.run(request, engine)


def test_running_out_of_memory_is_one_sentence(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    lab = labs["tiny-qwen3-vl"]

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore detail")

    def exhausted_on_cpu(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    def failing(words: str) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError(words)

        return fail

    monkeypatch.setattr(lab._bind(lab.engine("baseline")).stages, "encode", exhausted)  # type: ignore[attr-defined]
    monkeypatch.setattr(lab._bind(lab.engine("fastest")).stages, "encode", exhausted_on_cpu)  # type: ignore[attr-defined]
    request = Request(images=[np.zeros((40, 40, 3), np.uint8)], prompt="?")
    with pytest.raises(
        DeviceError, match=r"ran out of memory \(CUDA out of memory. Tried to allocate 20 GiB.\); set a smaller max_pixels"
    ):
        lab.run(request)
    with pytest.raises(DeviceError, match=r"can't allocate memory.*set a smaller max_pixels"):
        lab.run(request, Recipe.fastest())
    for words in (  # as the driver, cuBLAS and cuDNN say it, for which torch has no type of its own
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ):
        monkeypatch.setattr(lab._bind(lab.engine("baseline")).stages, "encode", failing(words))  # type: ignore[attr-defined]
        with pytest.raises(DeviceError, match=f"ran out of memory .{words.partition(chr(10))[0][:30]}"):
            lab.run(request)
    monkeypatch.setattr(lab._bind(lab.engine("baseline")).stages, "encode", failing("CUDA error: an illegal memory access"))  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        lab.run(request)


@pytest.mark.parametrize(
    "ask", [Lab.run, lambda lab, what: next(lab.stream(what)), lambda lab, what: lab.warm_up("baseline", [what])]
)
def test_memory_that_runs_out_as_an_engine_is_bound_is_the_same_sentence(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch, ask: Callable[..., object]
) -> None:
    """Where keys and values get their room, and weights their other layouts."""

    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("fastvl_lab.engine.Pipeline", exhausted)
    with pytest.raises(DeviceError, match=r"ran out of memory \(CUDA out of memory. Tried to allocate 20 GiB.\); set a smaller"):
        ask(labs["tiny-qwen3-vl"].apart(), Request(prompt="?", max_new_tokens=1))


def test_endpoints_are_bound_from_many_threads_and_push_no_recipe_out(lab: Lab) -> None:
    """They are asked from their callers' threads, while the lab's own binds and lets go what computes."""
    own, failed = lab.apart(), list[Exception]()
    own.run(Request(prompt="?", max_new_tokens=1))

    def bind(thread: int) -> None:
        try:
            for number in range(100):
                own._bind(Engine(name=f"http://{thread}:{number % (MAX_ENGINES + 1)}", bind=lambda _: Bound(), remote=True))
        except Exception as error:
            failed.append(error)

    class Bound:
        pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=bind, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    assert len(own._engines) == MAX_ENGINES + 1
    assert own.engine("baseline") in own._engines, "which computes here, and is not dropped on another's thread"


def test_tf32_stays_off_until_the_last_has_computed() -> None:
    """torch's switches are the process's: two devices, or an endpoint's caller beside a device, compute at once."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        first, second = TF32.off(), TF32.off()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False), "the second still computes"
        second.__exit__(None, None, None)
        assert cudnn.allow_tf32
        assert matmul.allow_tf32
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def test_logits_along_tokens_that_the_model_has_not_are_refused(lab: Lab) -> None:
    """On CUDA they would end all that the process computes there; an endpoint's tokens without a name are such."""
    request, given = Request(prompt="?"), [1, 2]
    expected = lab.logits_along(request, "baseline", given)
    for same in (np.array(given), torch.tensor(given), iter(given)):
        assert torch.equal(lab.logits_along(request, "baseline", same), expected)  # type: ignore[arg-type]
    known = expected.shape[1]
    for engine in ("baseline", "transformers"):
        for wrong in (UNNAMED, known, 2**70, 1.5, "1"):
            with pytest.raises(RequestError, match=rf"{wrong!r} is no token of the model, which has {known}, from 0 on"):
                lab.logits_along(request, engine, [1, wrong])  # type: ignore[list-item]


def test_an_error_for_want_of_memory_holds_none(labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps it, as a notebook does the last one, has its traceback, whose frames had what was computed."""
    lab, held = labs["tiny-qwen3-vl"], list[weakref.ref[torch.Tensor]]()

    def exhausted(*_: object, **__: object) -> None:
        computed = torch.zeros(8)
        held.append(weakref.ref(computed))
        raise MemoryError("no room")

    monkeypatch.setattr(lab._bind(lab.engine("baseline")).stages, "prefill", exhausted)  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="no room") as raised:
        lab.run(Request(prompt="?"))
    assert held[0]() is None
    assert raised.value.__cause__ is not None
    assert "exhausted" in "".join(traceback.format_exception(raised.value)), "it still says where"


@pytest.mark.parametrize("recipe", ["fastest", "fastest, cache.kv=paged, schedule.batching=continuous"])
def test_a_job_whose_answer_is_lost_as_it_ends_is_told_so(
    labs: dict[str, Lab], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """A device may tell of its failure only where it is waited for last; other jobs are served."""
    lab, inbox, ended = labs["tiny-qwen3-vl"], Inbox(), dict[int, Run | Exception]()
    finish = Tracer.finish

    def lost(tracer: Tracer) -> Trace:
        monkeypatch.setattr(Tracer, "finish", finish)
        raise RuntimeError("the device is lost")

    for number in range(2):
        inbox.put(lab.job(Request(prompt="?", max_new_tokens=2), recipe, on_end=partial(ended.__setitem__, number)))
    inbox.close()
    monkeypatch.setattr(Tracer, "finish", lost)
    lab.serve(recipe, inbox, lambda _: None)
    assert str(ended[0]) == "the device is lost"
    assert isinstance(ended[1], Run)


FIRST_RUN = """
import os, numpy, torch, fastvl_lab as fl

torch.set_num_threads(max(2, os.cpu_count()))  # the race that it looks for needs them

def first_run_is_right():
    lab = fl.Lab("tiny-qwen2.5-vl", device="cpu")
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # wakes the other threads
    picture = numpy.random.default_rng(0).integers(256, size=(700, 800, 3), dtype=numpy.uint8)
    request = fl.Request(images=[picture], prompt="?", max_new_tokens=1)
    first, second = (lab.run(request, "baseline, vit.tower=lean").logits for _ in range(2))
    assert torch.equal(first, second), (first - second).abs().max()

for _ in range(2):
    child = os.fork()
    if child == 0:
        first_run_is_right()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_the_first_run_of_a_process_computes_what_the_second_does(forked: Callable[..., str], tmp_path: Path) -> None:
    """Not so where threads race for the first call of torch's vector math; see checkpoint/loading.py."""
    (tmp_path / "first_run.py").write_text(FIRST_RUN)
    forked(tmp_path / "first_run.py")


def test_callers_take_turns(labs: dict[str, Lab], request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, texts, inside, most = labs["tiny-qwen2.5-vl"], [], [], []
    expected = lab.run(request_).text
    serve = lab._serve

    def counted(*arguments: object) -> object:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)  # long enough for another caller to come in, if it could
        outcome = serve(*arguments)  # type: ignore[arg-type]
        inside.pop()
        return outcome

    monkeypatch.setattr(lab, "_serve", counted)
    threads = [threading.Thread(target=lambda: texts.append(lab.run(request_).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4
    assert max(most) == 1


def test_a_stream_that_nobody_reads_does_not_keep_the_lab(labs: dict[str, Lab], picture: bytes) -> None:
    lab = labs["tiny-qwen3-vl"]
    stream = lab.stream(Request(images=[picture], prompt="Go on.", max_new_tokens=150, ignore_eos=True), "fastest")
    next(stream)
    assert lab.run(Request(prompt="Next.", max_new_tokens=1), "fastest").tokens  # waits for the stream's engine, not its reader
    assert len(list(stream)) > 50
