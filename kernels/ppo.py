"""PPO's clipped losses (Schulman et al., arXiv 1707.06347), elementwise over any shape.

policy:  rho = exp(log_prob - log_prob_old);  mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps))      (eq. 7, negated)
value:   0.5 mean (V - G)^2, with G = clip(returns, +-target_clip); with a value clip c
         0.5 mean max((V - G)^2, (V_old + clip(V - V_old, +-c) - G)^2)

Half-precision inputs are widened to float32; float64 stays float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyStatistics(NamedTuple):
    """What one policy update did, as detached 0-d tensors; rho is the importance ratio."""

    ratio: Tensor  # mean rho
    approx_kl: Tensor  # mean (rho - 1) - log rho: the low-variance estimator of KL(old || new), never negative
    old_approx_kl: Tensor  # mean -log rho
    clipfrac: Tensor  # share of elements with |rho - 1| > clip_range
    max_ratio_deviation: Tensor  # max |rho - 1|: 0 on the first update of a fresh batch


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_same_shape(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.shape != reference.shape:
        raise ValueError(f"{name} must have {reference_name}'s shape {list(reference.shape)}, got {list(x.shape)}")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def policy_loss_reference(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, PolicyStatistics]:
    advantage = _widen(advantage)
    log_ratio = _widen(log_prob) - _widen(log_prob_old)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    with torch.no_grad():
        deviation = ratio - 1.0
        statistics = PolicyStatistics(
            ratio=ratio.mean(),
            approx_kl=(deviation - log_ratio).mean(),
            old_approx_kl=-log_ratio.mean(),
            clipfrac=(deviation.abs() > clip_range).to(ratio.dtype).mean(),
            max_ratio_deviation=deviation.abs().max(),
        )
    return loss, statistics


def value_loss_reference(
    value: Tensor,
    returns: Tensor,
    value_old: Tensor | None = None,
    value_clip_range: float | None = None,
    target_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    value, returns = _widen(value), _widen(returns)
    target = returns if target_clip is None else returns.clamp(-target_clip, target_clip)
    squared_error = (value - target).square()
    if value_clip_range is None:
        return 0.5 * squared_error.mean(), torch.zeros((), dtype=value.dtype, device=value.device)
    value_old = _widen(value_old)
    change = value - value_old
    clipped_error = (value_old + change.clamp(-value_clip_range, value_clip_range) - target).square()
    value_clipfrac = (change.detach().abs() > value_clip_range).to(value.dtype).mean()
    return 0.5 * torch.maximum(squared_error, clipped_error).mean(), value_clipfrac


def policy_loss(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, PolicyStatistics]:
    """PPO's clipped surrogate, to be minimised: returns the loss (0-d) and what the update did.

    log_prob, log_prob_old, advantage: one shape, usually [B]; clip_range: eps > 0. ValueError names the argument.
    """
    _require_same_shape("log_prob_old", log_prob_old, "log_prob", log_prob)
    _require_same_shape("advantage", advantage, "log_prob", log_prob)
    _require_positive("clip_range", clip_range)
    return policy_loss_reference(log_prob, log_prob_old, advantage, clip_range)


def value_loss(
    value: Tensor,
    returns: Tensor,
    value_old: Tensor | None = None,
    value_clip_range: float | None = None,
    target_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Half the mean squared error of the critic: returns the loss (0-d) and `value_clipfrac` (0-d, detached).

    value, returns: one shape, usually [B, M] for M reward heads. target_clip: the returns are clipped to +-target_clip.
    value_clip_range: keeps `value` within that distance of `value_old`, the rollout's values (value's shape); the
    fraction that was further away is `value_clipfrac`, 0 without a value clip. ValueError names the argument.
    """
    _require_same_shape("returns", returns, "value", value)
    if target_clip is not None:
        _require_positive("target_clip", target_clip)
    if value_clip_range is not None:
        _require_positive("value_clip_range", value_clip_range)
        if value_old is None:
            raise ValueError("value_old must be given with value_clip_range")
        _require_same_shape("value_old", value_old, "value", value)
    return value_loss_reference(value, returns, value_old, value_clip_range, target_clip)
