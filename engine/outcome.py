"""What a rollout's pictures earned, and what policy and critic are to learn from it."""

import time
from functools import cached_property

from torch import Tensor

from .advantages import explained_variance, gae, normalize
from .config import AlgorithmConfig
from .reward_stats import RunningStandardizer
from .scoring import Scoring
from .trajectory import Trajectory


class Outcome:
    """N samples, K steps of which T are trained, M rewards of the given weights [M].

    Everything here waits, the first time it is asked for, until the last pictures are scored (`seconds` tells how
    long), and every rank must ask at the same point. An update asks after its first forward, which needs none of it:
    so the trunk computes meanwhile.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        scoring: Scoring,
        standardizer: RunningStandardizer,
        algorithm: AlgorithmConfig,
        weights: Tensor,
    ):
        self._trajectory, self._scoring, self._standardizer = trajectory, scoring, standardizer
        self._algorithm, self._weights = algorithm, weights
        self.seconds = 0.0

    @cached_property
    def raw(self) -> Tensor:
        """Rewards as they were given, float32 [N, M]. The standardizer learns them here."""
        began = time.perf_counter()
        raw = self._scoring.result()[1].to(self._trajectory.values.device)
        self.seconds = time.perf_counter() - began
        self._standardizer.update(raw)
        return raw

    @cached_property
    def rewards(self) -> Tensor:
        """Standardised, [N, M]."""
        return self._standardizer.standardize(self.raw)

    @cached_property
    def advantages(self) -> Tensor:
        """What the policy learns, of all rewards together and normalised: [N, T]."""
        algorithm, trained = self._algorithm, self._trajectory.trained_steps
        advantages, _ = gae(self.rewards, self._trajectory.values, algorithm.gamma, algorithm.lam)
        return normalize(advantages[:, :trained], self._weights, algorithm.advantage_clip)

    @cached_property
    def returns(self) -> Tensor:
        """What the critic learns, [N, K, M]: without bootstrapping, since a critic taught by itself drifts."""
        return gae(self.rewards, self._trajectory.values, self._algorithm.gamma, lam=1.0)[1]

    @cached_property
    def explained_variance(self) -> Tensor:
        """Share of the returns' variance that the rollout's values foresaw, by step: [K]."""
        return explained_variance(self._trajectory.values, self.returns).mean(1)
