"""How long the trunk itself computes: the floor under an iteration's time."""

import time

import torch
from torch import Tensor, nn


class TrunkClock:
    """Sums the seconds inside the trunk's forwards and backwards.

    A backward counts from the moment the gradient reaches the prediction (losses and critic heads are done by then) to
    its end. What sharding does inside these spans (gathering, reducing) counts as the trunk's.
    """

    def __init__(self, device: torch.device, *trunks: nn.Module):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []
        self._begin = None
        for trunk in trunks:
            trunk.register_forward_pre_hook(lambda *_: self._start())
            trunk.register_forward_hook(lambda *_: self._stop())

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self) -> None:
        self._begin = self._now()

    def _stop(self) -> None:
        if self._begin is not None:
            self._spans.append((self._begin, self._now()))
        self._begin = None

    def watch_backward(self, prediction: Tensor) -> None:
        """Call with the prediction before its backward, and `backward_done` after it."""
        if prediction.requires_grad:
            prediction.register_hook(lambda _grad: self._start())

    def backward_done(self) -> None:
        self._stop()

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._on_gpu:
            torch.cuda.synchronize()
            seconds = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        else:
            seconds = sum(end - begin for begin, end in self._spans)
        self._spans.clear()
        return seconds
