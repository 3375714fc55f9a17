import subprocess
import sys

import pytest
import torch

from latent_critic.engine.advantages import explained_variance, gae, normalize


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_gae_without_discount_is_reward_minus_value():
    rewards, values = _randn(6, 2, seed=1), _randn(6, 5, 2, seed=2)
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    assert torch.equal(returns, rewards[:, None].expand(6, 5, 2))
    assert torch.equal(advantages, rewards[:, None] - values)


def test_gae_by_hand():
    # One sample, three steps, R = 2, V = (1, 3, 0.5), gamma = 0.5, lam = 0.4, so gamma lam = 0.2:
    #   delta = (0.5 * 3 - 1, 0.5 * 0.5 - 3, 2 - 0.5)       = ( 0.5,  -2.75, 1.5)
    #   A     = (0.5 + 0.2 * -2.45, -2.75 + 0.2 * 1.5, 1.5) = ( 0.01, -2.45, 1.5)
    #   G     = A + V                                       = ( 1.01,  0.55, 2.0)
    # The second head has R = -1 and V = 0: A = G = (-1 * 0.2^2, -1 * 0.2, -1).
    rewards = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    values = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.5, 0.0]]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma=0.5, lam=0.4)
    expected_advantages = torch.tensor([[[0.01, -0.04], [-2.45, -0.2], [1.5, -1.0]]], dtype=torch.float64)
    expected_returns = torch.tensor([[[1.01, -0.04], [0.55, -0.2], [2.0, -1.0]]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected_advantages, rtol=0, atol=1e-15)
    torch.testing.assert_close(returns, expected_returns, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.9, 0.0), (0.97, 0.8)])
def test_gae_equals_the_recursion_over_deltas(gamma, lam):
    rewards, values = _randn(4, 3, seed=1, dtype=torch.float64), _randn(4, 6, 3, seed=2, dtype=torch.float64)
    expected = torch.zeros(4, 6, 3, dtype=torch.float64)
    following = torch.zeros(4, 3, dtype=torch.float64)
    for k in range(5, -1, -1):
        delta = (rewards if k == 5 else gamma * values[:, k + 1]) - values[:, k]
        following = delta + gamma * lam * following
        expected[:, k] = following
    advantages, returns = gae(rewards, values, gamma, lam)
    # A dozen float64 roundings of numbers of order 1.
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(returns, expected + values, rtol=0, atol=1e-14)


def test_gae_rejects_rewards_of_other_heads():
    with pytest.raises(ValueError, match=r"rewards \[4, 2\] must be \[N, M\]"):
        gae(torch.zeros(4, 2), torch.zeros(4, 5, 3), 1.0, 1.0)


def test_normalize_by_hand():
    # Head 0: 1, 3, 5, 7 has mean 4, population std sqrt(5). Head 1: -2, 2, 2, -2 has mean 0, std 2.
    advantages = torch.tensor([[[1.0, -2.0], [3.0, 2.0]], [[5.0, 2.0], [7.0, -2.0]]])
    normalized = normalize(advantages, torch.tensor([2.0, 0.5]), clip=10.0)
    # 2 * (-3, -1, 1, 3) / sqrt(5) + 0.5 * (-1, 1, 1, -1)
    r = 2 / 5**0.5
    expected = torch.tensor([[-3 * r - 0.5, -r + 0.5], [r + 0.5, 3 * r - 0.5]])
    # The 1e-6 beside the std.
    torch.testing.assert_close(normalized, expected, rtol=0, atol=3e-6)


def test_each_head_is_normalised_before_the_weighted_sum():
    heads = _randn(50, 8, 2, seed=3)
    weights = torch.tensor([1.0, 0.5])
    # A head's own units do not matter, except for the 1e-6 beside a std of 1.
    rescaled = torch.stack([100.0 * heads[..., 0] + 7.0, 0.01 * heads[..., 1] - 3.0], dim=2)
    torch.testing.assert_close(normalize(rescaled, weights, 10.0), normalize(heads, weights, 10.0), rtol=0, atol=5e-4)
    single = [normalize(heads[..., m : m + 1], torch.ones(1), 10.0) for m in range(2)]
    torch.testing.assert_close(normalize(heads, weights, 10.0), single[0] + 0.5 * single[1], rtol=0, atol=1e-6)
    # Mean 0 and std 1 up to the float32 rounding of 400 results, and the 1e-6.
    assert abs(single[0].double().mean().item()) < 1e-7
    assert abs(single[0].double().std(correction=0).item() - 1.0) < 2e-6


def test_clip_holds_per_head():
    advantages = torch.zeros(100, 1, 2)
    advantages[0] = 100.0  # 9.95 stds from the mean of 100 numbers
    assert normalize(advantages, torch.tensor([1.0, 1.0]), clip=3.0)[0, 0].item() == 6.0


def test_constant_advantages_become_zero():
    # 0.1 has no exact float32, so a one-pass variance would leave rounding errors to blow up.
    normalized = normalize(torch.full((77, 3, 1), 0.1), torch.ones(1), clip=10.0)
    assert torch.equal(normalized, torch.zeros(77, 3))


def test_explained_variance_by_hand():
    # Returns 0, 2, 4, 6: variance 5. One step per case, one sample per column.
    returns = torch.tensor([0.0, 2.0, 4.0, 6.0])
    values = torch.stack(
        [
            returns,  # perfect: 1
            returns + 5.0,  # a constant offset is no variance: 1
            torch.full((4,), 3.0),  # knows the mean only: 0
            torch.tensor([1.0, 1.0, 5.0, 5.0]),  # residuals -1, 1, -1, 1: 1 - 1 / 5
            -returns,  # residuals 0, 4, 8, 12 of variance 20: -3
        ]
    )
    result = explained_variance(values.T[:, :, None], returns[:, None, None].expand(4, 5, 1))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.tensor([[1.0], [1.0], [0.0], [0.8], [-3.0]], dtype=torch.float64))


def test_explained_variance_of_constant_returns_is_zero():
    values = _randn(77, 3, 2)
    returns = _randn(77, 3, 2, seed=1)
    returns[..., 1] = 0.1
    result = explained_variance(values, returns)
    assert torch.equal(result[:, 1], torch.zeros(3, dtype=torch.float64))
    assert (result[:, 0] != 0).all()


RANK = """
import sys
import torch
import torch.distributed as dist
from latent_critic.engine.advantages import explained_variance, normalize

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt", weights_only=True)
mine = slice(0, 5) if rank == 0 else slice(5, None)  # ranks of unequal size
result = {
    "normalized": normalize(data["advantages"][mine], data["weights"], 2.0),
    "explained_variance": explained_variance(data["values"][mine], data["returns"][mine]),
}
torch.save(result, f"{folder}/result{rank}.pt")
dist.destroy_process_group()
"""


def test_statistics_are_those_of_all_ranks(tmp_path):
    data = {
        "advantages": _randn(16, 4, 3, seed=1) * torch.tensor([1.0, 5.0, 0.2]) + 2.0,
        "weights": torch.tensor([1.0, 0.5, 2.0]),
        "values": _randn(16, 4, 3, seed=2),
        "returns": _randn(16, 4, 3, seed=3),
    }
    torch.save(data, tmp_path / "data.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    results = [torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2)]
    # The order of float64 sums differs, the result is rounded to float32: one ulp of numbers up to 7.
    torch.testing.assert_close(
        torch.cat([result["normalized"] for result in results]),
        normalize(data["advantages"], data["weights"], 2.0),
        rtol=0,
        atol=5e-7,
    )
    expected = explained_variance(data["values"], data["returns"])
    for result in results:
        torch.testing.assert_close(result["explained_variance"], expected, rtol=0, atol=1e-13)
