"""README.md and pareto.png of the cells that are there."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from steer_runs import MODELS

from latent_critic.engine.reports import SERIES, STYLE

TITLES = {"base": "the base model, with a critic trained on it", "trained": "a post-trained model, with its own critic"}
FAMILIES = (  # of the plot
    "best of N by V",
    "best of N by reward",
    "SMC of N by V",
    "SMC of N by V, kept by reward",
    "SMC of N by reward",
    "guidance + best of N by V",
    "guidance + best of N by reward",
    "guidance + SMC of N by V",
)
SINGLE = {"unsteered": "o", "ODE": "s", "guidance": "*", "guidance, ODE": "P"}  # markers
COMPARED = (  # the first with the second
    ("guidance", "unsteered"),
    ("guidance, ODE", "ODE"),
    ("best of 4 by V", "unsteered"),
    ("guidance + best of 4 by V", "best of 4 by V"),
    ("SMC of 4 by V", "SMC of 4 by reward"),
    ("SMC of 4 by V, kept by reward", "SMC of 4 by reward"),
    ("SMC of 4 by V, kept by reward", "best of 4 by reward"),
    ("guidance + SMC of 4 by V", "SMC of 4 by V"),
    ("best of 4 by V", "best of 4 by reward"),
)
Cell = Mapping[str, Any]
Number = tuple[float, float]  # mean and standard error


def write(folder: Path) -> Path:
    """Both models' cells, as far as they are there."""
    found = {model: json.loads(path.read_text()) for model in MODELS if (path := folder / f"{model}.json").exists()}
    lines = [
        "# What the critic is worth at sampling",
        "",
        "Held-out prompts, a picture of each for each seed. A mean's +- is its standard error over prompts, of a "
        "prompt's mean over seeds; differences to `unsteered` are paired. Passes are the trunk's forwards and "
        "backwards of one kept picture: a backward to the latents alone is as much arithmetic as a forward, for no "
        "weight has a gradient; decoded are pictures that went through autoencoder and reward on the "
        "way. *apart* is how far two pictures of a prompt, of different seeds, are apart (root mean square of their "
        "latents): less is less variety. Only composition is what the critic was trained to foretell.",
        "",
    ]
    for model, results in found.items():
        lines += _section(model, results)
    if found:
        _plot(found, folder / "pareto.png")
        lines += ["![Reward against compute](pareto.png)", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    path.write_text("\n".join(lines))
    return path


def _section(model: str, results: Mapping[str, Any]) -> list[str]:
    cells, where = results["cells"], results["about"]
    head = (
        *("way", "composition", "minus unsteered", "strictly right, %", "background", "JPEG, kB", "apart"),
        *("passes", "decoded", "s a picture"),
    )
    rows = [head, ["---"] * len(head), *(_row(name, cell, cells["unsteered"]) for name, cell in cells.items())]
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells.values()))
    chosen = "; ".join(
        f"{'SMC ' * name.startswith('by')}{name} {results['scales'][name]:g} "
        f"({', '.join(f'{scale:g} -> {reward:.4f}' for scale, reward in pairs)})"
        for name, pairs in results["tried"].items()
    )
    return [
        f"## From {TITLES[model]}",
        "",
        f"{results['prompts']} prompts, {results['seeds']} seeds. `{where['command']}`, commits {commits}, "
        f"{where['processor']}, " + ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
        "",
        f"Scales chosen on training prompts, by composition: {chosen}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        *_comparisons(cells),
    ]


def _comparisons(cells: Mapping[str, Cell]) -> list[str]:
    """The pairs that are there, a verdict each by one rule."""
    pairs = [names for names in COMPARED if set(names) <= set(cells)]
    head = ("composition, paired", "first minus second, 95% interval", "passes", "decoded", "s a picture", "verdict")
    rows = [head, ["---"] * len(head)]
    for first, second in pairs:
        one, other = cells[first], cells[second]
        mean, error = _mean(_by_prompt(one, "composition") - _by_prompt(other, "composition"))
        half = 1.96 * error
        verdict = "**above**" if mean > half else "**below**" if mean < -half else "not told apart"
        costs = [cell["cost"] for cell in (one, other)]
        rows.append(
            [
                f"{first} / {second}",
                f"{mean:+.4f} +- {half:.4f}",
                f"{passes(one):.0f} / {passes(other):.0f}",
                " / ".join(f"{cost['scored']:.0f}" for cost in costs),
                " / ".join(f"{cost['seconds']:.3f}" for cost in costs),
                verdict,
            ]
        )
    return [*(f"| {' | '.join(row)} |" for row in rows), ""] if pairs else []


def _row(name: str, cell: Cell, unsteered: Cell) -> list[str]:
    own, other = (_by_prompt(each, "composition") for each in (cell, unsteered))
    difference = "-" if cell is unsteered else "{:+.4f} +- {:.4f}".format(*_mean(own - other))
    cost, apart = cell["cost"], _mean(np.array(cell["apart"]))
    return [
        name,
        "{:.4f} +- {:.4f}".format(*_mean(own)),
        difference,
        f"{100 * _by_prompt(cell, 'composition_strict').mean():.1f}",
        f"{_by_prompt(cell, 'background').mean():.3f}",
        f"{-_by_prompt(cell, 'jpeg_compressibility').mean():.2f}",
        "{:.3f} +- {:.3f}".format(*apart),
        f"{passes(cell):.0f}",
        f"{cost['scored']:.0f}" if cost["scored"] else "-",
        f"{cost['seconds']:.3f}",
    ]


def passes(cell: Cell) -> float:
    return cell["cost"]["forwards"] + cell["cost"]["backwards"]


def _by_prompt(cell: Cell, name: str) -> np.ndarray:
    return np.array(cell["scores"][name]).mean(0)


def _mean(numbers: np.ndarray) -> Number:
    return float(numbers.mean()), float(numbers.std(ddof=1) / len(numbers) ** 0.5)


def _plot(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure((6.4 * len(found), 4.8), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (model, results) in zip(panels, found.items(), strict=True):
            cells = results["cells"]
            for color, family in zip(SERIES, FAMILIES, strict=False):
                first = cells["guidance" if family.startswith("guidance") else "unsteered"]
                is_one = re.compile(re.escape(family).replace("N", r"\d+")).fullmatch
                points = [first, *(cell for name, cell in cells.items() if is_one(name))]
                if len(points) > 1:
                    _line(axes, sorted(points, key=passes), color, family)
            for name, marker in SINGLE.items():
                if name in cells:
                    mean, _ = _mean(_by_prompt(cells[name], "composition"))
                    axes.plot(passes(cells[name]), mean, marker, color="black", markersize=9, label=name, zorder=3)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axes.set_xlabel("passes of the trunk for a picture, forward and backward")
            axes.set_ylabel("held-out composition")
            axes.set_title(f"From {TITLES[model]}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(path)


def _line(axes, points: list[Cell], color: str, label: str) -> None:
    means = [_mean(_by_prompt(cell, "composition")) for cell in points]
    x, y, error = [passes(cell) for cell in points], [m for m, _ in means], [e for _, e in means]
    axes.errorbar(x, y, error, color=color, marker=".", capsize=2, label=label)
