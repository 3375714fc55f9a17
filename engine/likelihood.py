"""Log-probabilities of stored trajectories under the policy as it is now."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.transition import transition_log_prob
from .noise import keyed_noise
from .passes import Part
from .trajectory import Trajectory


class Likelihood(NamedTuple):
    """Of n steps of B samples, [B, n]."""

    log_probs: Tensor
    reference_kl: Tensor | None  # KL from the reference's transition, of a number of the latent as log_probs are


def likelihood(trajectory: Trajectory, part: Part, prediction: Tensor, reference: Tensor | None = None) -> Likelihood:
    """prediction, reference: [B n, C, H, W].

    Two transitions have one std, so KL = (mu - mu_ref)^2 / (2 s^2) = b^2 / (2 s^2) (v - v_ref)^2: Flow-GRPO's (arXiv
    2505.05470), for any transition.
    """
    latents, table = trajectory.latents[part.samples], trajectory.table
    found = []
    for i, k in enumerate(range(part.steps.start, part.steps.stop)):
        here = prediction.unflatten(0, (len(latents), -1))[:, i], latents[:, k], latents[:, k + 1], table, k
        if reference is None:
            found.append((transition_log_prob(*here), None))
        else:
            log_prob, distance = transition_log_prob(*here, reference.unflatten(0, (len(latents), -1))[:, i])
            _, b, s = table[k]
            found.append((log_prob, distance * (b / s).square() / 2))
    log_probs, kls = zip(*found, strict=True)
    return Likelihood(torch.stack(log_probs, 1), None if reference is None else torch.stack(kls, 1))


def normalize_ratios(trajectory: Trajectory, part: Part, prediction: Tensor, log_probs: Tensor) -> Tensor:
    """Log-probs [B, n] whose ratios to the rollout's are GRPO-Guard's (arXiv 2510.22319).

    With mean mu and std s of a step, mu_old of the rollout's policy and its noise e, a log-ratio over the latent is

        log rho = mean(e (mu - mu_old)) / s - mean((mu - mu_old)^2) / (2 s^2)

    whose second part pulls every ratio below 1, and whose scale 1 / s differs by step. Here the second part is added
    back and the rest multiplied by s: mean(e (mu - mu_old)). mu_old is z' - s e, e being drawn anew by its key.
    """
    latents = trajectory.latents[part.samples]
    predictions = prediction.unflatten(0, (len(latents), -1)).float()
    old, dims = trajectory.log_probs[part.samples, part.steps], tuple(range(1, latents.ndim - 1))
    normalized = []
    for i, k in enumerate(range(part.steps.start, part.steps.stop)):
        a, b, s = trajectory.table[k]
        noise = keyed_noise(trajectory.seed, trajectory.sample_indices[part.samples], k + 1, latents.shape[2:])
        moved = a * latents[:, k] + b * predictions[:, i] - (latents[:, k + 1] - s * noise.to(latents.device))
        bias = moved.square().mean(dims) / (2 * s.square())
        normalized.append(old[:, i] + s * (log_probs[:, i] - old[:, i] + bias))
    return torch.stack(normalized, 1)
