"""Rewards: what training maximises. `build_rewards` makes scorers from a config, `score_all` runs and checks them.

`protocol` says what a reward is. It is scored in this process (`local`), in processes of its own (`pool`) or behind
HTTP (`remote`, which asks `serve`). `checks` looks at every score, `guards` at iterations of them.
"""

from .checks import join, judge, score_all
from .guards import ConstantGuard
from .local import BUILT_IN
from .protocol import ANY_VALUE, Reward, RewardConfig, RewardError, Scores
from .registry import build_rewards, check_prompts

__all__ = [
    "ANY_VALUE",
    "BUILT_IN",
    "ConstantGuard",
    "Reward",
    "RewardConfig",
    "RewardError",
    "Scores",
    "build_rewards",
    "check_prompts",
    "join",
    "judge",
    "score_all",
]
