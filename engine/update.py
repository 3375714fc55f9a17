"""Optimizer steps on a rollout: PPO for policy and critic together, and critic-only passes.

A micro-batch is one rollout micro-batch at one denoising step, exactly as it was sampled: same samples, same shapes,
same kernels. So the first update of a fresh batch has ratio 1 to the last bit.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from ..kernels.ppo import PPOClips, ppo_loss, value_loss
from ..kernels.transition import transition_log_prob
from .backbones.base import Conditioning
from .config import Config
from .errors import TrainingError
from .outcome import Outcome
from .rollout import rows
from .sharding import World, gradient_norm, set_learning_rates
from .trajectory import Trajectory
from .trunk_clock import TrunkClock


class Updater:
    def __init__(self, engine: DeepSpeedEngine, config: Config, world: World, clock: TrunkClock):
        self.engine, self.config, self.world, self.clock = engine, config, world, clock
        self.size, algorithm = config.rollout.micro_batch_size, config.algorithm
        self.clips = PPOClips(algorithm.clip_range, algorithm.value_clip_range, algorithm.target_clip)
        # A pass without the trunk's gradient keeps one block's activations, a training pass every block's (or with
        # checkpointing their inputs): so many steps of a sample at once need no more memory.
        depth = engine.module.backbone.depth
        self.steps_at_once = max(1, depth // 8) if config.model.gradient_checkpointing else depth

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
        for start in range(0, len(batches), share):
            work = [(batch, k) for batch in batches[start : start + share] for k in range(trajectory.trained_steps)]
            terms = []
            for number, (batch, k) in enumerate(work):
                steps, is_last = slice(k, k + 1), number == len(work) - 1
                prediction, values = self._forward(trajectory, batch, steps, unconditional, is_last)
                z, z_next = trajectory.latents[batch, k], trajectory.latents[batch, k + 1]
                log_prob = transition_log_prob(prediction, z, z_next, trajectory.table, k)
                loss, statistics = ppo_loss(
                    log_prob,
                    trajectory.log_probs[batch, k],
                    outcome.advantages[batch, k],
                    values,
                    outcome.returns[batch, steps],
                    trajectory.values[batch, steps],
                    self.clips,
                    self.config.critic.value_coef,
                )
                self._backward(loss / len(work), prediction)
                terms.append(torch.stack([statistics.policy_loss, statistics.value_loss, *statistics.policy]))
            self._step(torch.stack(terms), [f"step {k}" for _, k in work], log)
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
        count = trajectory.values.shape[1]
        parts = -(-count // self.steps_at_once)
        spans = [slice(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
        log = defaultdict(list)
        set_learning_rates(self.engine, 0.0, lr_scale * self.config.optimizer.critic_lr)
        for _ in range(epochs):
            batches = self._batches(trajectory, order)
            share = len(batches) // self.config.training.updates_per_iteration
            for start in range(0, len(batches), share):
                work = [(batch, steps) for batch in batches[start : start + share] for steps in spans]
                terms = []
                for number, (batch, steps) in enumerate(work):
                    prediction, values = self._forward(trajectory, batch, steps, unconditional, number == len(work) - 1)
                    returns, values_old = outcome.returns[batch, steps], trajectory.values[batch, steps]
                    critic, _ = value_loss(
                        values, returns, values_old, self.clips.value_clip_range, self.clips.target_clip
                    )
                    critic = critic * (steps.stop - steps.start) * parts / count  # each step weighs the same
                    self._backward(critic / len(work), prediction)
                    terms.append(torch.stack([torch.zeros_like(critic), critic.detach()]))
                self._step(torch.stack(terms), [f"steps {s.start} to {s.stop - 1}" for _, s in work], log)
        losses = _mean_over_ranks(torch.stack(log["terms"]).mean((0, 1)))
        return {"value_loss": losses[1].item(), "grad_norm/critic": sum(log["critic"]) / len(log["critic"])}

    def _batches(self, trajectory: Trajectory, order: torch.Generator) -> list[slice]:
        count = len(trajectory.latents) // self.size
        shuffled = torch.randperm(count, generator=order).tolist()
        return [slice(i * self.size, (i + 1) * self.size) for i in shuffled]

    def _forward(self, trajectory, batch: slice, steps: slice, unconditional, is_last: bool) -> tuple[Tensor, Tensor]:
        """Prediction [B n, C, H, W] and values [B, n, M] of n steps of B samples."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        z, count = trajectory.latents[batch, steps], steps.stop - steps.start
        conditioning = rows(trajectory.conditioning, batch)
        conditioning = {name: tensor.repeat_interleave(count, 0) for name, tensor in conditioning.items()}
        timesteps = trajectory.timesteps[steps].repeat(len(z))
        prediction, values = self.engine(z.flatten(0, 1), timesteps, conditioning, unconditional)
        return prediction, values.unflatten(0, (-1, count))

    def _backward(self, loss: Tensor, prediction: Tensor) -> None:
        self.clock.watch_backward(prediction)
        self.engine.backward(loss)
        self.clock.backward_done()

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


def _mean_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _max_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
