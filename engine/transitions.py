"""Samplers as tables: every transition is z_next ~ N(a z + b v, s^2), so K steps are [K, 3] rows (a, b, s).

`latent_critic.kernels.transition_step` takes the steps. Tables are computed in float64, stored in float32, on the CPU.
In the formulas:

    flow       z = (1 - sigma) data + sigma noise, the model predicts v = noise - data;
               sigma, sigma' before and after the step, D = sigma - sigma';
               x0 = z - sigma v and x1 = z + (1 - sigma) v: the predicted data and noise
    diffusion  z = sqrt(ab) data + sqrt(1 - ab) noise, ab and ab': alpha-bar before and after the step

Only the first `num_trained_steps` steps are stochastic and trained; the others are the ODE's (s = 0). By default that
is the last one alone: its std is tiny, so that its likelihood would explode.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from latent_critic.engine.errors import UserError

FLOW_TRANSITIONS = ("flow-sde", "dance-sde", "cps", "ode")
DIFFUSION_TRANSITIONS = ("ddim", "ode")
# Beyond these the formula's variance would be negative or shrink again; the SDEs have no limit.
MAX_NOISE_LEVEL = {"cps": 1.0, "ddim": 1.0}


class Schedule(NamedTuple):
    """What a rollout walks through, K steps."""

    table: Tensor  # float32 [K, 3]
    timesteps: Tensor  # float32 [K], what the model is conditioned on, 0..1000

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(self.table.to(device), self.timesteps.to(device))


def ode_table(sigmas: Tensor) -> Tensor:
    """Euler steps of the flow ODE, mu = z - D v: the sampler for evaluation. sigmas: [K+1], descending to 0."""
    sigma, sigma_next = _pairs(sigmas)
    return _table(torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma))


def flow_sde_table(sigmas: Tensor, noise_level: float, num_trained_steps: int | None = None) -> Tensor:
    """Flow-GRPO's SDE (arXiv 2505.05470): w = noise_level sqrt(sigma / (1 - sigma)), s = w sqrt(D),

        mu = z (1 - w^2 D / (2 sigma)) - v D (1 + w^2 (1 - sigma) / (2 sigma)).

    w is infinite at sigma = 1, so there its 1 - sigma takes the second noise level of the schedule, as in the authors'
    code. sigmas: [K+1], descending to 0.
    """
    sigma, _ = _pairs(sigmas)
    # A schedule computed in float32 may miss 1 by a rounding error, where w would be finite, but thousands.
    starts_at_one = 1.0 - sigma < 1e-6
    sigma_below_one = torch.where(starts_at_one, sigmas[1].to(torch.float64), sigma)
    w = noise_level * (sigma / (1.0 - sigma_below_one)).sqrt()
    return _score_sde_table(sigmas, w, num_trained_steps)


def dance_sde_table(sigmas: Tensor, noise_level: float, num_trained_steps: int | None = None) -> Tensor:
    """DanceGRPO's SDE (arXiv 2505.07818): mean and std of `flow_sde_table` with constant w = noise_level.

    sigmas: [K+1], descending to 0.
    """
    sigma, _ = _pairs(sigmas)
    return _score_sde_table(sigmas, torch.full_like(sigma, noise_level), num_trained_steps)


def cps_table(sigmas: Tensor, noise_level: float, num_trained_steps: int | None = None) -> Tensor:
    """Coefficients-preserving sampling (arXiv 2509.05952): s = sigma' sin(noise_level pi / 2),

        mu = (1 - sigma') x0 + sqrt(sigma'^2 - s^2) x1.

    The noise added never exceeds what sigma' allows, so s = 0 in the last step, always. noise_level: 0..1.
    sigmas: [K+1], descending to 0.
    """
    sigma, sigma_next = _pairs(sigmas)
    angle = _trained(torch.full_like(sigma, 0.5 * math.pi * noise_level), num_trained_steps)
    s = sigma_next * angle.sin()
    noise_kept = sigma_next * angle.cos()
    return _table(1.0 - sigma_next + noise_kept, noise_kept * (1.0 - sigma) - (1.0 - sigma_next) * sigma, s)


def ddim_table(
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    noise_level: float,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float = 1.0,
    num_trained_steps: int | None = None,
    next_timesteps: Tensor | None = None,
) -> Tensor:
    """DDIM with eta = noise_level (arXiv 2010.02502, eq. 12 and 16): s^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab'),

        mu = sqrt(ab') x0 + sqrt(1 - ab' - s^2) eps.

    alphas_cumprod: [T]. timesteps: integer [K], descending. next_timesteps: integer [K], ab' of a step is ab of these;
    None is each timestep's successor, and below 0, as after the last, ab' is `final_alpha_cumprod` (1, or
    alphas_cumprod[0] with diffusers' set_alpha_to_one=False).
    prediction_type: what the model predicts, "epsilon" (eps) or "v_prediction" (sqrt(ab) eps - sqrt(1 - ab) x0).
    noise_level: 0 (the ODE) .. 1 (DDPM).
    """
    if timesteps.ndim != 1 or len(timesteps) == 0 or not bool((timesteps.diff() < 0).all()):
        raise ValueError(f"timesteps must be [K], descending, got {timesteps.tolist()}")
    if next_timesteps is None:
        next_timesteps = torch.cat([timesteps[1:], timesteps.new_tensor([-1])])
    alphas_cumprod, next_timesteps = alphas_cumprod.to("cpu", torch.float64), next_timesteps.cpu()
    ab = alphas_cumprod[timesteps.cpu()]
    ab_next = torch.where(next_timesteps < 0, final_alpha_cumprod, alphas_cumprod[next_timesteps.clamp_min(0)])
    eta = _trained(torch.full_like(ab, noise_level), num_trained_steps)
    s = eta * ((1.0 - ab_next) / (1.0 - ab) * (1.0 - ab / ab_next)).sqrt()
    eps_coefficient = (1.0 - ab_next - s.square()).clamp_min(0.0).sqrt()
    if prediction_type == "epsilon":
        if bool((ab <= 0.0).any()):
            raise ValueError("alphas_cumprod must be positive for prediction_type epsilon: use v_prediction")
        a = (ab_next / ab).sqrt()
        b = eps_coefficient - a * (1.0 - ab).sqrt()
    elif prediction_type == "v_prediction":
        a = (ab_next * ab).sqrt() + eps_coefficient * (1.0 - ab).sqrt()
        b = eps_coefficient * ab.sqrt() - (ab_next * (1.0 - ab)).sqrt()
    else:
        raise ValueError(f'prediction_type must be "epsilon" or "v_prediction", got "{prediction_type}"')
    return _table(a, b, s)


def build_table(
    name: str,
    noise_level: float,
    *,
    sigmas: Tensor | None = None,
    alphas_cumprod: Tensor | None = None,
    timesteps: Tensor | None = None,
    next_timesteps: Tensor | None = None,
    prediction_type: str = "epsilon",
    final_alpha_cumprod: float = 1.0,
    num_trained_steps: int | None = None,
) -> Tensor:
    """The float32 [K, 3] table of the sampler `name` for a model's schedule.

    A flow model gives `sigmas` (float32 [K+1], descending to 0), a diffusion model what `ddim_table` takes. "ode" is
    for both and ignores the noise level. UserError if the model has no such sampler or the noise level is outside its
    range.
    """
    allowed = DIFFUSION_TRANSITIONS if sigmas is None else FLOW_TRANSITIONS
    if name not in allowed:
        kind = "diffusion" if sigmas is None else "flow-matching"
        raise UserError(f'rollout.transition: "{name}" does not fit a {kind} model; choose one of {", ".join(allowed)}')
    maximum = MAX_NOISE_LEVEL.get(name, math.inf)
    if name != "ode" and not (0.0 <= noise_level <= maximum and math.isfinite(noise_level)):
        allowed_range = "finite and not negative" if math.isinf(maximum) else f"between 0 and {maximum:g}"
        raise UserError(f'rollout.noise_level: must be {allowed_range} for "{name}", got {noise_level:g}')
    if sigmas is None:
        eta = 0.0 if name == "ode" else noise_level
        return ddim_table(
            alphas_cumprod, timesteps, eta, prediction_type, final_alpha_cumprod, num_trained_steps, next_timesteps
        )
    if name == "flow-sde":
        return flow_sde_table(sigmas, noise_level, num_trained_steps)
    if name == "dance-sde":
        return dance_sde_table(sigmas, noise_level, num_trained_steps)
    if name == "cps":
        return cps_table(sigmas, noise_level, num_trained_steps)
    return ode_table(sigmas)


def trained_steps(table: Tensor) -> Tensor:
    """Boolean [K]: the steps that have a likelihood (s > 0), so the ones that PPO trains; `.sum()` is their number."""
    return table[:, 2] > 0


def _score_sde_table(sigmas: Tensor, w: Tensor, num_trained_steps: int | None) -> Tensor:
    """mu = z - v D + w^2 / 2 score D with score = -(z + (1 - sigma) v) / sigma, s = w sqrt(D).

    The Euler-Maruyama step of an SDE with the ODE's marginals, for any w [K].
    """
    sigma, sigma_next = _pairs(sigmas)
    w = _trained(w, num_trained_steps)
    step = sigma - sigma_next
    score_weight = 0.5 * w.square() * step / sigma
    return _table(1.0 - score_weight, -step - score_weight * (1.0 - sigma), w * step.sqrt())


def _trained(noise: Tensor, count: int | None) -> Tensor:
    """noise [K] of the first `count` steps, 0 in the others; None is all but the last."""
    return torch.where(torch.arange(len(noise)) < (len(noise) - 1 if count is None else count), noise, 0.0)


def _pairs(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    sigmas = sigmas.to("cpu", torch.float64)
    descending = sigmas.ndim == 1 and len(sigmas) >= 2 and bool((sigmas.diff() < 0).all())
    if not descending or sigmas[0] > 1.0 or sigmas[-1] != 0.0:
        raise ValueError(f"sigmas must be [K+1], descending from at most 1 to 0, got {sigmas.tolist()}")
    return sigmas[:-1], sigmas[1:]


def _table(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    return torch.stack([a, b, s], dim=1).to(torch.float32)
