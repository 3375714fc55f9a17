"""Guidance by the critic: predictions that move latents to where the critic expects more."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Samples from p(z) exp(scale V(z)) in place of p(z), as classifier guidance does with log p(y | z)
    (arXiv 2105.05233): the score gains scale grad V, and a prediction what `Backbone.per_score` makes of it. Of a flow

        v <- v - scale sigma / (1 - sigma) grad V          (arXiv 2605.27736; the ODE moves z by -v D)

    and of a diffusion model's noise, eps <- eps - scale sqrt(1 - ab) grad V.

    scale: V is in standard deviations of the reward; below 0 it steers away. start, end: of the steps that are steered,
    end excluded and None for all. normalize: grad V of each sample to a root mean square of 1, whatever its size.
    """

    scale: float
    start: int = 0
    end: int | None = None
    normalize: bool = False

    def check(self, steps: int) -> None:
        """Raises UserError unless the window is in so many steps."""
        end = steps if self.end is None else self.end
        if not 0 <= self.start < end <= steps:
            raise UserError(
                f"guidance from step {self.start} to {end}: there are steps 0 to {steps - 1}; give a start below an "
                f"end of at most {steps}"
            )

    def is_on(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)

    def __call__(self, prediction: Tensor, gradient: Tensor, per_score: Tensor) -> Tensor:
        """prediction, gradient of V by the latents: [B, C, H, W]; per_score: [], of the step."""
        if self.normalize:
            dims = tuple(range(1, gradient.ndim))
            gradient = gradient / gradient.square().mean(dims, keepdim=True).sqrt().clamp_min(1e-12)
        return prediction + self.scale * per_score * gradient
