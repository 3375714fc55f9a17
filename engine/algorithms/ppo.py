"""PPO with a critic on the noisy latents (arXiv 2605.27736): GAE along the denoising axis, normalised."""

from collections.abc import Sequence

from torch import Tensor

from ..advantages import gae, normalize
from ..config import Config
from ..prompts import Prompt
from ..reward_stats import RunningStandardizer, sum_of_rewards
from .base import Algorithm


class PPO(Algorithm):
    def __init__(self, config: Config, weights: Tensor):
        super().__init__(config, weights)
        self.standardizer = RunningStandardizer(len(weights))
        self.is_sum = config.critic.heads == "sum"

    def observe(self, raw: Tensor, prompts: Sequence[Prompt]) -> None:
        self.standardizer.update(raw)

    def advantages(self, raw: Tensor, values: Tensor, trained: slice, prompts: Sequence[Prompt]) -> Tensor:
        advantages, _ = self._gae(raw, values, trained, self.config.lam)
        # Weighed before they are normalised: each by itself, a reward would count for more than its weight the better
        # the critic foresees it.
        total = advantages if self.is_sum else sum_of_rewards(advantages, self.weights)
        return normalize(total[:, trained], self.weights.new_ones(1), self.config.advantage_clip)

    def earned(self, raw: Tensor) -> Tensor:
        """Standardised, once anything was observed. Their sum is of standardised rewards too, so that one head differs
        from several in what it is told, not in the rewards' units."""
        rewards = self.standardizer.standardize(raw) if self.standardizer.count > 0 else raw
        return sum_of_rewards(rewards, self.weights) if self.is_sum else rewards

    def returns(self, raw: Tensor, values: Tensor, trained: slice) -> Tensor:
        return self._gae(raw, values, trained, self.config.value_lam)[1]

    def _gae(self, raw: Tensor, values: Tensor, trained: slice, lam: float) -> tuple[Tensor, Tensor]:
        """Bootstrapped over the noise of stochastic steps; the others add none that a later value could be free of."""
        lams = values.new_ones(values.shape[1])
        lams[trained] = lam
        return gae(self.earned(raw), values, self.config.gamma, lams)

    def state_dict(self) -> dict[str, Tensor]:
        return self.standardizer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.standardizer.load_state_dict(state)
