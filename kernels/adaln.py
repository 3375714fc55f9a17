"""What a block of a diffusion transformer does around attention and feed-forward: modulated norms and gated sums.

    adaln_modulate = (x - mean) rstd (1 + scale) + shift         mean, rstd = (variance + 1e-6)^(-1/2) of each token
    gate_residual  = residual + gate y

    argument        shape        dtype
    x, residual     [B, N, D]    any floating type; the output's
    scale, shift    [B, D]       one floating type, x's or a narrower one
    gate            [B, D]       floating, residual's type or a narrower one
    y               [B, N, D]    floating, residual's type or a narrower one

Both are those of DiT (arXiv 2212.09748). The kernels compute in float32 (float64 for itself) and round once; the
references are diffusers' arithmetic, to the bit.

The kernels read each input once and write each output once. The norm keeps mean and rstd, a thousandth of what it reads
and writes: its backward then waits for two sums over a token instead of four. Gradients of scale, shift and gate are
sums over N: each CHUNK of tokens writes its own down, and a second, tiny kernel adds them up, without atomics and in an
order that depends on N and D alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, check_device, check_floating, check_rows, check_shape, on_device, refuse, runs_kernels

EPS = tl.constexpr(1e-6)
CHUNK = 32  # tokens a partial sum covers: more would leave multiprocessors idle, fewer cost more scratch (now 1/24)
COLUMNS = 256  # a gate's program takes them of a chunk: a warp's 16-byte loads of half-precision numbers

# --------------------------------------------------------------------------------------------------------- reference


def adaln_modulate_reference(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS.value) * (1 + scale[:, None]) + shift[:, None]


def gate_residual_reference(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return residual + gate[:, None] * y


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _wide(x):
    """x in the type it is computed in."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit
def _tokens(n, start, ROWS: tl.constexpr):
    """ROWS tokens from `start`, and which of them exist."""
    token = start + tl.arange(0, ROWS)
    return token.to(tl.int64), token < n


@triton.jit
def _modulate_kernel(
    x_ptr,  # [B, n, d]
    scale_ptr,  # [B, d]
    shift_ptr,  # [B, d]
    out_ptr,  # [B, n, d] contiguous, written
    statistics_ptr,  # [B, n, 2] written: mean and rstd
    n,
    d,
    x_batch_stride,
    x_token_stride,
    scale_stride,
    shift_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two not below d
):
    tiles = tl.cdiv(n, ROWS)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    token, there = _tokens(n, tl.program_id(0) % tiles * ROWS, ROWS)
    column = tl.arange(0, BLOCK)
    exists = there[:, None] & (column < d)[None, :]
    x_rows = x_ptr + sample * x_batch_stride + token * x_token_stride
    x = _wide(tl.load(x_rows[:, None] + column[None, :], mask=exists, other=0.0))
    scale = _wide(tl.load(scale_ptr + sample * scale_stride + column, mask=column < d, other=0.0))
    shift = _wide(tl.load(shift_ptr + sample * shift_stride + column, mask=column < d, other=0.0))
    mean = tl.sum(x, 1) / d
    centred = tl.where(exists, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / d + EPS)
    out = centred * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]
    row = sample * n + token
    tl.store(out_ptr + (row * d)[:, None] + column[None, :], out, mask=exists)
    tl.store(statistics_ptr + 2 * row, mean, mask=there)
    tl.store(statistics_ptr + 2 * row + 1, rstd, mask=there)


@triton.jit
def _modulate_backward_kernel(
    grad_ptr,  # [B, n, d] contiguous
    x_ptr,  # [B, n, d]
    scale_ptr,  # [B, d]
    statistics_ptr,  # [B, n, 2]
    grad_x_ptr,  # [B, n, d] contiguous, written, or None
    parts_ptr,  # [2, B, chunks, d] written, or None: a chunk's gradients of scale and of shift
    n,
    d,
    x_batch_stride,
    x_token_stride,
    scale_stride,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,  # loads run one iteration less ahead
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(n, CHUNK)
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    column = tl.arange(0, BLOCK)
    real = column < d
    scale = tl.load(scale_ptr + sample * scale_stride + column, mask=real, other=0.0)
    gain = 1.0 + scale.to(statistics_ptr.dtype.element_ty)
    scale_sum, shift_sum = tl.zeros_like(gain), tl.zeros_like(gain)
    for start in tl.range(0, CHUNK, ROWS, num_stages=STAGES):
        token, there = _tokens(n, first + start, ROWS)
        row = sample * n + token
        exists = there[:, None] & real[None, :]
        x_rows = x_ptr + sample * x_batch_stride + token * x_token_stride
        x = _wide(tl.load(x_rows[:, None] + column[None, :], mask=exists, other=0.0))
        grad = _wide(tl.load(grad_ptr + (row * d)[:, None] + column[None, :], mask=exists, other=0.0))
        mean = tl.load(statistics_ptr + 2 * row, mask=there, other=0.0)
        rstd = tl.load(statistics_ptr + 2 * row + 1, mask=there, other=0.0)
        normal = tl.where(exists, (x - mean[:, None]) * rstd[:, None], 0.0)
        if parts_ptr is not None:
            scale_sum += tl.sum(grad * normal, 0)
            shift_sum += tl.sum(grad, 0)
        if grad_x_ptr is not None:
            grad_normal = grad * gain[None, :]
            level, slope = tl.sum(grad_normal, 1) / d, tl.sum(grad_normal * normal, 1) / d
            grad_x = (grad_normal - level[:, None] - normal * slope[:, None]) * rstd[:, None]
            tl.store(grad_x_ptr + (row * d)[:, None] + column[None, :], grad_x, mask=exists)
    if parts_ptr is not None:
        part = tl.program_id(0).to(tl.int64)
        tl.store(parts_ptr + part * d + column, scale_sum, mask=real)
        tl.store(parts_ptr + (tl.num_programs(0) + part) * d + column, shift_sum, mask=real)


@triton.jit
def _gate_tile(n, d, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, chunk of tokens among all samples' chunks, tokens, columns and which of them exist."""
    chunks, blocks = tl.cdiv(n, CHUNK), tl.cdiv(d, BLOCK)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    token, there = _tokens(n, chunk % chunks * CHUNK, CHUNK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return chunk // chunks, chunk, token, column, there[:, None] & (column < d)[None, :]


@triton.jit
def _gate_kernel(
    residual_ptr,  # [B, n, d]
    gate_ptr,  # [B, d]
    y_ptr,  # [B, n, d]
    out_ptr,  # [B, n, d] contiguous, written
    n,
    d,
    residual_batch_stride,
    residual_token_stride,
    gate_stride,
    y_batch_stride,
    y_token_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, token, column, exists = _gate_tile(n, d, CHUNK, BLOCK)
    residual_rows = residual_ptr + sample * residual_batch_stride + token * residual_token_stride
    y_rows = y_ptr + sample * y_batch_stride + token * y_token_stride
    residual = _wide(tl.load(residual_rows[:, None] + column[None, :], mask=exists, other=0.0))
    y = _wide(tl.load(y_rows[:, None] + column[None, :], mask=exists, other=0.0))
    gate = _wide(tl.load(gate_ptr + sample * gate_stride + column, mask=column < d, other=0.0))
    out_rows = out_ptr + (sample * n + token) * d
    tl.store(out_rows[:, None] + column[None, :], residual + gate[None, :] * y, mask=exists)


@triton.jit
def _gate_backward_kernel(
    grad_ptr,  # [B, n, d] contiguous
    gate_ptr,  # [B, d]
    y_ptr,  # [B, n, d]
    grad_y_ptr,  # [B, n, d] contiguous, written, or None
    parts_ptr,  # [B, chunks, d] written, or None: a chunk's gradient of the gate
    n,
    d,
    gate_stride,
    y_batch_stride,
    y_token_stride,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, chunk, token, column, exists = _gate_tile(n, d, CHUNK, BLOCK)
    rows = (sample * n + token) * d
    grad = _wide(tl.load(grad_ptr + rows[:, None] + column[None, :], mask=exists, other=0.0))
    if grad_y_ptr is not None:
        gate = _wide(tl.load(gate_ptr + sample * gate_stride + column, mask=column < d, other=0.0))
        tl.store(grad_y_ptr + rows[:, None] + column[None, :], grad * gate[None, :], mask=exists)
    if parts_ptr is not None:
        y_rows = y_ptr + sample * y_batch_stride + token * y_token_stride
        y = _wide(tl.load(y_rows[:, None] + column[None, :], mask=exists, other=0.0))
        tl.store(parts_ptr + chunk * d + column, tl.sum(grad * y, 0), mask=column < d)


@triton.jit
def _chunks_finish_kernel(
    parts_ptr,  # [R, chunks, d] contiguous
    out_ptr,  # [R, d] contiguous, written: the sums over chunks
    chunks,
    d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(d, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for start in range(0, chunks, ROWS):
        chunk, there = _tokens(chunks, start, ROWS)
        exists = there[:, None] & (column < d)[None, :]
        parts = tl.load(parts_ptr + ((row * chunks + chunk) * d)[:, None] + column[None, :], mask=exists, other=0.0)
        total += tl.sum(parts, 0)
    tl.store(out_ptr + row * d + column, total, mask=column < d)


# --------------------------------------------------------------------------------------------------------- launchers


def _compute_type(x: Tensor) -> torch.dtype:
    """What `_wide` makes of x, on the host."""
    return torch.promote_types(x.dtype, torch.float32)


def _new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory: of x's shape and type where none is given."""
    return x.new_empty(shape or x.shape, dtype=dtype)


def _whole_tokens(d: int, numbers: int) -> dict[str, int]:
    """Launch of tiles of whole tokens: with 4 warps, or more for wide ones, `numbers` numbers in each thread."""
    block = triton.next_power_of_2(d)
    rows = max(1, min(16, 128 * numbers // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(4, min(16, block // (32 * numbers))), **EXACT}


def _blocks(d: int) -> tuple[int, int]:
    block = min(COLUMNS, triton.next_power_of_2(d))
    return block, triton.cdiv(d, block)


def _add_up(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., chunks, D] to [..., D]."""
    *rows, chunks, d = parts.shape
    out = _new(parts, *rows, d, dtype=dtype)
    _chunks_finish_kernel[(out.numel() // d * triton.cdiv(d, 128),)](
        parts, out, chunks, d, ROWS=16, BLOCK=128, num_warps=4, **EXACT
    )
    return out


@torch.library.custom_op("latent_critic::adaln_modulate", mutates_args=())
def launch_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The output and, for the backward, mean and rstd of each token: [B, N, 2]."""
    batch, n, d = x.shape
    out, statistics = _new(x), _new(x, batch, n, 2, dtype=_compute_type(x))
    launch = _whole_tokens(d, numbers=32)
    with on_device(x):
        _modulate_kernel[(batch * triton.cdiv(n, launch["ROWS"]),)](
            x, scale, shift, out, statistics, n, d, x.stride(0), x.stride(1), scale.stride(0), shift.stride(0), **launch
        )
    return out, statistics


@torch.library.custom_op("latent_critic::adaln_modulate_backward", mutates_args=())
def launch_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, statistics: Tensor, wants_x: bool, wants_modulation: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in one tensor [2, B, D], of scale and shift; one that is not wanted is empty."""
    batch, n, d = x.shape
    chunks = triton.cdiv(n, CHUNK)
    grad_x = _new(x) if wants_x else _new(x, 0)
    parts = _new(statistics, 2, batch, chunks, d) if wants_modulation else None
    with on_device(x):
        _modulate_backward_kernel[(batch * chunks,)](
            grad.contiguous(), x, scale, statistics, grad_x if wants_x else None, parts, n, d,
            x.stride(0), x.stride(1), scale.stride(0), CHUNK=CHUNK, STAGES=3, **_whole_tokens(d, numbers=16),
        )  # fmt: skip
        return grad_x, _new(scale, 0) if parts is None else _add_up(parts, scale.dtype)


@torch.library.custom_op("latent_critic::gate_residual", mutates_args=())
def launch_gate(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    batch, n, d = residual.shape
    block, blocks = _blocks(d)
    out = _new(residual)
    with on_device(residual):
        _gate_kernel[(batch * triton.cdiv(n, CHUNK) * blocks,)](
            residual, gate, y, out, n, d, residual.stride(0), residual.stride(1), gate.stride(0),
            y.stride(0), y.stride(1), CHUNK=CHUNK, BLOCK=block, num_warps=4, **EXACT,
        )  # fmt: skip
    return out


@torch.library.custom_op("latent_critic::gate_residual_backward", mutates_args=())
def launch_gate_backward(
    grad: Tensor, gate: Tensor, y: Tensor, wants_gate: bool, wants_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and y; one that is not wanted is empty."""
    batch, n, d = y.shape
    chunks, (block, blocks) = triton.cdiv(n, CHUNK), _blocks(d)
    parts = _new(y, batch, chunks, d, dtype=_compute_type(grad)) if wants_gate else None
    grad_y = _new(y) if wants_y else _new(y, 0)
    with on_device(y):
        _gate_backward_kernel[(batch * chunks * blocks,)](
            grad.contiguous(), gate, y, grad_y if wants_y else None, parts, n, d,
            gate.stride(0), y.stride(0), y.stride(1), CHUNK=CHUNK, BLOCK=block, num_warps=4, **EXACT,
        )  # fmt: skip
        return _new(gate, 0) if parts is None else _add_up(parts, gate.dtype), grad_y


# ------------------------------------------------------------------------------------------------------ registration


@launch_modulate.register_fake
def _(x, scale, shift):
    return _new(x), _new(x, *x.shape[:2], 2, dtype=_compute_type(x))


@launch_modulate_backward.register_fake
def _(grad, x, scale, statistics, wants_x, wants_modulation):
    return _new(x) if wants_x else _new(x, 0), _new(scale, 2, *scale.shape) if wants_modulation else _new(scale, 0)


def _keep_modulate(ctx, inputs, output):
    x, scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else autograd fills zeros for the statistics
    ctx.save_for_backward(x, scale, output[1])


def _modulate_gradients(ctx, grad, _):
    if grad is None:
        return None, None, None
    x, scale, statistics = ctx.saved_tensors
    wants_x, wants_scale, wants_shift = ctx.needs_input_grad
    wants_modulation = wants_scale or wants_shift
    grad_x, modulation = launch_modulate_backward(grad, x, scale, statistics, wants_x, wants_modulation)
    grad_scale, grad_shift = modulation if wants_modulation else (None, None)
    return grad_x if wants_x else None, grad_scale, grad_shift


@launch_gate.register_fake
def _(residual, gate, y):
    return _new(residual)


@launch_gate_backward.register_fake
def _(grad, gate, y, wants_gate, wants_y):
    return _new(gate) if wants_gate else _new(gate, 0), _new(y) if wants_y else _new(y, 0)


def _keep_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gate_gradients(ctx, grad):
    gate, y = ctx.saved_tensors
    wants_residual, wants_gate, wants_y = ctx.needs_input_grad
    grad_gate, grad_y = launch_gate_backward(grad, gate, y, wants_gate, wants_y)
    return grad if wants_residual else None, grad_gate if wants_gate else None, grad_y if wants_y else None


launch_modulate.register_autograd(_modulate_gradients, setup_context=_keep_modulate)
launch_gate.register_autograd(_gate_gradients, setup_context=_keep_gate)

# -------------------------------------------------------------------------------------------------- public functions


def _check(name: str, x: Tensor, reference_name: str, reference: Tensor, shape: tuple[int, ...]) -> None:
    """`x` must have this shape and the reference's device and type, or a type that the reference's holds."""
    check_shape(name, x, shape)
    if not x.is_floating_point() or torch.promote_types(x.dtype, reference.dtype) != reference.dtype:
        refuse(name, f"have {reference_name}'s type {reference.dtype} or a narrower one", x.dtype)
    check_device(reference_name, reference, **{name: x})
    check_rows(**{name: x})


def adaln_modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of tokens `x` [B, N, D] without weights, times 1 + `scale` [B, D], plus `shift` [B, D]; x's dtype.

    Differentiable in all three. Samples, tokens and rows of the modulation may lie anywhere in memory, as slices and
    chunks do; neighbours in D must be neighbours there. ValueError names the argument that does not fit.
    """
    check_floating("x", x, "[B, N, D]", 3)
    check_rows(x=x)
    _check("scale", scale, "x", x, (x.shape[0], x.shape[2]))
    _check("shift", shift, "x", x, (x.shape[0], x.shape[2]))
    if shift.dtype != scale.dtype:
        refuse("shift", f"have scale's type {scale.dtype}", shift.dtype)
    if runs_kernels(x):
        return launch_modulate(x, scale, shift)[0]
    return adaln_modulate_reference(x, scale, shift)


def gate_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`residual` [B, N, D] + `gate` [B, D] times `y` [B, N, D], in residual's dtype; differentiable in all three.

    The inputs may lie in memory as those of `adaln_modulate`. ValueError names the argument that does not fit.
    """
    check_floating("residual", residual, "[B, N, D]", 3)
    check_rows(residual=residual)
    _check("gate", gate, "residual", residual, (residual.shape[0], residual.shape[2]))
    _check("y", y, "residual", residual, residual.shape)
    if runs_kernels(residual):
        return launch_gate(residual, gate, y)
    return gate_residual_reference(residual, gate, y)
