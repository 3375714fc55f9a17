"""The paper's claims as numbers of runs, and the one rule that says whether they hold here."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from repro_grid import Scale
from scipy.stats import t as student

Results = Mapping[tuple[str, int], dict[str, Any]]  # by variant and seed
Number = Callable[[dict[str, Any]], float | None]  # of one result

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "does not hold here", "undecided", "not measured"
CONFIDENCE = 0.95
PIXEL_RATIO = 2.6  # the least of the paper's factors, 2.6 to 4.3
EQUAL_EXPLAINED_VARIANCE = 0.05  # a difference below which two critics count as equally good
EQUAL_BACKGROUND = 0.02  # a loss of background score below which a training counts as harmless

RULE = (
    "Each claim is one number for each seed, mostly a difference of two runs with that seed, which are evaluated on "
    "the same held-out prompts and noise. Its mean over the seeds has the interval mean +- t s / sqrt(n): s is the "
    "standard deviation over the n seeds, and t the 97.5 % quantile of Student's distribution with n - 1 degrees of "
    "freedom. That is two standard errors where the spread is known well; with three seeds, whose spread is hardly "
    "known, it is 4.3, and with two 12.7. **Holds**: the interval lies above the threshold (0 where none is named). "
    "**Does not hold here**: it lies below. **Undecided**: it has the threshold within it, or there is one seed. Of "
    "twenty claims without any effect one is expected to be decided by chance. Which prompts are held out is not part "
    "of the spread: the appendix has each evaluation's standard error over them."
)


def half_width(numbers: Sequence[float]) -> float:
    """Of the interval around their mean; infinite for one number."""
    count = len(numbers)
    if count < 2:
        return math.inf
    quantile = student.ppf(0.5 + CONFIDENCE / 2, count - 1)
    return float(quantile * np.std(numbers, ddof=1) / math.sqrt(count))


def decide(numbers: Sequence[float], threshold: float = 0.0) -> str:
    """The rule. The claim is that the number lies above the threshold."""
    if not numbers:
        return MISSING
    mean, width = float(np.mean(numbers)), half_width(numbers)
    if mean - width > threshold:
        return HOLDS
    return FAILS if mean + width < threshold else UNDECIDED


class Shown(NamedTuple):
    """A number of single runs that explains a claim's."""

    label: str
    variant: str
    number: Number


@dataclass(frozen=True)
class Claim:
    """says: the paper. number: what is measured, in words. measure: it, for the results of one seed by variant, None
    where one is missing."""

    says: str
    number: str
    measure: Callable[[Mapping[str, dict[str, Any]]], float | None]
    shown: Sequence[Shown] = ()
    threshold: float = 0.0
    form: str = ".3f"

    def numbers(self, results: Results) -> dict[int, float]:
        """By seed."""
        found = {}
        for seed in sorted({seed for _, seed in results}):
            number = self.measure({variant: result for (variant, s), result in results.items() if s == seed})
            if number is not None:
                found[seed] = number
        return found


# ---- numbers of one run ---------------------------------------------------------------------------------------------


def score(name: str, evaluation: int = -1) -> Number:
    """A held-out mean; the last evaluation's, or the one before the run (0)."""

    def number(result: dict[str, Any]) -> float | None:
        return result["evaluations"][evaluation]["scores"].get(name, {}).get("mean")

    return number


def explained_variance(result: dict[str, Any]) -> float | None:
    """Held-out, at the end, mean over steps."""
    steps = explained_variance_per_step(result)
    return None if steps is None else float(np.mean(steps))


def explained_variance_per_step(result: dict[str, Any]) -> list[float] | None:
    return result["evaluations"][-1]["explained_variance_per_step"] or None


def squared_error(result: dict[str, Any]) -> float | None:
    steps = result["evaluations"][-1]["squared_error_per_step"]
    return float(np.mean(steps)) if steps else None


def iteration_seconds(result: dict[str, Any]) -> float:
    return result["iteration_seconds"]


def training_reward(result: dict[str, Any]) -> float:
    """The mean of the first trained reward over the last quarter of the iterations, by which the learning rates were
    chosen."""
    rewards = next(iter(result["training"]["reward"].values()))
    return float(np.mean(rewards[-(len(rewards) // 4) :]))


# ---- the claims -----------------------------------------------------------------------------------------------------


def claims(scale: Scale) -> list[Claim]:
    composition, background = score("composition"), score("background")
    on, off = f"pretraining-{scale.best_pretraining}", "pretraining-0"
    better_than_none = "iterations of value pretraining are better than none"
    found = [
        _above(f"PPO with a latent critic is better than {other.upper()} on {model}, {budget}", composition, ours, name)
        for model, ours, budget, end in (
            ("tiny-dit", "ours-long", "at equal images", "-long"),
            ("tiny-dit", "ours-long", "at equal compute", "-long-clock"),
            ("tiny-unet", "unet-ours", "at equal images", ""),
        )
        for other in ("grpo", "ddpo")
        for name in [("unet-" if model == "tiny-unet" else "") + other + end]
    ]
    return [
        *found,
        _above(f"{scale.best_pretraining} {better_than_none}, at equal images", composition, on, off),
        *(
            _above(f"{count} {better_than_none}, before as many of PPO", composition, f"pretraining-{count}-added", off)
            for count in scale.added_pretraining
        ),
        _above("The timestep in the critic's head (AdaLN) makes the policy better", composition, "ours", "no-adaln"),
        _above(
            "The timestep in the critic's head (AdaLN) makes the critic better",
            explained_variance,
            "ours",
            "no-adaln",
            what="held-out explained variance",
        ),
        *(
            _above(
                f"A head for each reward is better than one for all: {name}", score(name), "joint", "joint-sum", name
            )
            for name in ("composition", "background", "jpeg_compressibility")
        ),
        Claim(
            "The latent critic costs a 2.6th of a pixel critic or less",
            "seconds that a pixel critic adds to an iteration over those that the latent critic adds",
            _cost_ratio,
            [Shown(f"{name}, s an iteration:", name, iteration_seconds) for name in ("ddpo", "ours", "pixel")],
            PIXEL_RATIO,
            ".2f",
        ),
        _above(
            "The latent critic values at least as well as the pixel critic",
            explained_variance,
            "ours",
            "pixel",
            what="held-out explained variance",
            threshold=-EQUAL_EXPLAINED_VARIANCE,
        ),
        *(
            _above(f"Training without guidance ends best: 1 against {guidance}, {length}", composition, one, other)
            for guidance, length, one, other in (
                ("2", "short runs", "ours", "guidance-2"),
                ("4.5", "short runs", "ours", "guidance-4.5"),
                ("2", "long runs", "ours-long", "guidance-2-long"),
            )
        ),
        Claim(
            "Training on composition alone damages the background, which it does not reward",
            "background before minus after",
            lambda seed: _change(seed, "ours", "background", -1.0),
            (Shown("before", "ours", score("background", 0)), Shown("after", "ours", background)),
        ),
        Claim(
            "Joint training does not damage the background",
            "background after minus before",
            lambda seed: _change(seed, "joint", "background"),
            (Shown("before", "joint", score("background", 0)), Shown("after", "joint", background)),
            -EQUAL_BACKGROUND,
        ),
        _above("Joint training keeps more of the background", background, "joint", "ours", "background"),
        Claim(
            "The critic explains variance at every timestep",
            "held-out explained variance at the step where it is least",
            lambda seed: _of(seed, "ours-long", lambda steps: min(steps)),
            (Shown("mean over steps", "ours-long", explained_variance),),
        ),
        Claim(
            "It explains more toward the clean end",
            "held-out explained variance of the last step minus the first",
            lambda seed: _of(seed, "ours-long", lambda steps: steps[-1] - steps[0]),
            (
                Shown("first", "ours-long", lambda result: (explained_variance_per_step(result) or [None])[0]),
                Shown("last", "ours-long", lambda result: (explained_variance_per_step(result) or [None])[-1]),
            ),
        ),
    ]


def _above(says: str, number: Number, one: str, other: str, what: str = "composition", threshold: float = 0.0) -> Claim:
    def measure(seed: Mapping[str, dict[str, Any]]) -> float | None:
        if one not in seed or other not in seed:
            return None
        first, second = number(seed[one]), number(seed[other])
        return None if first is None or second is None else first - second

    return Claim(
        says, f"{what}, {one} minus {other}", measure, (Shown(one, one, number), Shown(other, other, number)), threshold
    )


def _change(seed: Mapping[str, dict[str, Any]], variant: str, name: str, sign: float = 1.0) -> float | None:
    if variant not in seed:
        return None
    before, after = score(name, 0)(seed[variant]), score(name)(seed[variant])
    return None if before is None or after is None else sign * (after - before)


def _of(seed: Mapping[str, dict[str, Any]], variant: str, number: Callable[[list[float]], float]) -> float | None:
    steps = explained_variance_per_step(seed[variant]) if variant in seed else None
    return None if steps is None else number(steps)


def _cost_ratio(seed: Mapping[str, dict[str, Any]]) -> float | None:
    """A critic costs what an iteration with it takes longer than DDPO's, which has none and else does the same."""
    if not {"ours", "pixel", "ddpo"} <= seed.keys():
        return None
    free = iteration_seconds(seed["ddpo"])
    latent, pixel = (iteration_seconds(seed[name]) - free for name in ("ours", "pixel"))
    return pixel / latent if latent > 0 else None
