"""Engines that come as a program with an OpenAI-compatible server: what is true of each is data, all else is here.

A text such as "vllm, graphs=off, max_batch=4, --block-size=32" names the engine, options whose names several engines share, and
flags of its own, which go to its command line as they are. Nothing is kept from one request to the next: caches of prefixes and of
images are off.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fastvl_lab.cache.slotted import KvShape
from fastvl_lab.checkpoint import Checkpoint
from fastvl_lab.engine import Engine, PeerInfo, PeerOption, Place, engine
from fastvl_lab.errors import EndpointError, RecipeError, quoted
from fastvl_lab.peer.http import HttpPeer
from fastvl_lab.pipeline import Outcome
from fastvl_lab.processes.server import Server, Tell
from fastvl_lab.request import Request
from fastvl_lab.streaming.text import Deliver
from fastvl_lab.trace import Tracer

# Seconds between two looks of a bar: where somebody sees it, and in a file, which keeps each.
_AGAIN, _AGAIN_IN_A_FILE = 0.1, 15.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the lab wants of a server, whichever it is.

    source: a folder or hub id. name: how the server shall call the model. max_batch: requests at once. kv_bytes: for keys and
    values, as much as the lab itself takes by default: two sessions.
    """

    source: str
    name: str
    port: int
    device: torch.device
    dtype: str
    session_len: int
    max_batch: int
    kv_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: str, *, max_batch: int) -> Wanted:
        return cls(
            source=source,
            name=checkpoint.name,
            port=_free_port(),
            device=checkpoint.device,
            dtype=str(checkpoint.dtype).removeprefix("torch."),
            session_len=checkpoint.session_len,
            max_batch=max_batch,
            kv_bytes=max(2 * checkpoint.session_len * KvShape.of(checkpoint).bytes_per_token, 2**28),
        )


@dataclass(frozen=True, kw_only=True)
class Value:
    """What an option's value adds to the command line, and to the environment as NAME=value.

    needs: another option's value, as "option=value", without which the engine would pass this one over.
    """

    name: str
    flags: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    needs: str = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of an engine's text: one of `values`, of which the first is the default, or a whole number.

    flag: what the number follows on the command line. unless: the number where none is given.
    """

    name: str
    does: str
    values: tuple[Value, ...] = ()
    flag: str = ""
    unless: str = ""

    @property
    def default(self) -> Value:
        return self.values[0] if self.values else Value(name=self.unless)

    def read(self, text: str, whose: str) -> Value:
        """What a value adds; raises `RecipeError`."""
        if not self.values:
            if not re.fullmatch(r"[1-9]\d{0,8}", text):
                raise RecipeError(f"{whose} has {self.name}={quoted(text)}; it must be a whole number from 1 to 999999999")
            return Value(name=text, flags=(self.flag, text) if self.flag and text != self.unless else ())
        for value in self.values:
            if value.name == text:
                return value
        choices = ", ".join(value.name for value in self.values)
        raise RecipeError(f"{whose} has {self.name}={quoted(text)}; the choices are {choices}")


def switch(name: str, does: str, *values: str, **flags: Sequence[str]) -> Option:
    """An option of some of "auto", "on" and "off", the default first; flags: what a value that is no default adds."""
    return Option(name=name, does=does, values=tuple(Value(name=value, flags=tuple(flags.get(value, ()))) for value in values))


def among(name: str, does: str, flag: str, choices: Mapping[str, str]) -> Option:
    """An option that the engine chooses itself unless told: its values, and how each is spelt behind the flag."""
    told = (Value(name=value, flags=(flag, spelt)) for value, spelt in choices.items())
    return Option(name=name, does=does, values=(Value(name="auto"), *told))


# What every engine has; each says it in a flag of its own, from `Wanted`.
MAX_BATCH = Option(name="max_batch", does="requests that may share a step; 8 by default", unless="8")


@dataclass(frozen=True, kw_only=True)
class Program:
    """An engine as a program.

    word: the first of its texts, and the program on the PATH. variable: of the environment, a path to the program. package: whose
    version is shown. serve: the words that make the program a server; module: those for a Python, where `variable` names one.
    arguments: the rest of its command line. env: what it needs in its environment. ready: the path that answers 200 once requests
    can be served. dtypes, devices: those that it has.
    """

    word: str
    does: str
    variable: str
    package: str
    serve: tuple[str, ...]
    arguments: Callable[[Wanted], Sequence[str]]
    env: Callable[[Wanted], Mapping[str, str]]
    options: tuple[Option, ...]
    ready: str = "/health"
    module: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")

    def command(self) -> tuple[str, ...]:
        """How it is called here; raises `EndpointError` where it is not found."""
        given = os.environ.get(self.variable, "").strip()
        if not given:
            found = shutil.which(self.word)
            if found is None:
                raise EndpointError(
                    f"no program {self.word} on the PATH; set {self.variable} to that of an environment that has it"
                )
            return found, *self.serve
        path = Path(given).expanduser()
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise EndpointError(f"{self.variable} is {given!r}, which is no program; it must be a path such as …/bin/{self.word}")
        path = path.absolute()
        return str(path), *(self.module if self.module and path.name.startswith("python") else self.serve)

    def version(self) -> str | None:
        """As the environment around the program says it, None where it does not; the program is not run."""
        try:
            program = Path(self.command()[0])
        except EndpointError:
            return None
        for home in dict.fromkeys((program.parent.parent, program.resolve().parent.parent)):
            for found in home.glob(f"lib*/python3*/*-packages/{self.package}-*.dist-info"):
                return found.name.removesuffix(".dist-info").rpartition("-")[2]
        return None

    def about(self) -> PeerInfo:
        """What `peers` says of it."""
        missing = ""
        try:
            self.command()
        except EndpointError as error:
            missing = str(error)
        if not missing and "cpu" not in self.devices and not torch.cuda.is_available():
            missing = f"{self.word} needs a CUDA device, and torch sees none"
        options = tuple(
            PeerOption(name=option.name, values=tuple(value.name for value in option.values), does=option.does)
            for option in self.options
        )
        return PeerInfo(word=self.word, does=self.does, missing=missing, version=self.version(), options=options)

    def read(self, text: str) -> Engine:
        """Read "word, option=value, --flag=value"; raises `RecipeError`."""
        word, *pieces = _pieces(text)
        known, flags = {option.name: option for option in self.options}, []
        chosen: dict[str, Value] = {}
        for piece in pieces:
            name, _, value = (part.strip() for part in piece.partition("="))
            if piece.startswith("--"):
                flags.append(piece)
            elif name in chosen:
                raise RecipeError(f"{text!r} has {name} twice")
            elif name not in known:
                raise RecipeError(
                    f"{text!r} has {quoted(piece)}; the options are {', '.join(known)}, or flags of its own: --flag=value"
                )
            else:
                chosen[name] = known[name].read(value, repr(text))
        values = {name: chosen.get(name, option.default) for name, option in known.items()}
        for name, chosen_value in chosen.items():
            if chosen_value.needs and chosen_value.needs not in [f"{other}={value.name}" for other, value in values.items()]:
                raise RecipeError(f"{text!r} has {name}={chosen_value.name}, which means nothing without {chosen_value.needs}")
        changed = [f"{name}={value.name}" for name, value in values.items() if value.name != known[name].default.name]
        name = ", ".join([word, *changed, *flags])
        return Engine(
            name=name,
            bind=partial(self._bind, name, values, flags),
            remote=True,
            started=True,
            held_against="transformers",
        )

    def launch(self, wanted: Wanted, values: Mapping[str, Value], flags: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Command line and environment; raises `EndpointError` for what the engine cannot do, `RecipeError` for a flag twice."""
        for what, value, choices in (("device", wanted.device.type, self.devices), ("dtype", wanted.dtype, self.dtypes)):
            if value not in choices:
                raise EndpointError(
                    f"{self.word} has no {what} {value}, which the lab has; load one with {what}={' or '.join(choices)}"
                )
        arguments = [*self.arguments(wanted), *(flag for value in values.values() for flag in value.flags)]
        for flag in flags:
            if (own := flag.partition("=")[0].replace("_", "-")) in arguments:
                raise RecipeError(f"{self.word} is given {own}, which the lab sets itself")
        command = self.command()
        env = _environment(command[0], wanted.device) | dict(self.env(wanted))
        env |= dict(pair.split("=", 1) for value in values.values() for pair in value.env)
        return (*command, *arguments, *flags), env

    def _bind(self, name: str, values: Mapping[str, Value], flags: Sequence[str], place: Place) -> StartedPeer:
        servers, checkpoint = place.servers, place.checkpoint
        if servers is None:
            raise EndpointError(f"{name} is a server, which nobody keeps here; run it by a lab")

        def start() -> Server:
            self.command()  # before anything is written
            wanted = Wanted.of(checkpoint, servers.folder(checkpoint), max_batch=int(values["max_batch"].name))
            command, env = self.launch(wanted, values, flags)
            return Server(name, command, wanted.port, env=env)

        with _shown(name) if place.tell is None else nullcontext(place.tell) as tell:
            server = servers.get(name, start, self.ready, tell, place.stop)
        return StartedPeer(server, self.ready, checkpoint, caches_nothing=not flags)


def register(program: Program) -> None:
    """Make a program's texts engines."""
    engine(program.word, about=program.about)(program.read)


class StartedPeer:
    """A server that the lab has started, spoken to as to any endpoint.

    caches_nothing: then a run has reused nothing, also where the server does not say.
    """

    def __init__(self, server: Server, ready: str, checkpoint: Checkpoint, *, caches_nothing: bool) -> None:
        self.server, self._ready, self._caches_nothing = server, ready, caches_nothing
        self._peer = HttpPeer(server.address, None, checkpoint.tokenizer)

    @property
    def alive(self) -> bool:
        return self.server.alive

    def processes(self) -> tuple[int, ...]:
        """Ids of the server's processes, and of the one that keeps them."""
        return self.server.kept.processes()

    def run(self, request: Request, tracer: Tracer, deliver: Deliver) -> Outcome:
        """Have one request served; raises `EndpointError`, with what its log says where the server has ended."""
        try:
            outcome = self._peer.run(request, tracer, deliver)
        except EndpointError:
            if self.server.has_ended(self._ready):
                raise EndpointError(self.server.how_it_ended("while it served")) from None
            raise
        return replace(outcome, kind=None) if outcome.kind == "unknown" and self._caches_nothing else outcome

    def logits_along(self, request: Request, tokens: torch.Tensor) -> torch.Tensor:
        """Servers show no logits: raises `EndpointError`."""
        return self._peer.logits_along(request, tokens)


@contextmanager
def _shown(name: str) -> Iterator[Tell]:
    """A bar with the seconds and the log's last line, once there is one to show."""
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    look = {"bar_format": "{desc} [{elapsed}]{postfix}", "leave": False, "mininterval": _AGAIN if is_seen else _AGAIN_IN_A_FILE}
    with ExitStack() as stack:
        bars: list[tqdm[Any]] = []

        def tell(line: str) -> None:
            if not bars:
                bars.append(stack.enter_context(tqdm(desc=f"{name} starts", **look)))
            bars[0].set_postfix_str(line.partition(": ")[2], refresh=False)
            bars[0].update(0)

        yield tell


def _pieces(text: str) -> list[str]:
    """The parts between commas; those inside brackets or braces divide nothing."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _free_port() -> int:
    """A port of 127.0.0.1 that nobody has, as the kernel chooses it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# What is this process's own, and would be wrong in an environment of another.
_OWN = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "VIRTUAL_ENV",
    "VLLM_API_KEY",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


def _environment(program: str, device: torch.device) -> dict[str, str]:
    """This process's environment without what is its own, with the program's tools first, and the lab's device alone in sight."""
    env = {name: value for name, value in os.environ.items() if name not in _OWN}
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    number = device.index or 0
    env["CUDA_VISIBLE_DEVICES"] = "" if device.type == "cpu" else visible[number] if number < len(visible) else str(number)
    path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", os.defpath)])
    return env | {"PATH": path, "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1"}
