"""Optimizer steps on a rollout: the clipped loss of the policy, together with the critic's, and critic-only passes.

A forward takes one rollout micro-batch at one denoising step, exactly as it was sampled: same samples, same shapes,
same kernels. So the first update of a fresh batch has ratio 1 to the last bit. With `training.steps_per_forward` it
takes several steps of these samples: fewer, larger passes, whose matrix products may round otherwise on a GPU (on a CPU
they do not: see engine/__init__.py).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from ..kernels.ppo import PPOClips, policy_loss, ppo_loss, value_loss
from .backbones.base import Conditioning
from .config import Config
from .ema import WeightAverage
from .errors import TrainingError
from .likelihood import likelihood, normalize_ratios
from .outcome import Outcome
from .passes import Forward, Part, Pass, Passes
from .rollout import LEAST, rows
from .sharding import gradient_norm, set_learning_rates
from .trajectory import Trajectory
from .world import World


def split(whole: slice, count: int) -> list[slice]:
    """In as many slices of nearly one length."""
    length = whole.stop - whole.start
    cuts = [whole.start + length * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def parts_of(batches: Sequence[slice], steps: slice, steps_per_forward: int, at_once: int) -> list[Part]:
    """Each of these steps of every sample of some micro-batches, in parts that each have a forward.

    Micro-batches are split where that lets `at_once` passes side by side end together.
    """
    spans = split(steps, math.ceil((steps.stop - steps.start) / steps_per_forward))
    smaller = at_once // math.gcd(at_once, len(batches) * len(spans))
    most = max(1, (batches[0].stop - batches[0].start) // LEAST)
    samples = [part for batch in batches for part in split(batch, min(smaller, most))]
    pairs = [(part, span) for part in samples for span in spans]
    sizes = [(part.stop - part.start) * (span.stop - span.start) for part, span in pairs]
    return [Part(*pair, size / sum(sizes)) for pair, size in zip(pairs, sizes, strict=True)]


class Updater:
    def __init__(
        self,
        engine: DeepSpeedEngine,
        passes: Passes,
        config: Config,
        world: World,
        average: WeightAverage | None = None,
    ):
        """average: of the policy's weights, to be kept up to date."""
        self.engine, self.passes, self.config, self.world = engine, passes, config, world
        self.average = average
        self.size, algorithm = config.rollout.micro_batch_size, config.algorithm
        self.clips = PPOClips(algorithm.clip_range, algorithm.value_clip_range, algorithm.target_clip)
        self.critic_steps = config.critic_steps_per_forward(engine.module.backbone.depth)

    def policy(
        self,
        trajectory: Trajectory,
        outcome: Outcome,
        unconditional: Conditioning | None,
        order: torch.Generator,
        lr_scale: float = 1.0,
        warm_up: float = 1.0,
    ) -> dict[str, float]:
        """`updates_per_iteration` steps on policy and, if there is one, critic, each on its own share of the samples.

        One loss and one backward per micro-batch: under ZeRO-3 a forward takes no second one. The first forward runs
        before the outcome is asked for. lr_scale: of both learning rates; warm_up: of the policy's. Returns the
        means of the update's statistics over the iteration.
        """
        optimizer, log = self.config.optimizer, defaultdict(list)
        rates = warm_up * lr_scale * optimizer.policy_lr, lr_scale * optimizer.critic_lr
        set_learning_rates(self.engine, *rates)
        forward = partial(self._policy_pass, trajectory, outcome, unconditional)
        for batches in self._batches(trajectory, order):
            parts = self._parts(batches, trajectory.trained_steps, self.config.training.steps_per_forward)
            self._step(parts, forward, log)
            if self.average:
                self.average.update()
        names = ("policy_loss", "value_loss", "ratio_mean", "approx_kl", "old_approx_kl", "clipfrac", "reference_kl")
        sums = torch.stack([terms.sum(0) for terms in log["terms"]])  # [updates, statistics]
        means = _mean_over_ranks(sums.mean(0))
        deviation = _max_over_ranks(torch.stack([terms[:, len(names)].amax() for terms in log["terms"]]))
        drift = _mean_over_ranks(sums[0, len(names) + 1 :])
        there = {"value_loss": self.config.has_critic, "reference_kl": self.config.algorithm.kl_coef > 0}
        norms = {f"grad_norm/{part}": sum(log[part]) / len(log[part]) for part in ("actor", "critic") if log[part]}
        return {
            **{name: mean for name, mean in zip(names, means.tolist(), strict=False) if there.get(name, True)},
            "first_ratio": sums[0, 2].item(),
            "first_clipfrac": sums[0, 5].item(),
            "first_ratio_deviation": deviation[0].item(),
            "ratio_max_deviation": deviation.max().item(),
            "first_log_prob_drift_per_step": drift.tolist(),
            **norms,
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

        Used for value pretraining, and after each PPO update so that the critic follows the policy. On the features
        that the rollout kept, if it did: then the trunk has nothing to do.
        Several steps of a sample share a forward: there is no ratio here that another batch shape could disturb.
        """
        log = defaultdict(list)
        set_learning_rates(self.engine, 0.0, lr_scale * self.config.optimizer.critic_lr)
        for _ in range(epochs):
            for batches in self._batches(trajectory, order):
                parts = self._parts(batches, slice(0, trajectory.values.shape[1]), self.critic_steps)
                seed = int(torch.randint(2**40, (), generator=order)) if self.config.critic.feature_dropout else 0
                self._step(parts, partial(self._critic_pass, trajectory, outcome, unconditional, seed), log)
        losses = _mean_over_ranks(torch.stack([terms.sum(0) for terms in log["terms"]]).mean(0))
        return {"value_loss": losses[1].item(), "grad_norm/critic": sum(log["critic"]) / len(log["critic"])}

    def _batches(self, trajectory: Trajectory, order: torch.Generator) -> list[list[slice]]:
        """The rollout's micro-batches in a new order, as many for each optimizer step."""
        count = len(trajectory.latents) // self.size
        shuffled = [slice(i * self.size, (i + 1) * self.size) for i in torch.randperm(count, generator=order).tolist()]
        share = count // self.config.training.updates_per_iteration
        return [shuffled[start : start + share] for start in range(0, count, share)]

    def _parts(self, batches: Sequence[slice], steps: slice, steps_per_forward: int) -> list[Part]:
        return parts_of(batches, steps, steps_per_forward, self.passes.at_once)

    def _step(self, parts: Sequence[Part], forward: Forward, log: dict[str, list]) -> None:
        """One optimizer step, unless a loss of its parts is not finite.

        Appends to the log: gradient norms, and terms [parts, statistics].
        """
        terms = torch.stack(self.passes.run(parts, forward))
        bad = (~torch.isfinite(terms[:, :2])).nonzero()
        if len(bad):
            number, term = bad[0].tolist()
            raise TrainingError(
                f"the {('policy', 'value')[term]} loss is not finite at denoising {_name(parts[number].steps)}; this "
                "update was not applied. Lower optimizer.policy_lr and optimizer.critic_lr, or algorithm.clip_range, "
                "and go on from the last checkpoint with --resume auto"
            )
        model = self.engine.module
        for name, parameters in (("actor", model.policy_parameters), ("critic", model.critic_parameters)):
            if parameters:
                log[name].append(gradient_norm(parameters, self.world))
        log["terms"].append(terms)
        self.engine.step()

    def _policy_pass(
        self, trajectory: Trajectory, outcome: Outcome, unconditional, model: nn.Module, part: Part
    ) -> Pass:
        """Loss of policy and critic, and the statistics of `policy`: its losses, then the policy's, and for each
        trained step its share of the mean |log-prob - the rollout's|."""
        options, where = self.config.algorithm, (part.samples, part.steps)
        inputs = _inputs(trajectory, part, unconditional)
        reference = model.reference_prediction(*inputs) if options.kl_coef else None
        prediction, values = model(*inputs)
        log_probs, kl = likelihood(trajectory, part, prediction, reference)
        old_log_probs, first = trajectory.log_probs[where], trajectory.trained_steps.start
        trained = slice(part.steps.start - first, part.steps.stop - first)
        advantages, zero = outcome.advantages[part.samples, trained], torch.zeros((), device=old_log_probs.device)
        compared = log_probs
        if options.ratio_normalization:
            compared = normalize_ratios(trajectory, part, prediction, log_probs)
        if self.config.has_critic:
            values = values.unflatten(0, log_probs.shape)
            loss, statistics = ppo_loss(
                compared,
                old_log_probs,
                advantages,
                values,
                outcome.returns[where],
                trajectory.values[where],
                self.clips,
                self.config.critic.value_coef,
            )
            losses, policy = [statistics.policy_loss, statistics.value_loss], statistics.policy
        else:
            loss, policy = policy_loss(compared, old_log_probs, advantages, options.clip_range)
            losses = [loss.detach(), zero]
        reference_kl = zero
        if kl is not None:
            loss, reference_kl = loss + options.kl_coef * kl.mean(), kl.detach().mean()
        *means, deviation = policy
        terms = torch.stack([*(part.weight * mean for mean in (*losses, *means, reference_kl)), deviation])
        steps = outcome.advantages.shape[1]
        drift = torch.zeros(steps, device=terms.device)
        apart = (log_probs.detach() - old_log_probs).abs().mean(0)
        drift[trained] = apart * (part.weight * steps / (trained.stop - trained.start))
        return Pass(prediction, part.weight * loss, torch.cat([terms, drift]))

    def _critic_pass(
        self, trajectory: Trajectory, outcome: Outcome, unconditional, seed: int, model: nn.Module, part: Part
    ) -> Pass:
        """The critic's loss alone, and the same first two statistics. seed: of what is dropped of the features."""
        features = self._features(trajectory, part, seed)
        inputs = _inputs(trajectory, part, unconditional)
        prediction, values = model(*inputs, values_only=True, features=features)
        where = part.samples, part.steps
        returns, values_old = outcome.returns[where], trajectory.values[where]
        values = values.view_as(returns)
        loss, _ = value_loss(values, returns, values_old, self.clips.value_clip_range, self.clips.target_clip)
        loss = part.weight * loss
        return Pass(prediction, loss, torch.stack([torch.zeros_like(loss), loss]).detach())

    def _features(self, trajectory: Trajectory, part: Part, seed: int) -> list[Tensor]:
        """What the rollout kept of each tap for this part, [B n, N, D], some of it dropped."""
        device, dropped = self.world.device, self.config.critic.feature_dropout
        # Sample by sample, which lie together: to a GPU, what must be put together first is not copied past the host.
        taps = [
            torch.cat([sample[part.steps].to(device, non_blocking=True) for sample in tap[part.samples]])
            for tap in trajectory.features
        ]
        if not dropped:
            return taps
        # Not torch's dropout: passes side by side would share its generator.
        generator = torch.Generator(device).manual_seed(seed + (part.samples.start << 20) + part.steps.start)
        return [drop(tap, dropped, generator) for tap in taps]


def drop(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """x with this share of its numbers, in 256ths, set to 0, and the others scaled so that its mean stays.

    Eight numbers share a draw of 64 bits: on a CPU a third of the time of torch's dropout.
    """
    kept = round(256 * (1 - share))
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    draws.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return x * (draws.view(torch.uint8)[: x.numel()].view(x.shape) < kept) * (256 / kept)


def _inputs(trajectory: Trajectory, part: Part, unconditional: Conditioning | None) -> tuple:
    """What the model takes for n steps of B samples: B n rows, the steps of a sample one after another."""
    z, count = trajectory.latents[part.samples, part.steps], part.steps.stop - part.steps.start
    conditioning = rows(trajectory.conditioning, part.samples)
    conditioning = {name: tensor.repeat_interleave(count, 0) for name, tensor in conditioning.items()}
    return z.flatten(0, 1), trajectory.timesteps[part.steps].repeat(len(z)), conditioning, unconditional


def _name(steps: slice) -> str:
    first, last = steps.start, steps.stop - 1
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _mean_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _max_over_ranks(x: Tensor) -> Tensor:
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x
