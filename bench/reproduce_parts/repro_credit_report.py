"""credit.json, credit.md and credit.png."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from repro_places import write_json
from repro_tables import NONE, markdown

from latent_critic.engine.reports import BLUE, ORANGE, STYLE, VERMILION


def save_credit(content: Mapping[str, Any], output: Path) -> Path:
    write_json(output / "credit.json", dict(content))
    _plot(content, output / "credit.png")
    page = output / "credit.md"
    page.write_text("\n".join(_page(content)) + "\n")
    return page


def _page(content: Mapping[str, Any]) -> list[str]:
    reference, steps = content["reference"], len(content["explained_variance_per_step"])
    return [
        "# Credit assignment",
        "",
        f"`{content['command']}`: commit {content['commit']}, torch {content['versions']['torch']}, "
        f"{content['processor']}.",
        "",
        f"The trained policy of `{content['run']}` draws {content['group_size']} samples of each of "
        f"{content['prompts']} held-out prompts. On these same trajectories:",
        "",
        "## The critic",
        "",
        "By denoising step, from noise to clean. The value error is the mean squared error in variances of the reward: "
        "1 is what a constant has. `could be foreseen` is what no critic can exceed: one minus the variance of the "
        f"reward among {content['group_size']} continuations of a step's latents, over all variance. The prompt alone "
        f"explains {content['variance_between_prompts']:.0%}.",
        "",
        *markdown(
            ["step", *map(str, range(1, steps + 1))],
            [
                ["could be foreseen", *(f"{share:.3f}" for share in content["foreseeable_per_step"])],
                ["explained variance", *(f"{value:.3f}" for value in content["explained_variance_per_step"])],
                ["value error", *(f"{value:.3f}" for value in content["value_error_per_step"])],
            ],
        ),
        "",
        "## The policy's gradient",
        "",
        f"Gradients of the policy loss at ratio 1, each of a chunk of {content['samples_per_chunk']} samples in whole "
        f"groups, as GRPO needs them; {content['chunks']} chunks. All advantages are scaled to variance 1. `variance` "
        "is the trace of the chunk gradients' covariance, `mean squared` the squared length of their mean, less what "
        "noise adds to it. +- is one standard error (jackknife).",
        "",
        "With advantages of variance 1 gradients vary about equally; they differ in how much of the reward's gradient "
        "they have. `per reward` divides it out: by 1 / std of the advantages before they were scaled; in GRPO, whose "
        "groups have scales of their own, by the slope of advantages over rewards within groups; and with lambda below "
        "1, which takes the critic's word for a part of the reward, by what the advantages say of those with lambda 1. "
        "It is the variance of estimates of the same gradient, that of the expected reward, and so the number to "
        "compare: at 0.5 half the samples do.",
        "",
        *markdown(
            ["advantages", "variance", f"x {reference}", "mean squared", "variance / mean squared"]
            + [f"variance per reward, x {reference}"],
            [_row(name, row) for name, row in content["estimators"].items()],
        ),
        "",
        "![Explained variance, value error and gradient noise](credit.png)",
    ]


def _row(name: str, row: Mapping[str, float | None]) -> list[str]:
    variance, mean_squared, error = row["variance"], row["mean_squared"], row["mean_squared_error"]
    told = error is not None and mean_squared > 2 * error
    return [
        name,
        f"{variance:.4g}",
        _with_error(row["relative_variance"], row["relative_variance_error"], ".3f"),
        _with_error(mean_squared, error, ".2g"),
        f"{variance / mean_squared:.3g}" if told else "mean not told from noise",
        _with_error(row["reward_variance"], row["reward_variance_error"], ".3f"),
    ]


def _with_error(number: float | None, error: float | None, form: str) -> str:
    if number is None:
        return NONE
    return f"{number:{form}}" + ("" if error is None else f" +- {error:{form}}")


def _plot(content: Mapping[str, Any], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure((11.5, 3.8), layout="constrained")
        values, noise = figure.subplots(1, 2)
        _plot_values(values, content)
        _plot_noise(noise, content)
        figure.savefig(path)


def _plot_values(axes: Axes, content: Mapping[str, Any]) -> None:
    explained = content["explained_variance_per_step"]
    steps = np.arange(1, len(explained) + 1)
    could = content["foreseeable_per_step"]
    axes.plot(steps, could, color="#555555", linestyle="--", label="could be foreseen")
    axes.plot(steps, explained, color=VERMILION, marker="o", label="explained variance")
    axes.plot(steps, content["value_error_per_step"], color=ORANGE, marker="s", label="value error, in variances")
    share = content["variance_between_prompts"]
    axes.axhline(share, color="#888888", linestyle=":", label="variance between prompts")
    axes.set_ylim(min(0.0, *explained) - 0.02, None)
    axes.set_xlabel("denoising step, from noise to clean")
    axes.set_title("The critic on held-out prompts")
    axes.legend(loc="best")


def _plot_noise(axes: Axes, content: Mapping[str, Any]) -> None:
    """On a logarithmic scale: a raw reward may be a hundred times as noisy."""
    estimators, reference = content["estimators"], content["reference"]
    key = "reward_variance" if all(row["reward_variance"] is not None for row in estimators.values()) else None
    key = key or "relative_variance"
    for place, (name, row) in enumerate(estimators.items()):
        number, error = row[key], row[f"{key}_error"]
        color = BLUE if name.startswith("GAE") else "#9a9a9a"
        axes.errorbar(number, place, xerr=error, fmt="o", color=color, ecolor="#333333", capsize=3, markersize=7)
        axes.annotate(f"{number:.2f}", (number, place), (0, 8), textcoords="offset points", ha="center", fontsize=8.5)
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(estimators)), list(estimators))
    axes.set_ylim(len(estimators) - 0.5, -0.7)
    axes.margins(x=0.12)
    what = " per reward" if key == "reward_variance" else ""
    axes.set_xlabel(f"variance of the policy's gradient{what}, x {reference}'s")
    axes.set_title("Noise of the policy's gradient")
