"""Denoising steps that the critic steers: the loop of rollouts, with other predictions, or other samples that go on."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backbones.base import Conditioning
from ..denoising import DenoisingLoop
from ..transitions import Schedule
from .guidance import Guidance
from .particles import Particles

Judge = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents, predictions, timestep [] -> potentials [B]


class SteeredLoop(DenoisingLoop):
    """Steps `first` to `first + K - 1` of a trajectory, the samples being N particles of each prompt, side by side.

    weights: [M], of the critic's values in a potential. judge: potentials by reward, where particles want them so. With
    guidance a step is a forward and a backward, for prediction, value and gradient; it runs from Python, as does one
    that is judged by reward.
    """

    def __init__(
        self,
        model,
        schedule: Schedule,
        size: int,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance_scale: float,
        *,
        weights: Tensor,
        guidance: Guidance | None,
        particles: Particles,
        count: int,
        first: int = 0,
        judge: Judge | None = None,
        graph: str = "off",
    ):
        """count: particles of a prompt in these steps."""
        self.weights, self.guidance, self.particles, self.judge = weights, guidance, particles, judge
        self.count, self.first, self._number, self._rows = count, first, first, size
        self.backwards = 0  # samples whose gradient was taken
        self.offset = torch.tensor(first, device=weights.device)
        self.per_score = model.backbone.per_score(schedule.timesteps)
        steps, stay = len(schedule.timesteps), torch.arange(count, device=weights.device)
        # Of those that take a step, and whose places they were in before it.
        self.potentials = torch.zeros(steps, size, device=weights.device)
        self.ancestors = stay.repeat(steps, size // count, 1)
        on_host = guidance is not None or particles.by == "reward"
        backbone = model.backbone
        super().__init__(
            model,
            schedule,
            backbone.latent_shape,
            size,
            conditioning,
            unconditional,
            guidance_scale,
            "off" if on_host else graph,
        )

    def __call__(self, noises: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        self._number, self.backwards, self._rows = self.first, 0, noises.shape[1]
        self.ancestors.copy_(torch.arange(self.count, device=self.ancestors.device).expand_as(self.ancestors))
        return super().__call__(noises, conditioning)

    def _step(self) -> None:
        super()._step()
        self._number += 1

    def _predict(self, z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        guidance = self.guidance
        if guidance is None or not guidance.is_on(self._number):
            return super()._predict(z, timestep)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            v, values = super()._predict(z, timestep)
            (gradient,) = torch.autograd.grad((values @ self.weights).sum(), z)
        self.backwards += self._rows  # less those that fill up a short batch
        per_score = self.per_score.index_select(0, self.step)[0]
        return guidance(v.detach(), gradient, per_score), values.detach()

    def _select(self, z: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        potential = values @ self.weights
        if self.judge is not None:
            if not self.particles.judges(self._number):
                return z, v
            potential = self.judge(z, v, self.timesteps.index_select(0, self.step)[0])
        if self.particles.resamples:
            chosen = self.particles.select(self.offset + self.step[0], potential.unflatten(0, (-1, self.count)))
            self.ancestors.index_copy_(0, self.step, chosen[None])
            places = (torch.arange(0, len(z), self.count, device=z.device)[:, None] + chosen).flatten()
            z, v, potential = z[places], v[places], potential[places]
        self.potentials.index_copy_(0, self.step, potential[None])
        return z, v
