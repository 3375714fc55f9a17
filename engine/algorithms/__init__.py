"""Advantage estimators over the same rollouts, losses and updates: `algorithm.name` chooses one."""

from torch import Tensor

from ..config import Config
from .base import Algorithm
from .ddpo import DDPO
from .grpo import GRPO
from .ppo import PPO

__all__ = ["Algorithm", "build_algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {"ppo": PPO, "grpo": GRPO, "ddpo": DDPO}


def build_algorithm(config: Config, weights: Tensor) -> Algorithm:
    """weights: of the rewards, [M]."""
    return ALGORITHMS[config.algorithm.name](config, weights)
