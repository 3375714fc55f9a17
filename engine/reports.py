"""The pictures of a run: `curves.png`, `critic.png`, sample grids, and before against after.

Plots are drawn from rows of `metrics.jsonl` (see metrics.py); whatever key a row lacks is left out. Colours keep their
meaning everywhere: blue policy and training, vermilion critic, orange held-out, grey value pretraining.
"""

import io
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont

from . import metrics

Rows = Sequence[dict[str, Any]]

# Okabe and Ito's palette: told apart with any colour vision
BLUE, VERMILION, ORANGE, GREEN, SKY, PURPLE, BLACK = (
    "#0072B2", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#333333",
)  # fmt: skip
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#8C6D31", "#999999", "#6B4C9A")
PRETRAINING = "#ECECEC"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.formatter.limits": (-4, 5),
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 110,
}

# explained variance: red below 0 (worse than predicting the mean), white at 0, blue up to 1
_EV_LOW, _EV_HIGH = -0.2, 1.0
_ZERO = -_EV_LOW / (_EV_HIGH - _EV_LOW)
_EV_COLORS = LinearSegmentedColormap.from_list(
    "explained_variance",
    [(0, "#C8553D"), (_ZERO, "#FFFFFF"), (_ZERO + 0.35, "#7FB2D6"), (1, "#08306B")],
).with_extremes(bad="#D8D8D8")


_WHOLE = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 5, 10]}  # ticks of iterations and steps

# ---- curves.png -----------------------------------------------------------------------------------------------------


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of the rows that have a number under `key`."""
    points = [(row["iteration"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    x, y = zip(*points, strict=True) if points else ((), ())
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)


def _mean_series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The same for a key that holds a list over steps: its mean."""
    means = [
        {"iteration": row["iteration"], key: float(np.nanmean(steps))}
        for row in rows
        if row.get(key) and not np.isnan(steps := np.asarray(row[key], dtype=float)).all()
    ]
    return _series(means, key)


def _names(rows: Rows, prefix: str, suffix: str) -> list[str]:
    """Names under `prefix` in order of appearance, without the companions `<name><suffix>`."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    return [name for name in names if not (name.endswith(suffix) and name.removesuffix(suffix) in names)]


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) <= 25 else None, markersize=3)


def _held_out(axes: Axes, rows: Rows, name: str, color: str, label: str) -> None:
    """Held-out mean at every evaluation; with its standard error, and thicker, where that is known."""
    x, y = _series(rows, f"eval/{name}")
    errors = dict(zip(*_series(rows, f"eval/{name}_stderr"), strict=True))
    marker = {"marker": "o", "markersize": 4 if len(x) <= 25 else 2}
    if errors:
        yerr = [errors.get(i, 0.0) for i in x]
        axes.errorbar(x, y, yerr=yerr, color=color, label=label, linewidth=1.8, elinewidth=1.0, capsize=2, **marker)
    else:
        axes.plot(x, y, color=color, label=label, linewidth=1.0, **marker)


def _reward_panel(rows: Rows, name: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        x, mean = _series(rows, f"reward/{name}")
        std = dict(zip(*_series(rows, f"reward/{name}_std"), strict=True))
        spread = np.array([std.get(i, 0.0) for i in x])
        _line(axes, x, mean, BLUE, "training samples")
        if len(x) == 1:  # a band over one iteration has no width
            axes.errorbar(x, mean, yerr=spread, color=BLUE, alpha=0.4, linewidth=0, elinewidth=4, label="± std")
        elif spread.any():
            axes.fill_between(x, mean - spread, mean + spread, color=BLUE, alpha=0.15, linewidth=0, label="± std")
        if len(_series(rows, f"eval/{name}")[0]):
            _held_out(axes, rows, name, ORANGE, "held-out ± std. error")
        axes.set_ylabel("mean reward (raw)")

    return draw


def _held_out_panel(rows: Rows, names: Sequence[str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for i, name in enumerate(names):
            _held_out(axes, rows, name, ORANGE if len(names) == 1 else SERIES[i % len(SERIES)], name)
        axes.set_ylabel("mean score ± std. error")

    return draw


def _monitor_panel(rows: Rows, names: Sequence[str]) -> Callable[[Axes], None]:
    """Each relative to its first value: what tells is a drift."""

    def draw(axes: Axes) -> None:
        axes.axhline(1, color="#888888", linewidth=0.8)
        for i, name in enumerate(names):
            x, y = _series(rows, f"eval/monitor/{name}")
            if y[0]:
                _line(axes, x, y / y[0], SERIES[i], name.replace("_", " "))
        axes.set_ylim(0, min(axes.get_ylim()[1], 3.0))  # sharpness can grow tenfold, which would flatten the rest
        axes.set_ylabel("relative to the first evaluation")

    return draw


def _lines_panel(rows: Rows, ylabel: str, lines: dict[str, tuple[str, str]], scale: str) -> Callable[[Axes], None]:
    """Lines: key -> (label, colour); scale: "linear", "from zero" or "log"."""

    def draw(axes: Axes) -> None:
        for key, (label, color) in lines.items():
            x, y = _series(rows, key)
            if len(x):
                _line(axes, x, y, color, label)
            if scale == "log" and (y > 0).any():
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(ylabel)
        if scale == "from zero":
            axes.set_ylim(bottom=0)

    return draw


def _explained_variance_panel(rows: Rows) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.axhline(0, color="#888888", linewidth=0.8)
        _line(axes, *_series(rows, "explained_variance"), VERMILION, "training samples")
        x, y = _mean_series(rows, "eval/explained_variance_per_step")
        if len(x):
            axes.plot(x, y, color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="held-out")
        # an untrained critic can be at -10, which would flatten the rest
        axes.set_ylim(max(axes.get_ylim()[0] - 0.05, -0.5), 1.0)
        axes.set_ylabel("mean over denoising steps")

    return draw


def _seconds_panel(rows: Rows) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        timed = [row for row in rows if isinstance(row.get("seconds"), int | float)]
        x = np.array([row["iteration"] for row in timed], dtype=float)
        edges = np.concatenate([[x[0] - 0.5], (x[1:] + x[:-1]) / 2, [x[-1] + 0.5]])
        total = np.array([row["seconds"] for row in timed], dtype=float)
        below = np.zeros(len(x))
        for part, color in (("rollout", BLUE), ("rewards", ORANGE), ("update", VERMILION)):
            seconds = np.array([row.get(f"seconds/{part}") or 0.0 for row in timed], dtype=float)
            axes.stairs(below + seconds, edges, baseline=below, fill=True, color=color, label=part)
            below = below + seconds
        top = np.maximum(total, below)
        axes.stairs(top, edges, baseline=below, fill=True, color="#BBBBBB", label="other")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("seconds")

    return draw


def _panels(rows: Rows) -> list[tuple[str, Callable[[Axes], None]]]:
    """Title and drawing function of every panel that has something to show."""
    present = {key for row in rows for key, value in row.items() if value is not None}
    rewards = _names(rows, "reward/", "_std")
    panels = [(f"Reward: {name}", _reward_panel(rows, name)) for name in rewards]

    others = ("explained_variance", "monitor/")
    held_out = [name for name in _names(rows, "eval/", "_stderr") if not name.startswith(others)]
    held_out = [name for name in held_out if name not in rewards]
    # what lives between 0 and 1 shares an axis; other scales get their own
    shared = [name for name in held_out if all(0 <= y <= 1 for y in _series(rows, f"eval/{name}")[1])]
    if shared:
        panels.append(("Held-out scores", _held_out_panel(rows, shared)))
    panels += [(f"Held-out: {name}", _held_out_panel(rows, [name])) for name in held_out if name not in shared]
    monitors = _names(rows, "eval/monitor/", "_stderr")
    if monitors:
        panels.append(("Monitors of held-out pictures", _monitor_panel(rows, monitors)))

    if "explained_variance" in present:
        panels.append(("Critic: explained variance", _explained_variance_panel(rows)))
    for title, ylabel, scale, lines in (
        ("Policy change", "KL(old || new)", "linear", {
            "old_approx_kl": ("old_approx_kl", SKY),
            "approx_kl": ("approx_kl", BLUE),
        }),
        ("Clip fraction", "share of ratios clipped", "from zero", {"clipfrac": ("clipfrac", BLUE)}),
        ("Importance ratio", "largest |ratio − 1|", "linear", {
            "ratio_max_deviation": ("all updates", BLUE),
            "first_ratio_deviation": ("first update (must be 0)", GREEN),
        }),
        ("Policy loss", "loss", "linear", {"policy_loss": ("policy_loss", BLUE)}),
        ("Value loss", "loss", "linear", {"value_loss": ("value_loss", VERMILION)}),
        ("Gradient norm", "norm", "log", {
            "grad_norm/actor": ("actor", BLUE),
            "grad_norm/critic": ("critic", VERMILION),
        }),
    ):  # fmt: skip
        if present & lines.keys():
            panels.append((title, _lines_panel(rows, ylabel, lines, scale)))
    if "seconds" in present:
        panels.append(("Time per iteration", _seconds_panel(rows)))
    return panels


def _pretraining(rows: Rows) -> tuple[float, float] | None:
    """First and last iteration of value pretraining, half an iteration wider on both sides."""
    iterations = [row["iteration"] for row in rows if row.get("phase") == metrics.PRETRAINING]
    return (min(iterations) - 0.5, max(iterations) + 0.5) if iterations else None


def _draw_panel(axes: Axes, rows: Rows, title: str, draw: Callable[[Axes], None]) -> None:
    iterations, pretraining = [row["iteration"] for row in rows], _pretraining(rows)
    if pretraining:
        axes.axvspan(*pretraining, color=PRETRAINING, linewidth=0, zorder=0)
    draw(axes)
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.set_xlim(min(iterations) - 0.5, max(iterations) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, **_WHOLE))
    axes.yaxis.set_offset_position("right")  # on the left a power of ten collides with the title
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        ncols = 4 if len(labels) == 4 and len("".join(labels)) < 30 else 3
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=ncols, columnspacing=1.2)


def plot_curves(rows: Rows, path: str | os.PathLike) -> None:
    """Draw a run's learning curves: rewards, held-out scores, PPO's diagnostics, losses, gradient norms, time."""
    panels = _panels(rows)
    columns = min(3, max(1, len(panels)))
    lines = math.ceil(max(1, len(panels)) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * columns, 3.3 * lines + 0.3), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.09)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (title, draw) in zip(grid, panels, strict=False):
            _draw_panel(axes, rows, title, draw)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if not panels:
            figure.axes[0].text(0.5, 0.5, "no metrics yet", ha="center", va="center")
        if panels and _pretraining(rows):
            patch = Patch(color=PRETRAINING, label="value pretraining (policy frozen)")
            figure.legend(handles=[patch], loc="outside upper right")
        figure.savefig(path)


def panels_as_svg(rows: Rows) -> dict[str, bytes]:
    """Each panel of `plot_curves` as an SVG file of its own, by title. Their text is text, in the reader's fonts."""
    files = {}
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "latent-critic"}):
        for title, draw in _panels(rows):
            figure = Figure(figsize=(4.8, 3.3), layout="constrained")
            _draw_panel(figure.subplots(), rows, title, draw)
            file = io.BytesIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            files[title] = file.getvalue()
    return files


# ---- critic.png -----------------------------------------------------------------------------------------------------


def _per_step(rows: Rows, key: str) -> tuple[list[int], np.ndarray]:
    """Iterations and explained variance `[iterations, K]` of the rows that have a list under `key`."""
    found = [(row["iteration"], row[key]) for row in rows if row.get(key)]
    iterations = [iteration for iteration, _ in found]
    return iterations, np.array([steps for _, steps in found], dtype=float)  # None becomes NaN


def _heat_map(figure: Figure, axes: Axes, rows: Rows) -> None:
    iterations, variance = _per_step(rows, "explained_variance_per_step")
    axes.set_title("Explained variance of the critic in training", pad=16)
    axes.set_xlabel("iteration")
    axes.set_ylabel("denoising step (noisy → clean)")
    axes.grid(False)
    if not iterations:
        axes.text(0.5, 0.5, "no explained variance logged", ha="center", va="center", transform=axes.transAxes)
        return
    steps = variance.shape[1]
    edges = np.concatenate([[iterations[0] - 0.5], np.add(iterations[1:], iterations[:-1]) / 2, [iterations[-1] + 0.5]])
    mesh = axes.pcolormesh(
        edges, np.arange(steps + 1) + 0.5, np.ma.masked_invalid(variance.T),
        cmap=_EV_COLORS, vmin=_EV_LOW, vmax=_EV_HIGH,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(8, **_WHOLE))
    axes.yaxis.set_major_locator(MaxNLocator(10, **_WHOLE))
    pretraining = _pretraining(rows)
    if pretraining and pretraining[1] < edges[-1]:
        axes.axvline(pretraining[1], color="black", linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            "PPO starts", (pretraining[1], 1), (3, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, va="bottom", annotation_clip=False,
        )  # fmt: skip
    bar = figure.colorbar(mesh, ax=axes, extend="min", pad=0.02, aspect=28)
    bar.set_ticks([-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1.0])
    bar.outline.set_visible(False)


def _profile(axes: Axes, rows: Rows) -> None:
    """Explained variance per step at the end of the run, training samples and held-out ones."""
    axes.axvline(0, color="#888888", linewidth=0.8)
    for key, label, color in (
        ("explained_variance_per_step", "training samples", VERMILION),
        ("eval/explained_variance_per_step", "held-out", ORANGE),
    ):
        iterations, variance = _per_step(rows, key)
        if iterations:
            steps = np.arange(1, variance.shape[1] + 1)
            label = f"{label}, iteration {iterations[-1]}"
            axes.plot(variance[-1], steps, color=color, marker="o", markersize=4, label=label)
    axes.set_title("At the end", pad=16)
    axes.set_xlabel("explained variance")
    axes.set_xlim(max(axes.get_xlim()[0], -0.5), 1.0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _explained_variance(values: np.ndarray, rewards: np.ndarray) -> float:
    variance = rewards.var()
    return float(1 - (rewards - values).var() / variance) if variance > 0 else math.nan


def _scatter(axes: Axes, values: np.ndarray, rewards: np.ndarray, limits: tuple[float, float]) -> None:
    axes.plot(limits, limits, color="#666666", linewidth=1.0, linestyle=(0, (4, 3)), label="perfect prediction")
    alpha = float(np.clip(150 / max(1, len(rewards)), 0.15, 0.6))
    axes.scatter(values, rewards, s=12, color=VERMILION, alpha=alpha, linewidths=0, label="one sample")
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_box_aspect(1)
    axes.set_xlabel("predicted value")


def plot_critic(rows: Rows, scatter: dict[str, Any] | None, path: str | os.PathLike) -> None:
    """Draw what the critic knows: explained variance per denoising step, and predictions against outcomes.

    Args:
        rows: rows of metrics with `explained_variance_per_step` (and `eval/explained_variance_per_step`).
        scatter: `values [N, K]` of one reward's head and that reward `rewards [N]` in the same unit, from the same N
            samples; None leaves the right side out.
        path: the PNG to write.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.4 if scatter is None else 9.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        top, bottom = (figure, None) if scatter is None else figure.subfigures(2, 1, height_ratios=(4.2, 5.0))
        left, right = top.subplots(1, 2, width_ratios=(3.2, 1), sharey=True)
        _heat_map(top, left, rows)
        _profile(right, rows)
        if bottom is not None:
            values = np.asarray(scatter["values"], dtype=float)
            rewards = np.asarray(scatter["rewards"], dtype=float)
            low, high = min(values.min(), rewards.min()), max(values.max(), rewards.max())
            margin = 0.05 * (high - low) or 1.0
            steps = sorted({0, values.shape[1] // 2, values.shape[1] - 1})
            grid = bottom.subplots(1, len(steps), sharey=True, squeeze=False)[0]
            for axes, step in zip(grid, steps, strict=True):
                _scatter(axes, values[:, step], rewards, (low - margin, high + margin))
                variance = _explained_variance(values[:, step], rewards)
                axes.set_title(f"Step {step + 1} of {values.shape[1]}: explained variance {variance:.2f}")
            grid[0].set_ylabel("final reward")
            handles, labels = grid[0].get_legend_handles_labels()
            bottom.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.savefig(path)


# ---- pictures -------------------------------------------------------------------------------------------------------

_RIGHT, _WRONG = (26, 152, 80), (215, 48, 39)
_INK, _MUTED, _PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
_MIN_SIDE = 128  # pixels
_BORDER = 4
_GAP = 10
_CAPTION_SIZE = 12
_LINE_HEIGHT = 15
_KEY_WIDTH = 420  # what the key of the border colours needs


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    properties = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(properties), size)


def _tiles(images: Any, marks: Sequence[bool] | None) -> list[Image.Image]:
    """Pictures at 128 pixels a side or more, each with room for a border, which is coloured where marks are given."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    if not len(images):
        raise ValueError("images must hold at least one picture")
    scale = max(1, math.ceil(_MIN_SIDE / min(images.shape[1:3])))
    colors = [_PAPER] * len(images) if marks is None else [_RIGHT if mark else _WRONG for mark in marks]
    tiles = []
    for image, color in zip(images, colors, strict=True):
        picture = Image.fromarray(image)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (picture.width + 2 * _BORDER, picture.height + 2 * _BORDER), color)
        tile.paste(picture, (_BORDER, _BORDER))
        tiles.append(tile)
    return tiles


def _wrap(text: str, width: float, font: ImageFont.FreeTypeFont, most: int = 2) -> list[str]:
    """At most `most` lines no wider than `width` pixels; what does not fit ends in an ellipsis."""
    words, lines = text.split(), []
    while words and len(lines) < most:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(" ".join(words[:taken]))
        words = words[taken:]
    for i, line in enumerate(lines):
        cut = bool(words) and i == len(lines) - 1
        while len(line) > 1 and font.getlength(line + "…" * cut) > width:
            line, cut = line[:-1], True
        lines[i] = line.rstrip() + "…" * cut
    return lines


def _write_caption(pen: ImageDraw.ImageDraw, caption: str, center: float, top: int, width: int) -> None:
    font = _font(_CAPTION_SIZE)
    for i, line in enumerate(_wrap(caption, width, font)):
        pen.text((center, top + i * _LINE_HEIGHT), line, fill=_INK, font=font, anchor="ma")


def save_grid(
    images: Any,
    captions: Sequence[str],
    path: str | os.PathLike,
    columns: int = 8,
    marks: Sequence[bool] | None = None,
) -> None:
    """Write pictures as one PNG with a caption beneath each.

    Args:
        images: uint8 `[N, H, W, 3]`, tensor or array; small ones are enlarged by a whole factor.
        captions: N texts, cut to two lines.
        path: the PNG to write.
        columns: pictures in a row.
        marks: N answers to "is it strictly right?": a green border where it is, a red one where not.
    """
    tiles = _tiles(images, marks)
    columns = min(columns, len(tiles))
    cell_width = tiles[0].width + _GAP
    cell_height = tiles[0].height + 4 + 2 * _LINE_HEIGHT + _GAP
    sheet = Image.new(
        "RGB", (columns * cell_width + _GAP, math.ceil(len(tiles) / columns) * cell_height + _GAP), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = _GAP + i % columns * cell_width, _GAP + i // columns * cell_height
        sheet.paste(tile, (left, top))
        _write_caption(pen, caption, left + tile.width / 2, top + tile.height + 4, tile.width + _GAP - 2)
    sheet.save(path)


def _row_label(name: str, marks: Sequence[bool] | None, length: int) -> Image.Image:
    """A name, with the score beneath it, to be read from bottom to top along `length` pixels."""
    strip = Image.new("RGB", (length, 36), _PAPER)
    pen = ImageDraw.Draw(strip)
    pen.text((length / 2, 0), name, fill=_INK, font=_font(14, bold=True), anchor="ma")
    if marks is not None:
        score = f"{sum(map(bool, marks))} of {len(marks)} right"
        pen.text((length / 2, 19), score, fill=_MUTED, font=_font(11), anchor="ma")
    return strip.rotate(90, expand=True)


def comparison(
    before: Any,
    after: Any,
    captions: Sequence[str],
    marks_before: Sequence[bool] | None,
    marks_after: Sequence[bool] | None,
    path: str | os.PathLike,
    title: str,
    columns: int = 8,
) -> None:
    """Write one PNG with the pictures before training above those after it, same prompt and seed in each column.

    Args:
        before, after: uint8 `[N, H, W, 3]`, tensors or arrays of one shape.
        captions: N prompts.
        marks_before, marks_after: N answers to "is it strictly right?", or None.
        path: the PNG to write.
        title: the heading.
        columns: pairs in a row; more of them go to a further pair of rows.
    """
    pairs = list(zip(_tiles(before, marks_before), _tiles(after, marks_after), captions, strict=True))
    columns = min(columns, len(pairs))
    blocks = math.ceil(len(pairs) / columns)
    width, height = pairs[0][0].size
    margin, left_edge = 14, 54
    sheet_width = max(left_edge + columns * (width + _GAP) - _GAP + margin, _KEY_WIDTH)
    heading = _wrap(title, sheet_width - 2 * margin, _font(17, bold=True), most=4)
    head = margin + 24 * len(heading) + (30 if marks_before is not None else 8)
    block = 2 * height + 10 + 2 * _LINE_HEIGHT + 16
    sheet = Image.new("RGB", (sheet_width, head + blocks * block), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        pen.text((margin, margin + 24 * i), line, fill=_INK, font=_font(17, bold=True))
    if marks_before is not None:
        x, y = margin, head - 24
        for color, meaning in ((_RIGHT, "everything in the prompt is right"), (_WRONG, "something is wrong")):
            pen.rectangle((x, y, x + 11, y + 11), outline=color, width=3)
            pen.text((x + 18, y + 6), meaning, fill=_MUTED, font=_font(12), anchor="lm")
            x += 18 + int(_font(12).getlength(meaning)) + 20
    for i, (first, second, caption) in enumerate(pairs):
        left, top = left_edge + i % columns * (width + _GAP), head + i // columns * block
        sheet.paste(first, (left, top))
        sheet.paste(second, (left, top + height + 6))
        _write_caption(pen, caption, left + width / 2, top + 2 * height + 10, width + _GAP - 2)
    for i in range(blocks):
        rows = slice(i * columns, (i + 1) * columns)
        for offset, name, marks in ((0, "before", marks_before), (height + 6, "after", marks_after)):
            label = _row_label(name, None if marks is None else marks[rows], height)
            sheet.paste(label, (margin - 2, head + i * block + offset))
    sheet.save(path)
