"""README.md and plots of what has been run."""

import os
from collections.abc import Sequence
from pathlib import Path

from repro_claims import RULE, Results, claims
from repro_curves import plot_curves, plot_explained_variance, plot_options
from repro_grid import GROUPS, Run, Scale, Variant
from repro_pictures import plot_hacking
from repro_places import Places, other_settings, read_json
from repro_recipe import forwards
from repro_tables import appendix, by_clock, by_images, claims_table, group_table, planned_table, tuning_table

UNETS = ("unet-ours", "unet-grpo", "unet-ddpo")


def read_results(places: Places) -> Results:
    """All that are there, whatever grid they are of."""
    found = [read_json(path) for path in sorted((places.output / "runs").glob("*.json"))]
    return {(result["variant"], result["seed"]): result for result in found}


def report(variants: Sequence[Variant], scale: Scale, places: Places, command: str) -> Path:
    """Writes README.md and the plots beside it."""
    every = read_results(places)
    warnings = _warnings(variants, every)
    results = {key: result for key, result in every.items() if key not in warnings}
    places.output.mkdir(parents=True, exist_ok=True)
    plots = {
        "curves.png": plot_curves(results, places.output / "curves.png"),
        "curves_options.png": plot_options(variants, results, places.output / "curves_options.png"),
        "explained_variance.png": plot_explained_variance(variants, results, places.output / "explained_variance.png"),
        "hacking.png": plot_hacking(results, places),
    }
    path = places.output / "README.md"
    drawn = {name for name, is_drawn in plots.items() if is_drawn}
    head = [*_machines(every), *(f"- **{words}, and is in the last table alone.**" for words in warnings.values())]
    page = _page(variants, scale, results, places, command, head, drawn)
    path.write_text("\n".join([*page, *_every_run(every)]) + "\n")
    return path


def _page(
    variants: Sequence[Variant],
    scale: Scale,
    results: Results,
    places: Places,
    command: str,
    head: list[str],
    drawn: set[str],
) -> list[str]:
    lines = [
        "# The paper's claims on the embedded models",
        "",
        '"Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736) at the scale of tiny-dit and '
        f"tiny-unet, written by `{command}`. How it is run: [bench/README.md]({_bench_page(places)}#reproducepy).",
        "",
        *head,
        "",
        "## Claims",
        "",
        *claims_table(claims(scale), results),
        "",
        RULE,
        "",
    ]
    for name, about in (
        ("curves.png", "Held-out composition over a run, mean and range over seeds"),
        ("explained_variance.png", "Held-out explained variance by denoising step"),
        (
            "hacking.png",
            "The same held-out prompts before, and after training on composition alone and on three rewards",
        ),
        ("curves_options.png", "Held-out composition of the other groups"),
    ):
        if name in drawn:
            lines += [f"![{about}]({name})", ""]
    if (places.output / "credit.png").exists():
        lines += ["[credit.md](credit.md): the gradient's variance under each advantage estimator.", ""]
    lines += _algorithms(variants, results)
    chosen = {variant.group for variant in variants}
    for group, about in GROUPS.items():
        if group in chosen and group != "tuning":
            lines += [f"## {group}: {about}", "", *group_table(group, variants, results), ""]
    if any(variant.startswith("tuning-") for variant, _ in results):
        lines += [
            "## tuning: policy learning rates",
            "",
            "Chosen by the training reward (never by held-out prompts), mean over seeds, the same budget for each: "
            "five rates and warm-ups over 40 iterations, and over 100 the best two of these. Of ours the best over "
            "40, by 0.003, was left out: with a third seed the reward collapsed.",
            "",
            *tuning_table(results),
            "",
        ]
    return lines


def _every_run(results: Results) -> list[str]:
    return ["## Every run", "", _HOW_TO_READ, "", *appendix(results)]


_HOW_TO_READ = (
    "Held-out scores before -> after, +- one standard error over the prompts. `training reward` is the mean of the "
    "first trained reward over the last quarter of the iterations, `explained variance` held-out at the end. `runs/` "
    "has each run's configuration, command, commit, and every iteration and evaluation."
)


def _algorithms(variants: Sequence[Variant], results: Results) -> list[str]:
    """Equal images and equal clock, beyond the group's table."""
    compared = [variant for variant in variants if variant.group in ("algorithms", "compute")]
    names = [variant.name for variant in compared]
    if not any(variant in names for variant, _ in results):
        return []
    planned = []
    for variant in compared:
        cost, training = forwards(variant.config), variant.config["training"]
        first, then = training["value_pretraining_iterations"], training["iterations"]
        images = (first + then) * variant.config["rollout"]["samples_per_iteration"]
        planned.append((variant.name, first * cost.pretraining + then * cost.training, images))
    lines = [
        "## Equal images, equal clock",
        "",
        "Held-out composition, mean +- standard deviation over seeds, by images drawn:",
        "",
        *by_images(names, results),
        "",
        "By measured seconds of training, without evaluations, each iteration counted as its run's median, which "
        "leaves pauses out. The learning rate falls to 0 at a run's own end, so only an end is a finished run:",
        "",
        *by_clock(names, "ours-long", results),
        "",
        "`-clock` variants are as long as `ours-long` by arithmetic: forwards of the trunk for the samples of an "
        "iteration, a backward as two.",
        "",
        *planned_table(planned, results),
        "",
    ]
    if unet := by_images(UNETS, results):
        lines += ["tiny-unet, by images:", "", *unet, ""]
    return lines


def _bench_page(places: Places) -> str:
    page = Path(__file__).resolve().parents[1] / "README.md"
    return Path(os.path.relpath(page, places.output.resolve())).as_posix()


def _machines(results: Results) -> list[str]:
    """What the runs were made on: each kind once, with its number of runs."""
    if not results:
        return ["No run has ended yet."]
    kinds: dict[str, int] = {}
    for result in results.values():
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        words = (
            f"{result['processor']}, {result['jobs']} run{'s' if result['jobs'] > 1 else ''} at a time with "
            f"{result['threads']} thread{'s' if result['threads'] > 1 else ''} each; {versions}; commit "
            f"{result['commit']}; `{result['command']}`"
        )
        kinds[words] = kinds.get(words, 0) + 1
    lines = [f"- {count} run{'s' if count > 1 else ''}: {words}" for words, count in kinds.items()]
    return [
        *lines,
        "- Seconds are measured while the other runs compute beside, and whatever else the machine does. A run that "
        "was resumed is told with the commit that ended it.",
    ]


def _warnings(variants: Sequence[Variant], results: Results) -> dict[tuple[str, int], str]:
    """Runs that are not what the grid would run now."""
    known, found = {variant.name: variant for variant in variants}, {}
    for (name, seed), result in sorted(results.items()):
        if name not in known:
            found[name, seed] = f"{name}-{seed} is of no variant of the grid"
        elif words := other_settings(Run(known[name], seed), result["config"]):
            found[name, seed] = f"{name}-{seed} was made with other settings: {words}"
    return found
