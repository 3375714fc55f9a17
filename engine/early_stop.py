"""Stops a run whose held-out reward has turned down, before much of what it gained is lost again.

An evaluation is *low* where the watched reward is below its best evaluation so far by more than `min_fall` standard
errors; after `patience` low evaluations in a row the run stops. All evaluations draw the same prompts from the same
noise, so the error is that of the paired differences, prompt by prompt: one and a half to four times smaller, in runs
of tiny-dit, than that of a difference of two means. The rule needs no gain: a reward that only falls is low against the
first evaluation.

What it can see depends on the number of prompts: a fall of a tenth of the gain is `min_fall` standard errors only where
the gain is ten times as many, so evaluate on enough prompts, and often. In the other direction, the best of many
evaluations owes something to luck: of simulated runs on a plateau, evaluated 30 times, one in six stops by the default
of 2.5 errors and patience 2, and one in two by 2 errors. Such a stop loses little, as the best model is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import EarlyStopConfig
from .errors import UserError
from .saved_evaluations import SavedEvaluation, paired_difference


@dataclass(frozen=True)
class Judged:
    """One evaluation against the best before it. Without one before it: a fall of 0."""

    iteration: int
    mean: float
    fall: float = 0.0  # of the mean below the best; negative where it is a new best
    error: float = 0.0  # standard error of the fall
    low: int = 0  # low evaluations in a row, this one included


class EarlyStop:
    """The rule over a run's evaluations. Every rank can hold one: it follows from the scores alone."""

    def __init__(self, options: EarlyStopConfig):
        self.options = options
        self.judged: list[Judged] = []
        self._best: tuple[Judged, np.ndarray] | None = None

    @classmethod
    def over(cls, options: EarlyStopConfig, evaluations: Sequence[SavedEvaluation]) -> "EarlyStop":
        """The rule after these evaluations, of a run that goes on or has ended; only those that know the reward count,
        which a run may begin to watch when it is resumed."""
        rule = cls(options)
        for evaluation in evaluations:
            if options.reward in evaluation.scores:
                rule.observe(evaluation.iteration, evaluation.scores[options.reward])
        return rule

    def observe(self, iteration: int, scores: np.ndarray) -> None:
        """The watched reward of one more evaluation, float [P] prompt by prompt, of the same prompts each time."""
        scores = np.asarray(scores, dtype=np.float64)
        mean = float(scores.mean())
        if self._best is None:
            judged = Judged(iteration, mean)
        elif len(scores) != len(self._best[1]):
            raise UserError(
                f"evaluation.early_stop: iteration {iteration} was evaluated on {len(scores)} prompts, earlier ones on "
                f"{len(self._best[1])}, which cannot be compared; set evaluation.num_prompts back, or "
                "evaluation.early_stop to null"
            )
        else:
            change, error = paired_difference(self._best[1], scores)
            is_low = -change > self.options.min_fall * error
            judged = Judged(iteration, mean, -change, error, self.judged[-1].low + 1 if is_low else 0)
        self.judged.append(judged)
        if self._best is None or mean > self._best[0].mean:
            self._best = judged, scores

    @property
    def best(self) -> Judged:
        """The best evaluation, the first of equals."""
        return self._best[0]

    @property
    def fired(self) -> bool:
        """Whether the run is to stop after the last evaluation."""
        return bool(self.judged) and self.judged[-1].low >= self.options.patience

    def describe(self, is_kept: bool) -> str:
        """The verdict in a line. is_kept: whether the folder of the run has the best model."""
        now, best, name = self.judged[-1], self.best, self.options.reward
        kept = f"best is iteration {best.iteration} ({name} {best.mean:.4f})" + ", kept in best/" * is_kept
        if not self.fired:
            return f"has not fired; {kept}"
        gain = best.mean - self.judged[0].mean
        lost = f", {now.fall / gain:.0%} of what it had gained" if gain > 0 else ""
        return (
            f"fired after iteration {now.iteration}: held-out {name} is {now.fall:.4f} +- {now.error:.4f} below its "
            f"best{lost}; {kept}"
        )
