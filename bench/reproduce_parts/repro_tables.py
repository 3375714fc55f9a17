"""The tables of a report, as Markdown."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from repro_claims import (
    CONFIDENCE,
    MISSING,
    Claim,
    Number,
    Results,
    decide,
    explained_variance,
    half_width,
    iteration_seconds,
    score,
    squared_error,
    training_reward,
)
from repro_grid import ALGORITHMS, REFERENCES, TUNED, TUNING_RATES, Variant

SCORES = {  # header: reward
    "composition": "composition",
    "strictly right, %": "composition_strict",
    "background": "background",
    "JPEG, kB": "jpeg_compressibility",
}
NONE = "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def spread(numbers: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    if not numbers:
        return NONE
    mean = f"{np.mean(numbers):{form}}"
    return f"{mean} +- {np.std(numbers, ddof=1):{form}}" if len(numbers) > 1 else mean


def of_seeds(results: Results, variant: str, number: Number) -> dict[int, float]:
    """A number of each of a variant's runs, by seed, where it has one."""
    found = {seed: number(result) for (name, seed), result in results.items() if name == variant}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


def displayed(name: str, evaluation: int = -1) -> Number:
    """A reward as it is shown: percents where it is 0 or 1, and the JPEG's size without its minus."""
    factor = {"composition_strict": 100.0, "jpeg_compressibility": -1.0}.get(name, 1.0)
    number = score(name, evaluation)
    return lambda result: None if (found := number(result)) is None else factor * found


def form(name: str) -> str:
    return {"composition_strict": ".1f", "jpeg_compressibility": ".2f"}.get(name, ".3f")


def claims_table(claims: Sequence[Claim], results: Results) -> list[str]:
    rows = []
    for claim in claims:
        by_seed = claim.numbers(results)
        numbers, shown = list(by_seed.values()), _shown(claim, results, by_seed)
        verdict = decide(numbers, claim.threshold)
        word = verdict if verdict == MISSING else f"**{verdict}**"
        rows.append([claim.says, claim.number, _measured(claim, numbers), shown, word])
    return markdown(["claim", "number", f"measured, with its {CONFIDENCE:.0%} interval", "runs", "verdict"], rows)


def _measured(claim: Claim, numbers: Sequence[float]) -> str:
    if not numbers:
        return NONE
    form = claim.form if claim.threshold > 1 else f"+{claim.form}"
    width = f"{half_width(numbers):{claim.form}}" if len(numbers) > 1 else "?"
    seeds = f"{len(numbers)} seed{'s' if len(numbers) > 1 else ''}"
    threshold = f"; threshold {claim.threshold:g}" if claim.threshold else ""
    return f"{np.mean(numbers):{form}} +- {width} ({seeds}{threshold})"


def _shown(claim: Claim, results: Results, seeds: Collection[int]) -> str:
    """Means over the claim's seeds; where it has none, over those that there are."""
    words = []
    for label, variant, number in claim.shown:
        found = of_seeds(results, variant, number)
        numbers = [value for seed, value in found.items() if seed in seeds or not seeds]
        words.append(f"{label} {np.mean(numbers):{claim.form}}" if numbers else f"{label} {NONE}")
    return ", ".join(words)


def group_table(group: str, variants: Sequence[Variant], results: Results) -> list[str]:
    """Each variant's end: mean +- standard deviation over seeds; the difference is paired."""
    reference = REFERENCES[group]
    seconds = ["training, s", "iteration, s", "explained variance", "squared error"]
    head = ["variant", "seeds", "iterations", *SCORES, f"composition minus `{reference}`", *seconds]
    chosen = [variant for variant in variants if variant.group == group]
    rows = []
    if all(variant.name != reference for variant in chosen) and of_seeds(results, reference, displayed("composition")):
        rows.append(_row(reference, "", reference, results))
    rows += [_row(variant.name, variant.about, reference, results) for variant in chosen]
    return markdown(head, rows)


def _row(variant: str, about: str, reference: str, results: Results) -> list[str]:
    runs = {seed: result for (name, seed), result in sorted(results.items()) if name == variant}
    name = f"`{variant}`" + (f" {about}" if about else "")
    if not runs:
        return [name, "0", *[NONE] * (len(SCORES) + 6)]
    own, other = (of_seeds(results, of, score("composition")) for of in (variant, reference))
    paired = [own[seed] - other[seed] for seed in own.keys() & other.keys()]
    difference = NONE
    if variant != reference and paired:
        width = f"{half_width(paired):.3f}" if len(paired) > 1 else "?"
        difference = f"{np.mean(paired):+.3f} +- {width}"

    def of(number: Number, form: str) -> str:
        return spread(list(of_seeds(results, variant, number).values()), form)

    return [
        name,
        str(len(runs)),
        _iterations(next(iter(runs.values()))),
        *(of(displayed(reward), form(reward)) for reward in SCORES.values()),
        difference,
        of(lambda result: result["seconds"], ".0f"),
        of(iteration_seconds, ".2f"),
        of(explained_variance, ".3f"),
        of(squared_error, ".3f"),
    ]


def _iterations(result: Mapping[str, Any]) -> str:
    training = result["config"]["training"]
    first, then = training["value_pretraining_iterations"], training["iterations"]
    return f"{first} + {then}" if first else str(then)


# ---- how fast -------------------------------------------------------------------------------------------------------


def by_images(variants: Sequence[str], results: Results) -> list[str]:
    """Held-out composition at every evaluation that some run of these has."""
    points: dict[str, dict[int, list[float]]] = {}
    for (variant, _), result in sorted(results.items()):
        for evaluation in result["evaluations"] if variant in variants else ():
            mean = evaluation["scores"]["composition"]["mean"]
            points.setdefault(variant, {}).setdefault(evaluation["images"], []).append(mean)
    images = sorted({count for found in points.values() for count in found})
    rows = [
        [variant, *(spread(points[variant].get(n, [])) for n in images)] for variant in variants if variant in points
    ]
    return markdown(["images", *(f"{n:,}" for n in images)], rows) if images else []


def by_clock(variants: Sequence[str], reference: str, results: Results) -> list[str]:
    """Held-out composition after the same measured seconds of training: shares of what the reference took with that
    seed, between evaluations on a straight line."""
    shares = (0.25, 0.5, 0.75, 1.0)
    took = of_seeds(results, reference, lambda result: result["seconds"])
    if not took:
        return []
    rows = []
    for variant in variants:
        row = [variant]
        for share in shares:
            found = [
                at_seconds(results[variant, seed], share * seconds)
                for seed, seconds in took.items()
                if (variant, seed) in results
            ]
            known = [value for value in found if value is not None]
            row.append(spread(known) + (" (where it ran so long)" if 0 < len(known) < len(found) else ""))
        if any(cell != NONE for cell in row[1:]):
            rows.append(row)
    mean = float(np.mean(list(took.values())))
    return markdown(["seconds of training", *(f"{share * mean:.0f}" for share in shares)], rows)


def at_seconds(result: Mapping[str, Any], seconds: float) -> float | None:
    """Held-out composition after so many seconds of training; None after the run's end."""
    times = [evaluation["seconds"] for evaluation in result["evaluations"]]
    means = [evaluation["scores"]["composition"]["mean"] for evaluation in result["evaluations"]]
    return float(np.interp(seconds, times, means)) if seconds <= 1.001 * times[-1] else None


def planned_table(variants: Sequence[tuple[str, float, int]], results: Results) -> list[str]:
    """(variant, forwards of the trunk in training, images): beside what was measured."""
    rows = [
        [
            name,
            f"{images:,}",
            f"{count:,.0f}",
            spread(list(of_seeds(results, name, lambda r: r["seconds"]).values()), ".0f"),
        ]
        for name, count, images in variants
    ]
    return markdown(["variant", "images", "forwards, planned", "seconds of training, measured"], rows)


# ---- tuning ---------------------------------------------------------------------------------------------------------


def tuning_table(results: Results) -> list[str]:
    head = ["training reward, last quarter", *(rate.words for rate in TUNING_RATES), "grid's"]
    rows = []
    lengths = ((", 40 iterations", "", "tiny-dit"), (", 100 iterations", "-long", "tiny-dit, long"))
    for (words, end, setting), name in itertools.product(lengths, ALGORITHMS):
        variants = [f"tuning-{name}-{rate.name}{end}" for rate in TUNING_RATES]
        found = [of_seeds(results, variant, training_reward).values() for variant in variants]
        best = max((np.mean(list(rewards)) for rewards in found if rewards), default=None)
        cells = [_rewards(list(rewards), best) for rewards in found]
        rows.append([name + words, *cells, TUNED[setting][name].words])
    return markdown(head, rows)


def _rewards(rewards: Sequence[float], best: float | None) -> str:
    """Their mean, marked if it is the best, and each seed's."""
    if not rewards:
        return NONE
    mean = f"{np.mean(rewards):.4f}"
    mean = f"**{mean}**" if np.mean(rewards) == best else mean
    return f"{mean} ({', '.join(f'{reward:.4f}' for reward in rewards)})"


# ---- everything -----------------------------------------------------------------------------------------------------


def appendix(results: Results) -> list[str]:
    """Every run: before -> after with the standard error over held-out prompts."""
    head = ["run", *SCORES, "training reward", "explained variance", "s / iteration", "commit"]
    rows = []
    for (variant, seed), result in sorted(results.items()):
        values = explained_variance(result)
        rows.append(
            [
                f"{variant}-{seed}",
                *(_before_after(result, reward) for reward in SCORES.values()),
                f"{training_reward(result):.3f}",
                NONE if values is None else f"{values:.3f}",
                f"{result['iteration_seconds']:.2f}",
                result["commit"],
            ]
        )
    return markdown(head, rows)


def _before_after(result: Mapping[str, Any], reward: str) -> str:
    before, after = (displayed(reward, evaluation)(result) for evaluation in (0, -1))
    if before is None or after is None:
        return NONE
    error = abs(result["evaluations"][-1]["scores"][reward]["stderr"]) * (100 if reward == "composition_strict" else 1)
    return f"{before:{form(reward)}} -> {after:{form(reward)}} +- {error:{form(reward)}}"
