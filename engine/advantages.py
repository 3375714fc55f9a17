"""Advantages along the denoising axis. N samples, K steps, M reward heads; statistics are taken over all ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(x: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """`x` summed over the ranks, in place; `x` itself when torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, group=process_group)
    return x


def mean_and_variance(
    x: Tensor, dims: tuple[int, ...], process_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, int]:
    """Mean, population variance and number of elements of `x` over `dims` and all ranks, in float64.

    Ranks may hold different numbers of samples. The variance takes a second pass over the deviations: sums of squares
    leave a rounding error in place of the 0 of a constant.
    """
    x = x.to(torch.float64)
    total = x.sum(dims)
    local_count = total.new_full((1,), math.prod(x.shape[d] for d in dims))
    packed = all_reduce_sum(torch.cat([total.flatten(), local_count]), process_group)
    count = int(packed[-1].item())
    mean = packed[:-1].view_as(total) / count
    deviation = x - mean.view([1 if d in dims else n for d, n in enumerate(x.shape)])
    variance = all_reduce_sum(deviation.square().sum(dims), process_group) / count
    return mean, variance, count


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) with one reward, at the end of the trajectory.

        delta_k = r_k + gamma V_{k+1} - V_k,  A_k = delta_k + gamma lam A_{k+1},  G_k = A_k + V_k,  V_K = 0

    rewards: [N, M], what the last of the K steps earns. values: [N, K, M], of the latents the steps start from; pass
    only those that the critic has learned. lam: of all steps, or [K], of each. Returns advantages and returns,
    [N, K, M].
    With gamma = lam = 1, A_k = R - V_k and G_k = R, exactly: what is computed is the equivalent lambda-return,
    G_k = r_k + gamma ((1 - lam) V_{k+1} + lam G_{k+1}), which then has no rounding.
    """
    if values.ndim != 3 or rewards.shape != (values.shape[0], values.shape[2]):
        raise ValueError(f"rewards {list(rewards.shape)} must be [N, M] for values [N, K, M] {list(values.shape)}")
    returns = torch.empty_like(values)
    lams = torch.as_tensor(lam, dtype=values.dtype, device=values.device).expand(values.shape[1])
    returns[:, -1] = rewards
    for k in reversed(range(values.shape[1] - 1)):
        returns[:, k] = gamma * ((1.0 - lams[k]) * values[:, k + 1] + lams[k] * returns[:, k + 1])
    return returns - values, returns


def normalize(
    advantages: Tensor, weights: Tensor, clip: float, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """One advantage per step: sum_m weights_m clip((A_m - mean_m) / (std_m + 1e-6), +-clip).

    advantages: [N, K, M]; weights: [M]. The mean and (population) std of a head are those over all samples, steps and
    ranks, in float64. Returns [N, K] of the type of `advantages`.
    """
    mean, variance, _ = mean_and_variance(advantages, (0, 1), process_group)
    standardized = (advantages.to(torch.float64) - mean) / (variance.sqrt() + 1e-6)
    weighted = standardized.clamp(-clip, clip) * weights.to(standardized)
    return weighted.sum(dim=2).to(advantages.dtype)


def explained_variance(values: Tensor, returns: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """1 - Var(returns - values) / Var(returns) per step and head, [N, K, M] -> float64 [K, M], over all ranks.

    1 is a perfect critic, 0 one that knows no more than the mean, below 0 a misleading one. Where the returns do not
    vary there is nothing to explain, and the result is 0.
    """
    _, return_variance, _ = mean_and_variance(returns, (0,), process_group)
    _, residual_variance, _ = mean_and_variance(returns.to(torch.float64) - values, (0,), process_group)
    varies = return_variance > 0
    return torch.where(varies, 1.0 - residual_variance / torch.where(varies, return_variance, 1.0), 0.0)
