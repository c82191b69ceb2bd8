"""What Prometheus is told: requests by status, who waits, how full steps and caches are, and where time to first token went."""

from __future__ import annotations

from typing import Any

from fastvl_lab.cache.memory import Memory
from fastvl_lab.errors import require
from fastvl_lab.run import Run
from fastvl_lab.schedule.loop import Step

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """One server's metrics, in a registry of its own, with the memory and the files of its process.

    memory: whose blocks are told of, where the recipe keeps keys and values in blocks.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        client = require("prometheus_client", "serve")
        self._client, self.registry = client, client.CollectorRegistry()
        client.ProcessCollector(registry=self.registry)

        def metric(kind: str, name: str, about: str, *labels: str, **options: Any) -> Any:
            return getattr(client, kind)(f"fastvl_lab_{name}", about, labels, registry=self.registry, **options)

        self.requests = metric("Counter", "requests", "Requests answered, by HTTP status; 499: the client left", "status")
        self.waiting = metric("Gauge", "requests_waiting", "Requests in the queue")
        self.running = metric("Gauge", "requests_running", "Requests under way, which share decode steps where the recipe says so")
        self._tokens = metric("Counter", "tokens", "Tokens, of prompts and answers", "of")
        self._runs = metric("Counter", "runs", "Finished runs, by kind: cold, warm or cache_hit", "kind")
        self._queued = metric(
            "Histogram",
            "queued_seconds",
            "Time until admitted: while its body is read and it waits",
            buckets=_SECONDS,
        )
        self._ttft = metric(
            "Histogram",
            "ttft_seconds",
            "From a request's whole body being there to the first chunk, its time in the queue included",
            buckets=_SECONDS,
        )
        self._tpot = metric("Histogram", "tpot_seconds", "Seconds a token after the first chunk", buckets=_SECONDS)
        self._stages = metric("Histogram", "stage_seconds", "Seconds of TTFT in a stage", "stage", buckets=_SECONDS)
        self._batch = metric("Histogram", "batch_size", "Answers that share a decode step", buckets=_ROWS)
        self._preemptions = metric("Counter", "preemptions", "Times that a request gave its blocks up, to be computed again")
        if memory is not None:
            metric("Gauge", "kv_blocks_used", "Blocks of the KV cache that requests hold").set_function(lambda: memory.blocks[0])
            metric("Gauge", "kv_blocks", "Blocks of the KV cache").set(memory.blocks[1])

    def stepped(self, step: Step) -> None:
        """Note what a step did."""
        if step.decoded:
            self._batch.observe(len(step.decoded))
        self._preemptions.inc(len(step.preempted))

    def served(self, run: Run) -> None:
        """Note a finished run."""
        self._runs.labels(run.kind).inc()
        self._tokens.labels("prompt").inc(run.n_prompt)
        self._tokens.labels("answer").inc(len(run.tokens))
        self._queued.observe(run.trace.stages().get("queued", 0) / 1e9)
        self._ttft.observe(run.ttft)
        if run.tpot is not None:
            self._tpot.observe(run.tpot)
        for stage, ns in run.trace.stages().items():
            self._stages.labels(stage).observe(ns / 1e9)

    def text(self) -> tuple[bytes, str]:
        """All of them, and their content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
