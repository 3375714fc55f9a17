"""PPO's losses in PyTorch against independent loops and numbers worked out by hand, and their arguments."""

import math

import pytest
import torch

from latent_critic.kernels.ppo import PPOClips, policy_loss, ppo_loss, value_loss


def _randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_policy_loss_and_statistics_against_a_loop():
    log_prob, log_prob_old, advantage = _randn(40, seed=1) * 0.3, _randn(40, seed=2) * 0.3, _randn(40, seed=3)
    losses, ratios = [], []
    for new, old, a in zip(log_prob.tolist(), log_prob_old.tolist(), advantage.tolist(), strict=True):
        ratio = math.exp(new - old)
        losses.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
        ratios.append(ratio)
    loss, statistics = policy_loss(log_prob, log_prob_old, advantage, 0.2)
    # float64 on both sides: a few dozen roundings of 1e-16.
    assert loss.item() == pytest.approx(sum(losses) / 40, rel=1e-13)
    assert statistics.ratio.item() == pytest.approx(sum(ratios) / 40, rel=1e-13)
    assert statistics.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 40, rel=1e-12)
    assert statistics.old_approx_kl.item() == pytest.approx(sum(-math.log(r) for r in ratios) / 40, rel=1e-12)
    assert statistics.clipfrac.item() == sum(abs(r - 1) > 0.2 for r in ratios) / 40
    assert statistics.max_ratio_deviation.item() == pytest.approx(max(abs(r - 1) for r in ratios), rel=1e-13)


def test_policy_loss_by_hand():
    # rho = 2, 2, 0.25, 0.25 and eps = 0.5, so all are outside the clip: it caps gains, never losses.
    log_prob = torch.tensor([2.0, 2.0, 0.25, 0.25], dtype=torch.float64).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, statistics = policy_loss(log_prob, torch.zeros_like(log_prob), advantage, 0.5)
    # max(-2, -1.5), max(2, 1.5), max(-0.25, -0.5), max(0.25, 0.5)
    assert loss.item() == pytest.approx((-1.5 + 2.0 - 0.25 + 0.5) / 4, rel=1e-14)
    assert statistics.clipfrac.item() == 1.0


def test_policy_gradient_inside_and_outside_the_clip():
    log_prob = torch.tensor([0.0, 0.3, 0.3, -0.3, -0.3], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    loss, statistics = policy_loss(log_prob, torch.zeros(5, dtype=torch.float64), advantage, 0.2)
    loss.backward()
    # -A rho / n where the unclipped term is the larger one, 0 where the clip has stopped the gain.
    up, down = math.exp(0.3), math.exp(-0.3)
    expected = torch.tensor([-2.0, 0.0, 2.0 * up, -2.0 * down, 0.0], dtype=torch.float64) / 5
    torch.testing.assert_close(log_prob.grad, expected, rtol=1e-14, atol=0)
    assert not any(statistic.requires_grad for statistic in statistics)


def test_policy_loss_gradcheck():
    log_prob = (_randn(12, seed=1) * 0.3).requires_grad_()
    old, advantage = _randn(12, seed=2) * 0.3, _randn(12, seed=3)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantage, 0.2)[0], log_prob)


def test_fresh_batch_has_ratio_one_and_no_clipping():
    log_prob, advantage = _randn(64, dtype=torch.float32), _randn(64, seed=5, dtype=torch.float32)
    loss, statistics = policy_loss(log_prob, log_prob.clone(), advantage, 1e-5)
    assert loss == -advantage.mean()
    assert [s.item() for s in statistics] == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("target_clip", [None, 1.0])
@pytest.mark.parametrize("value_clip_range", [None, 0.3])
def test_value_loss_against_a_loop(target_clip, value_clip_range):
    value, returns, value_old = _randn(10, 3, seed=1), 2.0 * _randn(10, 3, seed=2), _randn(10, 3, seed=3)
    losses, num_clipped = [], 0
    for v, g, v_old in zip(*(x.flatten().tolist() for x in (value, returns, value_old)), strict=True):
        if target_clip is not None:
            g = min(max(g, -target_clip), target_clip)
        error = (v - g) ** 2
        if value_clip_range is not None:
            clipped = v_old + min(max(v - v_old, -value_clip_range), value_clip_range)
            error = max(error, (clipped - g) ** 2)
            num_clipped += abs(v - v_old) > value_clip_range
        losses.append(0.5 * error)
    loss, statistics = value_loss(value, returns, value_old, value_clip_range, target_clip)
    assert loss.item() == pytest.approx(sum(losses) / 30, rel=1e-13)
    assert statistics.clipfrac.item() == pytest.approx(num_clipped / 30, rel=1e-15)


@pytest.mark.parametrize("value_clip_range", [None, 0.3])
def test_value_loss_gradcheck(value_clip_range):
    value = _randn(6, 2, seed=1).requires_grad_()
    returns, value_old = 2.0 * _randn(6, 2, seed=2), _randn(6, 2, seed=3)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, returns, value_old, value_clip_range, 1.0)[0], value)


def test_moments_give_the_explained_variance_of_each_head():
    returns = 3.0 + 2.0 * _randn(20, 4, 3, seed=1)
    value = (0.7 * returns + _randn(20, 4, 3, seed=2)).requires_grad_()
    _, statistics = value_loss(value, returns, target_clip=1.0)
    assert not any(statistic.requires_grad for statistic in statistics)
    left = statistics.error_square - statistics.error.square()
    explained = 1.0 - left / (statistics.returns_square - statistics.returns.square())
    flat_value, flat_returns = value.flatten(0, 1), returns.flatten(0, 1)
    expected = 1.0 - torch.var(flat_returns - flat_value, 0) / torch.var(flat_returns, 0)
    # E x^2 - (E x)^2 cancels the mean's square, about as large as the variance: a few dozen roundings of 1e-16.
    torch.testing.assert_close(explained, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value_clip_range", [None, 0.3])
def test_ppo_loss_is_the_weighted_sum_of_its_parts(value_clip_range):
    log_prob, log_prob_old, advantage = (_randn(8, seed=i, dtype=torch.float32) for i in range(3))
    value, returns, value_old = (_randn(8, 1, 3, seed=i, dtype=torch.float32) for i in range(3, 6))
    clips = PPOClips(0.2, value_clip_range, 1.0)
    loss, statistics = ppo_loss(log_prob, log_prob_old, advantage, value, returns, value_old, clips, 0.7)
    policy = policy_loss(log_prob, log_prob_old, advantage, 0.2)
    critic = value_loss(value, returns, value_old, value_clip_range, 1.0)
    assert torch.equal(loss, policy[0] + 0.7 * critic[0])
    assert (statistics.policy_loss, statistics.value_loss) == (policy[0], critic[0])
    assert statistics.policy == policy[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(statistics.value, critic[1], strict=True))


def test_half_precision_is_widened():
    value, returns = _randn(16, seed=1).bfloat16(), _randn(16, seed=2).bfloat16()
    loss, _ = value_loss(value, returns)
    assert loss.dtype == torch.float32
    assert loss == value_loss(value.float(), returns.float())[0]
    loss, _ = policy_loss(value, returns, value, 0.2)
    assert loss.dtype == torch.float32
    assert loss == policy_loss(value.float(), returns.float(), value.float(), 0.2)[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"log_prob_old": torch.zeros(3)}, "log_prob_old"),
        ({"advantage": torch.zeros(4, 1)}, "advantage"),
        ({"log_prob": torch.zeros(4, dtype=torch.int64)}, "log_prob"),
        ({"log_prob": torch.zeros(0)}, "log_prob"),
        ({"advantage": torch.zeros(4, dtype=torch.int64)}, "advantage"),
        ({"log_prob_old": torch.zeros(4, device="meta")}, "log_prob_old"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"clip_range": math.nan}, "clip_range"),
    ],
)
def test_bad_policy_argument_is_named(change, name):
    arguments = {"log_prob": torch.zeros(4), "log_prob_old": torch.zeros(4), "advantage": torch.zeros(4)}
    with pytest.raises(ValueError, match=rf"^{name} must"):
        policy_loss(**({"clip_range": 0.2} | arguments | change))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"returns": torch.zeros(4, 1)}, "returns"),
        ({"value": torch.zeros(4, dtype=torch.int32)}, "value"),
        ({"returns": torch.zeros(4, dtype=torch.int32)}, "returns"),
        ({"returns": torch.zeros(4, device="meta")}, "returns"),
        ({"target_clip": -1.0}, "target_clip"),
        ({"value_clip_range": 0.0}, "value_clip_range"),
        ({"value_clip_range": 0.1}, "value_old"),
        ({"value_clip_range": 0.1, "value_old": torch.zeros(3)}, "value_old"),
    ],
)
def test_bad_value_argument_is_named(change, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        value_loss(**({"value": torch.zeros(4), "returns": torch.zeros(4)} | change))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"advantage": torch.zeros(3)}, "advantage"),
        ({"returns": torch.zeros(4, 2)}, "returns"),
        ({"value": torch.zeros(3, 2), "returns": torch.zeros(3, 2)}, "value"),
        ({"value": torch.zeros(4, 1, device="meta"), "returns": torch.zeros(4, 1, device="meta")}, "value"),
        ({"clips": PPOClips(-1.0)}, "clip_range"),
        ({"clips": PPOClips(0.2, value_clip_range=math.nan)}, "value_clip_range"),
        ({"clips": PPOClips(0.2, value_clip_range=0.1)}, "value_old"),
        ({"clips": PPOClips(0.2, target_clip=0.0)}, "target_clip"),
    ],
)
def test_bad_argument_of_the_sum_is_named(change, name):
    arguments = {key: torch.zeros(4) for key in ("log_prob", "log_prob_old", "advantage")}
    arguments |= {"value": torch.zeros(4, 1), "returns": torch.zeros(4, 1), "value_old": None}
    with pytest.raises(ValueError, match=rf"^{name} must"):
        ppo_loss(**(arguments | {"clips": PPOClips(0.2), "value_coef": 0.5} | change))
