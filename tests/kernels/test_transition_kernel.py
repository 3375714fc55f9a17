"""The Triton kernels of a transition, in the interpreter where there is no GPU, against their reference."""

import pytest
import torch

from latent_critic.kernels import transition
from latent_critic.kernels.philox import NoiseKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = torch.tensor([[0.9, -0.3, 0.5], [1.0, -0.2, 0.0], [0.7, 0.4, 1.3], [1.1, 0.2, 1e-4]], device=DEVICE)
EPS = torch.finfo(torch.float32).eps
ODD = [(2, 1), (3, 3), (2, 1023), (2, 1025), (1, 4, 33, 33)]


def _randn(shape, count=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE) for _ in range(count)]


def _step(v, z, noise, step, table=TABLE):
    return transition.launch_step(v, z, noise, table, None, step, None, None)


def _log_prob(v, z, z_next, step, v_ref=None, table=TABLE):
    return transition.launch_log_prob(v, z, z_next, table, None, step, v_ref)


def _assert_log_prob(found, expected, n):
    # Sums of n squares in two orders: 2 log2(n) + 8 roundings at the most of what adds up to expected's quadratic term.
    bound = EPS * (2 * n.bit_length() + 8) * (expected.abs() + 10)
    assert ((found - expected).abs() <= bound).all(), (found, expected)


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("shape", ODD)
def test_step_and_log_prob(shape, step, v_dtype, poisoned_outputs):
    v, z, noise = _randn(shape)
    v = v.to(v_dtype)
    z_next, log_prob = _step(v, z, noise, step)
    expected, expected_log_prob = transition.transition_step_reference(v, z, noise, TABLE, step)
    # Products and sums are rounded one by one on both sides.
    assert torch.equal(z_next, expected)
    _assert_log_prob(log_prob, expected_log_prob, z[0].numel())
    again, distance = _log_prob(v, z, z_next, step)
    assert torch.equal(again, log_prob) and distance.numel() == 0


@pytest.mark.parametrize("offset", [20.0, -20.0])
def test_latents_far_from_the_mean(offset):
    v, z, _ = _randn((2, 300))
    s = TABLE[0, 2]
    z_next = 0.9 * z - 0.3 * v + s * offset
    expected = transition.transition_log_prob_reference(v, z, z_next, TABLE, 0)
    _assert_log_prob(_log_prob(v, z, z_next, 0)[0], expected, 300)


def test_distance_to_a_reference_prediction(poisoned_outputs):
    v, z, z_next, v_ref = _randn((3, 1025), 4)
    log_prob, distance = _log_prob(v, z, z_next, 0, v_ref)
    assert torch.equal(log_prob, _log_prob(v, z, z_next, 0)[0])
    torch.testing.assert_close(distance, (v - v_ref).square().mean(1), rtol=30 * EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_step_on_the_device(dtype):
    v, z, noise = _randn((2, 70))
    for step in range(4):
        by_number = _step(v, z, noise, step)
        on_device = torch.tensor(step, dtype=dtype, device=DEVICE)
        by_tensor = transition.launch_step(v, z, noise, TABLE, on_device, 0, None, None)
        assert all(torch.equal(a, b) for a, b in zip(by_number, by_tensor, strict=True))


# 1000 and 24 are divisible by 8 alone: two of them, as the rows of [N, 2, n], by 16.
@pytest.mark.parametrize("shape", [(4, 5, 7, 9), (4, 10, 10, 10), (4, 2, 3, 4), (4, 4, 16, 16)])
def test_bits_do_not_depend_on_batch_or_layout(shape):
    v, z, noise = _randn(shape)
    z_next, log_prob = _step(v, z, noise, 0)
    alone = _step(v[2:3], z[2:3], noise[2:3], 0)
    assert torch.equal(alone[0][0], z_next[2]) and torch.equal(alone[1][0], log_prob[2])
    # The trainer reads slices of [N, K + 1, ...], and a UNet answers channels last.
    stored = torch.stack([z, z_next], 1)
    by_slices = _log_prob(v.contiguous(memory_format=torch.channels_last), stored[:, 0], stored[:, 1], 0)[0]
    assert torch.equal(by_slices, log_prob)
    by_columns = [x.flatten(1).T.contiguous().T for x in (v, z, z_next)]
    assert torch.equal(_log_prob(*by_columns, 0)[0], log_prob)


@pytest.mark.parametrize("step", range(3))
def test_gradcheck(step):
    v, z, z_next, v_ref = _randn((2, 3, 2), 4, dtype=torch.float64)
    v.requires_grad_()
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, z: _log_prob(v, z, z_next, step)[0], (v, z))
    assert torch.autograd.gradcheck(lambda v, z: _log_prob(v, z, z_next, step, v_ref), (v, z))
    assert torch.autograd.gradcheck(lambda v, z: _step(v, z, v_ref, step)[0], (v, z))


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.float16])
def test_gradients(shape, step, v_dtype, poisoned_outputs):
    v, z, noise, weights = _randn(shape, 4)
    v = v.to(v_dtype).requires_grad_()
    z.requires_grad_()
    for wanted in ((v, z), (v,), (z,)):
        found, expected = [], []
        for function, gradients in (
            (lambda v, z: _step(v, z, noise, step), found),
            (lambda v, z: transition.transition_step_reference(v, z, noise, TABLE, step), expected),
        ):
            z_next, log_prob = function(v, z)
            gradients += torch.autograd.grad((z_next * weights).sum() + log_prob.sum(), wanted)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            # z_next - mu is a difference of rounded numbers of order 3, divided by n s^2: its rounding, with the
            # table's coefficients below 1.3; and one rounding to float16, the unit roundoff of its numbers.
            s, n = float(TABLE[step, 2]) or 1.0, z[0].numel()
            atol = 1.3 * (4 * 3 * EPS / (n * s**2) + 8 * EPS)
            unit = torch.finfo(ours.dtype).eps if ours.dtype == torch.float16 else 4 * EPS
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=unit)


def test_expanded_and_absent_incoming_gradients():
    v, z, noise = (x.requires_grad_() for x in _randn((3, 40)))
    z_next, log_prob = _step(v, z, noise, 0)
    log_prob.sum().backward()
    by_reference = torch.autograd.grad(
        transition.transition_log_prob_reference(v, z, z_next.detach(), TABLE, 0).sum(), v
    )[0]
    torch.testing.assert_close(v.grad, by_reference, atol=8 * EPS, rtol=0)
    assert noise.grad is None


def test_opcheck():
    v, z, z_next, v_ref = (x.requires_grad_() for x in _randn((2, 3, 5), 4))
    z_next, v_ref = z_next.detach(), v_ref.detach()
    step, seed, samples = (x.to(DEVICE) for x in (torch.tensor(0), torch.tensor(3), torch.arange(2)))
    torch.library.opcheck(transition.launch_step, (v, z, z_next, TABLE, None, 0, None, None))
    torch.library.opcheck(transition.launch_step, (v, z, None, TABLE, step, 0, seed, samples))
    torch.library.opcheck(transition.launch_log_prob, (v, z, z_next, TABLE, step, 0, None))
    torch.library.opcheck(transition.launch_log_prob, (v, z, z_next, TABLE, None, 2, v_ref))


@pytest.mark.parametrize("step", [0, torch.tensor(0, device=DEVICE)], ids=["int", "tensor"])
def test_public_functions_compile_without_a_graph_break(step):
    v, z, noise = _randn((2, 3, 5))

    def both(v, z, noise, step):
        z_next, log_prob = transition.transition_step(v, z, noise, TABLE, step)
        return log_prob - transition.transition_log_prob(v, z, z_next, TABLE, step, v_ref=noise)[0]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(v, z, noise, step), torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": torch.tensor(1.0)}, "noise.seed"),
        ({"seed": torch.tensor([1])}, "noise.seed"),
        ({"samples": torch.arange(4)}, "noise.samples"),
        ({"samples": torch.arange(3, device="meta")}, "noise.samples"),
    ],
)
def test_bad_noise_key_is_named(change, name):
    key = NoiseKey(**({"seed": torch.tensor(1), "samples": torch.arange(3)} | change))
    with pytest.raises(ValueError, match=rf"^{name} must"):
        transition.transition_step(torch.zeros(3, 4), torch.zeros(3, 4), key, TABLE.cpu(), 0)


@pytest.mark.parametrize("name", ["v", "table", "z_next", "v_ref"])
def test_argument_on_another_device_is_named(name):
    arguments = {name: torch.zeros(3, 4) for name in ("v", "z", "z_next", "v_ref")} | {"table": TABLE.cpu(), "step": 0}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{name} must be on z's device"):
        transition.transition_log_prob(**arguments)
