"""What a rollout earned: nothing waits before it is asked for, and the pieces fit together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from latent_critic.engine.advantages import explained_variance, gae, normalize
from latent_critic.engine.algorithms import Algorithm, build_algorithm
from latent_critic.engine.config import Config
from latent_critic.engine.outcome import Outcome
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.reward_stats import sum_of_rewards

SAMPLES, STEPS, REWARDS = 6, 4, 2
TRAINED = slice(1, 3)
PROMPTS = [Prompt(f"a red circle {i}") for i in range(SAMPLES)]


class Scoring:
    asked = 0

    def result(self):
        self.asked += 1
        return None, torch.arange(SAMPLES * REWARDS, dtype=torch.float32).reshape(SAMPLES, REWARDS)


def build(name: str = "ppo", **options) -> Algorithm:
    rewards = [{"name": "a"}, {"name": "b", "weight": 0.5}]
    config = Config.model_validate({"rewards": rewards, "algorithm": {"name": name, **options}})
    return build_algorithm(config, torch.tensor([1.0, 0.5]))


def drawn(values: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(values=values, trained_steps=TRAINED, prompts=PROMPTS)


@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_outcome(lam):
    values = torch.randn(SAMPLES, STEPS, REWARDS, generator=torch.Generator().manual_seed(0))
    scoring, algorithm = Scoring(), build(lam=lam)
    standardizer, options = algorithm.standardizer, algorithm.config
    outcome = Outcome(drawn(values), scoring, algorithm)
    assert (scoring.asked, standardizer.count, outcome.seconds) == (0, 0, 0)

    advantages, returns = outcome.advantages, outcome.returns
    assert outcome.explained_variance.shape == (STEPS,) and outcome.seconds > 0
    assert (scoring.asked, standardizer.count) == (1, SAMPLES)  # once, whatever is asked for
    assert torch.equal(outcome.raw, Scoring().result()[1])

    rewards = standardizer.standardize(outcome.raw)
    assert rewards.mean(0).abs().max() < 1e-6  # of one batch alone: float32 numbers of order 1
    expected = gae(rewards, values, options.gamma, lam)[0][:, TRAINED]
    total = sum_of_rewards(expected, algorithm.weights)
    assert torch.equal(advantages, normalize(total, torch.ones(1), options.advantage_clip))
    # gamma is 1: without bootstrapping every step's return is the reward.
    torch.testing.assert_close(returns, rewards[:, None].expand(-1, STEPS, -1), rtol=0, atol=1e-6)
    assert torch.equal(outcome.explained_variance, explained_variance(values, returns).mean(1))


@pytest.mark.parametrize("name, options", [("grpo", {"group_size": 3}), ("ddpo", {"reward_statistics": "prompt"})])
def test_outcome_without_a_critic(name, options):
    """The algorithm observes rewards once, with their prompts; there is nothing for a critic to learn."""
    scoring, algorithm, observed = Scoring(), build(name, **options), []
    observe = algorithm.observe
    algorithm.observe = lambda *given: (observed.append(given), observe(*given))
    outcome = Outcome(drawn(torch.zeros(SAMPLES, STEPS, 0)), scoring, algorithm)
    advantages = outcome.advantages
    assert torch.equal(advantages, algorithm.advantages(Scoring().result()[1], torch.zeros(6, 4, 0), TRAINED, PROMPTS))
    assert advantages.shape == (SAMPLES, 2) and advantages.std() > 0.5
    assert outcome.returns.shape == (SAMPLES, STEPS, 0)
    ((raw, prompts),) = observed
    assert raw is outcome.raw and prompts is PROMPTS and scoring.asked == 1


def test_threads_that_ask_at_once_wait_for_one_answer():
    together = threading.Barrier(4, timeout=60)

    class Late(Scoring):
        def result(self):
            answer = super().result()
            for _ in range(1000):  # others may ask meanwhile
                threading.Event().wait(1e-5)
            return answer

    scoring, algorithm = Late(), build()
    outcome = Outcome(drawn(torch.zeros(SAMPLES, STEPS, REWARDS)), scoring, algorithm)

    def ask(name):
        together.wait()
        return getattr(outcome, name)

    with ThreadPoolExecutor(4) as threads:
        first, again, returns, raw = threads.map(ask, ("advantages", "advantages", "returns", "raw"))
    assert (scoring.asked, algorithm.standardizer.count) == (1, SAMPLES)
    assert first is again and returns is outcome.returns and raw is outcome.raw
