"""What a rollout earned: nothing waits before it is asked for, and the pieces fit together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from latent_critic.engine.advantages import explained_variance, gae, normalize
from latent_critic.engine.config import AlgorithmConfig
from latent_critic.engine.outcome import Outcome
from latent_critic.engine.reward_stats import RunningStandardizer

SAMPLES, STEPS, TRAINED, REWARDS = 6, 4, 3, 2


class Scoring:
    asked = 0

    def result(self):
        self.asked += 1
        return None, torch.arange(SAMPLES * REWARDS, dtype=torch.float32).reshape(SAMPLES, REWARDS)


@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_outcome(lam):
    values = torch.randn(SAMPLES, STEPS, REWARDS, generator=torch.Generator().manual_seed(0))
    scoring, standardizer, weights = Scoring(), RunningStandardizer(REWARDS), torch.tensor([1.0, 0.5])
    algorithm = AlgorithmConfig(lam=lam)
    trajectory = SimpleNamespace(values=values, trained_steps=TRAINED)
    outcome = Outcome(trajectory, scoring, standardizer, algorithm, weights)
    assert (scoring.asked, standardizer.count, outcome.seconds) == (0, 0, 0)

    advantages, returns = outcome.advantages, outcome.returns
    assert outcome.explained_variance.shape == (STEPS,) and outcome.seconds > 0
    assert (scoring.asked, standardizer.count) == (1, SAMPLES)  # once, whatever is asked for
    assert torch.equal(outcome.raw, Scoring().result()[1])

    rewards = standardizer.standardize(outcome.raw)
    assert rewards.mean(0).abs().max() < 1e-6  # of one batch alone: float32 numbers of order 1
    expected = gae(rewards, values, algorithm.gamma, lam)[0][:, :TRAINED]
    assert torch.equal(advantages, normalize(expected, weights, algorithm.advantage_clip))
    # gamma is 1: without bootstrapping every step's return is the reward.
    torch.testing.assert_close(returns, rewards[:, None].expand(-1, STEPS, -1), rtol=0, atol=1e-6)
    assert torch.equal(outcome.explained_variance, explained_variance(values, returns).mean(1))


def test_threads_that_ask_at_once_wait_for_one_answer():
    together = threading.Barrier(4, timeout=60)

    class Late(Scoring):
        def result(self):
            answer = super().result()
            for _ in range(1000):  # others may ask meanwhile
                threading.Event().wait(1e-5)
            return answer

    scoring, standardizer = Late(), RunningStandardizer(REWARDS)
    trajectory = SimpleNamespace(values=torch.zeros(SAMPLES, STEPS, REWARDS), trained_steps=TRAINED)
    outcome = Outcome(trajectory, scoring, standardizer, AlgorithmConfig(), torch.ones(REWARDS))

    def ask(name):
        together.wait()
        return getattr(outcome, name)

    with ThreadPoolExecutor(4) as threads:
        first, again, returns, raw = threads.map(ask, ("advantages", "advantages", "returns", "raw"))
    assert (scoring.asked, standardizer.count) == (1, SAMPLES)
    assert first is again and returns is outcome.returns and raw is outcome.raw
