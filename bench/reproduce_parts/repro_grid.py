"""What is run: the variants of the paper's comparisons and ablations (arXiv 2605.27736), in the order they are run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from repro_recipe import WATCHED, base, changed, difference, iterations_at_equal_compute

SEEDS = (0, 1, 2)
TUNING_SEEDS = (100, 101)  # none of the grid's; one alone moves by as much as rates differ
LONG_TUNING_SEED = 102
TUNING_RATE = 1.5e-4
ALGORITHMS = ("ours", "grpo", "ddpo")


class Rate(NamedTuple):
    """Of a policy's learning, as it is tuned."""

    factor: float  # times TUNING_RATE
    warm_up: int = 0  # iterations

    @property
    def name(self) -> str:
        return f"{self.factor:g}" + (f"-warm-{self.warm_up}" if self.warm_up else "")

    @property
    def words(self) -> str:
        return f"{self.factor * TUNING_RATE:.3g}" + (f", warm-up of {self.warm_up}" if self.warm_up else "")

    @property
    def overrides(self) -> dict[str, Any]:
        return {
            "optimizer.policy_lr": self.factor * TUNING_RATE,
            "algorithm.clip_range": 0.01,
            "optimizer.lr_warmup_iterations": self.warm_up,
        }


TUNING_RATES = (Rate(0.5), Rate(1), Rate(2), Rate(1, 10), Rate(2, 10))
# The best two of each algorithm over 40 iterations, to choose from over 100. For `ours` Rate(2) is not one of them: its
# mean is the best by 0.003, but with a third seed the reward fell from 0.74 to 0.61 in ten iterations.
LONG_TUNING_RATES = {
    "ours": (Rate(1, 10), Rate(2, 10)),
    "grpo": (Rate(1, 10), Rate(2, 10)),
    "ddpo": (Rate(1), Rate(1, 10)),
}
# Chosen by the `tuning` group: for each algorithm the rate and warm-up of the highest training reward, over two seeds
# or, of long runs, one; but for what is said above. The UNet's are its recipe's.
TUNED = {
    "tiny-dit": {"ours": Rate(1, 10), "grpo": Rate(2, 10), "ddpo": Rate(1)},
    "tiny-dit, long": dict.fromkeys(ALGORITHMS, Rate(1, 10)),
    "tiny-unet": dict.fromkeys(ALGORITHMS, Rate(1, 10)),
}


@dataclass(frozen=True)
class Variant:
    """One setting, run with several seeds. overrides: of the base recipe, by dotted key."""

    name: str
    group: str
    about: str
    overrides: dict[str, Any] = field(hash=False)
    model: str = "tiny-dit"
    seeds: tuple[int, ...] | None = None  # None: those that are asked for

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, but for seed and output folder."""
        config = changed(base(self.model), self.overrides)
        del config["seed"], config["output_dir"]
        return config

    @property
    def own_overrides(self) -> dict[str, Any]:
        """What the variant's configuration says otherwise than its base recipe."""
        recipe = base(self.model)
        del recipe["seed"], recipe["output_dir"]
        return {key: now for key, (_, now) in difference(recipe, self.config).items()}


@dataclass(frozen=True)
class Run:
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.seed}"


@dataclass(frozen=True)
class Scale:
    """How long runs are: a PPO run and one of another algorithm draw equally many images."""

    pretraining: int  # critic-only iterations of every run with a critic, but for those that compare just these
    iterations: int  # of PPO
    long_iterations: int  # of PPO where algorithms are compared: a critic needs them to know something
    unet_iterations: int
    compared_pretraining: tuple[int, ...]
    best_pretraining: int  # of these, by the paper
    compared_total: int  # pretraining and PPO iterations of these runs together
    added_pretraining: tuple[int, ...]  # of runs that have `compared_total` iterations of PPO beside it
    evaluation: dict[str, Any] = field(hash=False, default_factory=dict)


# Twice the recipe's held-out pictures: algorithms differ by little more than the error of 512.
FULL = Scale(4, 36, 96, 40, (0, 5, 15, 30), 15, 60, (15,), {"evaluation.every": 20, "evaluation.num_prompts": 1024})
# At most 20 minutes on two cores: evaluations are only before and after the run.
QUICK = Scale(2, 6, 6, 6, (0, 3), 3, 8, (), {"evaluation.every": 0, "evaluation.num_prompts": 256})
QUICK_GROUPS, QUICK_SEEDS = ("algorithms", "pretraining"), (0, 1)

GROUPS = {
    "algorithms": "ours against the critic-free algorithms, at equal images",
    "compute": "the critic-free algorithms for as many forwards of the trunk as `ours-long`",
    "group-std": "what it is worth to GRPO that it divides by a group's std",
    "pixels": "a critic on the predicted picture; the ablations below are compared with this `ours` too",
    "grpo-options": "what the field adds to GRPO",
    "pretraining": "critic-only iterations before PPO, of equally many iterations in all or beside as many of PPO",
    "critic": "the critic's timestep, taps, trunk and training, and bootstrapping from it",
    "rewards": "three rewards at once, with a value head for each or one for their sum",
    "cfg": "training with classifier-free guidance, evaluated at the trained guidance",
    "cfg-long": "the same where runs are long",
    "clip": "the clip of the probability ratio",
    "steps": "trained denoising steps",
    "transition": "other stochastic samplers",
    "unet": "the algorithms on tiny-unet",
    "tuning": "policy learning rates of each algorithm, with seeds of their own; not part of the default grid",
}
DEFAULT_GROUPS = tuple(group for group in GROUPS if group != "tuning")
# What the other variants of a group are compared with in its table.
REFERENCES = {group: "ours" for group in DEFAULT_GROUPS} | {
    "algorithms": "ours-long",
    "compute": "ours-long",
    "group-std": "grpo-long",
    "cfg-long": "ours-long",
    "grpo-options": "grpo",
    "pretraining": "pretraining-0",
    "unet": "unet-ours",
}


def variants(scale: Scale = FULL) -> list[Variant]:
    """All of them, group by group."""
    length = {
        "training.value_pretraining_iterations": scale.pretraining,
        "training.iterations": scale.iterations,
    }
    of_scale = length | scale.evaluation
    ours = of_scale | TUNED["tiny-dit"]["ours"].overrides
    grpo = _without_critic("grpo", of_scale, "tiny-dit")
    ddpo = _without_critic("ddpo", of_scale, "tiny-dit")
    unet = of_scale | {"training.iterations": scale.unet_iterations}
    unet_ours = unet | TUNED["tiny-unet"]["ours"].overrides
    three = {"rewards": [{"name": name} for name in ("composition", *WATCHED[1:])]}
    long = {"training.iterations": scale.long_iterations}
    ours_long = of_scale | TUNED["tiny-dit, long"]["ours"].overrides | long
    grpo_long, ddpo_long = (_without_critic(name, of_scale | long, "tiny-dit, long") for name in ("grpo", "ddpo"))
    return [
        Variant("ours-long", "algorithms", "PPO with the latent critic", ours_long),
        Variant("grpo-long", "algorithms", "GRPO in groups of 8, as many images", grpo_long),
        Variant("ddpo-long", "algorithms", "DDPO with the batch's statistics, as many images", ddpo_long),
        Variant("grpo-long-clock", "compute", "GRPO, as many forwards of the trunk", _longer(grpo_long, ours_long)),
        Variant("ddpo-long-clock", "compute", "DDPO, as many forwards of the trunk", _longer(ddpo_long, ours_long)),
        Variant(
            "grpo-long-global-std",
            "group-std",
            "GRPO with the std of all samples in place of a group's",
            grpo_long | {"algorithm.global_std": True},
        ),
        Variant("ours", "pixels", "PPO with the latent critic", ours),
        Variant("ddpo", "pixels", "DDPO: no critic, as many images", ddpo),
        Variant(
            "pixel",
            "pixels",
            "PPO with a critic on the predicted picture, in as many passes over kept pictures",
            ours | {"critic.trunk": "pixels", "critic.feature_dropout": 0.0},
        ),
        Variant("grpo", "grpo-options", "GRPO in groups of 8", grpo),
        Variant("grpo-kl", "grpo-options", "GRPO with a KL penalty", grpo | {"algorithm.kl_coef": 0.01}),
        Variant(
            "grpo-guard",
            "grpo-options",
            "GRPO with GRPO-Guard's ratios",
            grpo | {"algorithm.ratio_normalization": True},
        ),
        Variant(
            "grpo-window",
            "grpo-options",
            "GRPO with MixGRPO's moving window of 2 of the 4 steps",
            grpo | {"rollout.sde_window": {"size": 2, "every": 4}},
        ),
        *(
            Variant(
                f"pretraining-{count}",
                "pretraining",
                f"{count} critic-only iterations of {scale.compared_total}",
                ours | _pretrained(count, scale.compared_total - count),
            )
            for count in scale.compared_pretraining
        ),
        *(
            Variant(
                f"pretraining-{count}-added",
                "pretraining",
                f"{count} critic-only iterations beside {scale.compared_total} of PPO",
                ours | _pretrained(count, scale.compared_total),
            )
            for count in scale.added_pretraining
        ),
        Variant("no-adaln", "critic", "no timestep in the critic's head", ours | {"critic.timestep_adaln": False}),
        Variant("taps-last", "critic", "the last block's features alone", ours | {"critic.taps": [4]}),
        Variant("taps-all", "critic", "the features of all five blocks", ours | {"critic.taps": [0, 1, 2, 3, 4]}),
        Variant("trunk-shared", "critic", "the value loss trains the trunk too", ours | _trunk("shared")),
        Variant("trunk-separate", "critic", "a trunk of the critic's own", ours | _trunk("separate")),
        Variant(
            "earned-targets", "critic", "what was earned as the critic's target", ours | {"algorithm.value_lam": 1.0}
        ),
        Variant("no-dropout", "critic", "all features in critic-only passes", ours | {"critic.feature_dropout": 0.0}),
        Variant(
            "little-decay",
            "critic",
            "the policy's weight decay for the critic",
            ours | {"optimizer.critic_weight_decay": None},
        ),
        Variant("one-epoch", "critic", "one critic-only pass an iteration", ours | {"training.critic_epochs": 1}),
        Variant("lam-0.95", "critic", "GAE's lambda 0.95 in place of 1", ours | {"algorithm.lam": 0.95}),
        Variant("joint", "rewards", "three rewards, a value head each", ours | three),
        Variant(
            "joint-sum", "rewards", "three rewards, one head for their sum", ours | three | {"critic.heads": "sum"}
        ),
        *(
            Variant(
                f"guidance-{guidance:g}",
                "cfg",
                f"guidance {guidance:g} in training and evaluation",
                ours | _guided(guidance),
            )
            for guidance in (2.0, 4.5)
        ),
        Variant("guidance-2-long", "cfg-long", "guidance 2 in training and evaluation", ours_long | _guided(2.0)),
        *(  # ratios leave 1 by 0.0015 at most: a clip of 0.002, 0.01 or more is one and the same run
            Variant(f"clip-{clip:g}", "clip", f"a clip range of {clip:g}", ours | {"algorithm.clip_range": clip})
            for clip in (1e-4, 1e-5)
        ),
        Variant("steps-2", "steps", "2 trained steps of 8", ours | {"rollout.num_trained_steps": 2}),
        Variant("steps-7", "steps", "7 trained steps of 8", ours | {"rollout.num_trained_steps": 7}),
        Variant(
            "dance-sde",
            "transition",
            "DanceGRPO's SDE with noise 0.3",
            ours | {"rollout.transition": "dance-sde", "rollout.noise_level": 0.3},
        ),
        Variant(
            "cps",
            "transition",
            "coefficient-preserving sampling with noise 0.8",
            ours | {"rollout.transition": "cps", "rollout.noise_level": 0.8},
        ),
        Variant("unet-ours", "unet", "PPO with the latent critic", unet_ours, "tiny-unet"),
        *(
            Variant(
                f"unet-{name}",
                "unet",
                f"{name.upper()}, as many images",
                _without_critic(name, unet, "tiny-unet"),
                "tiny-unet",
            )
            for name in ("grpo", "ddpo")
        ),
        *_tuning(length, "", dict.fromkeys(ALGORITHMS, TUNING_RATES), TUNING_SEEDS),
        *_tuning(length | long | {"evaluation.every": 0}, "-long", LONG_TUNING_RATES, (LONG_TUNING_SEED,)),
    ]


def _pretrained(count: int, iterations: int) -> dict[str, Any]:
    return {"training.value_pretraining_iterations": count, "training.iterations": iterations}


def _guided(scale: float) -> dict[str, Any]:
    return {"rollout.guidance_scale": scale, "evaluation.guidance_scale": scale}


def _trunk(kind: str) -> dict[str, Any]:
    """One that the value loss trains: critic-only passes run it whole, so there is one, and drop nothing of its
    features."""
    passes = {"training.value_pretraining_epochs": 2, "training.critic_epochs": 1}
    return {"critic.trunk": kind, "critic.feature_dropout": 0.0, **passes}


def _without_critic(name: str, of_scale: dict[str, Any], model: str) -> dict[str, Any]:
    """As many images: what a critic would be pretrained with is trained on."""
    images = of_scale["training.value_pretraining_iterations"] + of_scale["training.iterations"]
    length = {"training.value_pretraining_iterations": 0, "training.iterations": images}
    return of_scale | length | {"algorithm.name": name} | TUNED[model][name].overrides


def _longer(overrides: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    recipe = base("tiny-dit")
    iterations = iterations_at_equal_compute(changed(recipe, ours), changed(recipe, overrides))
    return overrides | {"training.iterations": iterations}


def _tuning(
    length: dict[str, Any], end: str, rates: dict[str, Sequence[Rate]], seeds: tuple[int, ...]
) -> Iterable[Variant]:
    """Whatever TUNED says: it is what is chosen here."""
    for name in ALGORITHMS:
        overrides = length if name == "ours" else _without_critic(name, length, "tiny-dit")
        for rate in rates[name]:
            about = f"{name} at a rate of {rate.words}"
            yield Variant(f"tuning-{name}-{rate.name}{end}", "tuning", about, overrides | rate.overrides, seeds=seeds)


def runs(chosen: Sequence[Variant], seeds: Sequence[int]) -> list[Run]:
    """Seed by seed, and within a seed in the order of the variants: a part of the grid compares something already."""
    every = [*seeds, *(seed for variant in chosen for seed in variant.seeds or () if seed not in seeds)]
    return [
        Run(variant, seed)
        for seed in dict.fromkeys(every)
        for variant in chosen
        if seed in (seeds if variant.seeds is None else variant.seeds)
    ]
