"""Optimizer steps on a rollout: PPO for policy and critic together, and critic-only passes.

A forward takes one rollout micro-batch at one denoising step, exactly as it was sampled: same samples, same shapes,
same kernels. So the first update of a fresh batch has ratio 1 to the last bit. With `training.steps_per_forward` it
takes several steps of these samples: fewer, larger passes, whose matrix products may round otherwise on a GPU (on a CPU
they do not: see engine/__init__.py).
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ..kernels.ppo import PPOClips, ppo_loss, value_loss
from ..kernels.transition import transition_log_prob
from .backbones.base import Conditioning
from .config import Config
from .cores import Cores
from .errors import TrainingError
from .outcome import Outcome
from .rollout import rows
from .sharding import World, gradient_norm, set_learning_rates
from .trajectory import Trajectory
from .trunk_clock import TrunkClock


class Span(NamedTuple):
    """Denoising steps that share a forward."""

    steps: slice
    weight: float  # of its mean over steps in the mean over all spans, so that each step counts the same

    @property
    def name(self) -> str:
        first, last = self.steps.start, self.steps.stop - 1
        return f"step {first}" if first == last else f"steps {first} to {last}"


def spans_of(count: int, at_once: int) -> list[Span]:
    """Steps 0 .. count - 1 in as few spans as may be, of nearly one length."""
    parts = -(-count // at_once)
    cuts = [count * i // parts for i in range(parts + 1)]
    return [Span(slice(a, b), (b - a) * parts / count) for a, b in pairwise(cuts)]


class Updater:
    def __init__(self, engine: DeepSpeedEngine, config: Config, world: World, clock: TrunkClock):
        self.engine, self.config, self.world, self.clock = engine, config, world, clock
        self.cores = Cores(world.cores)
        self.size, algorithm = config.rollout.micro_batch_size, config.algorithm
        self.clips = PPOClips(algorithm.clip_range, algorithm.value_clip_range, algorithm.target_clip)
        # A pass without the trunk's gradient keeps one block's activations, a training pass every block's (or with
        # checkpointing their inputs): so many steps of a sample at once need no more memory.
        depth = engine.module.backbone.depth
        self.critic_steps = max(1, depth // 8) if config.model.gradient_checkpointing else depth
        self.critic_steps = max(self.critic_steps, config.training.steps_per_forward)

    def ppo(
        self,
        trajectory: Trajectory,
        outcome: Outcome,
        unconditional: Conditioning | None,
        order: torch.Generator,
        lr_scale: float = 1.0,
    ) -> dict[str, float]:
        """`updates_per_iteration` steps on policy and critic, each on its own share of the samples.

        One loss and one backward per micro-batch: under ZeRO-3 a forward takes no second one. The first forward runs
        before the outcome is asked for. Returns the means of the update's statistics over the iteration.
        """
        optimizer, log = self.config.optimizer, defaultdict(list)
        set_learning_rates(self.engine, lr_scale * optimizer.policy_lr, lr_scale * optimizer.critic_lr)
        batches = self._batches(trajectory, order)
        share = len(batches) // self.config.training.updates_per_iteration
        spans = spans_of(trajectory.trained_steps, self.config.training.steps_per_forward)
        for start in range(0, len(batches), share):
            work = [(batch, span) for batch in batches[start : start + share] for span in spans]
            inputs = trajectory, outcome, unconditional
            terms = [self._pass(self._policy_terms, *inputs, work, number) for number in range(len(work))]
            self._step(torch.stack(terms), [span.name for _, span in work], log)
        names = ("policy_loss", "value_loss", "ratio_mean", "approx_kl", "old_approx_kl", "clipfrac")
        table = torch.stack(log["terms"])  # [updates, micro-batches, statistics]
        means = _mean_over_ranks(table.mean((0, 1)))
        deviation = _max_over_ranks(table[..., -1].amax(1))
        return {
            **dict(zip(names, means.tolist(), strict=False)),
            "first_ratio": table[0, :, 2].mean().item(),
            "first_clipfrac": table[0, :, 5].mean().item(),
            "first_ratio_deviation": deviation[0].item(),
            "ratio_max_deviation": deviation.max().item(),
            "grad_norm/actor": sum(log["actor"]) / len(log["actor"]),
            "grad_norm/critic": sum(log["critic"]) / len(log["critic"]),
        }

    def critic(
        self,
        trajectory: Trajectory,
        outcome: Outcome,
        unconditional: Conditioning | None,
        order: torch.Generator,
        epochs: int,
        lr_scale: float = 1.0,
    ) -> dict[str, float]:
        """Passes over the samples that train the critic alone, on every step; the policy stays bit-identical.

        Used for value pretraining, and after each PPO update so that the critic follows the policy.
        Several steps of a sample share a forward: there is no ratio here that another batch shape could disturb.
        """
        spans, log = spans_of(trajectory.values.shape[1], self.critic_steps), defaultdict(list)
        set_learning_rates(self.engine, 0.0, lr_scale * self.config.optimizer.critic_lr)
        for _ in range(epochs):
            batches = self._batches(trajectory, order)
            share = len(batches) // self.config.training.updates_per_iteration
            for start in range(0, len(batches), share):
                work = [(batch, span) for batch in batches[start : start + share] for span in spans]
                inputs = trajectory, outcome, unconditional
                terms = [self._pass(self._critic_terms, *inputs, work, number) for number in range(len(work))]
                self._step(torch.stack(terms), [span.name for _, span in work], log)
        losses = _mean_over_ranks(torch.stack(log["terms"]).mean((0, 1)))
        return {"value_loss": losses[1].item(), "grad_norm/critic": sum(log["critic"]) / len(log["critic"])}

    def _batches(self, trajectory: Trajectory, order: torch.Generator) -> list[slice]:
        count = len(trajectory.latents) // self.size
        shuffled = torch.randperm(count, generator=order).tolist()
        return [slice(i * self.size, (i + 1) * self.size) for i in shuffled]

    def _pass(
        self,
        terms: Callable,
        trajectory: Trajectory,
        outcome: Outcome,
        unconditional: Conditioning | None,
        work: list[tuple[slice, Span]],
        number: int,
    ) -> Tensor:
        """Forward and backward of one piece of an optimizer step, and the statistics that `terms` takes of it."""
        batch, span = work[number]
        with self.cores.one_pass((terms.__name__, span.steps.stop - span.steps.start)):
            self.engine.set_gradient_accumulation_boundary(number == len(work) - 1)
            prediction, values = self._forward(trajectory, batch, span.steps, unconditional)
            loss, found = terms(trajectory, outcome, batch, span, prediction, values)
            self.clock.watch_backward(prediction)
            self.engine.backward(loss / len(work))
            self.clock.backward_done()
        return found

    def _forward(self, trajectory, batch: slice, steps: slice, unconditional) -> tuple[Tensor, Tensor]:
        """Prediction [B n, C, H, W] and values [B, n, M] of n steps of B samples."""
        z, count = trajectory.latents[batch, steps], steps.stop - steps.start
        conditioning = rows(trajectory.conditioning, batch)
        conditioning = {name: tensor.repeat_interleave(count, 0) for name, tensor in conditioning.items()}
        timesteps = trajectory.timesteps[steps].repeat(len(z))
        prediction, values = self.engine(z.flatten(0, 1), timesteps, conditioning, unconditional)
        return prediction, values.unflatten(0, (-1, count))

    def _policy_terms(self, trajectory, outcome, batch: slice, span: Span, prediction, values) -> tuple[Tensor, Tensor]:
        """Loss of policy and critic, and the statistics of `ppo`: its losses, then the policy's."""
        loss, statistics = ppo_loss(
            _log_probs(trajectory, batch, span.steps, prediction),
            trajectory.log_probs[batch, span.steps],
            outcome.advantages[batch, span.steps],
            values,
            outcome.returns[batch, span.steps],
            trajectory.values[batch, span.steps],
            self.clips,
            self.config.critic.value_coef,
        )
        *means, deviation = [statistics.policy_loss, statistics.value_loss, *statistics.policy]
        return span.weight * loss, torch.stack([*(span.weight * mean for mean in means), deviation])

    def _critic_terms(
        self, trajectory, outcome, batch: slice, span: Span, _prediction, values
    ) -> tuple[Tensor, Tensor]:
        """The critic's loss alone, and the same first two statistics."""
        returns, values_old = outcome.returns[batch, span.steps], trajectory.values[batch, span.steps]
        loss, _ = value_loss(values, returns, values_old, self.clips.value_clip_range, self.clips.target_clip)
        loss = span.weight * loss
        return loss, torch.stack([torch.zeros_like(loss), loss.detach()])

    def _step(self, terms: Tensor, places: list[str], log: dict) -> None:
        """One optimizer step, unless a loss of its micro-batches is not finite. terms: [micro-batches, statistics]."""
        bad = (~torch.isfinite(terms[:, :2])).nonzero()
        if len(bad):
            number, term = bad[0].tolist()
            raise TrainingError(
                f"the {('policy', 'value')[term]} loss is not finite at denoising {places[number]}; this update was "
                "not applied. Lower optimizer.policy_lr and optimizer.critic_lr, or algorithm.clip_range, and go "
                "on from the last checkpoint with --resume auto"
            )
        module = self.engine.module
        if any(p.requires_grad for p in module.trunk.parameters()):
            log["actor"].append(gradient_norm(module.trunk, self.world))
        log["critic"].append(gradient_norm(module.critic, self.world))
        log["terms"].append(terms)
        self.engine.step()


def _log_probs(trajectory: Trajectory, batch: slice, steps: slice, prediction: Tensor) -> Tensor:
    """[B, n] of n steps of B samples, whose predictions are [B n, ...]."""
    latents, table = trajectory.latents[batch], trajectory.table
    predictions = prediction.unflatten(0, (len(latents), -1))
    numbers = range(steps.start, steps.stop)
    log_probs = [
        transition_log_prob(predictions[:, i], latents[:, k], latents[:, k + 1], table, k)
        for i, k in enumerate(numbers)
    ]
    return torch.stack(log_probs, 1)


def _mean_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _max_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
