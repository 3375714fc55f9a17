"""How much of what pictures earn could be foreseen at each denoising step: what no critic can exceed."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones.base import Conditioning
from latent_critic.engine.denoising import DenoisingLoop
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.rollout import rows
from latent_critic.engine.trajectory import Trajectory
from latent_critic.engine.transitions import Schedule


def foreseeable(
    model: ActorCritic,
    drawn: Trajectory,
    unconditional: Conditioning | None,
    score: Callable[[Tensor, slice], Tensor],
    size: int,
    count: int,
) -> list[float]:
    """The share of the reward's variance that a step's latents decide, for each of the K steps.

    From the latents of each step each of the N trajectories is continued `count` times with other noise, `size` of them
    at a time. score: clean latents [B, ...] of these trajectories -> what they earn [B, M].
    """
    steps, shares = drawn.trained_steps.stop, []  # after these all continuations are one
    for step in tqdm(range(steps), "continuing", unit="step"):
        tail = Schedule(drawn.table[step:], drawn.timesteps[step:])
        inputs = drawn.latents.shape[2:], size, drawn.conditioning, unconditional
        loop = DenoisingLoop(model, tail, *inputs)
        earned = []
        for number in range(count):
            # Keys that no trajectory has, nor another continuation.
            keys = drawn.sample_indices + (1 + step * count + number) * (1 << 40)
            earned.append(_continue(loop, drawn, step, keys, score, size))
        shares.append(between(torch.stack(earned, 1)))
    return shares + [1.0] * (len(drawn.timesteps) - steps)


def _continue(
    loop: DenoisingLoop, drawn: Trajectory, step: int, keys: Tensor, score: Callable[[Tensor, slice], Tensor], size: int
) -> Tensor:
    """[N, M] of one continuation each."""
    earned = []
    for start in range(0, len(keys), size):
        batch = slice(start, start + size)
        noises = [drawn.latents[batch, step].cpu()]
        noises += [keyed_noise(drawn.seed, keys[batch], k, noises[0].shape[1:]) for k in range(len(loop.timesteps))]
        latents, *_ = loop(torch.stack(noises), rows(drawn.conditioning, batch))
        earned.append(score(latents[:, -1], batch))
    return torch.cat(earned)


def between(groups: Tensor) -> float:
    """The share of the variance of [N, count, M] numbers that lies between their groups, mean over M."""
    groups = groups.double()
    within = groups.var(1).mean(0)
    means = groups.mean(1).var(0) - within / groups.shape[1]
    return (means / (means + within)).mean().item()
