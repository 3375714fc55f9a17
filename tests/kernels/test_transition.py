import math

import pytest
import torch

from latent_critic.engine.transitions import build_table, trained_steps
from latent_critic.kernels import policy_loss, transition_log_prob, transition_step

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])
ALPHAS_CUMPROD = torch.linspace(0.999, 0.02, 100)
TIMESTEPS = torch.tensor([99, 79, 59, 39, 19])
FLOW = {"sigmas": SIGMAS}
DIFFUSION = {"alphas_cumprod": ALPHAS_CUMPROD, "timesteps": TIMESTEPS}
TRANSITIONS = [
    ("flow-sde", 0.7, FLOW),
    ("dance-sde", 0.3, FLOW),
    ("cps", 0.8, FLOW),
    ("ode", 0.0, FLOW),
    ("ddim", 1.0, DIFFUSION),
    ("ddim", 1.0, DIFFUSION | {"prediction_type": "v_prediction"}),
]
TABLE = torch.tensor([[0.9, -0.3, 0.5], [1.0, -0.2, 0.0], [0.7, 0.4, 1.3]])
EPS = torch.finfo(torch.float32).eps


def _inputs(shape=(3, 4, 5, 7), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_step_is_affine_in_latent_prediction_and_noise(step):
    v, z, noise = _inputs()
    z_next, _ = transition_step(v, z, noise, TABLE, step)
    a, b, s = TABLE[step].double().tolist()
    terms = [a * z.double(), b * v.double(), s * noise.double()]
    # Three products and two sums, each rounded once to at most half an ulp of the sum of magnitudes.
    bound = 2.5 * EPS * sum(term.abs() for term in terms)
    assert z_next.dtype == torch.float32
    assert ((z_next.double() - sum(terms)).abs() <= bound).all()


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (2, 33), (1, 16, 8, 8)])
def test_log_prob_is_the_mean_normal_log_density_of_the_stored_latent(step, shape):
    v, z, noise = _inputs(shape)
    z_next, log_prob = transition_step(v, z, noise, TABLE, step)
    a, b, s = TABLE[step].double()
    normal = torch.distributions.Normal(a * z.double() + b * v.double(), s)
    expected = normal.log_prob(z_next.double()).flatten(1).mean(1)
    assert log_prob.shape == shape[:1] and log_prob.dtype == torch.float32
    # Rounding mu by 1e-7 moves a squared residual r^2 by 2 |r| 1e-7 / s < 2e-6 for s = 0.5, |r| < 4; most move less.
    torch.testing.assert_close(log_prob.double(), expected, atol=2e-6, rtol=0)


def test_log_prob_by_hand():
    # mu = 0.5 * 2 - 1 * 1 = 0, s = 2, z_next = (2, 4): mean of -(1 + 4) / 2 / 2 = -1.25.
    table = torch.tensor([[0.5, -1.0, 2.0]])
    z, v = torch.full((1, 2), 2.0), torch.ones(1, 2)
    log_prob = transition_log_prob(v, z, torch.tensor([[2.0, 4.0]]), table, 0)
    assert log_prob.item() == pytest.approx(-1.25 - math.log(2.0) - 0.5 * math.log(2.0 * math.pi), abs=4 * EPS)


def test_deterministic_step_ignores_the_noise_and_has_zero_log_prob_and_gradient():
    v, z, noise = _inputs()
    v.requires_grad_()
    z_next, log_prob = transition_step(v, z, noise, TABLE, 1)
    assert torch.equal(z_next, transition_step(v, z, torch.zeros_like(z), TABLE, 1)[0])
    assert torch.equal(log_prob, torch.zeros(3))
    (gradient,) = torch.autograd.grad(transition_log_prob(v, z, noise, TABLE, 1).sum(), v)
    assert torch.equal(gradient, torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prediction_is_widened_first(dtype):
    v, z, noise = _inputs()
    half = transition_step(v.to(dtype), z, noise, TABLE, 0)
    widened = transition_step(v.to(dtype).float(), z, noise, TABLE, 0)
    assert torch.equal(half[0], widened[0]) and torch.equal(half[1], widened[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensor_step_equals_int_step(dtype):
    v, z, noise = _inputs()
    for step in range(3):
        by_int = transition_step(v, z, noise, TABLE, step)
        by_tensor = transition_step(v, z, noise, TABLE, torch.tensor(step, dtype=dtype))
        assert torch.equal(by_int[0], by_tensor[0]) and torch.equal(by_int[1], by_tensor[1])


def test_tensor_step_is_not_read_on_the_host():
    # A meta tensor has no data, so any read of it raises.
    v, z, noise = (x.to("meta") for x in _inputs())
    z_next, log_prob = transition_step(v, z, noise, TABLE.to("meta"), torch.zeros((), dtype=torch.int64, device="meta"))
    assert z_next.shape == z.shape and log_prob.shape == z.shape[:1]


@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "noise_level", "schedule"), TRANSITIONS)
def test_ratio_is_exactly_one_on_the_stored_trajectory(name, noise_level, schedule, v_dtype):
    table = build_table(name, noise_level, num_trained_steps=1000, **schedule)  # all of them
    num_steps = len(table)
    generator = torch.Generator().manual_seed(1)
    # The trainer reads strided slices of [N, K+1, ...], and a UNet answers in channels_last: neither may change a bit.
    latents = torch.empty(4, num_steps + 1, 4, 8, 8)
    latents[:, 0] = torch.randn(4, 4, 8, 8, generator=generator)
    for step in range(num_steps):
        v = torch.randn(4, 4, 8, 8, generator=generator).to(v_dtype)
        noise = torch.randn(4, 4, 8, 8, generator=generator)
        z_next, log_prob_old = transition_step(v, latents[:, step].clone(), noise, table, step)
        latents[:, step + 1] = z_next
        layouts = [v, v.contiguous(memory_format=torch.channels_last)]
        for v_again in layouts:
            log_prob = transition_log_prob(v_again, latents[:, step], latents[:, step + 1], table, step)
            assert torch.equal(log_prob, log_prob_old)
            _, statistics = policy_loss(log_prob, log_prob_old, torch.ones(4), clip_range=1e-5)
            assert statistics.ratio == 1.0 and statistics.max_ratio_deviation == 0.0
    assert trained_steps(table).any() == (name != "ode")


def test_layout_does_not_change_a_bit():
    v, z, noise = _inputs((5, 999))
    z_next, log_prob = transition_step(v, z, noise, TABLE, 0)
    by_columns = [x.T.contiguous().T for x in (v, z, z_next)]
    assert torch.equal(transition_log_prob(*by_columns, TABLE, 0), log_prob)


def test_log_prob_gradient():
    v, z, z_next = _inputs((2, 3, 2, 2), dtype=torch.float64)
    v.requires_grad_()
    z.requires_grad_()
    z_next.requires_grad_()
    for step in range(3):
        torch.autograd.gradcheck(lambda v, z, step=step: transition_log_prob(v, z, z_next, TABLE, step), (v, z))
    transition_log_prob(v, z, z_next, TABLE, 0).sum().backward()
    assert z_next.grad is None
    # d log_prob / d v = b (z_next - mu) / (n s^2)
    a, b, s = TABLE[0].double()
    expected = b * (z_next - a * z - b * v).detach() / (12 * s**2)
    torch.testing.assert_close(v.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"z": torch.zeros(3, 4, dtype=torch.bfloat16)}, "z"),
        ({"z": torch.zeros(3)}, "z"),
        ({"v": torch.zeros(3, 5)}, "v"),
        ({"v": torch.zeros(3, 4, dtype=torch.int64)}, "v"),
        ({"noise": torch.zeros(3, 4, dtype=torch.float64)}, "noise"),
        ({"noise": torch.zeros(1, 4)}, "noise"),
        ({"table": TABLE.double()}, "table"),
        ({"table": TABLE[:, :2]}, "table"),
        ({"step": 3}, "step"),
        ({"step": -1}, "step"),
        ({"step": torch.tensor(0.0)}, "step"),
        ({"step": torch.tensor([0])}, "step"),
    ],
)
def test_bad_argument_is_named(change, name):
    arguments = {"v": torch.zeros(3, 4), "z": torch.zeros(3, 4), "noise": torch.zeros(3, 4), "table": TABLE, "step": 0}
    with pytest.raises(ValueError, match=rf"^{name} must"):
        transition_step(**(arguments | change))


def test_bad_stored_latent_is_named():
    with pytest.raises(ValueError, match=r"^z_next must"):
        transition_log_prob(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 5), TABLE, 0)
