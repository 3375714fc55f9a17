"""The clock counts what the trunk computes, and nothing else."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from latent_critic.engine import trunk_clock
from latent_critic.engine.trunk_clock import TrunkClock

FORWARD, BACKWARD, ELSEWHERE = 1.0, 10.0, 100.0


@pytest.fixture
def now(monkeypatch):
    """A clock that only moves when told to."""

    class Now:
        seconds, lock = 0.0, threading.Lock()

        def spend(self, seconds):
            with self.lock:
                self.seconds += seconds

    now = Now()
    monkeypatch.setattr(trunk_clock.time, "perf_counter", lambda: now.seconds)
    return now


class Spend(torch.autograd.Function):
    """Identity whose forward and backward take the given times."""

    @staticmethod
    def forward(ctx, x, now, forward, backward):
        ctx.now, ctx.backward_seconds = now, backward
        now.spend(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.now.spend(ctx.backward_seconds)
        return gradient, None, None, None


class Trunk(nn.Module):
    def __init__(self, now):
        super().__init__()
        self.now, self.weight = now, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return Spend.apply(x * self.weight, self.now, FORWARD, BACKWARD)


@pytest.fixture
def trunk(now):
    return Trunk(now)


@pytest.fixture
def clock(trunk):
    clock = TrunkClock(torch.device("cpu"))
    clock.watch(trunk)
    return clock


def test_forwards_alone(now, trunk, clock):
    with torch.no_grad():
        for _ in range(3):
            trunk(torch.ones(2))
            now.spend(ELSEWHERE)
    assert clock.read() == 3 * FORWARD
    assert clock.read() == 0.0  # since the last reading


def test_backward_counts_from_the_prediction_on(now, trunk, clock):
    prediction = trunk(torch.ones(2))
    loss = Spend.apply(prediction, now, ELSEWHERE, ELSEWHERE).sum()  # a critic head, the loss
    clock.watch_backward(prediction)
    loss.backward()
    clock.backward_done()
    now.spend(ELSEWHERE)
    assert clock.read() == FORWARD + BACKWARD


def test_a_gpu_runs_the_hooks_of_a_backward_in_another_thread(now, trunk, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(now))
    clock, prediction = TrunkClock(torch.device("cuda")), trunk(torch.ones(2))
    clock.watch_backward(prediction)
    with ThreadPoolExecutor(1) as autograd:
        autograd.submit(prediction.sum().backward).result()
    clock.backward_done()
    assert clock.read() == BACKWARD


class Event:
    """A stand-in for CUDA's, in the clock's seconds."""

    def __init__(self, now):
        self.now = now

    def record(self):
        self.at = self.now.seconds

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def test_a_backward_side_by_side_counts_its_share(now, trunk, clock):
    prediction = trunk(torch.ones(2))
    clock.watch_backward(prediction)
    prediction.sum().backward()
    clock.backward_done(1 / 4)
    assert clock.read() == FORWARD + BACKWARD / 4


def test_backward_that_does_not_reach_the_trunk_costs_nothing(now, trunk, clock):
    """Critic-only steps: the prediction has no gradient, or gets none."""
    for frozen in (True, False):
        trunk.requires_grad_(not frozen)
        prediction = trunk(torch.ones(2))
        clock.watch_backward(prediction)
        head = torch.ones((), requires_grad=True)
        Spend.apply(head, now, ELSEWHERE, ELSEWHERE).backward()
        clock.backward_done()
        now.spend(ELSEWHERE)
        assert clock.read() == FORWARD


def test_side_by_side_each_counts_its_share(now):
    """Two threads whose forwards take turns on the clock; neither ends the other's span."""
    clock, trunks = TrunkClock(torch.device("cpu")), [Trunk(now) for _ in range(2)]
    order = [threading.Barrier(2, timeout=60) for _ in range(2)]

    class Meet(nn.Module):
        """A trunk that begins and ends with the other one."""

        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk

        def forward(self, x):
            order[0].wait()
            y = self.trunk(x)
            order[1].wait()
            return y

    with torch.no_grad(), ThreadPoolExecutor(2) as threads:
        modules = [Meet(trunk) for trunk in trunks]
        for module in modules:
            clock.watch(module, side_by_side=2)
        list(threads.map(lambda module: module(torch.ones(2)), modules))
    # On this clock both spans hold both forwards; side by side they are the time of one wall clock.
    assert clock.read() == 2 * FORWARD


def test_a_span_counts_what_calls_no_module(now, clock):
    with clock.span():
        now.spend(3.0)
    now.spend(ELSEWHERE)
    assert clock.read() == 3.0
