"""A checkpoint loaded once, and any recipe or peer run on it."""

from __future__ import annotations

import copy
import dataclasses
import os
import queue
import threading
import time
import traceback
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from fastvl_lab import checkpoint as checkpoints, learnt
from fastvl_lab.cache.memory import Memory, default_session_len
from fastvl_lab.capture.compile_cache import keep_compiled
from fastvl_lab.capture.execute import Capture
from fastvl_lab.capture.graphs import GraphStore
from fastvl_lab.capture.warm_up import Shape, requests_of
from fastvl_lab.channels import as_message, said_in
from fastvl_lab.engine import BoundEngine, Engine, EngineLike, Place, StartedEngine, find, find_recipe
from fastvl_lab.engine_thread import EngineThread, of_caller
from fastvl_lab.errors import CheckpointError, DeviceError, FastvlError, RequestError, is_number, quoted
from fastvl_lab.families import FAMILIES, Family
from fastvl_lab.grammars import Grammars
from fastvl_lab.pipeline import Outcome, Pipeline
from fastvl_lab.processes.server import Servers
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import Chunk, Request, TokenLogprob, check_request, check_whole_number
from fastvl_lab.run import ELSEWHERE, Kind, Run
from fastvl_lab.schedule.inbox import Inbox, Job
from fastvl_lab.schedule.loop import OnStep, one_at_a_time, side_by_side
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Level, Span, Trace, Tracer

T = TypeVar("T")

GRAPH_BUDGET = 4 * 2**30
MAX_GRAPHS = 256

# Engines that a lab keeps bound beside those that are held: each has tables, threads and compiled programs of its own. As many are
# kept of those that compute elsewhere.
MAX_ENGINES = 8

# Shapes of requests that an engine is known to have run; one that was forgotten is called cold again.
MAX_SHAPES = 10_000

# How libraries word that memory has run out, where torch has no error type for it: its CPU allocator, the CUDA driver, cuBLAS and
# cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")


class Lab:
    """A checkpoint on a device, and the engines bound to it.

    name: a folder, a hub id, a built-in one such as "tiny-qwen2.5-vl", or "random:<hub id>" (see `checkpoint.load`). All labs of a
    device load and compute on one thread of the process, one request at a time; a second caller waits before its clock starts. In
    float32 on CUDA, TF32 is off while the lab computes.

    session_len: tokens of prompt and answer that a request may have together; by default up to 32,768, as memory and model allow.
    memory_budget: bytes that recipes' caches may take (`cache.memory.Memory`); by default what two sessions take and an eighth.
    graph_budget: bytes that CUDA graphs may take, of all recipes together; at most `MAX_GRAPHS` are kept. families: those that the
    checkpoint may be of; a new one is given as `(*FAMILIES, mine)`.

    Engines such as "vllm" are servers, which start with their first run or by `start`, and end with `close`, with the lab and its
    copies, and with the process. As a context manager, a lab closes at the end.
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
        families: Sequence[Family] = FAMILIES,
    ) -> None:
        for what, value in (("session_len", session_len), ("memory_budget", memory_budget), ("graph_budget", graph_budget)):
            if value is not None:
                check_whole_number(what, value)
        keep_compiled()
        on = of_caller(checkpoints.resolve_device(device))
        self._thread = EngineThread.of(on)
        loaded = self._thread.call(partial(checkpoints.load, name, device=on, dtype=dtype, families=families))
        if session_len is None:
            session_len = default_session_len(loaded, reserved=graph_budget if on.type == "cuda" else 0)
        if session_len > loaded.max_length:
            raise CheckpointError(
                f"session_len is {session_len}; checkpoint {loaded.name!r} attends to {loaded.max_length} tokens at most"
            )
        self.checkpoint = dataclasses.replace(loaded, session_len=session_len)
        self.memory = Memory(self.checkpoint, memory_budget)
        self.graphs = _graph_store(self.device, graph_budget)
        self.grammars = Grammars(self.checkpoint)
        self.servers = Servers()
        self._engines: OrderedDict[Engine, BoundEngine] = OrderedDict()
        self._held: Counter[Engine] = Counter()
        self._seen: dict[Engine, dict[tuple[object, ...], int]] = {}
        self._changing = threading.Lock()  # of these three: an endpoint is asked on its caller's thread
        self.relearn()

    @property
    def device(self) -> torch.device:
        return self.checkpoint.device

    @property
    def dtype(self) -> torch.dtype:
        return self.checkpoint.dtype

    def __repr__(self) -> str:
        return f"Lab({self.checkpoint.name!r}, device={str(self.device)!r}, dtype={dtype_name(self.dtype)!r})"

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers that this lab and its copies have started; an engine that is run again starts again."""
        self.servers.close()

    def start(
        self, engine: EngineLike, *, tell: Callable[[str], object] | None = None, stop: threading.Event | None = None
    ) -> None:
        """Make an engine ready, as `run` does where it has not been done; a server starts in minutes, beside what the lab serves.

        tell: given a line now and then while it starts; by default a bar shows it. stop: once it is set, the start ends with a
        `RequestCancelledError`. Raises `EndpointError` with what the server says of its failure, and what binding an engine raises.
        """
        key = self.engine(engine)
        if key.started:
            key.bind(self._place(tell, stop))  # which finds it again when it is run
            return
        self._check_turn(key)
        self._in_turn(key, lambda: self._bind(key))

    def processes(self, engine: EngineLike) -> tuple[int, ...]:
        """Ids of the processes that an engine has beside this one: those of a server that was started for it."""
        return self.servers.processes(self.engine(engine).name)

    def run(
        self,
        request: Request,
        engine: EngineLike | None = None,
        *,
        trace: Level = "stages",
        on_chunk: Callable[[Chunk], object] | None = None,
        on_begin: Callable[[str, int], object] | None = None,
        on_stage: Callable[[Span], object] | None = None,
        stop: threading.Event | None = None,
    ) -> Run:
        """Serve a request to the end and report on it.

        engine: a `Recipe`, a recipe's text such as "fastest, vit.tower=lean", or a peer's text such as "transformers", "vllm" or
        "http://127.0.0.1:8000/v1" (`peers`); by default the baseline. trace: "off", "stages", or "layers" to also time ViT blocks
        and decoder layers. on_chunk: given each chunk as it leaves, on_begin each stage's name and start (ns) as it begins,
        on_stage its span as it ends; the engine waits for them. stop: once it is set, the request ends at its next stage or step
        with a `RequestCancelledError`. Raises `FastvlError`s.
        """
        key = self._admitted(request, engine)
        tell_chunk, tell_begin, tell_stage = (self._told(key, tell) for tell in (on_chunk, on_begin, on_stage))
        tracer, chunks = Tracer(self.device, trace, stop=stop, on_begin=tell_begin, on_stage=tell_stage), []

        def deliver(text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = ()) -> None:
            chunks.append(Chunk(text=text, tokens=tokens, time=tracer.delivered(), logprobs=logprobs))
            if tell_chunk is not None:
                tell_chunk(chunks[-1])

        def served() -> tuple[Outcome, Trace, torch.Tensor, Kind]:
            bound = self._bind(key, stop)
            tracer.start()
            outcome = self._serve(bound, request, tracer, deliver)
            return outcome, tracer.finish(), outcome.logits.cpu(), self._kind(key, request, outcome)

        outcome, finished, logits, kind = self._in_turn(key, served)
        return self._made(key, engine, outcome, finished, logits, kind, chunks)

    def _made(
        self,
        key: Engine,
        engine: EngineLike | None,
        outcome: Outcome,
        finished: Trace,
        logits: torch.Tensor,
        kind: Kind,
        chunks: list[Chunk],
    ) -> Run:
        if outcome.chunk_tokens is not None:
            known = zip(chunks, outcome.chunk_tokens, strict=True)
            chunks = [dataclasses.replace(chunk, tokens=tokens) for chunk, tokens in known if chunk.text or tokens]
        own = None if outcome.account is None else outcome.account()
        return Run(
            engine=engine if isinstance(engine, str) else key.text(self.device, fastest=self.fastest),
            recipe=key.recipe,
            checkpoint=outcome.model or self.checkpoint.name,
            device=ELSEWHERE if key.elsewhere else device_name(self.device, threads=not key.started),
            dtype="unknown" if key.elsewhere else dtype_name(self.dtype),
            remote=key.remote,
            kind=kind,
            n_prompt=outcome.n_prompt,
            shapes=outcome.shapes,
            tokens=outcome.tokens,
            chunks=tuple(chunks),
            trace=finished,
            logits=logits,
            captures=outcome.captures,
            finite=bool(logits.isfinite().all()),
            account=None if own is None else own.held_against(finished),
            finish_reason=outcome.finish_reason,
        )

    def stream(self, request: Request, engine: EngineLike | None = None) -> Iterator[Chunk]:
        """Yield text as it is made; leaving the loop early stops the engine at its next stage or step, and waits for that.

        An endpoint is not waited for: its connection is closed once it sends more.
        """
        key, gone = self._admitted(request, engine), threading.Event()
        tracer = Tracer(self.device, "off", stop=gone)
        # Unbounded: an engine that waited for its consumer would keep the lab from everybody else; the answer's length bounds it.
        ready: queue.SimpleQueue[tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]] | BaseException | None] = queue.SimpleQueue()

        def deliver(text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = ()) -> None:
            ready.put((text, tokens, logprobs))

        def produce() -> None:
            try:
                bound = self._bind(key, gone)
                tracer.start()
                self._kind(key, request, self._serve(bound, request, tracer, deliver))
                ready.put(None)
            except BaseException as error:  # handed to the consumer, whose call it is
                ready.put(error)

        # What an endpoint makes is waited for on a thread of its own: the lab's is for what computes here.
        thread = EngineThread("fastvl-stream") if key.elsewhere else self._thread
        job, reader = thread.submit(produce), threading.get_ident()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield Chunk(text=item[0], tokens=item[1], time=tracer.delivered(), logprobs=item[2])
        finally:
            gone.set()
            # Not for an endpoint, which may be silent for long; nor where a collection closes what was left in a cycle: that comes
            # on any thread, also on one that the job needs for its end.
            if not job.cancel() and not key.elsewhere and threading.get_ident() == reader:
                job.wait()

    def message(self, request: Request, run: Run) -> dict[str, Any]:
        """A run's answer as OpenAI's message of an assistant: content, reasoning_content, and tool_calls with arguments as JSON.

        It can be sent back in `messages`, before the messages of role "tool" that answer its calls.
        """
        thinks = not request.raw and self.grammars.thinks
        cut = run.finish_reason == "length"
        return as_message(said_in(run.text, thinks=thinks, calls=bool(request.offered), cut=cut))

    def job(
        self,
        request: Request,
        engine: EngineLike,
        *,
        number: int = 0,
        trace: Level = "stages",
        on_end: Callable[[Run | Exception], object],
        on_begin: Callable[[], object] = lambda: None,
        on_chunk: Callable[[Chunk], object] | None = None,
        stop: threading.Event | None = None,
        since_ns: int | None = None,
    ) -> Job:
        """A request for `serve`, whose clock starts now, or has run since `since_ns` (`time.perf_counter_ns`).

        on_begin: called when it is admitted; on_end: given its run or its error; on_chunk, stop: as `run` has them.
        """
        key, tracer, chunks = self._admitted(request, engine), Tracer(self.device, trace, stop=stop), list[Chunk]()

        def deliver(text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = ()) -> None:
            chunks.append(Chunk(text=text, tokens=tokens, time=tracer.delivered(), logprobs=logprobs))
            if on_chunk is not None:
                on_chunk(chunks[-1])

        def made(outcome: Outcome | Exception) -> Run | Exception:
            if isinstance(outcome, Exception):
                return self._in_words(outcome)
            try:
                finished, logits = tracer.finish(), outcome.logits.cpu()
                return self._made(key, engine, outcome, finished, logits, self._kind(key, request, outcome), chunks)
            except Exception as error:  # a device may tell only now of what has failed
                return self._in_words(error)

        since = time.perf_counter_ns() if since_ns is None else since_ns
        return Job(
            number=number,
            request=request,
            tracer=tracer,
            deliver=deliver,
            begin=on_begin,
            end=lambda o: on_end(made(o)),
            since_ns=since,
        )

    def serve(self, engine: EngineLike, inbox: Inbox, on_step: OnStep, *, lingers: bool = True) -> None:
        """Serve jobs as they come, on the lab's thread, until the inbox is closed and all have ended.

        What a server computes is asked of it by all at once. on_step: given each step of the lab's own engines as it ends. lingers:
        whether to wait for more where there are none.
        """
        key = self.engine(engine)

        def serve() -> None:
            bound = self._bind(key)

            def run(job: Job) -> Outcome:
                return bound.run(job.request, job.tracer, job.deliver)

            if isinstance(bound, Pipeline):
                bound.serve(inbox, on_step, lingers=lingers)
            elif key.remote:
                side_by_side(run, inbox, lingers=lingers)
            else:
                one_at_a_time(run, self.device, inbox, on_step, lingers=lingers)

        if key.elsewhere:
            serve()
        else:
            self.compute(serve)

    def warm_up(
        self, recipe: EngineLike, shapes: Iterable[Shape], *, max_new_tokens: int = 32, progress: bool = True
    ) -> tuple[Capture, ...]:
        """Serve a request of each shape: what is built, tuned, compiled and captured for it is there before the first that counts.

        shapes: (width, height) of an image, or a `Request` as it will come. Everything that a request does is done, from unpacking
        its image to its `max_new_tokens`, and caches keep of it what they keep of any request. Decode steps are made ready first,
        for answers of any length that a session has room for. The largest shape had best come first: graphs captured later then
        find memory that they can share. progress: whether to show a bar. Returns what was compiled and captured. Raises
        `RequestError`, and what `run` raises.
        """
        requests, key = requests_of(shapes, max_new_tokens), self.engine(recipe)
        self._check_turn(key)

        def steps() -> tuple[Capture, ...]:
            bound = self._bind(key)
            with self._computing():
                return bound.warm_up(Tracer(self.device, "off")) if isinstance(bound, Pipeline) else ()

        made = [] if key.remote else [*self._thread.call(steps)]
        for request in tqdm(requests, desc="warm-up", unit="shape", disable=not progress):
            made += self.run(request, recipe, trace="off").captures
        return tuple(made)

    def captures(self, recipe: EngineLike) -> tuple[Capture, ...]:
        """What has been compiled and captured for a recipe and is kept, and what each has cost; none before its first run."""
        bound = self._engines.get(self.engine(recipe))
        return bound.stages.captures if isinstance(bound, Pipeline) else ()

    def apart(self) -> Lab:
        """The same loaded checkpoint with caches and engines of its own: neither lab finds what the other's requests left behind.

        Both together still run one request at a time.
        """
        other = copy.copy(self)
        other.memory, other._engines, other._held = Memory(self.checkpoint, self.memory.budget), OrderedDict(), Counter()
        other.grammars = Grammars(self.checkpoint)
        if self.graphs is not None:
            other.graphs = _graph_store(self.device, self.graphs.max_bytes)
        other._seen = {}
        return other

    def logits_along(self, request: Request, engine: EngineLike, tokens: Sequence[int]) -> torch.Tensor:
        """An engine's logits of a request's last prompt token, and after each of `tokens` that it is made to go on with.

        float32 [1 + n, vocab], on the host. Raises what `run` raises, `RequestError` for tokens that the model has not, and
        `EndpointError` for an endpoint, which shows no logits.
        """
        key, known = self._admitted(request, engine), self.checkpoint.config.get_text_config().vocab_size
        given = tokens.tolist() if isinstance(tokens, torch.Tensor) else [*tokens]
        for token in given:
            if not (is_number(token) and token in range(known)):
                raise RequestError(f"{quoted(token)} is no token of the model, which has {known}, from 0 on")

        def along() -> torch.Tensor:
            bound = self._bind(key)
            with self._computing():
                return bound.logits_along(request, torch.tensor(given, dtype=torch.int64))

        return self._in_turn(key, along)

    def compute(self, work: Callable[[], T], *, limit: float | None = None) -> T:
        """Do work of the caller's on the lab's thread, in its turn, with the lab's device the current one.

        limit: seconds that it may take, as `Job.result` has them; not for who is on that thread already.
        """

        def on_device() -> T:
            with computing(self.device, self.dtype):
                return work()

        return self._thread.call(on_device, limit=limit)

    @contextmanager
    def hold(self, engines: Iterable[EngineLike]) -> Iterator[None]:
        """Keep these bound, however many others run meanwhile: who measures engines in turn must not bind them anew each time."""
        keys = Counter(self.engine(engine) for engine in engines)
        with self._changing:
            self._held += keys
        try:
            yield
        finally:
            with self._changing:
                self._held -= keys
            # Not waited for: who held them may have left work behind that never ends. Nor is a lab kept for it.
            self._thread.submit(partial(_let_go, weakref.ref(self)))

    def engine(self, engine: EngineLike | None) -> Engine:
        """What `run` would run; raises `RecipeError` for what is no engine."""
        return find("baseline" if engine is None else engine, self.device, fastest=self.fastest)

    def recipe(self, engine: EngineLike) -> Recipe:
        """As `engine`, where nothing but a recipe will do."""
        return find_recipe(engine, self.device, fastest=self.fastest)

    @property
    def fastest(self) -> Recipe:
        """What the text "fastest" means on this lab: what was tuned here, else `Recipe.fastest`; its `origin` says which.

        Read when the lab was made, and by `relearn`: no comparison changes its meaning half-way.
        """
        return self._fastest

    def relearn(self) -> None:
        """Read anew what was learnt here (`fl.tune` does, once it has kept a record)."""
        self._fastest = learnt.fastest(self.checkpoint)

    def _admitted(self, request: Request, engine: EngineLike | None) -> Engine:
        """The engine, where it can be given a request at all."""
        check_request(request)
        key = self.engine(engine)
        self._check_turn(key)
        return key

    def _check_turn(self, key: Engine) -> None:
        if not key.elsewhere:
            self._thread.check_turn()

    def _told(self, key: Engine, callback: Callable[..., object] | None) -> Callable[..., object] | None:
        """The callback; within it no request can have a turn, where the one that it is told of has it and waits for it."""
        if callback is None or key.elsewhere:
            return callback

        def told(*news: Any) -> None:
            with self._thread.telling():
                callback(*news)

        return told

    def _place(self, tell: Callable[[str], object] | None, stop: threading.Event | None) -> Place:
        return Place(
            checkpoint=self.checkpoint,
            memory=self.memory,
            graphs=self.graphs,
            grammars=self.grammars,
            servers=self.servers,
            tell=tell,
            stop=stop,
        )

    def _bind(self, key: Engine, stop: threading.Event | None = None) -> BoundEngine:
        """The engine, bound now or before; on the lab's thread, or for what computes elsewhere on any."""
        with self._changing:
            bound = self._engines.get(key)
            if isinstance(bound, StartedEngine) and not bound.alive:
                self._forget(key)
                bound = None
        if bound is None:
            with self._computing():  # not while others wait for the lock: an endpoint may take long to answer
                bound = key.bind(self._place(None, stop))
        with self._changing:
            bound = self._engines.setdefault(key, bound)  # another thread may have been first
            self._engines.move_to_end(key)
        self._let_go(elsewhere=key.elsewhere)
        return bound

    def _let_go(self, *, elsewhere: bool) -> None:
        """Forget the engines unused for longest beyond `MAX_ENGINES`, of those that compute elsewhere or of the others.

        What is run of them again is cold. Those with a server stay: it takes a minute to start, and little here. What computes here
        goes on the lab's thread, which may be at work on graphs that go with it.
        """
        with self._changing:
            free = [k for k in self._engines if k.elsewhere is elsewhere and k not in self._held and not k.started]
            for key in free[:-MAX_ENGINES]:
                self._forget(key)

    def _forget(self, key: Engine) -> None:
        del self._engines[key]
        self._seen.pop(key, None)

    def _in_turn(self, key: Engine, work: Callable[[], T]) -> T:
        """One request at a time on the device; what an endpoint serves is elsewhere, or takes its own turn here."""
        return work() if key.elsewhere else self._thread.call(work)

    def _serve(self, engine: BoundEngine, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        with self._computing():
            return engine.run(request, tracer, deliver)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """`computing` on the lab's device, with a `DeviceError` in one sentence where memory runs out."""
        try:
            with computing(self.device, self.dtype):
                yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_want_of_memory(error):
                raise
            raise self._in_words(error) from error

    def _in_words(self, error: Exception) -> Exception:
        """A `DeviceError` in the place of one that says that memory has run out; any other as it is.

        The frames in its traceback lose their variables: whoever has the error would hold what has filled the memory.
        """
        if not _is_want_of_memory(error):
            return error
        traceback.clear_frames(error.__traceback__)
        return DeviceError(
            f"{device_name(self.device)} ran out of memory ({next(iter(str(error).splitlines()), 'no detail')}); "
            f"set a smaller max_pixels or max_new_tokens, or load a smaller checkpoint or dtype"
        )

    def _kind(self, key: Engine, request: Request, outcome: Outcome) -> Kind:
        """Whether anything was reused, else whether its engine has run this shape before, to as many tokens or more.

        A step reads more keys than the one before it, for which a library may build a plan; a sampled token has kernels of its own.
        A run that compiled or captured something on its way is cold in any case. What an endpoint reused only the endpoint knows:
        where it does not say, every run of it is of unknown kind.
        """
        if outcome.kind is not None:
            return outcome.kind
        if outcome.reused and not outcome.captures:
            return "cache_hit"
        shape, made = (request.is_greedy, outcome.n_prompt, *(s.grid for s in outcome.shapes)), len(outcome.tokens)
        with self._changing:
            seen = self._seen.setdefault(key, {})
            known = seen.pop(shape, 0)
            seen[shape] = max(known, made)  # the last of them
            if len(seen) > MAX_SHAPES:
                del seen[next(iter(seen))]
        return "cold" if made > known or outcome.captures else "warm"


def _is_want_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def is_lasting(error: BaseException) -> bool:
    """Whether CUDA reports what no later call in this process recovers from, such as an illegal access; want of memory passes."""
    text = str(error)
    lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "Error [CUDA]" in text  # the last is Triton's
    return lost and not isinstance(error, FastvlError) and not _is_want_of_memory(error)


def _let_go(lab: weakref.ref[Lab]) -> None:
    if (held := lab()) is not None:
        held._let_go(elsewhere=False)


def _graph_store(device: torch.device, max_bytes: int) -> GraphStore | None:
    """Room for CUDA graphs, on CUDA."""
    if device.type != "cuda":
        return None
    from fastvl_lab.capture.cuda_graphs import CudaRecorder

    return GraphStore(CudaRecorder(device), max_bytes=max_bytes, max_graphs=MAX_GRAPHS)


@contextmanager
def computing(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make a CUDA device the current one, where Triton launches its kernels, and keep float32 from TF32; nothing on a CPU.

    torch lets cuDNN round a float32 convolution's inputs to TF32, which moves the patch embedding by 2e-3 to 5e-3.
    """
    if device.type != "cuda":
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.cuda.device(device))
        if dtype == torch.float32:
            stack.enter_context(TF32.off())
        yield


class Tf32:
    """torch's switches for TF32, which are the process's: off while anybody computes without it, and then as they were."""

    def __init__(self) -> None:
        self._backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
        self._changing = threading.Lock()
        self._users: set[object] = set()
        self._before: list[bool] = []

    @contextmanager
    def off(self) -> Iterator[None]:
        user = object()
        try:
            with self._changing:
                if not self._users:
                    self._before = [backend.allow_tf32 for backend in self._backends]
                self._users.add(user)
                for backend in self._backends:
                    backend.allow_tf32 = False
            yield
        finally:
            with self._changing:
                self._users.discard(user)
                if not self._users:
                    for backend, allowed in zip(self._backends, self._before, strict=False):
                        backend.allow_tf32 = allowed


TF32 = Tf32()  # of all labs: two devices compute at once


def device_name(device: torch.device, *, threads: bool = True) -> str:
    """What ran: the GPU's name, or the CPU with torch's threads, or else with the cores that a program started here has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)" if threads else f"CPU ({len(os.sched_getaffinity(0))} cores)"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
