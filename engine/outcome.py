"""What a rollout's pictures earned, and what policy and critic are to learn from it."""

import time
from collections.abc import Callable
from threading import RLock
from typing import TypeVar

from torch import Tensor

from .advantages import explained_variance
from .algorithms import Algorithm
from .scoring import Scoring
from .trajectory import Trajectory

T = TypeVar("T")


def _once(compute: Callable[["Outcome"], T]) -> T:
    """A cached property that several threads may ask for: one computes it and the others wait."""

    def get(self: "Outcome") -> T:
        with self._turn:
            if compute not in self._found:
                self._found[compute] = compute(self)
            return self._found[compute]

    return property(get, doc=compute.__doc__)


class Outcome:
    """N samples, K steps of which T are trained, M rewards.

    Everything here waits, the first time it is asked for, until the last pictures are scored (`seconds` tells how
    long), and every rank must ask at the same point. An update asks after its first forward, which needs none of it:
    so the trunk computes meanwhile.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        scoring: Scoring,
        algorithm: Algorithm,
    ):
        self._trajectory, self._scoring, self._algorithm = trajectory, scoring, algorithm
        self.seconds = 0.0
        self._turn, self._found = RLock(), {}

    @_once
    def raw(self) -> Tensor:
        """Rewards as they were given, float32 [N, M]. The algorithm observes them here."""
        began = time.perf_counter()
        raw = self._scoring.result()[1].to(self._trajectory.values.device)
        self.seconds = time.perf_counter() - began
        self._algorithm.observe(raw, self._trajectory.prompts)
        return raw

    @_once
    def advantages(self) -> Tensor:
        """What the policy learns, of all rewards together and normalised: [N, T]."""
        it = self._trajectory
        return self._algorithm.advantages(self.raw, it.values, it.trained_steps, it.prompts)

    @_once
    def returns(self) -> Tensor:
        """What the critic learns, [N, K, heads]."""
        return self._algorithm.returns(self.raw, self._trajectory.values, self._trajectory.trained_steps)

    @_once
    def explained_variance(self) -> Tensor:
        """Share of the rewards' variance that the rollout's values foresaw, by step: [K]."""
        values = self._trajectory.values
        return explained_variance(values, self._algorithm.earned(self.raw)[:, None].expand_as(values)).mean(1)
