"""Several samples of a prompt, of which the critic tells early which to go on with.

A new method is one class of `Particles`. P prompts, N particles of each, K steps; a potential is what a particle is
judged by, in standard deviations of the reward.
"""

from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError

By = Literal["value", "reward"]


class Particles:
    """N samples of a prompt, of which the best is kept in the end.

    by: judged on the way by the critic ("value"), or by the rewards of the picture that a step predicts ("reward":
    decoded and scored each time). keep: what the one that is kept is chosen by, the same if None; "reward" with
    by="value" decodes and scores finished pictures alone. Raises UserError for by="reward" with keep="value".

    `begin` makes buffers that stay where they are, and `select` computes on the device alone, so that steps that are
    judged by value can be captured in a CUDA graph.
    """

    resamples = False  # whether `select` is asked

    def __init__(self, count: int, by: By = "value", keep: By | None = None):
        if count < 1:
            raise UserError(f"particles: {count} of a prompt; give 1 or more")
        if (by, keep) == ("reward", "value"):
            raise UserError("particles: judged by reward on the way they are kept by reward; leave keep out")
        self.count, self.by, self.keep = count, by, keep or by

    def check(self, steps: int) -> None:
        """Raises UserError unless the method fits so many steps."""

    def begin(self, prompts: int, noisy: Tensor, device: torch.device) -> None:
        """Before the first rollout of so many prompts at a time. noisy: bool [K] on the CPU, which steps add noise."""

    def reset(self, uniforms: Tensor) -> None:
        """Before each rollout. uniforms: float64 [K, P] in 0..1, of the prompts' own noise."""

    def judges(self, step: int) -> bool:
        """Whether particles may be moved at this step, or left behind after it."""
        return False

    def select(self, step: Tensor, potential: Tensor) -> Tensor:
        """Who takes the places of a prompt's particles before they take a step: int64 [P, N] in 0..N-1; here everyone
        their own.

        step: 0-d int64; potential: [P, N], of the latents that the step starts from.
        """
        return torch.arange(self.count, device=potential.device).expand_as(potential)

    def survivors(self, step: int) -> int:
        """Particles of a prompt that go on after a step, those of the highest potential in it."""
        return self.count


class BestOfN(Particles):
    """The best of N. prune: {step: particles that go on after it}, so that the worse are not finished."""

    def __init__(self, count: int, by: By = "value", prune: dict[int, int] | None = None, *, keep: By | None = None):
        super().__init__(count, by, keep)
        self.prune = dict(sorted((prune or {}).items()))
        left = count
        for step, kept in self.prune.items():
            if step < 0 or not 1 <= kept <= left:
                raise UserError(f"prune: {kept} particles after step {step}; give 1 to {left}, the number before it")
            left = kept

    def check(self, steps: int) -> None:
        if self.prune and max(self.prune) >= steps - 1:
            raise UserError(
                f"prune: after step {max(self.prune)}; steps are 0 to {steps - 1}, and after the last all end"
            )

    def judges(self, step: int) -> bool:
        return step in self.prune

    def survivors(self, step: int) -> int:
        return min([self.count, *(kept for after, kept in self.prune.items() if after <= step)])


class SMC(Particles):
    """Sequential Monte Carlo of p(z) exp(scale V(z)) (Feynman-Kac; arXiv 2501.06848 with a reward in place of V).

    A particle's weight is exp(scale (V now - V at the last resampling)). Systematic resampling where the effective
    sample size 1 / sum w^2 falls below `threshold` N, or at every `every`-th step whatever it is; never where no noise
    is to come, for copies of a particle would stay alike: weights are kept for the choice in the end.

    scale: None is 10 by reward, 3 by value, which is less sure.
    Buffers: base [P, N], the potentials at the last resampling; uniforms [K, P].
    """

    resamples = True

    def __init__(
        self,
        count: int,
        scale: float | None = None,
        every: int | None = None,
        threshold: float = 0.5,
        by: By = "value",
        keep: By | None = None,
    ):
        super().__init__(count, by, keep)
        if every is not None and every < 1:
            raise UserError(f"SMC: resampling at every {every} steps; give 1 or more")
        if not 0 < threshold <= 1:
            raise UserError(f"SMC: threshold {threshold:g}; give a share of the particles, above 0 and at most 1")
        default = 10.0 if by == "reward" else 3.0
        self.scale, self.every, self.threshold = default if scale is None else scale, every, threshold

    def begin(self, prompts: int, noisy: Tensor, device: torch.device) -> None:
        self.last = int(noisy.nonzero().max())  # that copies can part in
        self.base = torch.zeros(prompts, self.count, dtype=torch.float64, device=device)
        self.uniforms = torch.zeros(len(noisy), prompts, dtype=torch.float64, device=device)

    def reset(self, uniforms: Tensor) -> None:
        self.base.zero_()
        self.uniforms.copy_(uniforms)

    def judges(self, step: int) -> bool:
        return step <= self.last and (self.every is None or (step > 0 and step % self.every == 0))

    def select(self, step: Tensor, potential: Tensor) -> Tensor:
        potential = potential.double()
        weights = (self.scale * (potential - self.base)).softmax(1)
        uniform = self.uniforms.index_select(0, step[None])[0]
        chosen = systematic(weights, uniform)
        if self.every is None:
            is_due = effective_sample_size(weights) < self.threshold * self.count
        else:
            is_due = ((step > 0) & (step % self.every == 0)).expand(len(weights))
        is_due = is_due & (step <= self.last)
        chosen = torch.where(is_due[:, None], chosen, super().select(step, potential))
        self.base.copy_(torch.where(is_due[:, None], potential.gather(1, chosen), self.base))
        return chosen


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / sum w^2 of normalised weights [P, N]: N where they are equal, 1 where one has all."""
    return 1.0 / weights.square().sum(1)


def systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [P, N]: each particle as often as N times its weight, rounded up or down so that the mean is exact.

    weights: [P, N], sums of 1; uniform: [P] in 0..1 (Kitagawa 1996).
    """
    count = weights.shape[1]
    positions = (torch.arange(count, device=weights.device) + uniform[:, None]) / count
    return torch.searchsorted(weights.cumsum(1), positions, right=True).clamp_max(count - 1)
