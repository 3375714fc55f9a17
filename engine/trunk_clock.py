"""How long the trunk itself computes: the floor under an iteration's time."""

import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TrunkClock:
    """Sums the seconds inside the trunk's forwards and backwards.

    A backward counts from the moment the gradient reaches the prediction (losses and critic heads are done by then) to
    its end. What runs inside these spans or beside them and slows them counts as the trunk's: sharding's gathering and
    reducing, on a CPU pictures that are decoded on the same cores. Of several micro-batches side by side, each counts
    with its share.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []
        # On a GPU one thread drives the trunk, and waits while autograd runs hooks in a thread of the device's.
        self._running = types.SimpleNamespace() if self._on_gpu else threading.local()

    def watch(self, trunk: nn.Module, side_by_side: int = 1) -> None:
        """Counts the forwards of this module, one of so many that run at a time."""
        trunk.register_forward_pre_hook(lambda *_: self._start())
        trunk.register_forward_hook(lambda *_: self._stop(1 / side_by_side))

    def watch_backward(self, prediction: Tensor | None) -> None:
        """Call with the prediction before its backward, and `backward_done` after it, in the same thread."""
        if prediction is not None and prediction.requires_grad:
            prediction.register_hook(lambda _grad: self._start())

    def backward_done(self, share: float = 1.0) -> None:
        """share: of one backward among so many that run at a time."""
        self._stop(share)

    @contextmanager
    def span(self) -> Iterator[None]:
        """Counts the block: for what calls no module, such as a replayed graph."""
        self._start()
        yield
        self._stop()

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._on_gpu:
            torch.cuda.synchronize()
            seconds = sum(share * begin.elapsed_time(end) for begin, end, share in self._spans) / 1000
        else:
            seconds = sum(share * (end - begin) for begin, end, share in self._spans)
        self._spans.clear()
        return seconds

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self) -> None:
        # What a capture records has no time of its own.
        is_captured = self._on_gpu and torch.cuda.is_current_stream_capturing()
        self._running.begin = None if is_captured else self._now()

    def _stop(self, share: float = 1.0) -> None:
        begin = getattr(self._running, "begin", None)
        if begin is not None:
            self._spans.append((begin, self._now(), share))
        self._running.begin = None
