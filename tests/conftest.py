"""What all tests share: a cache of their own, the built-in checkpoints loaded once, and photographs of any size."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

# Tests, and the kernels they start, get an empty cache: none reads or fills the user's. A session's processes share it, so that
# each program is compiled once. Set before any library reads them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastvl-lab-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else whoever compiles starts a process that imports torch again
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]  # seconds to import; jsonschema goes without, and no test has an IRI
os.environ["FASTVL_LAB_QUIET"] = "off"  # tests share the cores on purpose; those of quiet itself switch it on
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter, on tensors of the host

from shallow import shallow_lab as load_shallow
from transformers import AutoConfig, AutoModelForImageTextToText

from fastvl_lab import Comparison, Lab, SweepSettings, photo
from fastvl_lab.catalogue import SLOTS, Option, toggles
from fastvl_lab.checkpoint import Checkpoint, tiny
from fastvl_lab.checkpoint.fused import fuse_projections
from fastvl_lab.checkpoint.random_weights import randomise
from fastvl_lab.families import family_of
from fastvl_lab.measure.parity import Parity
from fastvl_lab.measure.samples import Interval, RunSample
from fastvl_lab.preprocessor.decode_image import rgb_of
from fastvl_lab.request import Chunk, ImageInput, ImageSource
from fastvl_lab.run import Run
from fastvl_lab.trace import Span, Trace

TINY = ("tiny-qwen2.5-vl", "tiny-qwen3-vl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("FASTVL_LAB_VLLM"):
        skip = pytest.mark.skip(reason="needs vLLM, and FASTVL_LAB_VLLM names no program")
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(skip)
    if not os.environ.get("FASTVL_LAB_CLIENTS"):
        skip = pytest.mark.skip(
            reason="needs clients' own environment (make clients), and FASTVL_LAB_CLIENTS names no Python of it"
        )
        for item in items:
            if item.get_closest_marker("client"):
                item.add_marker(skip)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def labs() -> dict[str, Lab]:
    """Both built-in checkpoints on the CPU in float32."""
    return {name: Lab(name, device="cpu", dtype="float32") for name in TINY}


@pytest.fixture(params=TINY)
def lab(request: pytest.FixtureRequest, labs: dict[str, Lab]) -> Lab:
    """Each built-in checkpoint in turn."""
    return labs[request.param]


@pytest.fixture(scope="session")
def sweep_settings() -> Callable[..., SweepSettings]:
    """Makes the settings of a small sweep over the Qwen3-VL of the built-in checkpoints, with what a test changes."""

    def made(**changes: Any) -> SweepSettings:
        small: dict[str, Any] = {
            "checkpoints": ["tiny-qwen3-vl"],
            "recipes": ["transformers", "fastest"],
            "image": "coffee",
            "image_sizes": [[56, 56]],
            "prompt": "What is this?",
            "max_new_tokens": 2,
            "repeats": 1,
            "warm_up": 1,
            "device": "cpu",
            "dtype": "",
            "seed": 0,
            "output_dir": "",
        }
        return SweepSettings(**small | changes)

    return made


@pytest.fixture(scope="session")
def run_of() -> Callable[..., Run]:
    """Makes a run from its spans (stage, start and end in ms) and the moments of its chunks (s), which are of a token each."""

    def made(*spans: tuple[str, float, float], chunks: Sequence[float] = (0.01,)) -> Run:
        ns = [(name, round(start * 1e6), round(end * 1e6)) for name, start, end in spans]
        return Run(
            engine="x",
            recipe=None,
            checkpoint="c",
            device="d",
            dtype="float32",
            kind="warm",
            n_prompt=3,
            shapes=(),
            tokens=tuple(range(len(chunks))),
            chunks=tuple(Chunk(text="a", tokens=(number,), time=float(when)) for number, when in enumerate(chunks)),
            trace=Trace(
                spans=tuple(Span(name=name, lane="host", depth=0, start_ns=start, end_ns=end) for name, start, end in ns),
                first_chunk_ns=round(chunks[0] * 1e9),
                end_ns=max(round(chunks[-1] * 1e9), *(end for *_, end in ns), 0),
            ),
            logits=torch.empty(0),
        )

    return made


@pytest.fixture(scope="session")
def comparison_of(run_of: Callable[..., Run]) -> Callable[..., Comparison]:
    """Makes a comparison from the ms of each stage in each warm round: engine -> rounds -> stage -> ms; the first is the reference.

    wrong: engines that fail parity. where: what its environment has otherwise than that of all such.
    """

    def made(times: Mapping[str, Sequence[Mapping[str, float]]], *, wrong: Sequence[str] = (), **where: str) -> Comparison:
        samples = []
        for engine, rounds in times.items():
            for number, stages in enumerate(rounds):
                ends = [*accumulate(stages.values())]
                spans = [(name, end - ms, end) for (name, ms), end in zip(stages.items(), ends, strict=True)]
                run = dataclasses.replace(run_of(*spans, chunks=(ends[-1] / 1e3,)), engine=engine, tokens=(0,))
                samples.append(RunSample(engine=engine, round=number, run=run))
        checks = {engine: Parity(oracle="x", holds=engine not in wrong, why="planted", expected=(0,)) for engine in times}
        here = {"device": "CPU (2 threads)", "processor": "Z80", "dtype": "float32", "torch": "2.11", "date": "2026-01-02"} | where
        return Comparison(samples=tuple(samples), reference=next(iter(times)), checks=checks, failures={}, environment=here)

    return made


@pytest.fixture(scope="session")
def shallow_lab() -> Callable[..., Lab]:
    """A built-in checkpoint with two blocks and two layers, loaded once for each name and settings."""
    return cache(load_shallow)


@pytest.fixture(scope="session")
def shallow_labs(shallow_lab: Callable[..., Lab]) -> dict[str, Lab]:
    """Both of them on the CPU in float32."""
    return {name: shallow_lab(name, device="cpu", dtype="float32") for name in TINY}


@pytest.fixture(scope="session")
def quick_lab(shallow_lab: Callable[..., Lab]) -> Callable[..., Lab]:
    """In the place of `Lab` where any model will do: a built-in checkpoint is shallow and loaded once, whatever its name says.

    Its caches and engines are its own, and what was learnt here is read as by a new one.
    """

    def made(name: str, **settings: Any) -> Lab:
        if name not in TINY:
            return Lab(name, **settings)
        lab = shallow_lab(name, **settings).apart()
        lab.checkpoint = dataclasses.replace(lab.checkpoint, name=name)
        lab.relearn()
        return lab

    return made


@pytest.fixture(params=TINY)
def shallow(request: pytest.FixtureRequest, shallow_labs: dict[str, Lab]) -> Lab:
    """Each of them in turn."""
    return shallow_labs[request.param]


@pytest.fixture(scope="session")
def stock_resize(labs: dict[str, Lab]) -> str:
    """The option of preprocessor.resize whose pixels are those of Transformers' default image processor here."""
    return {"pillow": "pillow", "torchvision": "torch"}[labs[TINY[0]].checkpoint.image_backend]


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small photograph as JPEG bytes."""
    return photo("astronaut", (168, 140))


@pytest.fixture(scope="session")
def decode() -> Callable[[Sequence[ImageSource | ImageInput]], list[Image.Image]]:
    """Upright RGB images from encoded bytes, pictures and arrays, by Pillow."""
    return lambda images: [rgb_of(ImageInput.of(image)) for image in images]


@pytest.fixture(scope="session")
def assert_reaches() -> Callable[[Callable[[], Interval], float], None]:
    """Assert that a ratio measured side by side is shown to be above a bar: the low end of one of three intervals is.

    A pause of the machine hides a speed-up once; code that has become slower hides it always.
    """

    def check(measure: Callable[[], Interval], bar: float) -> None:
        seen = []
        for _ in range(3):
            seen.append(measure())
            print(f"{seen[-1]}, and the bar is {bar}")
            if seen[-1].low >= bar:
                return
        raise AssertionError(f"none of {seen} is shown to be above {bar}")

    return check


@pytest.fixture(scope="session")
def other_checkpoint() -> Callable[..., Checkpoint]:
    """Make a random model of another geometry than the built-in ones; only what the decoder reads is there."""

    def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 5, **changes: object) -> Checkpoint:
        config = AutoConfig.from_pretrained(tiny.folder(name))
        text = config.text_config
        for field, value in changes.items():
            setattr(config if field == "tie_word_embeddings" else text, field, value)
        half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
        if sum(text.rope_parameters["mrope_section"]) != half:  # another head, so other sections
            text.rope_parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        config.vision_config.out_hidden_size = text.hidden_size
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        family = family_of(config.model_type)
        assert family is not None
        randomise(family, model, seed=seed)
        fuse_projections(family.text(model))
        return Checkpoint(
            name=name,
            family=family,
            model=model,
            tokenizer=None,
            image_processor=None,
            eos_token_ids=(),
            max_length=1000,
            session_len=1000,
            device=torch.device("cpu"),
            dtype=dtype,
        )

    return make


@pytest.fixture
def add_option() -> Iterator[Callable[[str, Option], None]]:
    """Add an option to a toggle of the catalogue while everything runs, as a line of the file would."""
    with pytest.MonkeyPatch.context() as patch:

        def add(path: str, option: Option) -> None:
            slot, _, name = path.partition(".")
            field = SLOTS[slot].__dataclass_fields__[name]
            patch.setattr(field, "metadata", {"options": (*field.metadata["options"], option)})
            toggles.cache_clear()

        yield add
    toggles.cache_clear()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile reads, guards and splits programs as ever, and runs them by ATen: the minutes are in Inductor and its C++."""
    from torch._dynamo.backends.debugging import aot_eager  # seconds to import

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", aot_eager)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forked:
    """A script that runs: the id of its process and of its group, and the file that it prints into."""

    pid: int
    out: Path
    wait: Callable[[float], str]  # for so many seconds: the exit status, or "late" where it had to be killed

    def said(self) -> str:
        return self.out.read_text()


@pytest.fixture(scope="session")
def start_forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Start a script in a process of its own, without Triton's interpreter. See `forked.py`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("forked.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        wishes, answers, folder, running = parent.stdin, parent.stdout, tmp_path_factory.mktemp("forked"), set[int]()

        def answer(**wish: object) -> str:
            print(json.dumps(wish), file=wishes, flush=True)
            return answers.readline().strip()

        def start(path: Path, *arguments: str, **environment: str | None) -> Forked:
            out = folder / str(len(list(folder.iterdir())))
            out.touch()
            pid = int(answer(path=str(path), arguments=arguments, environment=environment, out=str(out)))
            running.add(pid)

            def wait(seconds: float) -> str:
                running.discard(pid)
                return answer(wait=pid, seconds=seconds)

            return Forked(pid=pid, out=out, wait=wait)

        yield start
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        wishes.close()


@pytest.fixture(scope="session")
def forked(start_forked: Callable[..., Forked]) -> Callable[..., str]:
    """Run such a script to its end: what it printed."""

    def run(path: Path, *arguments: str, **environment: str | None) -> str:
        script = start_forked(path, *arguments, **environment)
        status = script.wait(300)
        assert status == "0", f"{status}: {script.said()}"
        return script.said()

    return run


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def keyboard() -> Iterator[None]:
    """SIGINT interrupts, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
