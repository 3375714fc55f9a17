"""Attention of fixed queries over normalised tokens, in one read of the tokens: the core of `critic_pool`.

    x      = (h - mean) rstd              mean and rstd = (variance + 1e-6)^(-1/2) of each token
    s      = q x^T
    pooled = softmax over tokens of s, times x

    argument   shape            dtype
    h          [B, N, D]        any floating type; neighbours in D are neighbours in memory, rows lie anywhere
    q          [B, heads, D]    float32 (float64 when h is)
    pooled     [B, heads, D]    as q

The kernels multiply h as it is, on tensor cores: s = rstd (q h^T - mean sum(q)), and the weights of h are the softmax
times rstd. Half precision h is exact there; what it meets is the sum of two numbers of h's type, of 16 bits together in
bfloat16 and 22 in float16. The variance is E[h^2] - mean^2 in float32: rstd is good to 3e-5 while |mean| is below 10
standard deviations, to 3e-3 at 100, where a bfloat16 token has no digit left. Backward, for P = pooled, its gradient
dP, and w = softmax s:

    g = dP x^T,  ds = w (g - dP P),  dq = ds x
    dx = w^T dP + ds^T q,  dh = rstd (dx - mean(dx) - x mean(dx x))

with means over D that follow from w, ds and s alone. The gradient of h is a kernel of its own, run if it is wanted.

A program takes some of a sample's tokens, a number that depends on N alone, so a sample's numbers depend on no other
sample. Its 8 warps own D / 8 channels each, of the tokens in shared memory and of the sums in registers: a token is
read once, and only scores cross between warps. What programs have summed up, `_finish_kernel` adds in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device, runs_kernels, widened

LAYER_NORM_EPS = 1e-6
EPS = tl.constexpr(LAYER_NORM_EPS)
WARPS = tl.constexpr(8)
TILE = tl.constexpr(16)  # tokens a program takes at a time: the fewest a tensor core does
BEFORE_3_5 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)

# --------------------------------------------------------------------------------------------------------- reference


def pool_tokens_reference(h: Tensor, q: Tensor) -> Tensor:
    h = widened(h)
    ones, zeros = h.new_ones(h.shape[-1]), h.new_zeros(h.shape[-1])  # with them a CPU takes half the time, same bits
    x = torch.nn.functional.layer_norm(h, h.shape[-1:], ones, zeros, LAYER_NORM_EPS)
    return (q @ x.transpose(1, 2)).softmax(dim=-1) @ x


# ----------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _place(tokens, heads, splits, length, HEADS: tl.constexpr):
    """This program's row of partial results, sample, first token, end of its tokens, and heads."""
    groups = tl.cdiv(heads, HEADS)  # of one split lie side by side, so that the second finds the tokens in the L2 cache
    row = tl.program_id(0) // groups
    first = row % splits * length
    head = tl.program_id(0) % groups * HEADS + tl.arange(0, HEADS)
    return row.to(tl.int64), (row // splits).to(tl.int64), first, tl.minimum(first + length, tokens), head


@triton.jit
def _channels(chunk: tl.constexpr, WIDTH: tl.constexpr):
    """[WARPS, WIDTH] channels. D is cut into chunks since a tensor's sides are powers of two."""
    return (tl.arange(0, WARPS)[:, None] + chunk * WARPS) * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _vectors(ptr, head, heads, DTYPE: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """What tokens are multiplied by, of [heads, D] at ptr: chunks [WARPS, PARTS * HEADS, WIDTH], row sums, row scales.

    Part 1 of a number is what rounding it to DTYPE, part 0, has lost. A row is divided by its scale, the largest of its
    numbers, so that float16 holds it.
    """
    ROWS: tl.constexpr = PARTS * head.shape[0]
    is_rest = (tl.arange(0, ROWS) >= head.shape[0])[None, :, None]
    row = tl.reshape(tl.broadcast_to(head[None, :], (PARTS, head.shape[0])), (ROWS,))[None, :, None]
    whole = ()
    largest = tl.zeros((ROWS,), ptr.dtype.element_ty)
    for chunk in tl.static_range((D + WARPS * WIDTH - 1) // (WARPS * WIDTH)):
        channel = _channels(chunk, WIDTH)[:, None, :]
        x = tl.load(ptr + row * D + channel, mask=(row < heads) & (channel < D), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(x), 2), 0))
        whole = whole + (x,)
    scale = tl.where(largest > 0, largest, 1.0)
    parts = ()
    total = tl.zeros_like(scale)
    for chunk in tl.static_range(len(whole)):
        x = whole[chunk] / scale[None, :, None]
        rounded = x.to(DTYPE)
        part = tl.where(is_rest, (x - rounded.to(x.dtype)).to(DTYPE), rounded)
        total += tl.sum(tl.sum(part.to(x.dtype), 2), 0)
        parts = parts + (part,)
    return parts, total, scale


@triton.jit
def _tile(h_ptr, token, end, stride, vectors, D: tl.constexpr, WIDTH: tl.constexpr):
    """Chunks [WARPS, WIDTH, TILE] of tokens; the tokens' products with the vectors, sums and sums of squares."""
    TYPE: tl.constexpr = vectors[1].dtype
    parts, rows = vectors[0], h_ptr + token.to(tl.int64)[None, None, :] * stride
    products = tl.zeros((WARPS, vectors[1].shape[0], TILE), TYPE)
    # Eight neighbours lie in one thread: added up first, they leave little to hold and to exchange.
    sums = tl.zeros((WARPS, WIDTH // 8, TILE), TYPE)
    squares = sums
    h = ()
    for chunk in tl.static_range(len(parts)):
        channel = _channels(chunk, WIDTH)[:, :, None]
        x = tl.load(rows + channel, mask=(token < end)[None, None, :] & (channel < D), other=0.0)
        products = tl.dot(parts[chunk], x, products, input_precision="ieee", out_dtype=TYPE)
        wide = tl.reshape(x, (WARPS, WIDTH // 8, 8, TILE)).to(TYPE)
        sums += tl.sum(wide, 2)
        squares += tl.sum(wide * wide, 2)
        h = h + (x,)
    return h, tl.sum(products, 0), sums, squares


@triton.jit
def _statistics(sums, squares, D: tl.constexpr):
    """Mean and rstd of each token."""
    both = tl.reshape(tl.join(sums, squares), (sums.shape[0] * sums.shape[1], TILE, 2))
    mean, square = tl.split(tl.sum(both, 0) / D)
    return mean, 1.0 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + EPS)


@triton.jit
def _normalized(products, mean, rstd, vectors, PARTS: tl.constexpr):
    """[HEADS, TILE] products of the vectors with the normalised tokens."""
    products = (products - vectors[1][:, None] * mean[None, :]) * vectors[2][:, None]
    return tl.sum(tl.reshape(products, (PARTS, products.shape[0] // PARTS, TILE)), 0) * rstd[None, :]


@triton.jit
def _zeros(vectors, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    sums = ()
    for _ in tl.static_range(len(vectors[0])):
        sums = sums + (tl.zeros((WARPS, WIDTH, HEADS), vectors[1].dtype),)
    return sums


@triton.jit
def _scaled(sums, factor):
    scaled = ()
    for chunk in tl.static_range(len(sums)):
        scaled = scaled + (sums[chunk] * factor[None, None, :],)
    return scaled


@triton.jit
def _add(sums, h, weights, PARTS: tl.constexpr):
    """sums + h weights^T, chunk by chunk [WARPS, WIDTH, HEADS]; and the weights as they were after rounding."""
    DTYPE: tl.constexpr = h[0].dtype
    side: tl.constexpr = (WARPS, TILE, weights.shape[0])
    rounded = weights.to(DTYPE)
    used = rounded.to(weights.dtype)
    rest = (weights - used).to(DTYPE)
    high, low = tl.broadcast_to(tl.trans(rounded)[None, :, :], side), tl.broadcast_to(tl.trans(rest)[None, :, :], side)
    added = ()
    for chunk in tl.static_range(len(h)):
        x = tl.dot(h[chunk], high, sums[chunk], input_precision="ieee", out_dtype=used.dtype)
        if PARTS == 2:
            x = tl.dot(h[chunk], low, x, out_dtype=used.dtype)
        added = added + (x,)
    return added, used + rest.to(used.dtype)


@triton.jit
def _store(ptr, sums, shift, head, heads, D: tl.constexpr, WIDTH: tl.constexpr):
    """sums - shift into [heads, D]."""
    head = head[None, None, :]
    for chunk in tl.static_range(len(sums)):
        channel = _channels(chunk, WIDTH)[:, :, None]
        tl.store(ptr + head * D + channel, sums[chunk] - shift[None, None, :], mask=(channel < D) & (head < heads))


@triton.jit
def _pool_kernel(
    h_ptr,  # [B, N, D]
    q_ptr,  # [B, heads, D]
    parts_ptr,  # [B, splits, heads, D] written: sum of exp(s - top) x
    tops_ptr,  # [B, splits, heads] written: largest score
    totals_ptr,  # [B, splits, heads] written: sum of exp(s - top)
    scores_ptr,  # [B, heads, N] written
    statistics_ptr,  # [B, 2, N] written: mean and rstd
    tokens,
    heads,
    splits,
    length,
    batch_stride,
    token_stride,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, sample, first, end, head = _place(tokens, heads, splits, length, HEADS)
    q = _vectors(q_ptr + sample * heads * D, head, heads, h_ptr.dtype.element_ty, PARTS, D, WIDTH)
    h_ptr += sample * batch_stride
    scores_ptr += (sample * heads + head)[:, None] * tokens
    statistics_ptr += sample * 2 * tokens
    sums = _zeros(q, HEADS, WIDTH)
    total = tl.zeros((HEADS,), q[1].dtype)
    means, top = total, total - float("inf")
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        exists = token < end
        h, products, sum_h, squares = _tile(h_ptr, token, end, token_stride, q, D, WIDTH)
        mean, rstd = _statistics(sum_h, squares, D)
        scores = _normalized(products, mean, rstd, q, PARTS)
        tl.store(statistics_ptr + token, mean, mask=exists)
        tl.store(statistics_ptr + tokens + token, rstd, mask=exists)
        tl.store(scores_ptr + token[None, :], scores, mask=(head < heads)[:, None] & exists[None, :])
        scores = tl.where(exists[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights, keep = tl.exp(scores - new_top[:, None]), tl.exp(top - new_top)
        sums, used = _add(_scaled(sums, keep), h, weights * rstd[None, :], PARTS)
        total = total * keep + tl.sum(weights, 1)
        means = means * keep + tl.sum(used * mean[None, :], 1)
        top = new_top
    _store(parts_ptr + row * heads * D, sums, means, head, heads, D, WIDTH)
    tl.store(tops_ptr + row * heads + head, top, mask=head < heads)
    tl.store(totals_ptr + row * heads + head, total, mask=head < heads)


@triton.jit
def _finish_kernel(
    parts_ptr,  # [B, splits, heads, D]
    tops_ptr,  # [B, splits, heads], or None to add up the parts as they are
    totals_ptr,  # [B, splits, heads], or None
    result_ptr,  # [B, heads, D] written
    lse_ptr,  # [B, heads] written: log of the sum of exp(s), or None
    heads,
    splits,
    D: tl.constexpr,
    SPLITS: tl.constexpr,  # the power of two not below
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)  # sample * heads + head
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    place = (row // heads * splits + split) * heads + row % heads
    exists = (split < splits)[:, None] & (channel < D)[None, :]
    parts = tl.load(parts_ptr + place[:, None] * D + channel[None, :], mask=exists, other=0.0)
    if tops_ptr is not None:
        tops = tl.load(tops_ptr + place, mask=split < splits, other=-float("inf"))
        top = tl.max(tops, 0)
        shares = tl.exp(tops - top)
        total = tl.sum(tl.load(totals_ptr + place, mask=split < splits, other=0.0) * shares, 0)
        parts = parts * (shares / total)[:, None]
        tl.store(lse_ptr + row, top + tl.log(total))  # every block of the row writes the same
    tl.store(result_ptr + row * D + channel, tl.sum(parts, 0), mask=channel < D)


@triton.jit
def _rows_finish_kernel(
    q_ptr,  # [B, heads, D]
    grad_ptr,  # [B, heads, D]: dP
    pooled_ptr,  # [B, heads, D]: P
    rows_ptr,  # [3, B, heads] written: dP P, mean(q), mean(dP)
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    q = tl.load(q_ptr + row * D + channel, mask=channel < D, other=0.0)
    grad = tl.load(grad_ptr + row * D + channel, mask=channel < D, other=0.0)
    pooled = tl.load(pooled_ptr + row * D + channel, mask=channel < D, other=0.0)
    tl.store(rows_ptr + row, tl.sum(grad * pooled, 0))
    tl.store(rows_ptr + rows + row, tl.sum(q, 0) / D)
    tl.store(rows_ptr + 2 * rows + row, tl.sum(grad, 0) / D)


@triton.jit
def _pool_backward_kernel(
    h_ptr,  # [B, N, D]
    grad_ptr,  # [B, heads, D]: dP
    rows_ptr,  # [3, B, heads]: dP P first
    lse_ptr,  # [B, heads]
    scores_ptr,  # [B, heads, N]
    statistics_ptr,  # [B, 2, N]
    parts_ptr,  # [B, splits, heads, D] written: ds x
    grad_scores_ptr,  # [B, heads, N] written: ds
    tokens,
    heads,
    splits,
    length,
    batch_stride,
    token_stride,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, sample, first, end, head = _place(tokens, heads, splits, length, HEADS)
    grad = _vectors(grad_ptr + sample * heads * D, head, heads, h_ptr.dtype.element_ty, PARTS, D, WIDTH)
    # In these units dP is at most 1 long, so ds at most sqrt(D) / 2, and ds rstd, with rstd at most 1000, in the range
    # of float16.
    unit = tl.max(tl.reshape(grad[2], (PARTS, HEADS)), 0) * D**0.5
    h_ptr += sample * batch_stride
    statistics_ptr += sample * 2 * tokens
    by_head = sample * heads + head
    lse = tl.load(lse_ptr + by_head, mask=head < heads, other=0.0)
    shared = tl.load(rows_ptr + by_head, mask=head < heads, other=0.0)
    sums = _zeros(grad, HEADS, WIDTH)
    means = tl.zeros((HEADS,), unit.dtype)
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        h, products, sum_h, squares = _tile(h_ptr, token, end, token_stride, grad, D, WIDTH)
        mean = tl.load(statistics_ptr + token, mask=token < end, other=0.0)
        rstd = tl.load(statistics_ptr + tokens + token, mask=token < end, other=0.0)
        place, exists = by_head[:, None] * tokens + token[None, :], (head < heads)[:, None] & (token < end)[None, :]
        weights = tl.exp(tl.load(scores_ptr + place, mask=exists, other=-float("inf")) - lse[:, None])
        grad_scores = weights * (_normalized(products, mean, rstd, grad, PARTS) - shared[:, None])
        tl.store(grad_scores_ptr + place, grad_scores, mask=exists)
        sums, used = _add(sums, h, grad_scores / unit[:, None] * rstd[None, :], PARTS)
        means += tl.sum(used * mean[None, :], 1)
    _store(parts_ptr + row * heads * D, _scaled(sums, unit), means * unit, head, heads, D, WIDTH)


@triton.jit
def _tokens_backward_kernel(
    h_ptr,  # [B, N, D]
    q_ptr,  # [B, heads, D]
    grad_ptr,  # [B, heads, D]: dP
    rows_ptr,  # [3, B, heads]: dP P, mean(q), mean(dP)
    lse_ptr,  # [B, heads]
    scores_ptr,  # [B, heads, N]
    grad_scores_ptr,  # [B, heads, N]
    statistics_ptr,  # [B, 2, N]
    grad_h_ptr,  # [B, N, D] written
    rows,
    tokens,
    heads,
    batch_stride,
    token_stride,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    tiles = tl.cdiv(tokens, TOKENS)
    sample = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    token = tl.program_id(0) // blocks % tiles * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists, is_channel = token < tokens, channel < D
    mean = tl.load(statistics_ptr + sample * 2 * tokens + token, mask=exists, other=0.0)
    rstd = tl.load(statistics_ptr + (sample * 2 + 1) * tokens + token, mask=exists, other=0.0)
    place, both = token.to(tl.int64)[:, None], exists[:, None] & is_channel[None, :]
    h = tl.load(h_ptr + sample * batch_stride + place * token_stride + channel[None, :], mask=both, other=0.0)
    grad_x = tl.zeros((TOKENS, BLOCK), mean.dtype)
    mean_grad = tl.zeros((TOKENS,), mean.dtype)  # mean(dx)
    mean_grad_x = mean_grad  # mean(dx x)
    for row in range(sample * heads, sample * heads + heads):
        q = tl.load(q_ptr + row * D + channel, mask=is_channel, other=0.0)
        grad = tl.load(grad_ptr + row * D + channel, mask=is_channel, other=0.0)
        scores = tl.load(scores_ptr + row * tokens + token, mask=exists, other=0.0)
        grad_scores = tl.load(grad_scores_ptr + row * tokens + token, mask=exists, other=0.0)
        weights = tl.exp(scores - tl.load(lse_ptr + row))
        grad_x += weights[:, None] * grad[None, :] + grad_scores[:, None] * q[None, :]
        mean_grad += weights * tl.load(rows_ptr + 2 * rows + row) + grad_scores * tl.load(rows_ptr + rows + row)
        # w g + ds s, of which w g = ds + w dP P
        mean_grad_x += (weights * tl.load(rows_ptr + row) + grad_scores * (1.0 + scores)) / D
    x = (h.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    grad_h = rstd[:, None] * (grad_x - mean_grad[:, None] - x * mean_grad_x[:, None])
    tl.store(grad_h_ptr + (sample * tokens + place) * D + channel[None, :], grad_h, mask=both)


# --------------------------------------------------------------------------------------------------------- launchers


def _width(dim: int) -> int:
    """Channels of a warp in a chunk of D."""
    return min(max(triton.next_power_of_2(dim) // WARPS.value, 16), 64)


@torch.compiler.assume_constant_result  # torch.compile need not follow it
def _widest(itemsize: int, device: torch.device) -> int:
    """The largest D whose sums fit into a program's registers, and its q and a tile of tokens into shared memory."""
    chunk = WARPS.value * 64 * itemsize  # bytes of a token, which takes whole chunks
    if torch.version.hip:
        return 4096 // chunk * WARPS.value * 64
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return min(6144, (shared - 8192) // 32) // chunk * WARPS.value * 64


def _layout(h: Tensor, heads: int) -> tuple[int, int, int, dict]:
    """Programs, splits, tokens of a split, and what the kernels that walk through the tokens are compiled for."""
    batch, tokens, dim = h.shape
    chunk = WARPS.value * _width(dim)
    token_bytes = triton.cdiv(dim, chunk) * chunk * h.itemsize  # of shared memory
    length = TILE.value * min(max(triton.cdiv(tokens, 8 * TILE.value), 1), 8)  # 8 splits, or more of 128 tokens
    splits = triton.cdiv(tokens, length)
    rocm = torch.version.hip is not None
    constants = {
        "D": dim,
        # The fewest a matrix unit, or a product in Triton, takes; further heads go to further programs.
        "HEADS": 16 if rocm or BEFORE_3_5 else 8,
        "PARTS": 2 if h.itemsize == 2 else 1,
        "WIDTH": _width(dim),
        # Two tiles in shared memory, one arriving and one at work, or for wide tokens one; ROCm has room for none.
        "STAGES": 1 if rocm else 3 if token_bytes <= 3072 else 2,
        "num_warps": WARPS.value,
        "enable_fp_fusion": True,  # nothing here is compared bit by bit with another kernel
    }
    return batch * splits * triton.cdiv(heads, constants["HEADS"]), splits, length, constants


def _finish(parts: Tensor, tops: Tensor | None, totals: Tensor | None, result: Tensor, lse: Tensor | None) -> None:
    batch, splits, heads, dim = parts.shape
    padded = triton.next_power_of_2(splits)
    block = min(max(4096 // padded, 16), 256)
    _finish_kernel[(batch * heads * triton.cdiv(dim, block),)](
        parts, tops, totals, result, lse, heads, splits,
        D=dim, SPLITS=padded, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@torch.library.custom_op("latent_critic::pool_tokens", mutates_args=())
def launch_pool(h: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pooled; and for the backward lse [B, heads], scores [B, heads, N], mean and rstd [B, 2, N]."""
    q = q.contiguous()
    pooled, lse, scores, statistics = _results(h, q)
    batch, heads, dim = q.shape
    programs, splits, length, constants = _layout(h, heads)
    parts, tops, totals = q.new_empty(batch, splits, heads, dim), *q.new_empty(2, batch, splits, heads)
    with on_device(h):
        _pool_kernel[(programs,)](
            h, q, parts, tops, totals, scores, statistics,
            h.shape[1], heads, splits, length, h.stride(0), h.stride(1), **constants,
        )  # fmt: skip
        _finish(parts, tops, totals, pooled, lse)
    return pooled, lse, scores, statistics


@torch.library.custom_op("latent_critic::pool_tokens_backward", mutates_args=())
def launch_backward(
    grad: Tensor,
    h: Tensor,
    q: Tensor,
    pooled: Tensor,
    lse: Tensor,
    scores: Tensor,
    statistics: Tensor,
    wants_h: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and h; the latter is empty if it is not wanted."""
    grad, q = grad.contiguous(), q.contiguous()
    grad_q, grad_h = _gradients(h, q, wants_h)
    (batch, heads, dim), tokens = q.shape, h.shape[1]
    programs, splits, length, constants = _layout(h, heads)
    parts, rows, grad_scores = (
        q.new_empty(batch, splits, heads, dim),
        q.new_empty(3, batch, heads),
        scores.new_empty(scores.shape),
    )
    with on_device(h):
        _rows_finish_kernel[(batch * heads,)](
            q, grad, pooled, rows, batch * heads,
            D=dim, BLOCK=triton.next_power_of_2(dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _pool_backward_kernel[(programs,)](
            h, grad, rows, lse, scores, statistics, parts, grad_scores,
            tokens, heads, splits, length, h.stride(0), h.stride(1), **constants,
        )  # fmt: skip
        _finish(parts, None, None, grad_q, None)
        if wants_h:
            _tokens_backward_kernel[(batch * triton.cdiv(tokens, 64) * triton.cdiv(dim, 64),)](
                h, q, grad, rows, lse, scores, grad_scores, statistics, grad_h,
                batch * heads, tokens, heads, h.stride(0), h.stride(1),
                D=dim, TOKENS=64, BLOCK=64, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_q, grad_h


def _results(h: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, _), tokens = q.shape, h.shape[1]
    scores, statistics = q.new_empty(batch, heads, tokens), q.new_empty(batch, 2, tokens)
    return q.new_empty(q.shape), q.new_empty(batch, heads), scores, statistics


def _gradients(h: Tensor, q: Tensor, wants_h: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), h.new_empty(h.shape if wants_h else 0)


# ------------------------------------------------------------------------------------------------------ registration


@launch_pool.register_fake
def _(h, q):
    return _results(h, q)


@launch_backward.register_fake
def _(grad, h, q, pooled, lse, scores, statistics, wants_h):
    return _gradients(h, q, wants_h)


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_pooled, *_):
    wants_h = ctx.needs_input_grad[0]
    grad_q, grad_h = launch_backward(grad_pooled, *ctx.saved_tensors, wants_h)
    return grad_h if wants_h else None, grad_q


launch_pool.register_autograd(_backward, setup_context=_keep)

# --------------------------------------------------------------------------------------------------- public function


def pool_tokens(h: Tensor, q: Tensor) -> Tensor:
    """pooled [B, heads, D] of the formula above; differentiable in h and q, which the caller has checked.

    The kernels take tokens of 4096 bytes (D = 2048 in half precision), or 6144 where a program has 208 KB of shared
    memory, as on Hopper. Wider ones go through PyTorch.
    """
    multiplies = h.dtype != torch.float64 or not BEFORE_3_5  # that Triton knows no product of float64
    if runs_kernels(h) and multiplies and h.shape[2] <= _widest(h.itemsize, h.device):
        return launch_pool(h, q)[0]
    return pool_tokens_reference(h, q)
