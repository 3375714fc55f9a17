"""Rewards that say nothing: one score for every picture, iteration after iteration, as of a server that is broken."""

from collections.abc import Sequence

from .notice import notice
from .protocol import Reward, RewardError


class ConstantGuard:
    """Counts, for each reward, the iterations in a row whose pictures all got one score.

    It warns one iteration before `stop_if_constant` and stops at it. What it has counted is not kept in checkpoints:
    a run that goes on has that many iterations again to show that the reward was repaired.
    """

    def __init__(self, rewards: Sequence[Reward]):
        self._rewards = rewards
        self._in_a_row = [0] * len(rewards)

    def observe(self, lows: Sequence[float], highs: Sequence[float], pictures: int) -> None:
        """An iteration's lowest and highest score by each reward, over all ranks. RewardError at the limit."""
        for m, reward in enumerate(self._rewards):
            is_constant = lows[m] == highs[m] and pictures > 1
            self._in_a_row[m] = self._in_a_row[m] + 1 if is_constant else 0
            count, limit = self._in_a_row[m], reward.stop_if_constant
            if limit is None or count < limit - 1 or not count:
                continue
            what = (
                f"reward {reward.name!r} gave one score to all {pictures} pictures (now {lows[m]:g}) for {count} "
                f"iteration{'s' if count > 1 else ''} in a row"
            )
            if count >= limit:
                raise RewardError(
                    f"{what}: there is nothing to learn from it. Look whether it works; if such scores are right, set "
                    "rewards[].stop_if_constant to null, and go on with --resume auto"
                )
            notice(f"{what}; at {limit} the run stops")
