"""PPO's clipped losses (Schulman et al., arXiv 1707.06347), their gradients and their statistics in one launch.

policy:  rho = exp(log_prob - log_prob_old);  mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps))      (eq. 7, negated)
value:   0.5 mean (V - G)^2, with G = clip(returns, +-target_clip); with a value clip c
         0.5 mean max((V - G)^2, (V_old + clip(V - V_old, +-c) - G)^2)
both:    policy + value_coef value

    argument                            shape                   dtype
    log_prob, log_prob_old, advantage   [...] of N elements     any floating type
    value, returns, value_old           [..., M] of N rows      any floating type; a vector is one head, [N, 1]

Half precision is widened to float32; float64, for gradient checks, stays float64. An input that is not finite shows in
the loss: nothing is masked but infinite returns, which a target clip makes finite.

The inputs are a micro-batch, so one program reads them tile by tile and adds up in one order. It writes the gradients
of the loss beside the loss; the backward only multiplies them by the incoming gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, check_device, on_device, refuse, runs_kernels, widened

TILE = 1024  # numbers taken at once: 8 a thread, two 16-byte loads of float32 from each input


class PPOClips(NamedTuple):
    clip_range: float  # eps: of the ratio, around 1
    value_clip_range: float | None = None  # of a value, around the rollout's
    target_clip: float | None = None  # bound of the returns


class PolicyStatistics(NamedTuple):
    """What one policy update did, as detached 0-d tensors; rho is the importance ratio."""

    ratio: Tensor  # mean rho
    approx_kl: Tensor  # mean (rho - 1) - log rho: the low-variance estimator of KL(old || new), never negative
    old_approx_kl: Tensor  # mean -log rho
    clipfrac: Tensor  # share of elements with |rho - 1| > clip_range
    max_ratio_deviation: Tensor  # max |rho - 1|: 0 on the first update of a fresh batch


class ValueStatistics(NamedTuple):
    """How well the critic did, detached: `clipfrac` [] and, of each head, means over the batch [M].

    Averaged over equal batches the moments are those of all of them together, and
    explained variance = 1 - Var(returns - value) / Var(returns), with Var(x) = mean x^2 - (mean x)^2.
    """

    clipfrac: Tensor  # share of values further than value_clip_range from the rollout's; 0 without that clip
    returns: Tensor  # without the target clip, here and below
    returns_square: Tensor
    error: Tensor  # returns - value
    error_square: Tensor


class PPOStatistics(NamedTuple):
    policy_loss: Tensor
    value_loss: Tensor  # not yet weighted
    policy: PolicyStatistics
    value: ValueStatistics


SCALARS = 2 + len(PolicyStatistics._fields) + 1  # of PPOStatistics, which the kernel writes before the M moments each

# --------------------------------------------------------------------------------------------------------- reference


def _heads(x: Tensor) -> Tensor:
    """[N, M], a view where the memory allows it."""
    return x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def policy_loss_reference(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, PolicyStatistics]:
    advantage = widened(advantage.detach())
    log_ratio = widened(log_prob) - widened(log_prob_old.detach())
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
) -> tuple[Tensor, ValueStatistics]:
    value, returns = widened(value), widened(returns.detach())
    target = returns if target_clip is None else returns.clamp(-target_clip, target_clip)
    squared_error = (value - target).square()
    clipfrac = torch.zeros((), dtype=value.dtype, device=value.device)
    if value_clip_range is not None:
        value_old = widened(value_old.detach())
        change = value - value_old
        clipped_error = (value_old + change.clamp(-value_clip_range, value_clip_range) - target).square()
        squared_error = torch.maximum(squared_error, clipped_error)
        clipfrac = (change.detach().abs() > value_clip_range).to(value.dtype).mean()
    with torch.no_grad():
        error = returns - value
        moments = (_heads(x).mean(0) for x in (returns, returns.square(), error, error.square()))
    return 0.5 * squared_error.mean(), ValueStatistics(clipfrac, *moments)


def ppo_loss_reference(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    value: Tensor,
    returns: Tensor,
    value_old: Tensor | None,
    clips: PPOClips,
    value_coef: float,
) -> tuple[Tensor, PPOStatistics]:
    actor, policy = policy_loss_reference(log_prob, log_prob_old, advantage, clips.clip_range)
    critic, values = value_loss_reference(value, returns, value_old, clips.value_clip_range, clips.target_clip)
    return actor + value_coef * critic, PPOStatistics(actor.detach(), critic.detach(), policy, values)


# ------------------------------------------------------------------------------------------------------------ kernel


@triton.jit
def _clip(x, low, high):
    """torch.clamp, and where its gradient passes: NaN stays NaN, and the borders are inside."""
    return tl.where(x < low, low, tl.where(x > high, high, x)), (x >= low) & (x <= high)


@triton.jit
def _maximum(a, b):
    """torch.maximum and its derivatives by a and b: NaN wins, and equals share the gradient."""
    larger = tl.where((a >= b) | (a != a), a, b)
    by_a = tl.where(a == b, 0.5, tl.where(a < b, 0.0, 1.0))
    by_b = tl.where(a == b, 0.5, tl.where(a > b, 0.0, 1.0))
    return larger, by_a, by_b


@triton.jit
def _mean(total, N, M: tl.constexpr = 1):
    # The float32 division of NVIDIA GPUs is an approximation, in which N / N need not be 1; that of float64 is exact.
    return (total.to(tl.float64) / N / M).to(total.dtype)


@triton.jit
def _ppo_kernel(
    log_prob_ptr,  # [N] like the next two, elements log_prob_stride apart; or None: no policy loss
    log_prob_old_ptr,
    advantage_ptr,
    value_ptr,  # [N, M] like the next two, rows value_stride apart; or None: no value loss
    returns_ptr,
    value_old_ptr,  # None: no value clip
    loss_ptr,  # [] written
    statistics_ptr,  # [SCALARS + 4 M] written: PPOStatistics in its order
    grad_log_prob_ptr,  # [N] contiguous, written, of the loss
    grad_value_ptr,  # [N, M] contiguous, written, of the loss
    N,
    log_prob_stride,
    log_prob_old_stride,
    advantage_stride,
    value_stride,
    returns_stride,
    value_old_stride,
    # Rounded to the arithmetic's type in here, as PyTorch rounds the numbers it is given.
    ratio_low: tl.float64,
    ratio_high: tl.float64,
    clip_range: tl.float64,
    value_clip_range: tl.float64,
    target_clip: tl.float64,  # may be infinite
    value_coef: tl.float64,
    M: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # the power of two not below M
):
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    ratio_low, ratio_high = tl.full((), ratio_low, dtype), tl.full((), ratio_high, dtype)
    clip_range = tl.full((), clip_range, dtype)
    value_clip_range, target_clip = tl.full((), value_clip_range, dtype), tl.full((), target_clip, dtype)
    value_coef = tl.full((), value_coef, dtype)
    share = _mean(tl.full((), 1.0, dtype), N)  # of an element in a mean
    value_share = _mean(value_coef, N, M)
    zeros, zeros_NM = tl.zeros([BLOCK_N], dtype), tl.zeros([BLOCK_N, BLOCK_M], dtype)
    surrogates, ratios, kls, log_ratios, clipped_ratios, furthest = zeros, zeros, zeros, zeros, zeros, zeros
    squares, clipped_values = zeros_NM, zeros_NM
    returns_sums, returns_squares, errors, error_squares = zeros_NM, zeros_NM, zeros_NM, zeros_NM

    # Elements that do not exist are read as 0 and add 0, but for their ratio of 1.
    for start in range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N).to(tl.int64)
        exists = row < N
        if log_prob_ptr is not None:
            log_prob = tl.load(log_prob_ptr + row * log_prob_stride, mask=exists, other=0.0).to(dtype)
            log_prob_old = tl.load(log_prob_old_ptr + row * log_prob_old_stride, mask=exists, other=0.0).to(dtype)
            loss_slope = -tl.load(advantage_ptr + row * advantage_stride, mask=exists, other=0.0).to(dtype)
            log_ratio = log_prob - log_prob_old
            # A GPU's fast float32 exponential is up to 2.4e-7 off, a fortieth of a ratio clip of 1e-5.
            ratio = tl.exp(log_ratio.to(tl.float64)).to(dtype)
            clipped, inside = _clip(ratio, ratio_low, ratio_high)
            surrogate, by_free, by_clipped = _maximum(loss_slope * ratio, loss_slope * clipped)
            grad = share * by_free * loss_slope + tl.where(inside, share * by_clipped * loss_slope, 0.0)
            tl.store(grad_log_prob_ptr + row, grad * ratio, mask=exists)
            deviation = ratio - 1.0
            surrogates += surrogate
            ratios += tl.where(exists, ratio, 0.0)
            kls += deviation - log_ratio
            log_ratios += log_ratio
            clipped_ratios += (tl.abs(deviation) > clip_range).to(dtype)
            furthest = tl.where(tl.abs(deviation) > furthest, tl.abs(deviation), furthest)
        if value_ptr is not None:
            head = tl.arange(0, BLOCK_M)[None, :]
            row, exists = row[:, None], exists[:, None] & (head < M)
            value = tl.load(value_ptr + row * value_stride + head, mask=exists, other=0.0).to(dtype)
            returns = tl.load(returns_ptr + row * returns_stride + head, mask=exists, other=0.0).to(dtype)
            target, _ = _clip(returns, -target_clip, target_clip)
            distance = value - target
            if value_old_ptr is None:
                square, grad = distance * distance, value_share * distance
            else:
                value_old = tl.load(value_old_ptr + row * value_old_stride + head, mask=exists, other=0.0).to(dtype)
                change = value - value_old
                clipped, inside = _clip(change, -value_clip_range, value_clip_range)
                held = value_old + clipped - target
                square, by_free, by_clipped = _maximum(distance * distance, held * held)
                grad = value_share * by_free * distance + tl.where(inside, value_share * by_clipped * held, 0.0)
                clipped_values += (tl.abs(change) > value_clip_range).to(dtype)
            tl.store(grad_value_ptr + row * M + head, grad, mask=exists)
            squares += square
            error = returns - value
            returns_sums += returns
            returns_squares += returns * returns
            errors += error
            error_squares += error * error

    policy_loss, ratio = _mean(tl.sum(surrogates), N), _mean(tl.sum(ratios), N)
    value_loss = 0.5 * _mean(tl.sum(squares), N, M)
    tl.store(loss_ptr, policy_loss + value_coef * value_loss)
    tl.store(statistics_ptr, policy_loss)
    tl.store(statistics_ptr + 1, value_loss)
    tl.store(statistics_ptr + 2, ratio)
    tl.store(statistics_ptr + 3, _mean(tl.sum(kls), N))
    tl.store(statistics_ptr + 4, -_mean(tl.sum(log_ratios), N))
    tl.store(statistics_ptr + 5, _mean(tl.sum(clipped_ratios), N))
    # Comparisons pass over NaN; the mean of the ratios, of which none is negative, is NaN only if one of them is.
    tl.store(statistics_ptr + 6, tl.where(ratio != ratio, ratio, tl.max(furthest)))
    tl.store(statistics_ptr + 7, _mean(tl.sum(clipped_values), N, M))
    if value_ptr is not None:
        head = tl.arange(0, BLOCK_M)
        moments_ptr, exists = statistics_ptr + SCALARS + head, head < M
        tl.store(moments_ptr, _mean(tl.sum(returns_sums, 0), N), mask=exists)
        tl.store(moments_ptr + M, _mean(tl.sum(returns_squares, 0), N), mask=exists)
        tl.store(moments_ptr + 2 * M, _mean(tl.sum(errors, 0), N), mask=exists)
        tl.store(moments_ptr + 3 * M, _mean(tl.sum(error_squares, 0), N), mask=exists)


# ---------------------------------------------------------------------------------------------------------- launcher


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def _rows(x: Tensor | None) -> Tensor | None:
    """[N, M] with neighbouring heads, in place where the memory allows it, else copied."""
    if x is None:
        return None
    x = _heads(x)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _outputs(log_prob: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [], statistics [SCALARS + 4 M], and the gradients of log_prob and value, empty for one that is None."""
    given = [x for x in (log_prob, value) if x is not None]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in given), torch.float32)
    make = functools.partial(given[0].new_empty, dtype=dtype)
    heads = 0 if value is None else _heads(value).shape[1]
    return make(()), make(SCALARS + 4 * heads), *(make(0 if x is None else x.shape) for x in (log_prob, value))


@torch.library.custom_op("latent_critic::ppo_loss", mutates_args=())
def launch_ppo(
    log_prob: Tensor | None,
    log_prob_old: Tensor | None,
    advantage: Tensor | None,
    value: Tensor | None,
    returns: Tensor | None,
    value_old: Tensor | None,
    scalars: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scalars: clip_range, value_clip_range (read with value_old alone), target_clip (may be infinite), value_coef."""
    loss, statistics, grad_log_prob, grad_value = outputs = _outputs(log_prob, value)
    clip_range, value_clip_range, target_clip, value_coef = scalars
    inputs = [_flat(x) for x in (log_prob, log_prob_old, advantage)] + [_rows(x) for x in (value, returns, value_old)]
    strides = [0 if x is None else x.stride(0) for x in inputs]
    n, m = (len(inputs[0]), 1) if value is None else inputs[3].shape
    block_m = triton.next_power_of_2(m)
    block_n = min(triton.next_power_of_2(n), max(1, TILE // block_m))
    with on_device(loss):
        _ppo_kernel[(1,)](
            *inputs, loss, statistics, grad_log_prob, grad_value, n, *strides,
            1.0 - clip_range, 1.0 + clip_range, clip_range, value_clip_range, target_clip, value_coef,
            M=m, SCALARS=SCALARS, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=4, **EXACT,
        )  # fmt: skip
    return outputs


# ------------------------------------------------------------------------------------------------------ registration


@launch_ppo.register_fake
def _(log_prob, log_prob_old, advantage, value, returns, value_old, scalars):
    return _outputs(log_prob, value)


def _keep_gradients(ctx, inputs, output):
    _, statistics, *gradients = output
    ctx.mark_non_differentiable(statistics, *gradients)
    ctx.set_materialize_grads(False)  # nor zeros for what is not differentiable
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[3])]


def _gradients(ctx, grad, *_):
    wanted = [grad is not None and ctx.needs_input_grad[i] for i in (0, 3)]
    grad_log_prob, grad_value = (
        (grad * saved).to(dtype) if wants else None
        for saved, dtype, wants in zip(ctx.saved_tensors, ctx.dtypes, wanted, strict=True)
    )
    return grad_log_prob, None, None, grad_value, None, None, None


launch_ppo.register_autograd(_gradients, setup_context=_keep_gradients)

# -------------------------------------------------------------------------------------------------- public functions


def _check(name: str, x: Tensor, **others: Tensor | None) -> None:
    """`x` must be floating point and not empty; the others floating point, of its shape and on its device."""
    if not x.is_floating_point() or x.numel() == 0:
        refuse(name, "be floating point and not empty", f"{x.dtype} {list(x.shape)}")
    for other, y in others.items():
        if y is not None and (not y.is_floating_point() or y.shape != x.shape):
            refuse(other, f"be floating point of {name}'s shape {list(x.shape)}", f"{y.dtype} {list(y.shape)}")
    check_device(name, x, **others)


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > 0:
            refuse(name, "be positive", number)


def _check_policy(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float) -> None:
    _check("log_prob", log_prob, log_prob_old=log_prob_old, advantage=advantage)
    _check_positive(clip_range=clip_range)


def _check_value(value, returns, value_old, value_clip_range: float | None, target_clip: float | None) -> None:
    _check_positive(value_clip_range=value_clip_range, target_clip=target_clip)
    if value_clip_range is not None and value_old is None:
        refuse("value_old", "be given with value_clip_range", None)
    _check("value", value, returns=returns, value_old=None if value_clip_range is None else value_old)


def _by_kernel(log_prob, log_prob_old, advantage, value, returns, value_old, clips, value_coef):
    clip_range, value_clip_range, target_clip = clips
    value_old = None if value_clip_range is None else value_old
    scalars = [clip_range, value_clip_range or math.inf, target_clip or math.inf, value_coef]
    loss, statistics, *_ = launch_ppo(log_prob, log_prob_old, advantage, value, returns, value_old, scalars)
    policy_loss, value_loss, *policy, value_clipfrac = statistics[:SCALARS].unbind()
    values = ValueStatistics(value_clipfrac, *statistics[SCALARS:].chunk(4))
    return loss, PPOStatistics(policy_loss, value_loss, PolicyStatistics(*policy), values)


def policy_loss(
    log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, PolicyStatistics]:
    """PPO's clipped surrogate, to be minimised: returns the loss (0-d) and what the update did.

    log_prob, log_prob_old, advantage: one shape, usually [B]; clip_range: eps > 0. Differentiable in log_prob, once.
    ValueError names the argument that does not fit.
    """
    _check_policy(log_prob, log_prob_old, advantage, clip_range)
    if runs_kernels(log_prob):
        clips = PPOClips(clip_range)
        loss, statistics = _by_kernel(log_prob, log_prob_old, advantage, None, None, None, clips, 1.0)
        return loss, statistics.policy
    return policy_loss_reference(log_prob, log_prob_old, advantage, clip_range)


def value_loss(
    value: Tensor,
    returns: Tensor,
    value_old: Tensor | None = None,
    value_clip_range: float | None = None,
    target_clip: float | None = None,
) -> tuple[Tensor, ValueStatistics]:
    """Half the mean squared error of the critic: returns the loss (0-d) and how well the critic did.

    value, returns: one shape, [..., M] for M reward heads; a vector is one head. target_clip: the returns are clipped
    to +-target_clip. value_clip_range: keeps `value` within that distance of `value_old`, the rollout's values (value's
    shape, only needed then). Differentiable in value, once. ValueError names the argument that does not fit.
    """
    _check_value(value, returns, value_old, value_clip_range, target_clip)
    if runs_kernels(value):
        clips = PPOClips(math.inf, value_clip_range, target_clip)
        loss, statistics = _by_kernel(None, None, None, value, returns, value_old, clips, 1.0)
        return loss, statistics.value
    return value_loss_reference(value, returns, value_old, value_clip_range, target_clip)


def ppo_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    value: Tensor,
    returns: Tensor,
    value_old: Tensor | None,
    clips: PPOClips,
    value_coef: float,
) -> tuple[Tensor, PPOStatistics]:
    """policy_loss + value_coef value_loss in one launch: returns the sum (0-d), and its parts and statistics, detached.

    log_prob, log_prob_old, advantage: one shape of N elements, usually [B]. value, returns, value_old: one shape,
    [..., M] with N rows for M reward heads, such as [B, 1, M], or [N] for a single one; value_old is needed with
    clips.value_clip_range only. Differentiable in log_prob and value, once. ValueError names the argument that does not
    fit.
    """
    _check_policy(log_prob, log_prob_old, advantage, clips.clip_range)
    _check_value(value, returns, value_old, clips.value_clip_range, clips.target_clip)
    if len(_heads(value)) != log_prob.numel():
        refuse("value", f"have a row for each of log_prob's {log_prob.numel()} elements", list(value.shape))
    check_device("log_prob", log_prob, value=value)
    compute = _by_kernel if runs_kernels(log_prob) else ppo_loss_reference
    return compute(log_prob, log_prob_old, advantage, value, returns, value_old, clips, value_coef)
