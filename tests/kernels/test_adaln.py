"""Modulated norms and gated sums: references against diffusers' arithmetic and float64, kernels against both.

The kernels run in Triton's interpreter where there is no GPU; it truncates bfloat16, so float16 stands for it.
"""

import pytest
import torch

from latent_critic.kernels import adaln
from latent_critic.kernels.adaln import adaln_modulate, adaln_modulate_reference, gate_residual, gate_residual_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
ODD = [(2, 1, 1), (2, 3, 3), (2, 1, 1023), (1, 3, 1025), (1, 1023, 3), (1, 1025, 1)]  # B, N, D
WANTED = [(0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)]  # inputs whose gradients are asked for
TYPES = [torch.float32, torch.float16]


def _randn(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE) for shape in shapes]


def _inputs(batch, n, d, dtype=torch.float32):
    """x or residual, scale or gate, shift, y, and weights of a loss."""
    rows, vector = (batch, n, d), (batch, d)
    return _randn(rows, vector, vector, rows, rows, dtype=dtype)


def _modulate_kernel(x, scale, shift):
    return adaln.launch_modulate(x, scale, shift)[0]


def _modulate_by_hand(x, scale, shift):
    mean = x.sum(2, keepdim=True) / x.shape[2]
    variance = (x * x).sum(2, keepdim=True) / x.shape[2] - mean * mean
    return (x - mean) / (variance + 1e-6).sqrt() * (scale.unsqueeze(1) + 1) + shift.unsqueeze(1)


def _modulate_size(x, scale, shift):
    """What the float32 roundings of the forward are relative to, [B, N, D].

    The mean is rounded to the size of a token's numbers, and the difference from it is divided by the deviation.
    """
    rstd = (x.var(2, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    size = x.abs().amax(2, keepdim=True) * rstd + 1
    return size * (1 + scale.abs())[:, None] + shift.abs()[:, None]


def _roundings(length):
    """Of a sum of `length` numbers, added up in a tree or in 4 to 16 sequences, and a few operations around it."""
    return 2 * length.bit_length() + 16


def _assert_close(found, expected, bound):
    """Within `bound` of float64's answer, and one rounding to the type it is stored in."""
    rounding = expected.abs() * torch.finfo(found.dtype).eps + torch.finfo(found.dtype).tiny
    error = (found.double() - expected).abs()
    assert (error <= bound + rounding).all(), (error / (bound + rounding)).max()


# --------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_references_are_diffusers_arithmetic(dtype):
    x, scale, shift, y, _ = (t.cpu() for t in _inputs(2, 7, 192, dtype=dtype))
    norm = torch.nn.LayerNorm(192, elementwise_affine=False, eps=1e-6)
    assert torch.equal(adaln_modulate(x, scale, shift), norm(x) * (1 + scale[:, None]) + shift[:, None])
    assert torch.equal(gate_residual(x, scale, y), x + scale.unsqueeze(1) * y)


def test_references_against_a_formula_by_hand():
    x, scale, shift, y, _ = _inputs(2, 5, 11, dtype=torch.float64)
    # float64 on both sides, sums of 11 numbers of order 1.
    torch.testing.assert_close(
        adaln_modulate_reference(x, scale, shift), _modulate_by_hand(x, scale, shift), rtol=0, atol=1e-13
    )
    expected = torch.stack([r + g * v for r, g, v in zip(x, scale, y, strict=True)])
    assert torch.equal(gate_residual_reference(x, scale, y), expected)


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ODD)
def test_modulate(shape, dtype, poisoned_outputs):
    x, scale, shift, _, _ = _inputs(*shape, dtype=dtype)
    x = 2 * x + 3
    found, wide = _modulate_kernel(x, scale, shift), [t.detach().double() for t in (x, scale, shift)]
    assert found.dtype == dtype and found.is_contiguous()
    _assert_close(found, _modulate_by_hand(*wide), _roundings(shape[2]) * EPS * _modulate_size(*wide))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ODD)
def test_modulate_gradients(shape, dtype, poisoned_outputs):
    _, n, d = shape
    x, scale, shift, _, weights = _inputs(*shape, dtype=dtype)
    inputs = [t.requires_grad_() for t in (2 * x + 3, scale, shift)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad((_modulate_by_hand(*wide) * weights.double()).sum(), wide)
    out = _modulate_kernel(*inputs)
    # The gradient of x is rstd times differences of numbers like (1 + scale) weights, times at most 3: the normalised
    # numbers', whose errors the forward's bound is of. Those of scale and shift are sums over N.
    wide = [t.detach() for t in wide]
    size, weight = _modulate_size(wide[0], *[torch.zeros_like(wide[1])] * 2), weights.double().abs()
    rstd = (wide[0].var(2, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    largest = (weight * (1 + wide[1].abs())[:, None]).amax(2, keepdim=True)
    normal = _modulate_by_hand(wide[0], *[torch.zeros_like(wide[1])] * 2).abs()
    bounds = [
        _roundings(d) * EPS * rstd * largest * size * (1 + normal),
        (_roundings(d) + _roundings(n)) * EPS * (weight * (size + normal)).sum(1),
        _roundings(n) * EPS * weight.sum(1),
    ]
    for wanted in WANTED if n == 3 else WANTED[:1]:
        found = torch.autograd.grad(out, [inputs[i] for i in wanted], weights, retain_graph=True)
        for i, gradient in zip(wanted, found, strict=True):
            assert gradient.dtype == dtype
            _assert_close(gradient, expected[i], bounds[i])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", ODD)
def test_gate_and_its_gradients(shape, dtype, poisoned_outputs):
    _, n, d = shape
    residual, gate, _, y, weights = _inputs(*shape, dtype=dtype)
    inputs = [t.requires_grad_() for t in (residual, gate, y)]
    wide = [t.detach().double() for t in inputs]
    out = adaln.launch_gate(*inputs)
    assert out.dtype == dtype and out.is_contiguous()
    # A product and a sum, each rounded once.
    _assert_close(out, gate_residual_reference(*wide), EPS * (wide[0].abs() + 2 * (wide[1][:, None] * wide[2]).abs()))
    grad_gate = (weights.double() * wide[2]).sum(1)
    for wanted in WANTED if n == 3 else WANTED[:1]:
        gradients = torch.autograd.grad(out, [inputs[i] for i in wanted], weights, retain_graph=True)
        found = dict(zip(wanted, gradients, strict=True))
        if 0 in found:
            assert torch.equal(found[0], weights)
        if 1 in found:
            _assert_close(found[1], grad_gate, _roundings(n) * EPS * (weights.double() * wide[2]).abs().sum(1))
        if 2 in found:
            assert torch.equal(found[2], gate[:, None] * weights)  # one product, rounded once
        assert all(gradient.dtype == dtype for gradient in found.values())


@pytest.mark.parametrize("d", [6, 130])
def test_gradcheck(d):
    x, scale, shift, y, _ = (t.requires_grad_() for t in _inputs(1, 2, d, dtype=torch.float64))
    assert torch.autograd.gradcheck(_modulate_kernel, (x, scale, shift), fast_mode=True)
    assert torch.autograd.gradcheck(adaln.launch_gate, (x, scale, y), fast_mode=True)


def test_inputs_anywhere_in_memory():
    stored, y, modulation = _randn((3, 2, 9, 40), (3, 9, 50), (3, 4 * 40))
    x, y = stored[:, 1, 2:7], y[:, ::2, 7:47]  # tokens of a slice, of every second row, an odd offset
    gate, scale, shift, _ = modulation.chunk(4, dim=1)
    assert not any(t.is_contiguous() for t in (x, y, gate, scale, shift))
    for function, arguments in ((_modulate_kernel, (x, scale, shift)), (adaln.launch_gate, (x, gate, y))):
        leaves = [t.detach().requires_grad_() for t in arguments]
        copies = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in arguments]
        found, expected = function(*leaves), function(*copies)
        # Reductions may be laid out otherwise where loads are narrower: a few roundings of numbers below 8.
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * 8 * EPS)
        weights = torch.randn(5, 3, 40, device=DEVICE).transpose(0, 1)  # a gradient that is not contiguous either
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, copies, weights), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 8 * EPS)


def test_expanded_gradient_of_a_sum():
    x, scale, shift, y, _ = (t.requires_grad_() for t in _inputs(2, 4, 20))
    for function, reference, arguments in (
        (_modulate_kernel, adaln_modulate_reference, (x, scale, shift)),
        (adaln.launch_gate, gate_residual_reference, (x, scale, y)),
    ):
        found = torch.autograd.grad(function(*arguments).sum(), arguments)
        expected = torch.autograd.grad(reference(*arguments).sum(), arguments)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=_roundings(20) * 4 * EPS)


def test_extreme_tokens(poisoned_outputs):
    (noise,) = _randn((1, 5, 200))
    scale, shift = _randn((1, 200), (1, 200), seed=1)
    x = noise.clone()
    x[0, 0] = 3.0  # constant
    x[0, 1] = 0.0
    x[0, 2] *= 1e-6  # a variance below epsilon
    x[0, 3] += 1e4  # a large mean
    x[0, 4] *= 1e15  # a variance near the largest float32's 3e38
    x.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, scale, shift)]
    expected = torch.nn.functional.layer_norm(wide[0], (200,), eps=1e-6) * (1 + wide[1])[:, None] + wide[2][:, None]
    found = _modulate_kernel(x, scale, shift)
    _assert_close(found, expected, _roundings(200) * EPS * _modulate_size(*wide))
    assert torch.equal(found[0, 1], shift[0])
    # A GPU's approximate division may miss the mean of a constant by a unit in the last place, and rstd is 1000 there.
    off = 1000 * 3 * EPS * (1 + scale[0]).abs() if DEVICE == "cuda" else 0.0
    assert ((found[0, 0] - shift[0]).abs() <= off).all()
    gradient, theirs = torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected.sum(), wide[0])[0]
    size = wide[0].detach().abs().amax(2, keepdim=True) * (wide[0].detach().var(2, keepdim=True) + 1e-6).rsqrt() + 1
    rstd = (wide[0].detach().var(2, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    _assert_close(gradient, theirs, _roundings(200) * EPS * rstd * size * 4 * 5)  # numbers below 4, deviations below 5


def test_wide_norm_over_narrow_modulation():
    """As under autocast: linear layers answer in half precision, the residual stream is float32."""
    x, scale, shift, y, weights = _inputs(2, 3, 50)
    narrow = [t.half().requires_grad_() for t in (scale, shift, y)]
    scale, shift, y = narrow
    x.requires_grad_()
    for function, reference, arguments in (
        (_modulate_kernel, adaln_modulate_reference, (x, scale, shift)),
        (adaln.launch_gate, gate_residual_reference, (x, scale, y)),
    ):
        found, expected = function(*arguments), reference(x, *(t.float() for t in arguments[1:]))
        assert found.dtype == reference(*arguments).dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * 8 * EPS)
        gradients = torch.autograd.grad(found, arguments, weights), torch.autograd.grad(expected, arguments, weights)
        for ours, theirs in zip(*gradients, strict=True):
            assert ours.dtype == theirs.dtype
            unit = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=unit, atol=16 * 8 * EPS)


@pytest.mark.parametrize("n", [3, 70])
def test_bits_do_not_depend_on_the_batch(n):
    x, scale, shift, y, weights = (t.requires_grad_() for t in _inputs(3, n, 30))
    for function, arguments in ((_modulate_kernel, (x, scale, shift)), (adaln.launch_gate, (x, scale, y))):
        alone = [t[1:2] for t in arguments]
        out, one = function(*arguments), function(*alone)
        assert torch.equal(out[1:2], one)
        together = torch.autograd.grad(out, arguments, weights)
        for ours, theirs in zip(torch.autograd.grad(one, alone, weights[1:2]), together, strict=True):
            assert torch.equal(ours, theirs[1:2])


def test_opcheck():
    x, scale, shift, y, weights = (t.requires_grad_() for t in _inputs(2, 3, 10))
    torch.library.opcheck(adaln.launch_modulate, (x, scale, shift))
    torch.library.opcheck(adaln.launch_gate, (x, scale, y))
    x, scale, y, weights = (t.detach() for t in (x, scale, y, weights))
    statistics = adaln.launch_modulate(x, scale, shift)[1]
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(adaln.launch_modulate_backward, (weights, x, scale, statistics, *wants))
        torch.library.opcheck(adaln.launch_gate_backward, (weights, scale, y, *wants))


def _by_public_functions(x, scale, shift, y):
    return gate_residual(y, scale, adaln_modulate(x, scale, shift))


def _by_kernels(x, scale, shift, y):
    return adaln.launch_gate(y, scale, _modulate_kernel(x, scale, shift))


@pytest.mark.parametrize("function", [_by_public_functions, _by_kernels])
def test_compiles_without_a_graph_break(function):
    *inputs, weights = (t.requires_grad_() for t in _inputs(2, 3, 20))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*inputs), function(*inputs)
    # The compiler takes the reference's norm apart: a few roundings of numbers below 32.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * 32 * EPS)
    gradients = (torch.autograd.grad(out, inputs, weights) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=_roundings(20) * 32 * EPS)


# ------------------------------------------------------------------------------------------------------------- errors


def _columns(*shape):
    return torch.zeros(shape).transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 3), r"be floating point \[B, N, D\]"),
        ("x", torch.zeros(2, 3, 4, dtype=torch.int64), "be floating point"),
        ("x", _columns(2, 3, 4), "have stride 1 in its last dimension"),
        ("scale", torch.zeros(2, 5), r"be \[2, 4\], got \[2, 5\]"),
        ("scale", torch.zeros(2, 4, dtype=torch.float64), "have x's type torch.float32 or a narrower one"),
        ("scale", torch.zeros(2, 4, dtype=torch.int32), "have x's type"),
        ("scale", _columns(2, 4), "have stride 1"),
        ("shift", torch.zeros(2, 1, 4), r"be \[2, 4\]"),
        ("shift", torch.zeros(2, 4, device="meta"), "be on x's device cpu"),
        ("shift", torch.zeros(2, 4, dtype=torch.float16), "have scale's type torch.float32"),
    ],
)
def test_bad_argument_of_modulate_is_named(name, value, message):
    arguments = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(2, 4), "shift": torch.zeros(2, 4)} | {name: value}
    with pytest.raises(ValueError, match=rf"^{name} must {message}"):
        adaln_modulate(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("residual", torch.zeros(4), r"be floating point \[B, N, D\]"),
        ("residual", _columns(2, 3, 4), "have stride 1"),
        ("gate", torch.zeros(1, 4), r"be \[2, 4\]"),
        ("gate", torch.zeros(2, 4, device="meta"), "be on residual's device cpu"),
        ("y", torch.zeros(2, 3, 5), r"be \[2, 3, 4\]"),
        ("y", torch.zeros(2, 3, 4, dtype=torch.float64), "have residual's type torch.float32 or a narrower one"),
        ("y", _columns(2, 3, 4), "have stride 1"),
    ],
)
def test_bad_argument_of_gate_is_named(name, value, message):
    rows = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=rf"^{name} must {message}"):
        gate_residual(**({"residual": rows, "gate": torch.zeros(2, 4), "y": rows} | {name: value}))
