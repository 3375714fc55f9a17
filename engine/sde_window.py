"""Which steps are stochastic and trained, where they are a window that moves (MixGRPO, arXiv 2507.21802)."""

import torch

from .backbones.base import Backbone
from .config import RolloutConfig
from .errors import UserError
from .transitions import Schedule


def build_schedules(backbone: Backbone, config: RolloutConfig) -> list[Schedule]:
    """One for each place of the window, the noisiest first; a single one where there is no window.

    UserError where the sampler has fewer stochastic steps than the window.
    """
    steps = config.num_inference_steps
    whole = backbone.schedule(config.transition, config.noise_level, steps, config.num_trained_steps)
    if config.sde_window is None:
        return [whole]
    size = config.sde_window.size
    stochastic = int((whole.table[:, 2] > 0).sum())  # cps has no noise in its last step, whatever is trained
    if size > stochastic:
        raise UserError(
            f"rollout.sde_window.size = {size}: at most {stochastic}, the stochastic steps of {config.transition}"
        )
    ode, number = backbone.schedule("ode", 0.0, steps).table, torch.arange(steps)[:, None]
    return [
        Schedule(torch.where((number >= start) & (number < start + size), whole.table, ode), whole.timesteps)
        for start in range(stochastic - size + 1)
    ]


def place(config: RolloutConfig, iteration: int, places: int) -> int:
    """Of the window in an iteration, among so many."""
    return iteration // config.sde_window.every % places if config.sde_window else 0
