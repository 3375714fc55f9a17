"""One denoising step of any affine sampler, and the log-density of the step that was taken.

    mu       = a z + b v
    z_next   = mu + s noise
    log_prob = mean over all but the batch dimension of  -(z_next - mu)^2 / (2 s^2) - ln s - ln(2 pi) / 2, 0 if s = 0

with (a, b, s) = table[step]; `latent_critic.engine.transitions` builds the tables.

    argument               shape         dtype
    v                      [B, ...]      any floating type
    z, noise, z_next       [B, ...]      float32 (float64 for gradient checks)
    table                  [K, 3]        float32
    step                   int, or []    integer
    log_prob (result)      [B]           as z

Half-precision `v` is widened first: all arithmetic is in the type of `z`. The log-probability is the mean over the
latent dimensions, not their sum, as in Flow-GRPO (arXiv 2505.05470) and DDPO (arXiv 2305.13301).
"""

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _row(table: Tensor, step: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # Indexing with a 0-d tensor reads it on the host; index_select does not, so the step can live in a CUDA graph.
    row = table[step] if isinstance(step, int) else table.index_select(0, step.reshape(1)).squeeze(0)
    a, b, s = row.to(dtype).unbind()
    return a, b, s


def transition_log_prob_reference(v: Tensor, z: Tensor, z_next: Tensor, table: Tensor, step: int | Tensor) -> Tensor:
    a, b, s = _row(table, step, z.dtype)
    mean = a * z + b * v.to(z.dtype)
    is_random = s > 0
    s = torch.where(is_random, s, 1.0)  # keeps the branch that is not taken finite, and so its gradient
    # The latent is the action that was taken: data, not a function of the policy's weights.
    residual = (z_next.detach() - mean) / s
    # Contiguous rows: the order of the sum, and so its last bit, must not depend on the layout of the inputs.
    mean_square = residual.square().flatten(1).contiguous().mean(dim=1)
    return torch.where(is_random, -0.5 * mean_square - s.log() - HALF_LOG_2PI, 0.0)


def transition_step_reference(
    v: Tensor, z: Tensor, noise: Tensor, table: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    a, b, s = _row(table, step, z.dtype)
    z_next = a * z + b * v.to(z.dtype) + s * noise
    return z_next, transition_log_prob_reference(v, z, z_next, table, step)


def _validate(v: Tensor, z: Tensor, third: Tensor, third_name: str, table: Tensor, step: int | Tensor) -> None:
    if z.dtype not in (torch.float32, torch.float64) or z.ndim < 2:
        raise ValueError(f"z must be float32 [B, ...], got {z.dtype} {list(z.shape)}")
    if not v.is_floating_point() or v.shape != z.shape:
        raise ValueError(f"v must be floating point of z's shape {list(z.shape)}, got {v.dtype} {list(v.shape)}")
    if third.dtype != z.dtype or third.shape != z.shape:
        raise ValueError(
            f"{third_name} must have z's type and shape, {z.dtype} {list(z.shape)}, "
            f"got {third.dtype} {list(third.shape)}"
        )
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != 3:
        raise ValueError(f"table must be float32 [K, 3], got {table.dtype} {list(table.shape)}")
    if isinstance(step, int):
        if not 0 <= step < table.shape[0]:
            raise ValueError(f"step must be in 0..{table.shape[0] - 1}, got {step}")
    elif step.ndim != 0 or step.dtype not in (torch.int32, torch.int64) or step.device != table.device:
        raise ValueError(
            f"step must be an int or a 0-d int32 or int64 tensor on {table.device}, "
            f"got {step.dtype} {list(step.shape)} on {step.device}"
        )


def transition_step(v: Tensor, z: Tensor, noise: Tensor, table: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """Takes step `step` of the sampler `table`: returns `z_next` (z's shape) and its `log_prob` [B].

    v: the model's prediction, [B, ...]. z: the latent the prediction was made from. noise: standard normal, z's shape.
    The log-probability is that of the returned `z_next`, and 0 in a deterministic step. A tensor `step` is not read on
    the host, hence not checked against the table's length. ValueError names the argument that does not fit.
    """
    _validate(v, z, noise, "noise", table, step)
    return transition_step_reference(v, z, noise, table, step)


def transition_log_prob(v: Tensor, z: Tensor, z_next: Tensor, table: Tensor, step: int | Tensor) -> Tensor:
    """Log-probability [B] of having gone from `z` to the stored `z_next` in step `step`; differentiable in v and z.

    Bit-identical with what `transition_step` returned for the same v, z and z_next, so that the importance ratio of a
    fresh batch is exactly 1. `z_next` gets no gradient. ValueError names the argument that does not fit.
    """
    _validate(v, z, z_next, "z_next", table, step)
    return transition_log_prob_reference(v, z, z_next, table, step)
