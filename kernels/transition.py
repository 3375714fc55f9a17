"""One denoising step of any affine sampler, and the log-density of the step that was taken.

    mu       = a z + b v
    z_next   = mu + s noise
    log_prob = mean over all but the batch dimension of  -(z_next - mu)^2 / (2 s^2) - ln s - ln(2 pi) / 2, 0 if s = 0
    distance = mean over all but the batch dimension of  (v - v_ref)^2

with (a, b, s) = table[step]; `latent_critic.engine.transitions` builds the tables.

    argument               shape         dtype
    v, v_ref               [B, ...]      any floating type; v_ref has v's
    z, noise, z_next       [B, ...]      float32 (float64 for gradient checks)
    table                  [K, 3]        float32
    step                   int, or []    integer
    log_prob, distance     [B]           as z

Half-precision `v` is widened first: all arithmetic is in the type of `z`. The log-probability is the mean over the
latent dimensions, not their sum, as in Flow-GRPO (arXiv 2505.05470) and DDPO (arXiv 2305.13301).

The kernels read each input once and write each output once. A sample is cut into tiles whose sums are written down and
added up by a second, tiny kernel: no atomics, and an order of addition that depends on the latent's size alone.
The step and its log-probability are one kernel, compiled twice: they round alike.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, check_device, on_device, refuse, runs_kernels
from .philox import NoiseKey, keyed_normal, normal_tile

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
# Numbers a program takes: 8 a thread, so that bfloat16 too is read 16 bytes at a time; with 16, drawn noise spills on
# sm_100. The backward takes 16 a thread, 8 on ROCm, whose warps have 64 threads.
BLOCK = 1024
BACKWARD_BLOCK = 2048
LOG_NORMALISER = tl.constexpr(HALF_LOG_2PI)

# --------------------------------------------------------------------------------------------------------- reference


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


def prediction_distance_reference(v: Tensor, v_ref: Tensor, dtype: torch.dtype) -> Tensor:
    return (v.to(dtype) - v_ref.detach().to(dtype)).square().flatten(1).contiguous().mean(dim=1)


def transition_step_reference(
    v: Tensor, z: Tensor, noise: Tensor, table: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    a, b, s = _row(table, step, z.dtype)
    z_next = a * z + b * v.to(z.dtype) + s * noise.detach()
    return z_next, transition_log_prob_reference(v, z, z_next, table, step)


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tile(n, BLOCK: tl.constexpr):
    """This program's sample, tile of the sample, elements and which of them exist."""
    tiles = tl.cdiv(n, BLOCK)
    tile = tl.program_id(0) % tiles
    element = tile * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), tile, element, element < n


@triton.jit
def _row_of(table_ptr, step_ptr, step_number, dtype: tl.constexpr):
    step = step_number if step_ptr is None else tl.load(step_ptr)
    a, b, s = tl.load(table_ptr + 3 * step), tl.load(table_ptr + 3 * step + 1), tl.load(table_ptr + 3 * step + 2)
    return step, a.to(dtype), b.to(dtype), s.to(dtype)


@triton.jit(do_not_specialize=["step_number"])
def _transition_kernel(
    v_ptr,  # [B, n], rows v_stride apart
    z_ptr,  # [B, n]
    noise_ptr,  # [B, n], or None to draw it by seed and samples
    z_next_ptr,  # [B, n], written if STEP, else read
    v_ref_ptr,  # [B, n], or None
    squares_ptr,  # [B, tiles] written: sum of (z_next - mu)^2
    distances_ptr,  # [B, tiles] written if v_ref is given: sum of (v - v_ref)^2
    table_ptr,  # [K, 3]
    step_ptr,  # [] or None, then step_number counts
    seed_ptr,  # []
    samples_ptr,  # [B]
    step_number,
    n,
    v_stride,
    z_stride,
    noise_stride,
    z_next_stride,
    v_ref_stride,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, tile, element, exists = _tile(n, BLOCK)
    z = tl.load(z_ptr + row * z_stride + element, mask=exists, other=0.0)
    v = tl.load(v_ptr + row * v_stride + element, mask=exists, other=0.0).to(z.dtype)
    step, a, b, s = _row_of(table_ptr, step_ptr, step_number, z.dtype)
    mean = a * z + b * v
    if STEP:
        if noise_ptr is None:
            noise = normal_tile(tl.load(seed_ptr), tl.load(samples_ptr + row), step, tile, BLOCK).to(z.dtype)
        else:
            noise = tl.load(noise_ptr + row * noise_stride + element, mask=exists, other=0.0)
        z_next = mean + s * noise
        tl.store(z_next_ptr + row * z_next_stride + element, z_next, mask=exists)
    else:
        z_next = tl.load(z_next_ptr + row * z_next_stride + element, mask=exists, other=0.0)
    residual = tl.where(exists, z_next - mean, 0.0)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(residual * residual))
    if v_ref_ptr is not None:
        difference = v - tl.load(v_ref_ptr + row * v_ref_stride + element, mask=exists, other=0.0).to(z.dtype)
        tl.store(distances_ptr + tl.program_id(0), tl.sum(difference * difference))


@triton.jit(do_not_specialize=["step_number"])
def _transition_finish_kernel(
    squares_ptr,  # [B, tiles]
    distances_ptr,  # [B, tiles] or None
    log_prob_ptr,  # [B] written
    distance_ptr,  # [B] written, or None
    table_ptr,
    step_ptr,
    step_number,
    n,
    tiles,
    TILES: tl.constexpr,  # the power of two not below
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    square = tl.sum(tl.load(squares_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)) / n
    _, _, _, s = _row_of(table_ptr, step_ptr, step_number, square.dtype)
    is_random = s > 0
    s = tl.where(is_random, s, 1.0)
    log_prob = -0.5 * (square / s / s) - tl.log(s) - LOG_NORMALISER
    tl.store(log_prob_ptr + row, tl.where(is_random, log_prob, 0.0))
    if distances_ptr is not None:
        distance = tl.sum(tl.load(distances_ptr + row * tiles + tile, mask=tile < tiles, other=0.0)) / n
        tl.store(distance_ptr + row, distance)


@triton.jit(do_not_specialize=["step_number"])
def _transition_backward_kernel(
    v_ptr,  # [B, n]
    z_ptr,  # [B, n]
    z_next_ptr,  # [B, n]
    v_ref_ptr,  # [B, n] or None
    grad_next_ptr,  # [B, n] contiguous, or None
    grad_log_prob_ptr,  # [B]
    grad_distance_ptr,  # [B], or None where v_ref is
    grad_v_ptr,  # [B, n] contiguous, written, or None
    grad_z_ptr,  # the same
    table_ptr,
    step_ptr,
    step_number,
    n,
    v_stride,
    z_stride,
    z_next_stride,
    v_ref_stride,
    BLOCK: tl.constexpr,
):
    row, _, element, exists = _tile(n, BLOCK)
    z = tl.load(z_ptr + row * z_stride + element, mask=exists, other=0.0)
    v = tl.load(v_ptr + row * v_stride + element, mask=exists, other=0.0).to(z.dtype)
    z_next = tl.load(z_next_ptr + row * z_next_stride + element, mask=exists, other=0.0)
    _, a, b, s = _row_of(table_ptr, step_ptr, step_number, z.dtype)
    # d log_prob / d mu = (z_next - mu) / (n s^2): divided by s in two steps, since s^2 may underflow
    weight = tl.load(grad_log_prob_ptr + row) / n
    safe = tl.where(s > 0, s, 1.0)
    grad_mean = tl.where(s > 0, weight * ((z_next - (a * z + b * v)) / safe / safe), 0.0)
    if grad_next_ptr is not None:
        grad_mean += tl.load(grad_next_ptr + row * n + element, mask=exists, other=0.0)
    if grad_z_ptr is not None:
        tl.store(grad_z_ptr + row * n + element, a * grad_mean, mask=exists)
    if grad_v_ptr is not None:
        grad_v = b * grad_mean
        if v_ref_ptr is not None:
            v_ref = tl.load(v_ref_ptr + row * v_ref_stride + element, mask=exists, other=0.0).to(z.dtype)
            grad_v += tl.load(grad_distance_ptr + row) * 2.0 / n * (v - v_ref)
        tl.store(grad_v_ptr + row * n + element, grad_v, mask=exists)


# --------------------------------------------------------------------------------------------------------- launchers


def _rows(x: Tensor) -> Tensor:
    """[B, n] with neighbouring elements, in place where the memory allows it, else copied.

    Triton divides a tile among threads, and so orders its sum, by what it knows to be divisible by 16: rows that are
    not aligned as a new tensor's are copied too, or the log-probability of a step could change in its last bit.
    """
    x = x.flatten(1)
    n = x.shape[1]
    aligned = x.data_ptr() % 16 == 0 and (x.stride(0) % 16 == 0) == (n % 16 == 0)
    return x if aligned and (x.stride(1) == 1 or n == 1) else x.clone(memory_format=torch.contiguous_format)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _launch(v, z, noise, z_next, v_ref, table, step, step_number, seed, samples, is_step: bool):
    v, z, z_next = _rows(v), _rows(z), _rows(z_next)
    noise, v_ref = (None if x is None else _rows(x) for x in (noise, v_ref))
    batch, n = z.shape
    tiles = triton.cdiv(n, BLOCK)
    squares = z.new_empty(batch, tiles)
    log_prob = z.new_empty(batch)
    distances, distance = (None, None) if v_ref is None else (torch.empty_like(squares), torch.empty_like(log_prob))
    strides = [_stride(x) for x in (v, z, noise, z_next, v_ref)]
    with on_device(z):
        _transition_kernel[(batch * tiles,)](
            v, z, noise, z_next, v_ref, squares, distances, table, step, seed, samples, step_number, n, *strides,
            STEP=is_step, BLOCK=BLOCK, num_warps=2 if torch.version.hip else 4, **EXACT,
        )  # fmt: skip
        _transition_finish_kernel[(batch,)](
            squares, distances, log_prob, distance, table, step, step_number, n, tiles,
            TILES=triton.next_power_of_2(tiles), num_warps=1, **EXACT,
        )  # fmt: skip
    return log_prob, distance


@torch.library.custom_op("latent_critic::transition_step", mutates_args=())
def launch_step(
    v: Tensor,
    z: Tensor,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor | None,
    step_number: int,
    seed: Tensor | None,
    samples: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z_next = torch.empty_like(z, memory_format=torch.contiguous_format)
    log_prob, _ = _launch(v, z, noise, z_next, None, table, step, step_number, seed, samples, is_step=True)
    return z_next, log_prob


@torch.library.custom_op("latent_critic::transition_log_prob", mutates_args=())
def launch_log_prob(
    v: Tensor, z: Tensor, z_next: Tensor, table: Tensor, step: Tensor | None, step_number: int, v_ref: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_prob, distance = _launch(v, z, None, z_next, v_ref, table, step, step_number, None, None, is_step=False)
    return log_prob, z.new_empty(0) if distance is None else distance


@torch.library.custom_op("latent_critic::transition_backward", mutates_args=())
def launch_backward(
    v: Tensor,
    z: Tensor,
    z_next: Tensor,
    v_ref: Tensor | None,
    grad_next: Tensor | None,
    grad_log_prob: Tensor,
    grad_distance: Tensor | None,
    table: Tensor,
    step: Tensor | None,
    step_number: int,
    wants_v: bool,
    wants_z: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of v and z, contiguous; one that is not wanted is empty."""
    v_rows, z_rows, next_rows = _rows(v), _rows(z), _rows(z_next)
    v_ref = None if v_ref is None else _rows(v_ref)
    batch, n = z_rows.shape
    grad_v, grad_z = _gradients_like(v, z, wants_v, wants_z)
    with on_device(z):
        _transition_backward_kernel[(batch * triton.cdiv(n, BACKWARD_BLOCK),)](
            v_rows, z_rows, next_rows, v_ref, None if grad_next is None else grad_next.contiguous(),
            grad_log_prob.contiguous(), None if grad_distance is None else grad_distance.contiguous(),
            grad_v if wants_v else None, grad_z if wants_z else None, table, step, step_number, n,
            *(_stride(x) for x in (v_rows, z_rows, next_rows, v_ref)), BLOCK=BACKWARD_BLOCK, num_warps=4, **EXACT,
        )  # fmt: skip
    return grad_v, grad_z


def _gradients_like(v: Tensor, z: Tensor, wants_v: bool, wants_z: bool) -> list[Tensor]:
    wanted = ((v, wants_v), (z, wants_z))
    return [torch.empty_like(x, memory_format=torch.contiguous_format) if w else x.new_empty(0) for x, w in wanted]


# ------------------------------------------------------------------------------------------------------ registration


@launch_step.register_fake
def _(v, z, noise, table, step, step_number, seed, samples):
    return torch.empty_like(z, memory_format=torch.contiguous_format), z.new_empty(z.shape[0])


@launch_log_prob.register_fake
def _(v, z, z_next, table, step, step_number, v_ref):
    return z.new_empty(z.shape[0]), z.new_empty(0 if v_ref is None else z.shape[0])


@launch_backward.register_fake
def _(v, z, z_next, v_ref, grad_next, grad_log_prob, grad_distance, table, step, step_number, wants_v, wants_z):
    return tuple(_gradients_like(v, z, wants_v, wants_z))


def _keep_step(ctx, inputs, output):
    v, z, _, table, step, ctx.step_number, _, _ = inputs
    ctx.save_for_backward(v, z, output[0], None, table, step)


def _keep_log_prob(ctx, inputs, output):
    v, z, z_next, table, step, ctx.step_number, v_ref = inputs
    ctx.save_for_backward(v, z, z_next, v_ref, table, step)


def _gradients(ctx, grad_next, grad_log_prob, grad_distance):
    v, z, z_next, v_ref, table, step = ctx.saved_tensors
    wants_v, wants_z = ctx.needs_input_grad[:2]
    grad_distance = None if v_ref is None else grad_distance
    grad_v, grad_z = launch_backward(
        v, z, z_next, v_ref, grad_next, grad_log_prob, grad_distance, table, step, ctx.step_number, wants_v, wants_z
    )
    return grad_v if wants_v else None, grad_z if wants_z else None


launch_step.register_autograd(
    lambda ctx, grad_next, grad_log_prob: (*_gradients(ctx, grad_next, grad_log_prob, None), *[None] * 6),
    setup_context=_keep_step,
)
launch_log_prob.register_autograd(
    lambda ctx, grad_log_prob, grad_distance: (*_gradients(ctx, None, grad_log_prob, grad_distance), *[None] * 5),
    setup_context=_keep_log_prob,
)

# -------------------------------------------------------------------------------------------------- public functions


def _validate(v: Tensor, z: Tensor, table: Tensor, step: int | Tensor, **latents: Tensor) -> None:
    if z.dtype not in (torch.float32, torch.float64) or z.ndim < 2:
        refuse("z", "be float32 [B, ...]", f"{z.dtype} {list(z.shape)}")
    if not v.is_floating_point() or v.shape != z.shape:
        refuse("v", f"be floating point of z's shape {list(z.shape)}", f"{v.dtype} {list(v.shape)}")
    for name, x in latents.items():
        if x.dtype != z.dtype or x.shape != z.shape:
            refuse(name, f"have z's type and shape, {z.dtype} {list(z.shape)}", f"{x.dtype} {list(x.shape)}")
    if table.dtype != torch.float32 or table.ndim != 2 or table.shape[1] != 3 or not table.is_contiguous():
        given = f"{table.dtype} {list(table.shape)}, strides {list(table.stride())}"
        refuse("table", "be contiguous float32 [K, 3]", given)
    check_device("z", z, v=v, table=table, **latents)
    if isinstance(step, int):
        if not 0 <= step < table.shape[0]:
            refuse("step", f"be in 0..{table.shape[0] - 1}", step)
    elif step.ndim != 0 or step.dtype not in (torch.int32, torch.int64) or step.device != table.device:
        given = f"{step.dtype} {list(step.shape)} on {step.device}"
        refuse("step", f"be an int or a 0-d int32 or int64 tensor on {table.device}", given)


def _validate_key(key: NoiseKey, z: Tensor) -> None:
    for name, x, shape in (("noise.seed", key.seed, ()), ("noise.samples", key.samples, (z.shape[0],))):
        if x.dtype != torch.int64 or x.shape != shape or not x.is_contiguous():
            given = f"{x.dtype} {list(x.shape)}, strides {list(x.stride())}"
            refuse(name, f"be contiguous int64 {list(shape)}", given)
        check_device("z", z, **{name: x})


def _split(step: int | Tensor) -> tuple[Tensor | None, int]:
    return (None, step) if isinstance(step, int) else (step, 0)


def transition_step(
    v: Tensor, z: Tensor, noise: Tensor | NoiseKey, table: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Takes step `step` of the sampler `table`: returns `z_next` (z's shape) and its `log_prob` [B].

    v: the model's prediction, [B, ...]. z: the latent the prediction was made from. noise: standard normal, z's shape,
    or the key it is drawn by as it is needed. The log-probability is that of the returned `z_next`, and 0 in a
    deterministic step. A tensor `step` is not read on the host, hence not checked against the table's length.
    Differentiable in v and z, the log-probability as that of `transition_log_prob`. ValueError names the argument that
    does not fit.
    """
    if isinstance(noise, NoiseKey):
        _validate(v, z, table, step)
        _validate_key(noise, z)
        seed, samples = noise
        if runs_kernels(z):
            return launch_step(v, z, None, table, *_split(step), seed, samples)
        noise = keyed_normal(noise, step, z[0].numel()).view(z.shape).to(z.dtype)
    _validate(v, z, table, step, noise=noise)
    if runs_kernels(z):
        return launch_step(v, z, noise, table, *_split(step), None, None)
    return transition_step_reference(v, z, noise, table, step)


def transition_log_prob(
    v: Tensor, z: Tensor, z_next: Tensor, table: Tensor, step: int | Tensor, v_ref: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability [B] of having gone from `z` to the stored `z_next` in step `step`; differentiable in v and z.

    Bit-identical with what `transition_step` returned for the same v, z and z_next, so that the importance ratio of a
    fresh batch is exactly 1. `z_next` gets no gradient. With `v_ref`, a reference model's prediction, the result is
    (log_prob, distance), both differentiable in v: `distance` [B] times b^2 / (2 s^2) is the KL from the reference's
    transition. ValueError names the argument that does not fit.
    """
    _validate(v, z, table, step, z_next=z_next)
    if v_ref is not None and (v_ref.dtype != v.dtype or v_ref.shape != v.shape):
        refuse("v_ref", f"have v's type and shape, {v.dtype} {list(v.shape)}", f"{v_ref.dtype} {list(v_ref.shape)}")
    check_device("z", z, v_ref=v_ref)
    if runs_kernels(z):
        log_prob, distance = launch_log_prob(v, z, z_next, table, *_split(step), v_ref)
        return log_prob if v_ref is None else (log_prob, distance)
    log_prob = transition_log_prob_reference(v, z, z_next, table, step)
    return log_prob if v_ref is None else (log_prob, prediction_distance_reference(v, v_ref, z.dtype))
