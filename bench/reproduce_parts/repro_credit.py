"""Credit assignment of a trained run: how well its critic foresees rewards and how well any could, and how noisy the
policy's gradient is with its advantages and with those of other estimators, on the same trajectories."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from repro_credit_report import save_credit
from repro_foresight import between, foreseeable
from repro_gradients import GradientMoments, jackknife
from repro_machine import about
from repro_places import Mistake
from torch import Tensor
from tqdm import tqdm

from latent_critic.engine.advantages import explained_variance, gae, normalize
from latent_critic.engine.algorithms import Algorithm, build_algorithm
from latent_critic.engine.config import Config
from latent_critic.engine.critic_file import TrainedCritic, load_critic
from latent_critic.engine.errors import UserError
from latent_critic.engine.likelihood import likelihood
from latent_critic.engine.passes import Part
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import load_prompts
from latent_critic.engine.reward_stats import sum_of_rewards
from latent_critic.engine.rewards import build_rewards, score_all
from latent_critic.engine.rollout import Rollout, rows
from latent_critic.engine.saved_run import SavedRun
from latent_critic.engine.scoring import Scoring
from latent_critic.engine.sde_window import build_schedules
from latent_critic.engine.trajectory import Trajectory
from latent_critic.engine.world import resolve_dtype
from latent_critic.kernels.ppo import policy_loss

REFERENCE = "ddpo"  # whose gradient the others' noise is compared with
LAMBDA = 0.95
BLOCKS = 8  # of the jackknife


@dataclass(frozen=True)
class Size:
    """A chunk, whose gradient is one draw, holds whole groups: GRPO's samples depend on the others of their prompt."""

    prompts: int = 256
    group_size: int = 8
    groups_per_chunk: int = 4

    @property
    def samples(self) -> int:
        return self.prompts * self.group_size

    @property
    def chunk(self) -> int:
        return self.groups_per_chunk * self.group_size


def measure_credit(folder: Path, output: Path, size: Size = Size()) -> Path:  # noqa: B008
    """Writes credit.json, credit.md and credit.png to `output`; returns the page. Mistake where `folder` is no run with
    a critic on latents."""
    try:
        run = SavedRun(folder)
        config = run.config
        if not config.has_critic:
            raise UserError(f"{folder}: {config.algorithm.name} trains no critic; give a run of algorithm.name ppo")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backbone = run.backbone(resolve_dtype(config.model.dtype, device))
        backbone.to(device)
        critic = load_critic(folder / "critic.safetensors", backbone)
    except UserError as error:
        raise Mistake(str(error)) from None
    critic.model.to(device)
    credit = Credit(config, critic, size, device)
    content = {
        **about(),
        "run": str(folder),
        "seed": config.seed,
        "prompts": size.prompts,
        "group_size": size.group_size,
        "chunks": size.prompts // size.groups_per_chunk,
        "samples_per_chunk": size.chunk,
        **credit.values(),
        "foreseeable_per_step": credit.foreseeable(),
        "reference": REFERENCE,
        "estimators": credit.gradients(),
    }
    return save_credit(content, output)


class Advantages(NamedTuple):
    """[N, T], of variance 1; all but the raw reward have a mean of 0.

    slope: how many times their policy gradient has the gradient of the expected reward, in the critic's units. Whatever
    is subtracted from a reward before an action is drawn adds noise to a gradient but nothing to its mean. None where
    several rewards have no common unit.
    """

    numbers: Tensor
    slope: float | None


class Credit:
    """Trajectories of held-out prompts under the trained policy, a group of samples of each prompt, and their rewards.

    M values, K steps, of which T are trained; N samples, groups being neighbours.
    """

    def __init__(self, config: Config, critic: TrainedCritic, size: Size, device: torch.device):
        self.config, self.critic, self.size, self.model = config, critic, size, critic.model
        backbone = self.model.backbone
        encode = PromptCache(backbone, device)
        guided = backbone.needs_unconditional(config.rollout.guidance_scale)
        self.unconditional = encode([""]) if guided else None
        prompts = load_prompts(config.prompts.eval)
        drawn = [prompts[i % len(prompts)] for i in range(size.prompts) for _ in range(size.group_size)]
        self.rewards = build_rewards(config.rewards)
        scoring = Scoring(backbone, self.rewards)
        rollout = Rollout([self.model], encode, backbone.latent_shape, config.rollout.micro_batch_size, device)
        with tqdm(total=size.samples, desc="drawing", unit="sample") as progress:

            def finished(start: int, part: Trajectory) -> None:
                scoring.submit(start, part)
                progress.update(len(part.prompts))

            self.trajectory = rollout(
                drawn,
                torch.arange(size.samples),
                schedule=build_schedules(backbone, config.rollout)[0].to(device),
                seed=config.evaluation.seed,
                finished=finished,
            )
        self.raw = scoring.result()[1].to(device)
        self.earned = critic.standardize(self.raw)  # [N, M]

    def values(self) -> dict[str, Any]:
        """The critic's error by step, in variances of the reward, and how much of it is the prompt's."""
        values = self.trajectory.values
        returns = self.earned[:, None].expand_as(values)
        errors = (values - returns).double().square().mean(0) / returns.double().var(0, correction=0)
        return {
            "explained_variance_per_step": explained_variance(values, returns).mean(1).tolist(),
            "value_error_per_step": errors.mean(1).tolist(),
            # More than that no baseline of the prompt can take out of a gradient.
            "variance_between_prompts": between(self.earned.unflatten(0, (-1, self.size.group_size))),
        }

    def foreseeable(self) -> list[float]:
        """By step, from one trajectory of each prompt: what the best of critics would explain."""
        whole, every = self.trajectory, slice(None, None, self.size.group_size)
        drawn = replace(
            whole,
            **{name: getattr(whole, name)[every] for name in ("latents", "log_probs", "values", "sample_indices")},
            conditioning=rows(whole.conditioning, every),
            prompts=whole.prompts[every],
        )

        def score(latents: Tensor, batch: slice) -> Tensor:
            texts, metadata = zip(*((prompt.text, prompt.metadata) for prompt in drawn.prompts[batch]), strict=True)
            return score_all(self.rewards, self.model.backbone.decode(latents).cpu(), texts, metadata)

        options = self.config.rollout.micro_batch_size, self.size.group_size
        return foreseeable(self.model, drawn, self.unconditional, score, *options)

    def advantages(self) -> dict[str, "Advantages"]:
        """Of each estimator."""
        trained, weights = self.trajectory.trained_steps, self.critic.weights().to(self.earned.device)
        options, values, prompts = self.config.algorithm, self.trajectory.values, self.trajectory.prompts
        found = {}
        unbiased = gae(self.earned, values, options.gamma, 1.0)[0][:, trained]
        for lam in (1.0, LAMBDA):
            before = gae(self.earned, values, options.gamma, lam)[0][:, trained]
            after = normalize(sum_of_rewards(before, weights), weights.new_ones(1), options.advantage_clip)
            found[f"GAE, lambda {lam:g}"] = self._scaled(after, share(before, unbiased) / before.std(correction=0))
        for name, global_std in (("grpo", False), ("grpo, global std", True)):
            grpo = self._build("grpo", global_std=global_std).advantages(self.raw, values, trained, prompts)
            found[name] = self._scaled(grpo, within_groups(grpo[:, 0], self.earned[:, 0], self.size.group_size))
        ddpo = self._build("ddpo").advantages(self.raw, values, trained, prompts)
        whole = self.earned.std(correction=0).reciprocal()
        found["ddpo"] = self._scaled(ddpo, whole)
        given = torch.tensor([reward.weight for reward in self.config.rewards]).to(self.raw)
        raw = (self.raw / self.raw.std(0, correction=0)) @ given
        found["raw reward"] = self._scaled(raw[:, None].expand_as(ddpo), whole)
        return found

    def _scaled(self, advantages: Tensor, slope: Tensor) -> "Advantages":
        std = advantages.std(correction=0)
        return Advantages(advantages / std, (slope / std).item() if self.earned.shape[1] == 1 else None)

    def _build(self, name: str, **options: Any) -> Algorithm:
        options = {"name": name, "group_size": self.size.group_size, **options}
        algorithm = self.config.algorithm.model_copy(update=options)
        weights = torch.tensor([reward.weight for reward in self.config.rewards], device=self.raw.device)
        return build_algorithm(self.config.model_copy(update={"algorithm": algorithm}), weights)

    def gradients(self) -> dict[str, dict[str, float]]:
        """By estimator: variance and squared mean of a chunk's gradient of the policy loss at ratio 1."""
        parameters = [parameter.requires_grad_() for parameter in self.model.trunk.parameters()]
        advantages = self.advantages()
        chunks = self.size.prompts // self.size.groups_per_chunk
        blocks = min(BLOCKS, chunks // 2)
        moments = {name: GradientMoments(blocks) for name in advantages}
        for number in tqdm(range(chunks), "gradients", unit="chunk"):
            part = Part(
                slice(number * self.size.chunk, (number + 1) * self.size.chunk), self.trajectory.trained_steps, 1.0
            )
            log_probs = self._log_probs(part)
            for left, (name, mine) in zip(reversed(range(len(advantages))), advantages.items(), strict=True):
                loss, _ = policy_loss(
                    log_probs, log_probs.detach(), mine.numbers[part.samples], self.config.algorithm.clip_range
                )
                gradient = torch.autograd.grad(loss, parameters, retain_graph=left > 0, materialize_grads=True)
                vector = torch.cat([one.flatten().float() for one in gradient])
                moments[name].add(number % blocks, vector)
        return summarize(moments, {name: mine.slope for name, mine in advantages.items()}, blocks)

    def _log_probs(self, part: Part) -> Tensor:
        """[B, T], with a gradient to the policy."""
        trajectory, count = self.trajectory, part.steps.stop - part.steps.start
        latents = trajectory.latents[part.samples, part.steps]
        conditioning = rows(trajectory.conditioning, part.samples)
        conditioning = {name: tensor.repeat_interleave(count, 0) for name, tensor in conditioning.items()}
        timesteps = trajectory.timesteps[part.steps].repeat(len(latents))
        prediction, _ = self.model(latents.flatten(0, 1), timesteps, conditioning, self.unconditional)
        return likelihood(trajectory, part, prediction).log_probs


def share(advantages: Tensor, unbiased: Tensor) -> Tensor:
    """How much of the reward's gradient bootstrapped advantages have, by what a unit of them says of those that are not
    bootstrapped: all of it where the critic is right, and lambda's power where it knows nothing."""
    advantages, unbiased = (x - x.mean() for x in (advantages.double(), unbiased.double()))
    return advantages.square().sum() / (advantages * unbiased).sum()


def within_groups(advantages: Tensor, rewards: Tensor, size: int) -> Tensor:
    """Slope of advantages over rewards within groups of so many neighbours, less the share that a sample takes from
    itself as part of its group's mean."""
    advantages, rewards = (x.double().unflatten(0, (-1, size)) for x in (advantages, rewards))
    centred = rewards - rewards.mean(1, keepdim=True)
    return (advantages * centred).sum() / centred.square().sum() * (size - 1) / size


def summarize(
    moments: Mapping[str, GradientMoments], slopes: Mapping[str, float | None], blocks: int
) -> dict[str, dict[str, float | None]]:
    """Each estimator's numbers with their jackknife's standard errors; None for what cannot be told.

    variance, mean_squared: of a chunk's gradient. relative_variance: x the reference's. reward_variance: the same for
    gradients that are divided by their slopes, and so all estimate the gradient of the expected reward.
    """

    def ratio(name: str, without: int | None = None) -> float:
        return moments[name].spread(without).variance / moments[REFERENCE].spread(without).variance

    def error(numbers: Iterable[float]) -> float | None:
        return jackknife(list(numbers)) if blocks > 1 else None

    found = {}
    for name, mine in moments.items():
        spread, relative = mine.spread(), ratio(name)
        relative_error = error(ratio(name, block) for block in range(blocks))
        slope, other = slopes[name], slopes[REFERENCE]
        per_reward = None if slope is None or other is None else (other / slope) ** 2
        found[name] = {
            "variance": spread.variance,
            "mean_squared": spread.mean_squared,
            "mean_squared_error": error(mine.spread(block).mean_squared for block in range(blocks)),
            "relative_variance": relative,
            "relative_variance_error": relative_error,
            "reward_variance": None if per_reward is None else per_reward * relative,
            "reward_variance_error": None if None in (per_reward, relative_error) else per_reward * relative_error,
        }
    return found
