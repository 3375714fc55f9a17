import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from latent_critic.engine.errors import UserError
from latent_critic.engine.transitions import (
    build_table,
    cps_table,
    dance_sde_table,
    ddim_table,
    flow_sde_table,
    ode_table,
    trained_steps,
)
from latent_critic.kernels import transition_step

EPS = torch.finfo(torch.float32).eps
FLOW_TABLES = {
    "flow-sde": lambda sigmas: flow_sde_table(sigmas, 0.7),
    "dance-sde": lambda sigmas: dance_sde_table(sigmas, 0.3),
    "cps": lambda sigmas: cps_table(sigmas, 0.8),
}


def _sd3_sigmas(num_steps: int) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _affine_coefficients(mean, num_steps):
    """a and b [K, 2] of an un-expanded mean(z, v, k): what it gives for (z, v) = (1, 0) and (0, 1)."""
    return torch.tensor([[mean(1.0, 0.0, k), mean(0.0, 1.0, k)] for k in range(num_steps)], dtype=torch.float64)


def _assert_table(table, mean, std):
    """A table is the float64 formula, rounded once: half an ulp, plus the formula's own 1e-16."""
    assert table.dtype == torch.float32 and table.shape == (len(std), 3)
    expected = torch.cat([_affine_coefficients(mean, len(std)), torch.tensor(std, dtype=torch.float64)[:, None]], 1)
    torch.testing.assert_close(table.double(), expected, rtol=0.5 * EPS, atol=1e-12)


def test_ode_equals_the_stock_flow_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    table = ode_table(scheduler.sigmas)
    z = _randn(2, 4, 8, 8)
    for k, t in enumerate(scheduler.timesteps):
        v = _randn(2, 4, 8, 8, seed=k + 1)
        expected = scheduler.step(v, t, z).prev_sample
        z_next, log_prob = transition_step(v, z, _randn(2, 4, 8, 8), table, k)
        # One product and one sum on either side, and D rounded once: 3 ulp of the largest number involved.
        torch.testing.assert_close(z_next, expected, rtol=0, atol=3 * EPS * float(z.abs().max() + v.abs().max()))
        assert torch.equal(log_prob, torch.zeros(2))
        z = expected


@pytest.mark.parametrize("name", FLOW_TABLES)
def test_noise_level_zero_is_the_ode(name):
    sigmas = _sd3_sigmas(10)
    table = build_table(name, 0.0, sigmas=sigmas, num_trained_steps=10)
    # CPS reaches 1 and -D by sums of numbers up to 1 in float64, so only the rounding to float32 differs.
    torch.testing.assert_close(table, ode_table(sigmas), rtol=EPS, atol=1e-15)
    assert not trained_steps(table).any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_equals_the_stock_scheduler(eta, spacing, prediction_type, set_alpha_to_one):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1 if spacing == "leading" else 0,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
    )
    # In float64, so that the scheduler's own rounding (1 - ab / ab' cancels) does not hide ours.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(10)
    table = ddim_table(
        scheduler.alphas_cumprod,
        scheduler.timesteps,
        eta,
        prediction_type,
        scheduler.final_alpha_cumprod.item(),
        num_trained_steps=10,
        # The scheduler steps down by T // K = 100, while its own timesteps are 111 apart.
        next_timesteps=scheduler.timesteps - 100 if spacing == "linspace" else None,
    )
    z = _randn(2, 4, 8, 8)
    for k, t in enumerate(scheduler.timesteps):
        v, noise = _randn(2, 4, 8, 8, seed=2 * k + 1), _randn(2, 4, 8, 8, seed=2 * k + 2)
        expected = scheduler.step(v.double(), t, z.double(), eta=eta, variance_noise=noise.double()).prev_sample
        z_next, _ = transition_step(v, z, noise, table, k)
        a, b, s = table[k].abs().tolist()
        # Three products, two sums and three rounded coefficients, at most half an ulp each of the magnitudes summed.
        bound = 4 * EPS * (a * z.abs() + b * v.abs() + s * noise.abs()).max().item()
        torch.testing.assert_close(z_next.double(), expected, rtol=0, atol=bound)
        z = z_next


def test_flow_sde_equals_the_published_step():
    sigmas = _sd3_sigmas(10)
    levels = sigmas.double().tolist()

    def std_dev(k):
        return 0.7 * math.sqrt(levels[k] / (1 - (levels[1] if levels[k] == 1 else levels[k])))

    def mean(z, v, k):
        sigma, dt = levels[k], levels[k + 1] - levels[k]
        drift = std_dev(k) ** 2 / (2 * sigma)
        return z * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt

    std = [std_dev(k) * math.sqrt(levels[k] - levels[k + 1]) for k in range(10)]
    _assert_table(flow_sde_table(sigmas, 0.7, num_trained_steps=10), mean, std)


def test_flow_sde_stds_of_sd35_medium():
    # Known values for SD3.5-M's schedule (shift 3) in 10 steps; the last is why it is not trained.
    expected = torch.tensor([0.70, 0.74, 0.54, 0.45, 0.39, 0.35, 0.32, 0.28, 0.23, 0.0063])
    std = flow_sde_table(_sd3_sigmas(10), 0.7, num_trained_steps=10)[:, 2]
    torch.testing.assert_close(std[:9], expected[:9], rtol=0, atol=0.005)
    torch.testing.assert_close(std[9:], expected[9:], rtol=0, atol=0.00005)


def test_dance_sde_adds_half_the_score_to_the_euler_step():
    sigmas = _sd3_sigmas(10)
    levels = sigmas.double().tolist()

    def mean(z, v, k):
        sigma, step = levels[k], levels[k] - levels[k + 1]
        x0 = z - sigma * v
        score = -(z - (1 - sigma) * x0) / sigma**2  # of z ~ N((1 - sigma) x0, sigma^2)
        return z - v * step + 0.5 * 0.3**2 * score * step

    std = [0.3 * math.sqrt(levels[k] - levels[k + 1]) for k in range(10)]
    _assert_table(dance_sde_table(sigmas, 0.3, num_trained_steps=10), mean, std)


def test_cps_recombines_predicted_data_and_noise():
    sigmas = _sd3_sigmas(10)
    levels = sigmas.double().tolist()
    std = [level * math.sin(0.8 * math.pi / 2) for level in levels[1:]]

    def mean(z, v, k):
        x0, x1 = z - levels[k] * v, z + (1 - levels[k]) * v
        return (1 - levels[k + 1]) * x0 + math.sqrt(levels[k + 1] ** 2 - std[k] ** 2) * x1

    _assert_table(cps_table(sigmas, 0.8), mean, std)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_recombines_predicted_data_and_noise(prediction_type):
    alphas_cumprod = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
    timesteps = torch.tensor([90, 60, 30, 5])
    ab = [*alphas_cumprod[timesteps].tolist(), 1.0]
    std = [
        0.6 * math.sqrt((1 - ab[k + 1]) / (1 - ab[k])) * math.sqrt(max(0.0, 1 - ab[k] / ab[k + 1])) for k in range(4)
    ]

    def mean(z, v, k):
        root, noise_root = math.sqrt(ab[k]), math.sqrt(1 - ab[k])
        if prediction_type == "epsilon":
            x0, eps = (z - noise_root * v) / root, v
        else:
            x0, eps = root * z - noise_root * v, root * v + noise_root * z
        return math.sqrt(ab[k + 1]) * x0 + math.sqrt(1 - ab[k + 1] - std[k] ** 2) * eps

    _assert_table(ddim_table(alphas_cumprod, timesteps, 0.6, prediction_type), mean, std)


@pytest.mark.parametrize("name", ["flow-sde", "dance-sde"])
def test_sde_keeps_the_marginals_of_a_gaussian_flow(name):
    """With data N(m, c^2) the exact v is affine in z, so mean and variance of the sampler follow by recursion."""
    m, c2 = 1.5, 0.09

    def worst_variance_error(num_steps):
        # From 0.9: at sigma = 1 the published flow-sde divides by a substitute, and its first steps are not small.
        sigmas = torch.linspace(0.9, 0.0, num_steps + 1, dtype=torch.float64)
        mean, variance = 0.1 * m, 0.1**2 * c2 + 0.9**2
        worst = 0.0
        for k, (a, b, s) in enumerate(FLOW_TABLES[name](sigmas).tolist()):
            sigma, sigma_next = sigmas[k].item(), sigmas[k + 1].item()
            gain = (sigma - (1 - sigma) * c2) / ((1 - sigma) ** 2 * c2 + sigma**2)
            mean = a * mean + b * (gain * (mean - (1 - sigma) * m) - m)
            variance = (a + b * gain) ** 2 * variance + s**2
            # Exact for the mean, but for a table rounded to 3e-8 in each of the steps.
            assert mean == pytest.approx((1 - sigma_next) * m, abs=num_steps * 6e-8)
            worst = max(worst, abs(variance - ((1 - sigma_next) ** 2 * c2 + sigma_next**2)))
        return worst

    errors = [worst_variance_error(num_steps) for num_steps in (100, 200, 400)]
    # Euler-Maruyama is first order: half the step, half the error, and nothing that stays.
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.2)
    assert errors[2] < 2e-3


@pytest.mark.parametrize("name", ["cps", "ddim"])
def test_cps_and_ddim_keep_the_marginals_of_a_point(name):
    """With one data point x0 the noise is known exactly: z_k ~ N(alpha_k x0, sigma_k^2) must hold at every step."""
    x0 = 1.7
    if name == "cps":
        sigmas = _sd3_sigmas(10).double()
        table, alpha, sigma = cps_table(sigmas, 0.8), 1.0 - sigmas, sigmas
    else:
        alphas_cumprod = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)
        timesteps = torch.arange(95, 0, -10)
        ab = torch.cat([alphas_cumprod[timesteps], torch.ones(1, dtype=torch.float64)])
        table, alpha, sigma = ddim_table(alphas_cumprod, timesteps, 1.0), ab.sqrt(), (1.0 - ab).sqrt()
    for k, (a, b, s) in enumerate(table.double().tolist()):
        # eps = (z - alpha x0) / sigma; the flow's v = eps - x0.
        mean = a * alpha[k] * x0 + (-b * x0 if name == "cps" else 0.0)
        std = torch.hypot((a + b / sigma[k]) * sigma[k], torch.tensor(s, dtype=torch.float64))
        expected = torch.stack([alpha[k + 1] * x0, sigma[k + 1]])
        # Coefficients up to 10, rounded to float32.
        torch.testing.assert_close(torch.stack([mean, std]), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("start", [1.0, 1.0 - EPS / 2])
def test_flow_sde_substitutes_the_second_level_at_sigma_one(start):
    table = flow_sde_table(torch.tensor([start, 0.8, 0.3, 0.0]), 0.7)
    # w^2 = 0.49 / (1 - 0.8), D = 0.2: s = w sqrt(D) = 0.7, a = 1 - w^2 D / 2 = 0.755, b = -D as 1 - sigma = 0.
    torch.testing.assert_close(table[0], torch.tensor([0.755, -0.2, 0.7]), rtol=0, atol=4 * EPS)


@pytest.mark.parametrize("name", FLOW_TABLES)
def test_sigma_one_is_finite(name):
    table = FLOW_TABLES[name](torch.tensor([1.0, 0.5, 0.0]))
    assert table.isfinite().all()
    assert trained_steps(table).tolist() == [True, False]


@pytest.mark.parametrize("name", ["flow-sde", "dance-sde", "cps"])
def test_last_flow_step_is_the_odes_unless_trained(name):
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])
    table = build_table(name, 0.5, sigmas=sigmas)
    assert trained_steps(table).tolist() == [True, True, True, False]
    torch.testing.assert_close(table[-1], ode_table(sigmas)[-1], rtol=0, atol=EPS)
    trained = build_table(name, 0.5, sigmas=sigmas, num_trained_steps=4)
    assert torch.equal(trained[:-1], table[:-1])
    # CPS adds at most sigma' = 0 of noise there.
    assert trained_steps(trained).sum() == (3 if name == "cps" else 4)


def test_last_ddim_step_is_deterministic_unless_trained():
    schedule = {"alphas_cumprod": torch.linspace(0.999, 0.02, 50), "timesteps": torch.tensor([40, 20, 2])}
    schedule["final_alpha_cumprod"] = 0.9995
    table = build_table("ddim", 1.0, **schedule)
    assert trained_steps(table).tolist() == [True, True, False]
    assert torch.equal(table[-1], build_table("ode", 0.0, **schedule)[-1])
    assert trained_steps(build_table("ddim", 1.0, **schedule, num_trained_steps=3)).sum() == 3


@pytest.mark.parametrize("name", ["flow-sde", "dance-sde", "cps", "ddim"])
def test_steps_after_the_trained_ones_are_the_odes(name):
    alphas_cumprod, timesteps = torch.linspace(0.999, 0.02, 50), torch.tensor([40, 30, 20, 2])
    diffusion = {"alphas_cumprod": alphas_cumprod, "timesteps": timesteps}
    schedule = diffusion if name == "ddim" else {"sigmas": torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])}
    table = build_table(name, 0.5, num_trained_steps=2, **schedule)
    assert trained_steps(table).tolist() == [True, True, False, False]
    assert torch.equal(table[:2], build_table(name, 0.5, **schedule)[:2])
    torch.testing.assert_close(table[2:], build_table("ode", 0.0, **schedule)[2:], rtol=0, atol=EPS)


def test_zero_terminal_snr():
    alphas_cumprod = torch.tensor([0.99, 0.5, 0.0])
    timesteps = torch.tensor([2, 1, 0])
    table = ddim_table(alphas_cumprod, timesteps, 1.0, "v_prediction")
    # ab = 0: x0 = -v, eps = z, s^2 = 1 - ab' leaves nothing for eps.
    torch.testing.assert_close(table[0], torch.tensor([0.0, -math.sqrt(0.5), math.sqrt(0.5)]), rtol=0, atol=EPS)
    with pytest.raises(ValueError, match="v_prediction"):
        ddim_table(alphas_cumprod, timesteps, 1.0, "epsilon")


def test_build_table_dispatches():
    sigmas = _sd3_sigmas(5)
    assert torch.equal(build_table("flow-sde", 0.7, sigmas=sigmas), flow_sde_table(sigmas, 0.7))
    assert torch.equal(build_table("dance-sde", 0.3, sigmas=sigmas), dance_sde_table(sigmas, 0.3))
    assert torch.equal(build_table("cps", 0.8, sigmas=sigmas), cps_table(sigmas, 0.8))
    assert torch.equal(build_table("ode", 0.7, sigmas=sigmas), ode_table(sigmas))
    diffusion = {"alphas_cumprod": torch.linspace(0.999, 0.02, 50), "timesteps": torch.tensor([40, 20, 2])}
    diffusion["prediction_type"] = "v_prediction"
    positional = list(diffusion.values())
    assert torch.equal(build_table("ddim", 0.5, **diffusion), ddim_table(*positional[:2], 0.5, "v_prediction"))
    assert torch.equal(build_table("ode", 0.5, **diffusion), ddim_table(*positional[:2], 0.0, "v_prediction"))


@pytest.mark.parametrize(
    ("name", "noise_level", "message"),
    [
        ("ddim", 1.0, 'rollout.transition: "ddim" .* flow-matching .* flow-sde, dance-sde, cps, ode'),
        ("flow-sde", -0.1, "rollout.noise_level: .* finite and not negative .* got -0.1"),
        ("flow-sde", math.inf, "rollout.noise_level: .* finite and not negative .* got inf"),
        ("dance-sde", math.nan, "rollout.noise_level: .* finite and not negative .* got nan"),
        ("cps", 1.1, "rollout.noise_level: .* between 0 and 1 .* got 1.1"),
    ],
)
def test_users_mistake_names_the_key(name, noise_level, message):
    with pytest.raises(UserError, match=message):
        build_table(name, noise_level, sigmas=_sd3_sigmas(4))


def test_flow_sampler_on_a_diffusion_model():
    with pytest.raises(UserError, match='"cps" does not fit a diffusion model; choose one of ddim, ode'):
        build_table("cps", 0.8, alphas_cumprod=torch.linspace(0.99, 0.1, 10), timesteps=torch.tensor([9, 4]))


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.1], [1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [1.5, 0.5, 0.0], [0.0]])
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        ode_table(torch.tensor(sigmas))


def test_bad_diffusion_schedule():
    alphas_cumprod = torch.linspace(0.999, 0.02, 50)
    with pytest.raises(ValueError, match="timesteps"):
        ddim_table(alphas_cumprod, torch.tensor([2, 20, 40]), 1.0)
    with pytest.raises(ValueError, match='prediction_type .* got "sample"'):
        ddim_table(alphas_cumprod, torch.tensor([40, 20, 2]), 1.0, "sample")
