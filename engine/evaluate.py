"""Held-out evaluation: the same prompts, seeds and sampler each time."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import monitors, reports
from .algorithms import Algorithm
from .backbones.base import Backbone
from .config import Config
from .embedded.scenes import parse
from .errors import UserError
from .prompts import Prompt
from .rewards import Reward
from .rollout import Rollout
from .saved_evaluations import strictly_right
from .scoring import Scoring
from .transitions import Schedule
from .world import World

THUMBNAIL = 192  # pixels, at most, of a picture in an evaluation's sheet and in the run's report


@dataclass
class Evaluation:
    """Results over all ranks, on the CPU. P prompts, R watched rewards, K steps, M heads of the critic, if there is
    one: else values and returns are None."""

    prompts: list[Prompt]
    names: list[str]
    scores: Tensor  # [P, R] of deterministic (ODE) samples
    images: Tensor  # uint8 [S, H, W, 3]: the first S samples, for the grids
    values: Tensor | None = None  # [P, K, M] along stochastic rollouts on the same prompts
    returns: Tensor | None = None  # [P, K, M], what those rollouts earned, standardised
    monitors: dict[str, float] = field(default_factory=dict)  # of all P samples, by name

    @property
    def explained_variance(self) -> Tensor:
        """float64 [K, M] on held-out prompts, as `advantages.explained_variance`, but of this process alone."""
        returns, residuals = self.returns.double(), self.returns.double() - self.values
        variance, left = ((x - x.mean(0)).square().mean(0) for x in (returns, residuals))
        return torch.where(variance > 0, 1.0 - left / torch.where(variance > 0, variance, 1.0), 0.0)

    def row(self) -> dict:
        """Flat metrics: mean and standard error of each reward, the first one's mean by task, the monitors, explained
        variance."""
        count, row = len(self.prompts), {}
        for column, name in enumerate(self.names):
            scores = self.scores[:, column].double()
            row[f"eval/{name}"] = scores.mean().item()
            row[f"eval/{name}_stderr"] = (scores.std() / count**0.5).item()
        tasks = [_task(prompt) for prompt in self.prompts]
        strict = self.names.index("composition_strict") if "composition_strict" in self.names else 0
        for task in sorted(set(filter(None, tasks))):
            row[f"eval/task/{task}"] = self.scores[[t == task for t in tasks], strict].mean().item()
        row |= {f"eval/monitor/{name}": value for name, value in self.monitors.items()}
        if self.values is not None:
            per_step = self.explained_variance.mean(1)
            row["eval/explained_variance"] = per_step.mean().item()
            row["eval/explained_variance_per_step"] = per_step.tolist()
        return row

    def of(self, reward: str) -> Tensor:
        """Its scores, [P]."""
        return self.scores[:, self.names.index(reward)]

    def save(self, path: Path, settings: dict) -> None:
        """`path`.json: every prompt's scores, and the settings that repeat them; `path`.npz: the first pictures, large
        ones as thumbnails too, and what the critic foresaw; `path`.png: these pictures as a sheet.

        The JSON comes last and whole, so that where it is, everything is.
        """
        scores = {name: self.of(name).tolist() for name in self.names}
        texts, shown = [prompt.text for prompt in self.prompts], len(self.images)
        path.parent.mkdir(exist_ok=True)
        small, arrays = monitors.shrink(self.images, THUMBNAIL), {"images": self.images}
        if small is not self.images:
            arrays["thumbnails"] = small
        if self.values is not None:
            arrays |= {"values": self.values.mean(2), "rewards": self.returns[:, -1].mean(1)}
        np.savez(path, **arrays)
        reports.save_grid(small, texts[:shown], path.with_suffix(".png"), marks=strictly_right(scores, shown))
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"settings": settings, "prompts": texts, "scores": scores}) + "\n")
        partial.replace(path.with_suffix(".json"))


class Evaluator:
    """Evaluates on the first `evaluation.num_prompts` held-out prompts (cycled where there are fewer; seeds differ)."""

    GRID = 32  # samples kept for the grids

    def __init__(
        self,
        config: Config,
        world: World,
        backbone: Backbone,
        prompts: list[Prompt],
        trained: list[Reward],
        watched: list[Reward],
        algorithm: Algorithm,
        schedule: Schedule,
    ):
        """trained, watched: rewards. algorithm: knows the critic's units. schedule: of training, for the critic."""
        self.config, self.world, self.backbone = config, world, backbone
        self.prompts = [prompts[i % len(prompts)] for i in range(config.evaluation.num_prompts)]
        self.trained = trained
        names = {reward.name for reward in trained}
        self.rewards = trained + [reward for reward in watched if reward.name not in names]
        self.algorithm, self.schedule = algorithm, schedule
        ode = backbone.schedule("ode", 0.0, config.evaluation.num_inference_steps)
        self.ode = ode.to(world.device)

    def __call__(self, rollout: Rollout) -> Evaluation:
        options, count = self.config.evaluation, self.config.evaluation.num_prompts
        images, scores, _ = self._sample(rollout, self.ode, options.guidance_scale, self.rewards)
        images, scores, measured = self._gather(images[: self.GRID], scores, monitors.measure(images))
        found = Evaluation(
            self.prompts,
            [reward.name for reward in self.rewards],
            scores[:count],
            images[: min(self.GRID, count)],
            monitors=monitors.monitor(measured[:count]),
        )
        if self.config.has_critic:
            guidance = self.config.rollout.guidance_scale
            _, raw, values = self._sample(rollout, self.schedule, guidance, self.trained)
            raw, found.values = (x[:count] for x in self._gather(raw, values))
            found.returns = self.algorithm.earned(raw)[:, None].expand_as(found.values)
        return found

    def _sample(self, rollout: Rollout, schedule: Schedule, guidance: float, rewards: list[Reward]):
        """Images, scores and values of this rank's prompts, on the CPU. Ranks have consecutive parts of all prompts;
        the last ones are filled up with prompts from the start."""
        world = self.world
        padded = -(-len(self.prompts) // world.size)  # every rank takes as many, since ZeRO-3 gathers together
        indices = torch.arange(world.rank * padded, (world.rank + 1) * padded)
        mine = [self.prompts[i % len(self.prompts)] for i in indices.tolist()]
        scoring = Scoring(self.backbone, rewards)
        trajectory = rollout(
            mine,
            indices,
            schedule=schedule,
            seed=self.config.evaluation.seed,
            guidance_scale=guidance,
            finished=scoring.submit,
        )
        return *scoring.result(), trajectory.values.cpu()

    def _gather(self, *mine: Tensor) -> list[Tensor]:
        """Every rank's, one after the other, on every rank."""
        gathered: list = [None] * self.world.size
        dist.all_gather_object(gathered, mine)
        return [torch.cat(parts) for parts in zip(*gathered, strict=True)]


def _task(prompt: Prompt) -> str | None:
    """The embedded world's task; None for prompts of other worlds."""
    try:
        return parse(prompt.text).task
    except UserError:
        return prompt.metadata.get("tag")
