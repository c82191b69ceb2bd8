"""One finished run: what it made, and how long each stage took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fastvl_lab import shown
from fastvl_lab.account import OF_WAIT, WAIT, Account
from fastvl_lab.capture.execute import Capture
from fastvl_lab.lasting import About, Lasting, Traced
from fastvl_lab.recipe import Recipe
from fastvl_lab.request import UNNAMED, Chunk, FinishReason, Grid, ImageShape, Kind as Kind
from fastvl_lab.trace import Span, Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

# The device of a run whose engine is behind an address.
ELSEWHERE = "elsewhere"

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
# Bars of an engine's own account are lighter.
_OWN = str.maketrans(dict.fromkeys("█▉▊▋▌", "▒") | dict.fromkeys("▏▎▍", "░"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Run(Lasting):
    """What one engine did with one request.

    `kind` is "cold" for the first run of its engine, shape and thread, and for any run that compiled or captured something (they
    are its `captures`), "warm" after that, "cache_hit" when something was reused from an earlier request. An endpoint's run is what
    the endpoint says of it, and "unknown" where it does not say whether it reused anything. `logits` are those of the last prompt
    token, float32 [vocab] on the host; finite: whether all of them were finite numbers, without which tokens mean nothing.
    `n_prompt` is 0 where an endpoint does not count. remote: the engine is behind an address, here or elsewhere, and shows neither
    its pixels nor its logits. `account` is what the endpoint's engine tells of the request by its own clock. finish_reason: why the
    answer ended, None where that is not known.
    """

    engine: str
    recipe: Recipe | None
    checkpoint: str
    device: str
    dtype: str
    kind: Kind
    n_prompt: int
    shapes: tuple[ImageShape, ...]
    tokens: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    trace: Trace
    logits: torch.Tensor
    captures: tuple[Capture, ...] = ()
    finite: bool = True
    remote: bool = False
    account: Account | None = None
    finish_reason: FinishReason | None = None

    @property
    def ttft(self) -> float:
        """Seconds from the request's bytes to the first text in the consumer's hands."""
        return self.trace.first_chunk_ns / 1e9

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first chunk, or None when everything came at once."""
        later = sum(len(chunk.tokens) for chunk in self.chunks[1:])
        return (self.chunks[-1].time - self.chunks[0].time) / later if later else None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def made(self, tokens: tuple[int, ...], text: str) -> bool:
        """Whether it made these tokens of this text; where an endpoint does not name all of them, as many, and the same text."""
        if UNNAMED in self.tokens or UNNAMED in tokens:
            return len(self.tokens) == len(tokens) and self.text == text
        return self.tokens == tokens

    @property
    def visual_tokens(self) -> int:
        return sum(shape.visual_tokens for shape in self.shapes)

    def subtitle(self) -> str:
        """What became of the images: unpacked size, resized size, patches, visual tokens."""
        if self.remote:
            return f"{self.n_prompt} prompt tokens, as the endpoint counts them" if self.n_prompt else "prompt tokens not counted"
        if not self.shapes:
            return f"text only → {self.n_prompt} prompt tokens"
        first, more = self.shapes[0], len(self.shapes) - 1
        patches = sum(shape.grid.n_patches for shape in self.shapes)
        others = f" and {more} more" if more else ""
        return (
            f"image {first.width}×{first.height}{others} → resized {first.resized_width}×{first.resized_height} → "
            f"{patches} patches → {self.visual_tokens} visual tokens → {self.n_prompt} prompt tokens"
        )

    def title(self) -> str:
        return f"{self.checkpoint} · {self.engine} · {self.device} {self.dtype} · {in_words(self.kind)}"

    def stage_table(self) -> list[dict[str, Any]]:
        """One row a stage, then `unaccounted` and `TTFT`: name, host ms, device ms (CUDA only), share of TTFT.

        Below `wait` stand its parts, "wait: …", where the engine tells of them; their clock is its own, and they add up to `wait`.
        """
        device, parts = self.trace.stages("device"), self.own_spans()
        rows: list[dict[str, Any]] = []
        for name, ns in self.trace.stages().items():
            rows.append({"stage": name, "host_ms": ns / 1e6, "device_ms": device[name] / 1e6 if name in device else None})
            if name == WAIT:
                rows += [{"stage": part.name, "host_ms": part.duration_ns / 1e6, "device_ms": None} for part in parts]
        rows.append({"stage": "unaccounted", "host_ms": self.trace.unaccounted_ns / 1e6, "device_ms": None})
        rows.append({"stage": "TTFT", "host_ms": self.ttft * 1e3, "device_ms": None})
        return [row | {"share": row["host_ms"] / (self.ttft * 1e3)} for row in rows]

    def own_spans(self) -> tuple[Span, ...]:
        """`wait`, split as far as the engine tells (`Account.spans`)."""
        return () if self.account is None else self.account.spans(self.trace)

    def without_logits(self, **changes: Any) -> Run:
        """For whoever holds many: logits may be half a megabyte, of which a slice holds all. changes: of other fields."""
        return replace(self, logits=self.logits.new_empty(0), **changes)

    def waterfall(self) -> go.Figure:
        """The TTFT waterfall as a plotly figure; needs the extra "notebooks"."""
        return shown.figure(self)

    def to_record(self) -> dict[str, Any]:
        """Everything but logits and logprobs as JSON-ready data; `from_record` reads it back."""
        return {
            "engine": self.engine,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "checkpoint": self.checkpoint,
            "device": self.device,
            "dtype": self.dtype,
            "kind": self.kind,
            "n_prompt": self.n_prompt,
            "shapes": [{**vars(shape), "grid": list(shape.grid)} for shape in self.shapes],
            "tokens": list(self.tokens),
            "chunks": [{"text": c.text, "tokens": list(c.tokens), "time": c.time} for c in self.chunks],
            "trace": self.trace.to_record(),
            "captures": [vars(capture) for capture in self.captures],
            "finite": self.finite,
            "remote": self.remote,
            "account": None if self.account is None else self.account.to_record(),
            "finish_reason": self.finish_reason,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        """Read `to_record`'s form; the logits are empty."""
        data = dict(record)
        data["recipe"] = None if record["recipe"] is None else Recipe.from_dict(record["recipe"])
        data["shapes"] = tuple(ImageShape(**{**shape, "grid": Grid(*shape["grid"])}) for shape in record["shapes"])
        data["tokens"] = tuple(record["tokens"])
        data["chunks"] = tuple(Chunk(**{**chunk, "tokens": tuple(chunk["tokens"])}) for chunk in record["chunks"])
        own = record.get("account")  # the same
        data["account"] = None if own is None else Account.from_record(own)
        data["trace"] = Trace.from_record(record["trace"])
        data["captures"] = tuple(Capture(**capture) for capture in record.get("captures", ()))  # absent in older records
        data["remote"] = record.get("remote", record["device"] == ELSEWHERE)
        return cls(**data, logits=torch.empty(0))

    def row(self) -> dict[str, Any]:
        """What it took as one row of numbers: TTFT, TPOT, what is unaccounted, and each stage, in ms."""
        return {
            "kind": self.kind,
            "visual_tokens": self.visual_tokens,
            "prompt_tokens": self.n_prompt,
            "new_tokens": len(self.tokens),
            "ttft_ms": self.ttft * 1e3,
            "tpot_ms": None if self.tpot is None else self.tpot * 1e3,
            "unaccounted_ms": self.trace.unaccounted_ns / 1e6,
            **{f"{stage}_ms": ns / 1e6 for stage, ns in self.trace.stages().items()},
            **{f"device_{stage}_ms": ns / 1e6 for stage, ns in self.trace.stages("device").items()},
        }

    def traced(self, label: str, since_ns: int = 0) -> Traced:
        """Its trace under a label. since_ns: when it began, among others."""
        return Traced(label=label, trace=self.trace, ours=self.recipe is not None, since_ns=since_ns)

    def about(self) -> About:
        return About(
            title=f"{self.title()}: {self.summary()}",
            findings=[self.subtitle()],
            environment={"device": self.device, "dtype": self.dtype},
            samples=[{"checkpoint": self.checkpoint, "engine": self.engine, **self.row()}],
            traces=[self.traced(self.title())],
        )

    def _bar(self, intervals: list[tuple[int, int]]) -> str:
        """Intervals of TTFT in nanoseconds as a bar of block characters, at the place where they happened."""
        scale = _BAR_WIDTH * 8 / max(self.trace.first_chunk_ns, 1)
        cells = [0] * _BAR_WIDTH
        for start, end in intervals:
            for eighth in range(round(start * scale), max(round(end * scale), round(start * scale) + 1)):
                if eighth // 8 < _BAR_WIDTH:
                    cells[eighth // 8] += 1
        return "".join("█" if filled >= 8 else _EIGHTHS[filled] for filled in cells)

    def stage_bars(self) -> list[tuple[str, float, float, str]]:
        """The stage table's names, host ms and shares, each with a bar of text that lies where the stage ran."""
        intervals: dict[str, list[tuple[int, int]]] = {"unaccounted": list(self.trace.gaps())}
        for span in (*self.trace.within_ttft(), *self.own_spans()):
            intervals.setdefault(span.name, []).append((span.start_ns, span.end_ns))
        rows = [(row["stage"], row["host_ms"], row["share"]) for row in self.stage_table()]
        bars = [self._bar(intervals.get(stage, [])) for stage, *_ in rows]
        return [(*row, bar.translate(_OWN) if row[0].startswith(OF_WAIT) else bar) for row, bar in zip(rows, bars, strict=True)]

    def summary(self) -> str:
        """TTFT, TPOT, and how many tokens in how many chunks."""
        per_token = "" if self.tpot is None else f", TPOT {milliseconds(self.tpot * 1e3)}"
        return f"TTFT {self.ttft * 1e3:.1f} ms{per_token}, {len(self.tokens)} tokens in {len(self.chunks)} chunks"

    def __repr__(self) -> str:
        lines = [self.title(), self.subtitle(), self.summary()]
        if not self.finite:
            lines.append("its logits are not finite: its tokens mean nothing")
        bars = self.stage_bars()
        width = max(13, *(len(stage) for stage, *_ in bars))
        lines += [f"{stage:<{width}} {ms:9.3f} ms {share:6.1%} {bar}".rstrip() for stage, ms, share, bar in bars]
        if beside := self.trace.stages("beside"):
            lines.append("beside, on another thread: " + ", ".join(f"{stage} {ns / 1e6:.3f} ms" for stage, ns in beside.items()))
        if self.account is not None:
            lines.append(f"its own account (▒), {self.account}")
        lines += [f"{c.how} of {c.stage}: {c.seconds:.2f} s, {c.n_bytes / 1e6:.1f} MB ({c.shape})" for c in self.captures]
        if self.trace.padding:
            lines.append("padding: " + ", ".join(f"{share:.1%} of {stage}" for stage, share in self.trace.padding.items()))
        if self.trace.counts:
            lines.append("counted: " + ", ".join(f"{name} {times}" for name, times in self.trace.counts.items()))
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """A figure where plotly can be shown, a table where only HTML can, and text in a terminal."""
        return shown.bundle(self)


def milliseconds(ms: float) -> str:
    """A duration with three significant digits, in seconds from one on."""
    if abs(ms) >= 1000:
        return f"{ms / 1e3:.2f} s"
    decimals = 0 if abs(ms) >= 100 else 1 if abs(ms) >= 10 else 2 if abs(ms) >= 0.1 or ms == 0 else 3
    return f"{ms:.{decimals}f} ms"


def in_words(kind: Kind) -> str:
    """A kind as it is shown."""
    return {"cache_hit": "cache hit", "unknown": "reuse unknown"}.get(kind, kind)
