"""Likelihoods of stored trajectories, and GRPO-Guard's ratios: exactly 1 at first, and of one scale at all steps."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from latent_critic.engine.likelihood import likelihood, normalize_ratios
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.passes import Part
from latent_critic.engine.trajectory import Trajectory
from latent_critic.engine.transitions import ddim_table, flow_sde_table
from latent_critic.kernels.transition import transition_log_prob, transition_step

SHAPE, STEPS, SEED = (2, 4, 4), 5, 3
TABLES = {
    "flow-sde": flow_sde_table(torch.linspace(1.0, 0.0, STEPS + 1), 0.7),
    "ddim": ddim_table(torch.linspace(0.999, 0.05, 1000), torch.tensor([999, 799, 599, 399, 199]), 1.0),
}


def draw(count=6, table="flow-sde", first=100, shape=SHAPE):
    """A trajectory of a policy whose predictions [N, K, ...] are noise."""
    table, indices = TABLES[table], torch.arange(first, first + count)
    predictions = torch.randn(count, STEPS, *shape, generator=torch.Generator().manual_seed(first))
    latents, log_probs = [keyed_noise(SEED, indices, 0, shape)], []
    for k in range(STEPS):
        noise = keyed_noise(SEED, indices, k + 1, shape)
        z, log_prob = transition_step(predictions[:, k], latents[-1], noise, table, k)
        latents.append(z), log_probs.append(log_prob)
    tensors = torch.stack(latents, 1), torch.stack(log_probs, 1), torch.zeros(count, STEPS, 0)
    return Trajectory(*tensors, torch.arange(STEPS), table, {}, [], indices, SEED), predictions


def moved_by(predictions, size=0.05):
    """Another policy's, that differ by so much from place to place."""
    return predictions + size * torch.randn(predictions.shape, generator=torch.Generator().manual_seed(0))


PARTS = [Part(slice(0, 6), slice(0, 4), 1.0), Part(slice(2, 5), slice(1, 2), 1.0), Part(slice(4, 6), slice(1, 4), 1.0)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_likelihood_is_the_transitions_at_each_step(table, part):
    trajectory, predictions = draw(table=table)
    of_part = moved_by(predictions)[part.samples, part.steps].requires_grad_()
    found = likelihood(trajectory, part, of_part.flatten(0, 1))
    assert found.reference_kl is None and found.log_probs.shape == of_part.shape[:2]
    for i, k in enumerate(range(STEPS)[part.steps]):
        z, z_next = trajectory.latents[part.samples, k], trajectory.latents[part.samples, k + 1]
        assert torch.equal(found.log_probs[:, i], transition_log_prob(of_part[:, i], z, z_next, trajectory.table, k))
    (gradient,) = torch.autograd.grad(found.log_probs.sum(), of_part)
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("part", PARTS)
def test_the_same_policy_has_the_rollouts_likelihood_to_the_bit(part):
    trajectory, predictions = draw()
    found = likelihood(trajectory, part, predictions[part.samples, part.steps].flatten(0, 1))
    assert torch.equal(found.log_probs, trajectory.log_probs[part.samples, part.steps])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_the_kl_is_that_of_the_two_gaussians(table, part):
    """In float64, of float32 squares of order 0.0025; with a gradient to the policy's and none to the reference's."""
    trajectory, predictions = draw(table=table)
    reference = predictions[part.samples, part.steps].clone().requires_grad_()
    mine = moved_by(predictions)[part.samples, part.steps].requires_grad_()
    found = likelihood(trajectory, part, mine.flatten(0, 1), reference.flatten(0, 1))
    z = trajectory.latents[part.samples, part.steps].double()
    a, b, s = trajectory.table.double()[part.steps, :, None, None, None].unbind(1)
    here, there = (Normal(a * z + b * v.double(), s.expand_as(z)) for v in (mine, reference))
    expected = kl_divergence(here, there).mean((2, 3, 4))
    torch.testing.assert_close(found.reference_kl.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(found.log_probs, likelihood(trajectory, part, mine.flatten(0, 1)).log_probs)
    gradients = torch.autograd.grad(found.reference_kl.sum(), [mine, reference], allow_unused=True)
    (wanted,) = torch.autograd.grad(expected.sum(), mine)
    torch.testing.assert_close(gradients[0], wanted, rtol=1e-5, atol=1e-9)
    assert gradients[1] is None or not gradients[1].any()
    same = likelihood(trajectory, part, reference.flatten(0, 1), reference.flatten(0, 1))
    assert torch.equal(same.reference_kl, torch.zeros_like(expected, dtype=torch.float32))


# --------------------------------------------------------------------------------------------------- GRPO-Guard's ratio


def log_ratios(trajectory, part, predictions):
    """The plain ones, and GRPO-Guard's."""
    prediction = predictions[part.samples, part.steps].flatten(0, 1)
    log_probs, _ = likelihood(trajectory, part, prediction)
    old = trajectory.log_probs[part.samples, part.steps]
    return log_probs - old, normalize_ratios(trajectory, part, prediction, log_probs) - old


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_a_fresh_batch_has_a_ratio_of_exactly_one(table, part):
    trajectory, predictions = draw(table=table)
    assert not any(ratios.any() for ratios in log_ratios(trajectory, part, predictions))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("table", TABLES)
def test_a_moved_policys_ratio_is_how_far_the_mean_went_along_the_noise(table, part):
    """mean(e (mu - mu_old)) in float64, e drawn by its key, mu_old the rollout's own."""
    trajectory, predictions = draw(table=table)
    moved = moved_by(predictions, 0.2)
    _, found = log_ratios(trajectory, part, moved)
    for i, k in enumerate(range(STEPS)[part.steps]):
        noise = keyed_noise(SEED, trajectory.sample_indices[part.samples], k + 1, SHAPE).double()
        shift = trajectory.table[k, 1].double() * (moved - predictions)[part.samples, k].double()
        expected = (noise * shift).mean((1, 2, 3))
        # Differences of log-probs of order 1 in float32, whose latents were rounded: 2e-7 of up to 3.
        torch.testing.assert_close(found[:, i].double(), expected, rtol=0, atol=1e-6)
        assert expected.abs().max() > 1e-4


def test_the_gradient_is_that_of_the_normalised_ratio():
    """By a prediction: b e / n. The share that pulls ratios below 1 has none left in it."""
    trajectory, predictions = draw()
    part = PARTS[0]
    moved = moved_by(predictions).requires_grad_()
    log_ratios(trajectory, part, moved)[1].sum().backward()
    for k in range(4):
        noise = keyed_noise(SEED, trajectory.sample_indices, k + 1, SHAPE)
        expected = trajectory.table[k, 1] * noise / noise[0].numel()
        # z' - mu_old is s e but for a latent's rounding, 2e-7 over an std of 0.3 and more, over n = 32.
        torch.testing.assert_close(moved.grad[:, k], expected, rtol=0, atol=1e-7)
    assert not moved.grad[:, 4].any()


def test_ratios_have_mean_one_and_one_scale_at_steps_of_any_std():
    """A mean that moves by d in every place. Over samples, plain log-ratios are normal of mean -d^2 / (2 s^2) and std
    d / (s sqrt(n)), GRPO-Guard's of mean 0 and std d / sqrt(n), the same at each step, and ratios of mean
    1 + d^2 / (2 n).

    4000 samples: a std is known to 1.1 %, a mean to std / 63.
    """
    count, shape, d = 4000, (1, 4, 4), 0.2
    trajectory, predictions = draw(count, shape=shape)
    part = Part(slice(0, count), slice(0, STEPS - 1), 1.0)
    a, b, s = trajectory.table[:-1].T
    moved = predictions[:, :-1] + d / b[:, None, None, None]
    plain, found = (x.double() for x in log_ratios(trajectory, part, moved))
    assert s.max() / s.min() > 2
    torch.testing.assert_close(plain.std(0), (d / 4 / s).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(found.std(0), torch.full((4,), d / 4, dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(found.exp().mean(0), torch.ones(4).double(), rtol=0, atol=4 * d / 4 / 63)
    torch.testing.assert_close(plain.mean(0), (-(d**2) / (2 * s**2)).double(), rtol=0.1, atol=0)
