"""PhasedAdamW: torch's AdamW, except that a group with learning rate 0 rests."""

import copy

import pytest
import torch

from latent_critic.engine.optimizer import PhasedAdamW

RATES = (1e-2, 1e-1)


def make(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = [[torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))] for _ in RATES]
    optimizer = kind(
        [{"params": params, "lr": lr} for params, lr in zip(groups, RATES, strict=True)],
        betas=(0.9, 0.95),
        weight_decay=1e-2,
    )
    return groups, optimizer


def step(groups, optimizer, seed, rates=RATES):
    generator = torch.Generator().manual_seed(seed)
    for parameter in sum(groups, []):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.step()


def snapshot(groups, optimizer, number):
    return copy.deepcopy([(p.detach(), optimizer.state[p]) for p in groups[number]])


def assert_same(left, right):
    for (weight, state), (other_weight, other_state) in zip(left, right, strict=True):
        assert torch.equal(weight, other_weight)
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[key], other_state[key]) for key in state)


def test_equals_adamw_while_nothing_rests():
    ours, theirs = make(PhasedAdamW), make(torch.optim.AdamW)
    for seed in range(5):
        step(*ours, seed)
        step(*theirs, seed)
    for number in (0, 1):
        assert_same(snapshot(*ours, number), snapshot(*theirs, number))


@pytest.mark.parametrize("resting", [0, 1])
def test_a_resting_group_is_left_alone(resting):
    groups, optimizer = make(PhasedAdamW)
    step(groups, optimizer, 0)
    before, moving = snapshot(groups, optimizer, resting), snapshot(groups, optimizer, 1 - resting)
    rates = [0.0 if number == resting else lr for number, lr in enumerate(RATES)]
    step(groups, optimizer, 1, rates)
    assert_same(snapshot(groups, optimizer, resting), before)
    assert not torch.equal(snapshot(groups, optimizer, 1 - resting)[0][0], moving[0][0])
    assert optimizer.param_groups[resting]["params"] == groups[resting]  # it is only out of the step, not the optimizer


def test_rest_is_as_if_the_step_had_not_been():
    """Group 0 with two rests in between ends where AdamW ends without them; group 1 never rests."""
    (ours, optimizer), (theirs, plain) = make(PhasedAdamW), make(torch.optim.AdamW)
    for seed in range(5):
        step(ours, optimizer, seed, (0.0 if seed in (1, 3) else RATES[0], RATES[1]))
    for seed in (0, 2, 4):
        step(theirs, plain, seed)
    assert_same(snapshot(ours, optimizer, 0), snapshot(theirs, plain, 0))
    assert all(optimizer.state[p]["step"] == 5 for p in ours[1])


def test_group_is_given_back_when_a_step_fails():
    groups, optimizer = make(PhasedAdamW)
    optimizer.param_groups[0]["lr"] = 0.0

    def fail():
        raise RuntimeError("closure")

    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(fail)
    assert optimizer.param_groups[0]["params"] == groups[0]


def test_plain_adamw_would_move_the_moments():
    """Why the class exists: with gradient 0 and rate 0, AdamW still decays the moments of the resting group."""
    groups, optimizer = make(torch.optim.AdamW)
    step(groups, optimizer, 0)
    before = snapshot(groups, optimizer, 0)
    step(groups, optimizer, 1, (0.0, RATES[1]))
    assert not torch.equal(snapshot(groups, optimizer, 0)[0][1]["exp_avg"], before[0][1]["exp_avg"])
