"""The kernels of `pool_tokens`, in the interpreter where there is no GPU, against float64."""

import types

import pytest
import torch

from latent_critic.kernels import pool_tokens as pool
from latent_critic.kernels.critic_pool import critic_pool, critic_pool_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of a product in the kernels. float32: unit roundoff 2^-24, doubled for the two roundings of a term.
# float16: the float32 side is two numbers of 11 bits, so 2^-22. bfloat16: two of 8 bits, and the interpreter truncates
# where a GPU rounds, so 2^-14.
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-22, torch.bfloat16: 2.0**-14}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}  # of h's gradient
SUBNORMAL = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
SHAPES = [(2, 33, 20, 3), (1, 130, 48, 1), (1, 3, 1025, 8), (2, 1, 20, 9), (1, 17, 1023, 1)]  # B, N, D, heads


@pytest.fixture
def on_kernels(monkeypatch):
    """`critic_pool` runs the kernels where the tensors are: on a CPU as on a GPU with an H100's shared memory."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(pool, "runs_kernels", lambda x: True)
    hopper = types.SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as integers and multiplies those: here it widens them first."""
    if DEVICE == "cuda":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    create_dot, float32 = interpreter.InterpreterBuilder.create_dot, interpreter.tl.float32

    def widened(builder, a, b, *others):
        if a.dtype.scalar == interpreter.tl.bfloat16:
            a, b = builder.cast_impl(a, float32), builder.cast_impl(b, float32)
        return create_dot(builder, a, b, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


def _inputs(batch, tokens, dim, heads, dtype, seed=0, score=2.0):
    """h, q that gives scores of that size, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    h = (3.0 * torch.randn(batch, tokens, dim, generator=generator, dtype=wide) + 1.0).to(DEVICE, dtype)
    q = torch.randn(batch, heads, dim, generator=generator, dtype=wide).to(DEVICE) * score / dim**0.5
    return h, q, torch.randn(batch, heads, dim, generator=generator, dtype=wide).to(DEVICE)


def _run(function, h, q, grad):
    """Result, gradient of h, gradient of q."""
    h, q = h.detach().requires_grad_(), q.detach().requires_grad_()
    result = function(h, q)
    return result.detach(), *torch.autograd.grad(result, (h, q), grad)


def _check(h, q, grad):
    """Everything within what rounding explains.

    A score is rstd times a sum of D products of q and h: with random errors it is off by unit times |q| |h| rstd, over
    sqrt(D), which is unit |q| sqrt(1 + (mean rstd)^2). A weight is off by that much of itself, twice since the largest
    score is subtracted, by unit times the largest score and by unit sqrt(N), for the sum over tokens. dP likewise.
    """
    unit, (_, tokens, dim) = UNIT[h.dtype], h.shape
    found = _run(lambda *given: pool.launch_pool(*given)[0], h, q, grad)
    expected = _run(pool.pool_tokens_reference, h.double(), q.double(), grad.double())
    wide = h.double()
    x = torch.nn.functional.layer_norm(wide, (dim,), eps=1e-6)
    rstd = (wide.var(dim=-1, correction=0) + 1e-6).rsqrt()
    offset = (wide.mean(dim=-1) * rstd).abs().max().item()
    rstd = rstd.max().item()
    products = grad.double() @ x.transpose(1, 2)
    size, largest = (lambda t: t.double().norm(dim=-1).max().item()), (lambda t: t.double().abs().max().item())
    of_weight = unit * (2.0 * size(q) * (1.0 + offset) + largest(q.double() @ x.transpose(1, 2)) + tokens**0.5)
    of_grad_score = unit * size(grad) * (1.0 + offset) + largest(products) * of_weight
    of_grad_x = q.shape[1] * (largest(grad) * of_weight + largest(q) * of_grad_score)
    limits = (
        (largest(x) + offset) * of_weight,
        2.0 * rstd * (1.0 + largest(x)) * of_grad_x + STORED[h.dtype] * largest(expected[1]) + SUBNORMAL[h.dtype],
        2.0 * (largest(x) + offset) * of_grad_score,
    )
    for name, ours, theirs, limit in zip(("result", "h", "q"), found, expected, limits, strict=True):
        error = largest(ours.double() - theirs)
        assert error <= limit, f"{name}: error {error:.3g} above {limit:.3g}"  # NaN is not below either


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, poisoned_outputs):
    h, q, grad = _inputs(*shape, dtype)
    if DEVICE == "cuda" and h.shape[2] > pool._widest(h.itemsize, h.device):
        pytest.skip("tokens too wide for this GPU's shared memory; the interpreter has no limit")
    _check(h, q, grad)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_bfloat16(shape, poisoned_outputs, bfloat16_products):
    _check(*_inputs(*shape, torch.bfloat16))


def test_gradcheck():
    h, q, _ = _inputs(1, 3, 5, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda h, q: pool.launch_pool(h, q)[0], (h.requires_grad_(), q.requires_grad_()))


def test_critic_pool_by_the_kernels(on_kernels, poisoned_outputs):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 20), (3, 4), (12, 20), (12, 20), (2, 20), (2, 20)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    found, expected = critic_pool(*inputs), critic_pool_reference(*inputs)
    # float64 on both sides, sums of at most 24 products of order 1.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["equal scores", "huge scores", "one token counts", "constant token", "tiny gradient"])
def test_extreme_values(case, dtype, poisoned_outputs):
    h, q, grad = _inputs(1, 20, 48, 2, dtype)
    if case == "equal scores":
        q = torch.zeros_like(q)
    elif case == "huge scores":  # about +-80
        q = q * 20.0
    elif case == "one token counts":
        h[0, 7] = (q[0, 0] * 30.0).to(dtype)
        q = q * 40.0
    elif case == "constant token":  # its variance is 0, its rstd 1000
        h[0, 3] = 5.0
    else:
        grad = grad * 1e-7  # would vanish in float16
    _check(h, q, grad)


def test_large_mean():
    h, q, grad = _inputs(1, 20, 48, 2, torch.float32)
    h = h + 300.0  # 100 standard deviations
    found = _run(lambda *given: pool.launch_pool(*given)[0], h, q, grad)
    expected = _run(pool.pool_tokens_reference, h.double(), q.double(), grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        # E[h^2] and mean^2 are 10^4 times the variance: their roundings are 2 * 10^4 * 2^-24 of it, and those of the
        # mean's own sum, log2(48) of them, enter twice: 2 * 6 * 10^4 * 2^-24 at the most. rstd is off by half of that,
        # 4e-3; of 2,000 random tokens none was by more than 3e-3. Gradients have it in the third power.
        assert (ours.double() - theirs).norm() <= 3 * 3e-3 * theirs.norm()


def test_any_strides():
    # All divisible by 16: Triton adds in another order where some are not.
    h, q, grad = _inputs(4, 40, 32, 2, torch.float32)
    padded = torch.full((8, 80, 48), torch.nan, device=DEVICE)
    padded[::2, 1::2, :32] = h
    view, scattered = padded[::2, 1::2, :32], q.transpose(0, 1).contiguous().transpose(0, 1)
    run = lambda *given: pool.launch_pool(*given)[0]  # noqa: E731
    for ours, theirs in zip(_run(run, view, scattered, grad), _run(run, h, q, grad), strict=True):
        assert torch.equal(ours, theirs)


def test_a_sample_does_not_depend_on_the_batch():
    inputs = _inputs(3, 40, 48, 2, torch.float16)
    run = lambda *given: pool.launch_pool(*given)[0]  # noqa: E731
    for together, alone in zip(_run(run, *inputs), _run(run, *(x[1:2] for x in inputs)), strict=True):
        assert torch.equal(together[1:2], alone)


def test_gradient_of_the_tokens_only_if_asked(on_kernels, monkeypatch):
    wanted = []
    launch = pool.launch_backward
    monkeypatch.setattr(pool, "launch_backward", lambda *given: wanted.append(given[-1]) or launch(*given))
    monkeypatch.setattr(pool, "_tokens_backward_kernel", None)  # cannot be launched
    h, q, grad = _inputs(1, 3, 20, 1, torch.float32)
    pool.pool_tokens(h, q.requires_grad_()).backward(grad)
    assert wanted == [False] and h.grad is None and q.grad.isfinite().all()


def test_opcheck():
    h, q, grad = _inputs(2, 3, 20, 1, torch.float32)
    torch.library.opcheck(pool.launch_pool, (h.requires_grad_(), q.requires_grad_()))
    with torch.no_grad():
        outputs = pool.launch_pool(h, q)
        for wants_h in (False, True):
            torch.library.opcheck(pool.launch_backward, (grad, h.detach(), q.detach(), *outputs, wants_h))


def test_compiles_without_graph_breaks_at_any_shape(on_kernels):
    generator = torch.Generator().manual_seed(0)
    function = torch.compile(critic_pool, fullgraph=True, backend="aot_eager")
    for batch, tokens, dim in ((2, 3, 20), (4, 3, 20), (3, 5, 20), (3, 5, 36)):
        shapes = [(batch, tokens, dim), (2, 4), (8, dim), (8, dim), (batch, dim), (batch, dim)]
        inputs = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in shapes]
        compiled, eager = function(*inputs), critic_pool(*inputs)
        assert torch.equal(compiled, eager)
        for ours, theirs in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (compiled, eager)), strict=True):
            assert torch.equal(ours, theirs)


def test_float64_goes_through_pytorch_where_triton_cannot_multiply_it(on_kernels, monkeypatch):
    monkeypatch.setattr(pool, "BEFORE_3_5", True)
    monkeypatch.setattr(pool, "launch_pool", None)
    h, q, _ = _inputs(1, 3, 20, 2, torch.float64)
    assert torch.equal(pool.pool_tokens(h, q), pool.pool_tokens_reference(h, q))


@pytest.mark.parametrize(("dtype", "widest"), [(torch.bfloat16, 3072), (torch.float32, 1536), (torch.float64, 512)])
def test_tokens_too_wide_go_through_pytorch(dtype, widest, on_kernels, monkeypatch):
    monkeypatch.setattr(pool, "launch_pool", lambda h, q: ("kernels",))
    assert pool.pool_tokens(torch.zeros(1, 1, widest, dtype=dtype, device=DEVICE), None) == "kernels"
    h, q = (
        torch.zeros(1, 1, widest + 1, dtype=dtype, device=DEVICE),
        torch.zeros(1, 1, widest + 1, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE),
    )
    assert torch.equal(pool.pool_tokens(h, q), torch.zeros_like(q))


@pytest.mark.parametrize("tokens", [1, 16, 64, 129, 1024, 4096])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_splits_cover_the_tokens(tokens, itemsize):
    h = torch.empty(3, tokens, 640, dtype=torch.bfloat16 if itemsize == 2 else torch.float32, device="meta")
    programs, splits, length, constants = pool._layout(h, 9)
    assert (splits - 1) * length < tokens <= splits * length and length % pool.TILE.value == 0
    assert programs == 3 * splits * -(-9 // constants["HEADS"])
