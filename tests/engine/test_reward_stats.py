import threading

import pytest
import torch

from latent_critic.engine import advantages
from latent_critic.engine.errors import UserError
from latent_critic.engine.reward_stats import MIN_STD, RunningStandardizer


def _rewards(num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, 2, generator=generator) * torch.tensor([0.01, 30.0]) + torch.tensor([0.2, -100.0])


def test_first_batch_by_hand():
    standardizer = RunningStandardizer(1)
    rewards = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    standardizer.update(rewards)
    # Mean 4, population variance 5.
    assert standardizer.mean.item() == 4.0
    assert standardizer.std.item() == 5.0**0.5
    expected = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]) / 5.0**0.5
    # Either side is rounded to float32: an ulp of 1.34.
    torch.testing.assert_close(standardizer.standardize(rewards), expected, rtol=0, atol=1.2e-7)


def test_decay_by_hand():
    # Batches (0, 2) then (4, 8) at decay 0.5: each number of the first counts half. Weight 1 + 2 = 3,
    # mean (0.5 * 0 + 0.5 * 2 + 4 + 8) / 3 = 13 / 3, second moment (0.5 * 0 + 0.5 * 4 + 16 + 64) / 3 = 82 / 3.
    standardizer = RunningStandardizer(1, decay=0.5)
    standardizer.update(torch.tensor([[0.0], [2.0]]))
    standardizer.update(torch.tensor([[4.0], [8.0]]))
    assert standardizer.mean.item() == pytest.approx(13 / 3, rel=1e-15)
    assert standardizer.std.item() == pytest.approx((82 / 3 - (13 / 3) ** 2) ** 0.5, rel=1e-14)


def test_no_decay_gives_the_statistics_of_all_batches():
    standardizer = RunningStandardizer(2, decay=1.0)
    batches = [_rewards(num_samples, seed) for seed, num_samples in enumerate([7, 1, 20, 4])]
    for batch in batches:
        standardizer.update(batch)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(standardizer.mean, everything.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(standardizer.std, everything.std(0, correction=0), rtol=1e-12, atol=0)


def test_decayed_statistics_follow_a_drift():
    forgetting, remembering = RunningStandardizer(1), RunningStandardizer(1, decay=1.0)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(100):
        rewards = torch.randn(64, 1, generator=generator) + 0.1 * iteration
        forgetting.update(rewards)
        remembering.update(rewards)
    # The last batch has mean 9.9 and std 1. Weights 0.9^i lag by 0.1 * 0.9 / 0.1 = 0.9; equal weights by half of 9.9.
    # The sampling error of the decayed mean is 1 / sqrt(64 * 19), about 0.03.
    assert forgetting.mean.item() == pytest.approx(9.0, abs=0.12)
    assert remembering.mean.item() == pytest.approx(4.95, abs=0.06)
    # Variance within a batch 1, between batches 0.1^2 * 0.9 / 0.1^2 = 0.9.
    assert forgetting.std.item() == pytest.approx(1.9**0.5, abs=0.1)


def test_each_reward_gets_unit_scale():
    standardizer = RunningStandardizer(2)
    rewards = _rewards(500, seed=0)
    standardizer.update(rewards)
    standardized = standardizer.standardize(rewards)
    assert standardized.dtype == torch.float32
    torch.testing.assert_close(standardized.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(standardized.std(0, correction=0), torch.ones(2), rtol=0, atol=1e-6)


def test_constant_reward_is_zero():
    standardizer = RunningStandardizer(1)
    rewards = torch.full((77, 1), 0.1)
    for _ in range(5):
        standardizer.update(rewards)
    assert standardizer.std.item() == MIN_STD
    # The float64 mean is within 1e-16 of the reward, divided by 1e-4.
    assert standardizer.standardize(rewards).abs().max() < 1e-11


@pytest.mark.parametrize("through_file", [False, True])
def test_resume_is_exact(tmp_path, through_file):
    uninterrupted, first = RunningStandardizer(2), RunningStandardizer(2)
    batches = [_rewards(16, seed) for seed in range(6)]
    for batch in batches:
        uninterrupted.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    state = first.state_dict()
    if through_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    first.update(batches[0])  # must not reach the state that was saved
    resumed = RunningStandardizer(2)
    resumed.load_state_dict(state)
    for batch in batches[3:]:
        resumed.update(batch)
    for name, expected in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected)
    assert torch.equal(resumed.standardize(batches[0]), uninterrupted.standardize(batches[0]))


def test_checkpoint_of_other_rewards():
    with pytest.raises(UserError, match="statistics of 2 rewards, the config has 3"):
        RunningStandardizer(3).load_state_dict(RunningStandardizer(2).state_dict())


def test_misuse():
    with pytest.raises(RuntimeError, match="before the first update"):
        RunningStandardizer(2).standardize(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"rewards must be \[N, 2\], got \[4, 3\]"):
        RunningStandardizer(2).update(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="decay"):
        RunningStandardizer(2, decay=0.0)


def test_statistics_are_those_of_all_ranks(monkeypatch):
    # Two ranks as threads; the all-reduce itself is run for real in test_advantages.
    barrier, contributions = threading.Barrier(2, timeout=30), {}

    def all_reduce_sum(x, process_group):
        contributions[process_group] = x
        barrier.wait()
        total = contributions["rank 0"] + contributions["rank 1"]
        barrier.wait()
        return total

    batches = [_rewards(10, seed) for seed in range(3)]
    single, ranks = RunningStandardizer(2), {"rank 0": RunningStandardizer(2), "rank 1": RunningStandardizer(2)}
    for batch in batches:
        single.update(batch)
    monkeypatch.setattr(advantages, "all_reduce_sum", all_reduce_sum)

    def run(rank, mine):
        for batch in batches:
            ranks[rank].update(batch[mine], process_group=rank)

    parts = {"rank 0": slice(0, 3), "rank 1": slice(3, None)}
    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for name, expected in single.state_dict().items():
        assert torch.equal(ranks["rank 0"].state_dict()[name], ranks["rank 1"].state_dict()[name])
        # Only the order of float64 sums differs.
        torch.testing.assert_close(ranks["rank 0"].state_dict()[name], expected, rtol=1e-13, atol=0)
