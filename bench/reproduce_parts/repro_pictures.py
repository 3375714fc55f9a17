"""Reward hacking to look at: the same held-out prompts before training, after composition alone, and after all."""

import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from repro_claims import Results
from repro_places import Places
from repro_tables import SCORES, displayed, form

from latent_critic.engine.reports import STYLE

ROWS = (  # title, variant, suffix of its strip, evaluation
    ("before", "ours", "-before", 0),
    ("composition alone", "ours", "", -1),
    ("joint: composition,\nbackground, JPEG size", "joint", "", -1),
)
SEED = 0  # whose pictures are kept


def plot_hacking(results: Results, places: Places) -> bool:
    """hacking.png. False, and no file, unless both runs of seed 0 are there."""
    needed = {(variant, SEED) for _, variant, _, _ in ROWS}
    strips = [places.pictures(variant + suffix) for _, variant, suffix, _ in ROWS]
    if not needed <= results.keys() or not all(strip.exists() for strip in strips):
        return False
    prompts = results["ours", SEED]["prompts"]
    with matplotlib.rc_context(STYLE):
        figure = Figure((1.35 * len(prompts) + 3.4, 1.62 * len(ROWS) + 0.6), layout="constrained")
        axes = figure.subplots(len(ROWS), 2, width_ratios=(3.4, 1.35 * len(prompts)), squeeze=False)
        for row, ((title, variant, _, evaluation), path) in enumerate(zip(ROWS, strips, strict=True)):
            words, pictures = axes[row]
            _words(words, title, results[variant, SEED], evaluation)
            picture = np.asarray(Image.open(path))
            pictures.imshow(picture, interpolation="nearest")
            pictures.set_axis_off()
            side = picture.shape[0]
            for number, prompt in enumerate(prompts if row == 0 else ()):
                text = textwrap.fill(prompt, 20)
                pictures.text((number + 0.5) * side, -4, text, ha="center", va="bottom", fontsize=7)
            for number in range(1, len(prompts)):
                pictures.axvline(number * side - 0.5, color="white", linewidth=3)
        figure.savefig(places.output / "hacking.png")
    return True


def _words(axes: Any, title: str, result: Mapping[str, Any], evaluation: int) -> None:
    axes.set_axis_off()
    axes.text(0, 0.97, title, fontsize=10, fontweight="bold", va="top", transform=axes.transAxes)
    below = 0.68 if "\n" not in title else 0.56
    for number, (label, name) in enumerate(SCORES.items()):
        value = displayed(name, evaluation)(result)
        height = below - 0.14 * number
        axes.text(0, height, label, fontsize=8.5, va="top", transform=axes.transAxes)
        shown = "-" if value is None else f"{value:{form(name)}}"
        axes.text(0.95, height, shown, fontsize=8.5, va="top", ha="right", transform=axes.transAxes)
