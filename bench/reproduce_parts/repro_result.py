"""What is kept of a run: its result as JSON, and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from repro_grid import Run
from repro_places import Places, recipe_of

from latent_critic.engine.metrics import read_metrics

PRETRAINING = "value_pretraining"
PICTURES = 8  # of a strip


def collect(run: Run, places: Places, about: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that has ended, out of its folder. Raises ValueError where the folder lacks something."""
    folder = places.run_folder(run)
    rows = read_metrics(folder)
    config = run.variant.config
    expected = config["training"]["value_pretraining_iterations"] + config["training"]["iterations"]
    done = [row for row in rows if "phase" in row]
    if len(done) != expected:
        raise ValueError(f"{folder}: {len(done)} iterations in metrics.jsonl, expected {expected}")
    usual = usual_seconds([row["phase"] for row in done], [row["seconds"] for row in done])
    return {
        "variant": run.variant.name,
        "seed": run.seed,
        "group": run.variant.group,
        "model": run.variant.model,
        "overrides": run.variant.own_overrides,
        **about,
        "config": {key: value for key, value in recipe_of(run, places).items() if key != "output_dir"},
        "seconds": _short(sum(usual[row["phase"]] for row in done)),
        "iteration_seconds": _short(next(seconds for phase, seconds in usual.items() if phase != PRETRAINING)),
        "training": _training(done),
        "evaluations": _evaluations(rows, folder, usual),
        "prompts": _prompts(folder)[:PICTURES],
    }


def usual_seconds(phases: Sequence[str], seconds: Sequence[float]) -> dict[str, float]:
    """The median of a phase's iterations. A run's clock counts each as that: on a shared machine some wait for others,
    and a run that is paused goes on."""
    return {
        phase: median(s for p, s in zip(phases, seconds, strict=True) if p == phase) for phase in dict.fromkeys(phases)
    }


def _training(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lists over iterations; explained variance is None without a critic."""
    names = [key for key in rows[0] if key.startswith("reward/") and not key.endswith("_std")]
    return {
        "phase": [row["phase"] for row in rows],
        "seconds": _short([row["seconds"] for row in rows]),
        "reward": {key.removeprefix("reward/"): _short([row[key] for row in rows]) for key in names},
        "explained_variance_per_step": [_short(row.get("explained_variance_per_step")) for row in rows],
    }


def _evaluations(rows: Sequence[dict[str, Any]], folder: Path, usual: dict[str, float]) -> list[dict[str, Any]]:
    """Each with the images and the usual seconds of the training before it."""
    found, images, seconds = [], 0, 0.0
    for row in rows:
        images, seconds = images + row.get("samples", 0), seconds + usual.get(row.get("phase"), 0.0)
        names = [key.removesuffix("_stderr") for key in row if key.startswith("eval/") and key.endswith("_stderr")]
        if not names:
            continue
        tasks = {key.removeprefix("eval/task/"): row[key] for key in row if key.startswith("eval/task/")}
        found.append(
            {
                "iteration": row["iteration"],
                "images": images,
                "seconds": _short(seconds),
                "scores": {
                    key.removeprefix("eval/"): {"mean": _short(row[key]), "stderr": _short(row[f"{key}_stderr"])}
                    for key in names
                },
                "strict_by_task": {task: _short(value) for task, value in tasks.items()},
                "explained_variance_per_step": _short(row.get("eval/explained_variance_per_step")),
                "squared_error_per_step": _squared_error(_kept(folder, row["iteration"])),
            }
        )
    return found


def _squared_error(kept: Any) -> list[float] | None:
    """Mean over held-out samples of (value - what was earned)^2 by step, in squared standard deviations of the reward
    (of several rewards: of their means); None without a critic."""
    if "values" not in kept or not kept["values"].size:
        return None
    errors = (kept["values"] - kept["rewards"][:, None]).astype(np.float64) ** 2
    return _short(errors.mean(0).tolist())


def _kept(folder: Path, iteration: int) -> Any:
    return np.load(folder / "evaluations" / f"iteration-{iteration:06d}.npz")


def _prompts(folder: Path) -> list[str]:
    first = min((folder / "evaluations").glob("iteration-*.json"))
    return json.loads(first.read_text())["prompts"]


def _short(value: Any) -> Any:
    """To six digits, which is more than a metric has."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value if value is None else float(f"{value:.6g}")


def save_strips(run: Run, places: Places) -> None:
    """The first held-out pictures after the run, and of `ours` those before it too."""
    evaluations = sorted((places.run_folder(run) / "evaluations").glob("iteration-*.npz"))
    _save_strip(evaluations[-1], places.pictures(run.variant.name))
    if is_baseline(run):
        _save_strip(evaluations[0], places.pictures(f"{run.variant.name}-before"))


def _save_strip(evaluation: Path, path: Path) -> None:
    pictures = np.load(evaluation)["images"][:PICTURES]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(pictures), 1)).save(path)


def is_baseline(run: Run) -> bool:
    return run.variant.name in ("ours", "unet-ours")
