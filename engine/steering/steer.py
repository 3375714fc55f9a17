"""Sampling that the critic steers: `steer(pipe, critic, prompts, ...)`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from ..backbones import Backbone, Conditioning, backbone_of
from ..config import RewardConfig, Transition
from ..critic_file import TrainedCritic, load_critic, prompt_length
from ..errors import UserError
from ..noise import keyed_noise
from ..prompt_cache import PromptCache
from ..prompts import Prompt
from ..rewards import Reward, build_rewards, score_all
from ..scoring import BATCH
from ..transitions import Schedule
from .guidance import Guidance
from .loop import SteeredLoop
from .particles import BestOfN, Particles


@dataclass
class Cost:
    """What steering took, in samples: forwards and backwards of the trunk, decoded and scored pictures."""

    forwards: int = 0
    backwards: int = 0
    decoded: int = 0
    scored: int = 0
    seconds: float = 0.0  # without reading prompts

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Steered:
    """P prompts, N particles of each as the last step had them, M values."""

    images: Tensor  # uint8 [P, H, W, 3]: of each prompt the chosen one
    latents: Tensor  # float32 [P, C, H, W], its
    potentials: Tensor  # float32 [P, N], what the particles were chosen by
    chosen: Tensor  # int64 [P], which
    values: Tensor  # float32 [P, K, M] of the place that ended up chosen, as the steps found it
    ancestors: Tensor | None = None  # of resampling: int64 [K, P, N], whose place a particle was in before a step
    cost: Cost = field(default_factory=Cost)


class Steerer:
    """A pipeline and a critic, ready to draw prompts."""

    def __init__(
        self,
        backbone: Backbone,
        critic: TrainedCritic,
        device: torch.device,
        *,
        guidance: Guidance | None = None,
        particles: Particles | None = None,
        weights: dict[str, float] | None = None,
        rewards: Sequence[RewardConfig] | None = None,
        transition: Transition | str | None = None,
        noise_level: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 16,
        graph: str = "off",
    ):
        """What is None is as the critic was trained. weights: of its values, by name. rewards: what scores particles
        that are judged or kept by reward, in the critic's order. batch_size: samples in a forward.

        graph: "step" or "loop" replays captured CUDA graphs where nothing asks for a gradient or a reward.
        Raises UserError where a step or a number of particles is impossible.
        """
        self.backbone, self.critic, self.device = backbone, critic, device
        self.guidance, self.particles = guidance, particles or BestOfN(1)
        trained = critic.rollout
        as_trained = trained.transition, trained.noise_level, trained.num_inference_steps
        given = transition, noise_level, num_inference_steps
        sampler = tuple(own if one is None else one for one, own in zip(given, as_trained, strict=True))
        noisy_steps = trained.num_trained_steps if sampler == as_trained else None
        self.schedule = backbone.schedule(*sampler, noisy_steps).to(device)
        self.steps = len(self.schedule.timesteps)
        if guidance is not None:
            guidance.check(self.steps)
        self._noisy = (self.schedule.table[:, 2] > 0).cpu()
        if self.particles.resamples and not bool(self._noisy.any()):
            raise UserError('resampled particles would stay alike: with SMC use a stochastic transition, not "ode"')
        self.particles.check(self.steps)
        self.guidance_scale = trained.guidance_scale if guidance_scale is None else guidance_scale
        self.batch_size = max(batch_size, self.particles.count)
        self.graph = graph if device.type == "cuda" else "off"
        self.weights = critic.weights(weights).to(device)
        self.rewards: list[Reward] = []
        if self.particles.keep == "reward":
            self.rewards = build_rewards(critic.harmless_rewards() if rewards is None else rewards)
        dtype = next(backbone.trunk.parameters()).dtype
        backbone.to(device)
        critic.model.to(device, dtype)
        self.encode = PromptCache(backbone, device)
        self.unconditional = self.encode([""]) if backbone.needs_unconditional(self.guidance_scale) else None
        self._loops: dict[tuple, SteeredLoop] = {}
        self._size = 0  # prompts at a time, which loops and particles have buffers for
        self._prompts: list[Prompt] = []
        self._cost = Cost()

    def __call__(self, prompts: Sequence[Prompt], seed: int, progress: bool = False) -> Steered:
        """Noise is keyed by (seed, sample, step): the first particle of the p-th prompt is the p-th sample of an
        unsteered rollout of that seed, and a prompt's particles are the same whatever the batch size."""
        if not prompts:
            raise UserError("no prompt was given; give one or more")
        count = min(self.batch_size // self.particles.count, len(prompts))
        if count != self._size:
            self._release()
            self._size = count
            self.particles.begin(count, self._noisy, self.device)
        parts = []
        with tqdm(total=len(prompts), desc="drawing", disable=not progress or len(prompts) <= count) as bar:
            for start in range(0, len(prompts), count):
                parts.append(self._draw(prompts[start : start + count], start, len(prompts), seed))
                bar.update(len(parts[-1].images))
        first = parts[0]
        return Steered(
            *(torch.cat([getattr(part, name) for part in parts]) for name in _ROWS),
            ancestors=None if first.ancestors is None else torch.cat([part.ancestors for part in parts], 1),
            cost=sum((part.cost for part in parts), Cost()),
        )

    def close(self) -> None:
        """Gives back graphs, and takes the critic's taps out of the pipeline's trunk."""
        self._release()
        self.critic.model.untap()

    def _release(self) -> None:
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()

    @torch.no_grad()
    def _draw(self, prompts: Sequence[Prompt], start: int, total: int, seed: int) -> Steered:
        """Some prompts, all particles of each in one batch."""
        conditioning = self.encode([prompt.text for prompt in prompts])
        began, self._cost = time.perf_counter(), Cost()
        number, shape = self.particles.count, self.backbone.latent_shape
        self._real = len(prompts)
        self._prompts = [*prompts, *[prompts[-1]] * (self._size - self._real)]  # as loops fill up a short batch
        samples = (start + torch.arange(len(prompts)))[:, None] + total * torch.arange(number)
        uniforms = torch.zeros(self.steps, self._size, dtype=torch.float64)
        for k, row in enumerate(uniforms):
            row[: len(prompts)] = _uniforms(seed, samples[:, 0], k)
        z = keyed_noise(seed, samples.flatten(), 0, shape).to(self.device)
        samples = samples.to(self.device)
        values = torch.zeros(len(prompts), number, self.steps, len(self.critic.names), device=self.device)
        self.particles.reset(uniforms.to(self.device))
        ancestors = []
        for first, stop, count in self._segments():
            loop = self._loop(first, stop, count, conditioning)
            drawn = [keyed_noise(seed, samples.flatten().cpu(), k + 1, shape) for k in range(first, stop)]
            noises = torch.stack([z, *(noise.to(self.device) for noise in drawn)])
            latents, _, found = loop(noises, _repeat(conditioning, count))
            self._cost += Cost(forwards=noises.shape[1] * (stop - first), backwards=loop.backwards)
            values[:, :, first:stop] = found.unflatten(0, (-1, count))
            z, potentials = latents[:, -1], loop.potentials[-1, : len(z)].unflatten(0, (-1, count)).clone()
            ancestors.append(loop.ancestors[:, : len(prompts)].cpu())
            left = self.particles.survivors(stop - 1)
            if left < count and stop < self.steps:
                best = potentials.topk(left, dim=1).indices.sort(1).values  # of equals the earlier
                z = z.unflatten(0, (-1, count)).take_along_dim(best[..., None, None, None], 1).flatten(0, 1)
                samples, values = samples.gather(1, best), values.take_along_dim(best[..., None, None], 1)
        z = z.unflatten(0, (-1, potentials.shape[1]))
        pictures = None
        if self.particles.keep == "reward":
            pictures = self._decode(z.flatten(0, 1))
            potentials = self._score(pictures, prompts).to(self.device).unflatten(0, (len(prompts), -1))
            pictures = pictures.unflatten(0, (len(prompts), -1))
        chosen = potentials.argmax(1)
        rows = torch.arange(len(prompts), device=self.device)
        latents = z[rows, chosen]
        images = self._decode(latents) if pictures is None else pictures[rows.cpu(), chosen.cpu()]
        self._cost.seconds = time.perf_counter() - began
        found = [images.cpu(), latents.cpu(), potentials.float().cpu(), chosen.cpu(), values[rows, chosen].cpu()]
        return Steered(*found, torch.cat(ancestors) if self.particles.resamples else None, self._cost)

    def _segments(self) -> list[tuple[int, int, int]]:
        """(first step, stop, particles of a prompt): all steps, cut where particles are left behind."""
        found, first = [], 0
        for step in range(self.steps):
            count = self.particles.count if step == 0 else self.particles.survivors(step - 1)
            if step == self.steps - 1 or self.particles.survivors(step) != count:
                found.append((first, step + 1, count))
                first = step + 1
        return found

    def _loop(self, first: int, stop: int, count: int, conditioning: Conditioning) -> SteeredLoop:
        key = first, stop
        if key not in self._loops:
            cost = self._cost
            self._cost = Cost()  # a loop warms up with a step
            schedule = Schedule(*(rows[first:stop].contiguous() for rows in self.schedule))
            self._loops[key] = SteeredLoop(
                self.critic.model,
                schedule,
                self._size * count,
                _repeat(conditioning, count),
                self.unconditional,
                self.guidance_scale,
                weights=self.weights,
                guidance=self.guidance,
                particles=self.particles,
                count=count,
                first=first,
                judge=self._judge if self.particles.by == "reward" else None,
                graph=self.graph,
            )
            self._cost = cost
        return self._loops[key]

    def _judge(self, z: Tensor, v: Tensor, timestep: Tensor) -> Tensor:
        """Potentials [B] by the rewards of the pictures that predictions amount to."""
        clean = self.backbone.clean(z, v, timestep.expand(len(z)))
        found = self._score(self._decode(clean), self._prompts).to(z.device)
        added = len(z) - len(z) * self._real // self._size  # to fill up a short batch
        self._cost += Cost(decoded=-added, scored=-added)
        return found

    def _decode(self, latents: Tensor) -> Tensor:
        self._cost.decoded += len(latents)
        return torch.cat([self.backbone.decode(part).cpu() for part in latents.split(BATCH)])

    def _score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._cost.scored += len(images)
        prompts = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
        raw = score_all(self.rewards, images, [p.text for p in prompts], [p.metadata for p in prompts])
        return self.critic.standardize(raw) @ self.weights.cpu()


_ROWS = ("images", "latents", "potentials", "chosen", "values")


def steer(
    pipe: DiffusionPipeline,
    critic: str | Path,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    guidance: Guidance | None = None,
    particles: Particles | None = None,
    seed: int = 0,
    max_sequence_length: int | None = None,
    **options,
) -> Steered:
    """Draws prompts with a stock diffusers pipeline, steered by the critic of a `critic.safetensors`.

        pipe = StableDiffusion3Pipeline.from_pretrained("runs/zero3_dit/pipeline")
        steered = steer(pipe, "runs/zero3_dit/critic.safetensors", ["a red circle"], guidance=Guidance(4.0))

    guidance, particles: how; both at once steer every particle. prompts: texts, or with metadata for rewards. Other
    options are Steerer's: weights (of the critic's values, by name), rewards, transition, noise_level,
    num_inference_steps, guidance_scale, batch_size, graph; None is as the critic was trained, max_sequence_length too.
    The pipeline's weights are frozen, its own scheduler and settings stay as they are. Raises UserError for a critic of
    another model, a window outside of the steps, or a pipeline or scheduler that is not supported.
    """
    device = pipe.device
    if max_sequence_length is None:
        max_sequence_length = prompt_length(Path(critic))
    backbone = backbone_of(pipe, max_sequence_length)
    found = load_critic(Path(critic), backbone)
    prompts = [prompts] if isinstance(prompts, (str, Prompt)) else prompts
    steerer = Steerer(backbone, found, device, guidance=guidance, particles=particles, **options)
    try:
        return steerer([Prompt(one) if isinstance(one, str) else one for one in prompts], seed, True)
    finally:
        steerer.close()


def _repeat(conditioning: Conditioning, count: int) -> Conditioning:
    return {name: tensor.repeat_interleave(count, 0) for name, tensor in conditioning.items()}


def _uniforms(seed: int, samples: Tensor, step: int) -> Tensor:
    """float64 [P] in 0..1, keyed as noise is, and apart from it: the normal distribution function of a draw."""
    normal = keyed_noise(seed, samples, 2**32 + step, (1,))[:, 0]
    return torch.special.ndtr(normal.double()).clamp(0.0, 1.0 - 1e-12)
