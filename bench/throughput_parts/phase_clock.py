"""How long the phases of an iteration take, on the main thread and beside it."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class _Span:
    phase: str
    is_main: bool
    share: float
    begin: Any
    end: Any = None
    inner: list["_Span"] = field(default_factory=list)


class PhaseClock:
    """Sums the seconds of named spans; a span within another of its thread counts for itself alone.

    On a GPU a span is the time between two events of its stream, so that nothing waits for the device; with `on_host`
    it is the host's, for work that never reaches the device. `share` is for threads that work side by side while the
    main thread waits for them: of so many, each counts with its share of the time, as the main thread's. What a CUDA
    graph captures has no time of its own, and is no span.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[_Span] = []
        self._open = threading.local()

    @contextmanager
    def span(self, phase: str, on_host: bool = False, share: float = 1.0) -> Iterator[None]:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            yield
            return
        stack = self._open.__dict__.setdefault("stack", [])
        is_main = share < 1 or threading.current_thread() is threading.main_thread()
        span = _Span(phase, is_main, share, self._now(on_host))
        stack.append(span)
        try:
            yield
        finally:
            stack.pop()
            span.end = self._now(on_host)
            if stack:
                stack[-1].inner.append(span)
            else:
                self._spans.append(span)

    def timed(self, phase: str, function: Callable, on_host: bool = False, share: float = 1.0) -> Callable:
        """`function`, each call a span."""

        def call(*args, **kwargs):
            with self.span(phase, on_host, share):
                return function(*args, **kwargs)

        return call

    def read(self) -> dict[str, dict[str, float]]:
        """Seconds by phase since the last reading: {"main": {...}, "beside": {...}}."""
        if self._on_gpu:
            torch.cuda.synchronize()
        sums: dict[str, dict[str, float]] = {"main": defaultdict(float), "beside": defaultdict(float)}
        spans, self._spans = self._spans, []
        while spans:
            span = spans.pop()
            within = sum(_seconds(inner) for inner in span.inner)
            sums["main" if span.is_main else "beside"][span.phase] += span.share * (_seconds(span) - within)
            spans += span.inner
        return {place: dict(phases) for place, phases in sums.items()}

    def _now(self, on_host: bool):
        if on_host or not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(span: _Span) -> float:
    if isinstance(span.begin, float):
        return span.end - span.begin
    return span.begin.elapsed_time(span.end) / 1000
