"""The results as curves: held-out composition over a run, and explained variance over denoising steps."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from repro_claims import Results, explained_variance_per_step
from repro_grid import GROUPS, REFERENCES, Variant

from latent_critic.engine.reports import SERIES, STYLE

Curve = tuple[np.ndarray, np.ndarray]  # x and y of one run
# By images alone.
OTHERS = ("group-std", "pixels", "grpo-options", "critic", "rewards", "cfg", "cfg-long", "clip", "steps", "transition")
PANEL = (6.2, 3.6)  # inches
COLUMNS = 2


def plot_curves(results: Results, path: Path) -> bool:
    """Algorithms, pretraining and the UNet, by images and by seconds. False, and no file, where nothing was run."""
    rows = {
        "algorithms on tiny-dit": ("ours-long", "grpo-long", "ddpo-long", "grpo-long-clock", "ddpo-long-clock"),
        "critic-only iterations before PPO": _names(results, "pretraining"),
        "algorithms on tiny-unet": ("unet-ours", "unet-grpo", "unet-ddpo"),
    }
    rows = {title: found for title, names in rows.items() if (found := _present(names, results))}
    if not rows:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure((2 * PANEL[0], PANEL[1] * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), 2, squeeze=False, sharey="row")
        for (title, names), (left, right) in zip(rows.items(), axes, strict=True):
            _learning(left, names, results, "images")
            _learning(right, names, results, "seconds")
            left.set_title(f"{title}, by images")
            right.set_title(f"{title}, by clock")
            left.set_ylabel("held-out composition")
            left.set_xlabel("images drawn in training")
            right.set_xlabel("seconds of training, without evaluations")
            left.legend(loc="best")
        _note(figure, "lines: means over seeds; bands: from the least to the greatest")
        figure.savefig(path)
    return True


def plot_options(variants: Sequence[Variant], results: Results, path: Path) -> bool:
    """The other groups, by images, each with what it is compared with."""
    groups = {}
    for group in OTHERS:
        names = _present([variant.name for variant in variants if variant.group == group], results)
        if names:
            groups[group] = list(dict.fromkeys([*_present([REFERENCES[group]], results), *names]))
    if not groups:
        return False
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(groups))
        for (group, names), axes in zip(groups.items(), panels, strict=False):
            _learning(axes, names, results, "images")
            axes.set_title(textwrap.fill(f"{group}: {GROUPS[group]}", 66), fontsize=9)
            axes.set_xlabel("images drawn in training")
            axes.set_ylabel("held-out composition")
            axes.legend(loc="best")
        _note(figure, "lines: means over seeds; bands: from the least to the greatest")
        figure.savefig(path)
    return True


def plot_explained_variance(variants: Sequence[Variant], results: Results, path: Path) -> bool:
    """Per denoising step at the end of the run, a panel a group that has critics to compare."""
    groups = {}
    for group in GROUPS:
        names = [variant.name for variant in variants if variant.group == group]
        names = [name for name in _present(names, results) if _steps(name, results)]
        if group != "tuning" and names:
            reference = REFERENCES[group]
            first = [reference] if reference not in names and _steps(reference, results) else []
            groups[group] = [*first, *names]
    if not groups:
        return False
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(len(groups))
        for (group, names), axes in zip(groups.items(), panels, strict=False):
            for number, name in enumerate(names):
                curves = [(np.arange(1, len(steps) + 1), np.asarray(steps)) for steps in _steps(name, results)]
                _band(axes, curves, SERIES[number % len(SERIES)], name)
            axes.axhline(0, color="#888888", linewidth=0.8)
            axes.set_title(textwrap.fill(f"{group}: {GROUPS[group]}", 66), fontsize=9)
            axes.set_xlabel("denoising step, from noise to clean")
            axes.set_ylabel("held-out explained variance")
            axes.legend(loc="best")
        _note(figure, "at the end of the run; lines: means over seeds; bands: from the least to the greatest")
        figure.savefig(path)
    return True


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure((PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels


def _note(figure: Figure, words: str) -> None:
    figure.supxlabel(words, fontsize=8.5, color="#555555")


def _names(results: Results, group: str) -> list[str]:
    found = {result["variant"]: result for result in results.values() if result["group"] == group}
    return sorted(found, key=lambda name: found[name]["config"]["training"]["value_pretraining_iterations"])


def _present(names: Iterable[str], results: Results) -> list[str]:
    there = {variant for variant, _ in results}
    return [name for name in names if name in there]


def _runs(name: str, results: Results) -> list[Mapping[str, Any]]:
    return [result for (variant, _), result in sorted(results.items()) if variant == name]


def _steps(name: str, results: Results) -> list[list[float]]:
    found = [explained_variance_per_step(result) for result in _runs(name, results)]
    return [steps for steps in found if steps]


def _learning(axes: Axes, names: Sequence[str], results: Results, over: str) -> None:
    for number, name in enumerate(names):
        curves = [_held_out(result, over) for result in _runs(name, results)]
        _band(axes, curves, SERIES[number % len(SERIES)], name, "--" if name.endswith("-clock") else "-")


def _held_out(result: Mapping[str, Any], over: str) -> Curve:
    evaluations = result["evaluations"]
    means = [evaluation["scores"]["composition"]["mean"] for evaluation in evaluations]
    return np.array([evaluation[over] for evaluation in evaluations], float), np.array(means, float)


def _band(axes: Axes, curves: Sequence[Curve], color: str, label: str, style: str = "-") -> None:
    """The seeds' mean within their range, at mean places: seconds differ from seed to seed. Where runs differ in
    length, as far as all go."""
    count = min(len(x) for x, _ in curves)
    x = np.mean([x[:count] for x, _ in curves], 0)
    y = np.array([y[:count] for _, y in curves])
    axes.plot(x, y.mean(0), style, color=color, label=label, marker="o", markersize=3)
    if len(curves) > 1:
        axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.13, linewidth=0)
