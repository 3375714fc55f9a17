"""The clock counts what the trunk computes, and nothing else."""

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
        seconds = 0.0

        def spend(self, seconds):
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
    return TrunkClock(torch.device("cpu"), trunk)


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
