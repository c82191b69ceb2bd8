"""A checkpoint loaded once, and any recipe or peer run on it."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fastvl_lab import checkpoint as checkpoints
from fastvl_lab import peers
from fastvl_lab.cache.memory import Memory, default_session_len
from fastvl_lab.capture.compile_cache import keep_compiled
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import GraphStore
from fastvl_lab.capture.warm_up import Shape, requests_of
from fastvl_lab.errors import CheckpointError, DeviceError, RecipeError, RequestError
from fastvl_lab.pipeline import Engine, Outcome, Pipeline
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, Request, check_whole_number
from fastvl_lab.run import ELSEWHERE, Kind, Run
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Level, Span, Tracer

EngineName = Recipe | str

GRAPH_BUDGET = 4 * 2**30
MAX_GRAPHS = 256


class Lab:
    """A checkpoint on a device, and the engines bound to it.

    name: a folder, a hub id, "tiny-qwen2.5-vl", "tiny-qwen3-vl", or "random:<hub id>" (see `checkpoint.load`). One request runs
    at a time; a second caller waits before its clock starts.

    session_len: tokens of prompt and answer that a request may have together; by default up to 32,768, as memory and model allow.
    memory_budget: bytes that recipes' caches may take (`cache.memory.Memory`); by default what two sessions take and an eighth.
    graph_budget: bytes that CUDA graphs may take, of all recipes together; at most `MAX_GRAPHS` are kept.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        session_len: int | None = None,
        memory_budget: int | None = None,
        graph_budget: int = GRAPH_BUDGET,
    ) -> None:
        for what, value in (("session_len", session_len), ("memory_budget", memory_budget), ("graph_budget", graph_budget)):
            if value is not None:
                check_whole_number(what, value)
        keep_compiled()
        loaded = checkpoints.load(name, device=device, dtype=dtype)
        session_len = default_session_len(loaded) if session_len is None else session_len
        if session_len > loaded.max_length:
            raise CheckpointError(
                f"session_len is {session_len}; checkpoint {loaded.name!r} attends to {loaded.max_length} tokens at most"
            )
        self.checkpoint = dataclasses.replace(loaded, session_len=session_len)
        self.memory = Memory(self.checkpoint, memory_budget)
        self.graphs = _graph_store(self.device, graph_budget)
        self._engines: dict[EngineName, Engine] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._seen_by_thread = threading.local()
        self._telling = threading.local()
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return self.checkpoint.device

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype

    def __repr__(self) -> str:
        return f"Lab({self.checkpoint.name!r}, device={str(self.device)!r}, dtype={_dtype_name(self.dtype)!r})"

    def run(
        self,
        request: Request,
        engine: EngineName | None = None,
        *,
        trace: Level = "stages",
        on_chunk: Callable[[Chunk], object] | None = None,
        on_stage: Callable[[Span], object] | None = None,
        stop: threading.Event | None = None,
    ) -> Run:
        """Serve a request to the end and report on it.

        engine: a `Recipe`, a recipe's text such as "fastest, vit.tower=lean", or a peer's text such as "transformers" or
        "http://127.0.0.1:8000/v1"; by default the baseline. trace: "off", "stages", or "layers" to also time ViT blocks and decoder
        layers. on_chunk: given each chunk as it leaves, and on_stage each stage as it ends; the engine waits for them. stop: once
        it is set, the request ends at its next stage or step with a `RequestCancelledError`. Raises `FastvlError`s.
        """
        key = self._admitted(request, engine)
        tell_chunk, tell_stage = self._told(key, on_chunk), self._told(key, on_stage)
        tracer, chunks = Tracer(self.device, trace, stop=stop, on_stage=tell_stage), []

        def deliver(text: str, tokens: tuple[int, ...]) -> None:
            chunks.append(Chunk(text=text, tokens=tokens, time=tracer.delivered()))
            if tell_chunk is not None:
                tell_chunk(chunks[-1])

        with self._turn(key):
            bound = self._bind(key)
            tracer.start()
            outcome = self._serve(bound, request, tracer, deliver)
            finished, logits = tracer.finish(), outcome.logits.cpu()
            kind = self._kind(key, outcome)
        name = key.text(self.device) if isinstance(key, Recipe) else key
        return Run(
            engine=engine if isinstance(engine, str) else name,
            recipe=key if isinstance(key, Recipe) else None,
            checkpoint=outcome.model or self.checkpoint.name,
            device=ELSEWHERE if peers.is_remote(key) else device_name(self.device),
            dtype="unknown" if peers.is_remote(key) else _dtype_name(self.dtype),
            kind=kind,
            n_prompt=outcome.n_prompt,
            shapes=outcome.shapes,
            tokens=outcome.tokens,
            chunks=tuple(chunks),
            trace=finished,
            logits=logits,
            captures=outcome.captures,
        )

    def stream(self, request: Request, engine: EngineName | None = None) -> Iterator[Chunk]:
        """Yield text as it is made; leaving the loop early stops the engine at its next stage or step.

        The engine runs on a thread of its own. On a CPU that makes the first chunk later than `run`'s: torch keeps a pool of
        threads for each thread that has computed, and together they are more than there are cores.
        """
        key, gone, started = self._admitted(request, engine), threading.Event(), threading.Event()
        tracer = Tracer(self.device, "off", stop=gone)
        # Unbounded: an engine that waited for its consumer would keep the lab from everybody else; the answer's length bounds it.
        ready: queue.SimpleQueue[tuple[str, tuple[int, ...]] | BaseException | None] = queue.SimpleQueue()

        def produce() -> None:
            try:
                with self._turn(key):
                    started.set()
                    if gone.is_set():  # the consumer left while others were served
                        return
                    bound = self._bind(key)
                    tracer.start()
                    self._kind(key, self._serve(bound, request, tracer, lambda text, tokens: ready.put((text, tokens))))
                ready.put(None)
            except BaseException as error:  # handed to the consumer, whose call it is
                ready.put(error)

        producer = threading.Thread(target=produce, name="fastvl-stream", daemon=True)
        try:
            producer.start()
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield Chunk(text=item[0], tokens=item[1], time=tracer.delivered())
        finally:
            gone.set()
            if started.is_set():  # else it waits for its turn, and will leave without a trace
                producer.join()

    def warm_up(
        self, recipe: Recipe | str, shapes: Iterable[Shape], *, max_new_tokens: int = 32, progress: bool = True
    ) -> tuple[Capture, ...]:
        """Serve a request of each shape: what is built, tuned, compiled and captured for it is there before the first that counts.

        shapes: (width, height) of an image, or a `Request` as it will come. Everything that a request does is done, from decoding
        its image to its `max_new_tokens`, and caches keep of it what they keep of any request. Decode steps are made ready first,
        for answers of any length that a session has room for. The largest shape had best come first: graphs captured later then
        find memory that they can share. progress: whether to show a bar. Returns what was compiled and captured. Raises
        `RequestError`, and what `run` raises.
        """
        requests, key = requests_of(shapes, max_new_tokens), self.engine(recipe)
        made: list[Capture] = []
        self._check_turn(key)
        with self._turn(key), current_device(self.device):
            bound = self._bind(key)
            if isinstance(bound, Pipeline):
                made += bound.warm_up(Tracer(self.device, "off"))
        for request in tqdm(requests, desc="warm-up", unit="shape", disable=not progress):
            made += self.run(request, recipe, trace="off").captures
        return tuple(made)

    def captures(self, recipe: Recipe | str) -> tuple[Capture, ...]:
        """What has been compiled and captured for a recipe and is kept, and what each has cost; none before its first run."""
        bound = self._engines.get(self.engine(recipe))
        return bound.stages.captures if isinstance(bound, Pipeline) else ()

    def apart(self) -> Lab:
        """The same loaded checkpoint with caches and engines of its own: neither lab finds what the other's requests left behind.

        Both together still run one request at a time.
        """
        other = copy.copy(self)
        other.memory, other._engines = Memory(self.checkpoint, self.memory.budget), {}
        if self.graphs is not None:
            other.graphs = _graph_store(self.device, self.graphs.max_bytes)
        other._seen, other._seen_by_thread = set(), threading.local()
        return other

    def engine(self, engine: EngineName | None) -> EngineName:
        """What `run` would run: a recipe, or the text of a peer; raises `RecipeError` for a text that is neither."""
        if engine is None:
            return Recipe.baseline()
        return engine if isinstance(engine, Recipe) else parse_engine(engine, self.device)

    def _admitted(self, request: Request, engine: EngineName | None) -> EngineName:
        """The engine, where it can be given a request at all."""
        if not isinstance(request, Request):
            raise RequestError(f"the request is a {type(request).__name__}; give a fastvl_lab.Request")
        key = self.engine(engine)
        self._check_turn(key)
        return key

    def _check_turn(self, key: EngineName) -> None:
        if getattr(self._telling, "now", False) and not peers.is_remote(key):
            raise RequestError("a request waits for its on_chunk and on_stage, in which the lab serves no other; ask after it")

    def _told(self, key: EngineName, callback: Callable[[Any], object] | None) -> Callable[[Any], object] | None:
        """The callback; within it no request can have a turn, where the one that it is told of has it and waits for it."""
        if callback is None or peers.is_remote(key):
            return callback

        def told(news: Any) -> None:
            self._telling.now = True
            try:
                callback(news)
            finally:
                self._telling.now = False

        return told

    def _bind(self, key: EngineName) -> Engine:
        if key not in self._engines:
            if isinstance(key, Recipe):
                self._engines[key] = Pipeline(self.checkpoint, key, self.memory, self.graphs)
            else:
                self._engines[key] = peers.bind(key, self.checkpoint)
        return self._engines[key]

    def _turn(self, key: EngineName) -> AbstractContextManager[object]:
        """One request at a time on the device; what an endpoint serves is elsewhere, or takes its own turn here."""
        return nullcontext() if peers.is_remote(key) else self._lock

    def _serve(self, engine: Engine, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        try:
            with current_device(self.device):
                return engine.run(request, tracer, deliver)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
                raise  # torch's CPU allocator has no error type of its own
            raise DeviceError(
                f"{device_name(self.device)} ran out of memory ({next(iter(str(error).splitlines()), 'no detail')}); "
                f"set a smaller max_pixels or max_new_tokens, or load a smaller checkpoint or dtype"
            ) from error

    def _kind(self, key: EngineName, outcome: Outcome) -> Kind:
        """Whether anything was reused, else whether this was the first run of its engine and shape; decode steps share one shape.

        A run that compiled or captured something on its way is cold in any case.
        On a CPU each calling thread has a thread pool of its own in torch, so the first run of another thread is cold again.
        """
        if outcome.reused and not outcome.captures:
            return "cache_hit"
        seen = self._seen
        if self.device.type == "cpu":
            seen = self._seen_by_thread.__dict__.setdefault("seen", set())
        shape = (key, outcome.n_prompt, *(s.grid for s in outcome.shapes), len(outcome.tokens) > 1)
        first = shape not in seen
        seen.add(shape)
        return "cold" if first or outcome.captures else "warm"


def _graph_store(device: torch.device, max_bytes: int) -> GraphStore | None:
    """Room for CUDA graphs, on CUDA."""
    if device.type != "cuda":
        return None
    from fastvl_lab.capture.cuda_graphs import CudaRecorder

    return GraphStore(CudaRecorder(device), max_bytes=max_bytes, max_graphs=MAX_GRAPHS)


def current_device(device: torch.device) -> AbstractContextManager[None]:
    """Make a CUDA device the current one, which is where Triton launches its kernels; nothing to do on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def parse_engine(text: str, device: torch.device | str = "cpu") -> EngineName:
    """A peer's text, or the recipe that the text describes; raises `RecipeError` naming the choices."""
    if peers.is_peer(text):
        return peers.parse(text)
    try:
        return Recipe.parse(text, device)
    except RecipeError as error:
        raise RecipeError(f"{error}; or a peer: {', '.join(peers.PEERS)}") from None


def device_name(device: torch.device) -> str:
    """What ran: the GPU's name, or the CPU with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
