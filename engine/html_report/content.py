"""What the report of a run says, read from the run folder: plain texts and pictures, which the template lays out."""

import base64
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from .. import reports
from ..config import Config, load_config
from ..early_stop import EarlyStop
from ..errors import UserError
from ..metrics import read_metrics
from ..model_card import describe_recipe
from ..saved_evaluations import SavedEvaluation, paired_difference, read_evaluations

PICTURES = 16  # of an evaluation
EVALUATIONS = 24  # whose pictures are shown: of more, so many from the first to the last
ENLARGED = 128  # pixels a side: smaller pictures are enlarged, and then keep their pixels

MONITORS = {  # name -> unit, and what a drift means
    "diversity": (
        "levels between two pictures",
        "falls where pictures go flat, or those of different prompts become alike",
    ),
    "edge_density": ("share of pixels", "falls where pictures are flattened, rises with texture and noise"),
    "color_entropy": ("bits a picture, 0 to 9", "falls where palettes collapse, rises with noise and garish colours"),
    "sharpness": ("variance of the Laplacian", "falls with blur, rises with over-sharpening, halos and grids"),
}


@dataclass(frozen=True)
class Change:
    """A held-out number at the first and at the last evaluation."""

    name: str
    note: str
    before: float
    after: float
    change: str


@dataclass(frozen=True)
class Tile:
    source: str  # a data URL
    prompt: str
    is_right: bool | None  # strictly; None where nobody judged that


@dataclass(frozen=True)
class Sheet:
    """The first held-out pictures after an iteration."""

    iteration: int
    note: str
    tiles: list[Tile]


@dataclass(frozen=True)
class Content:
    name: str
    status: str
    recipe: dict[str, str]
    results: list[Change]
    settings: str  # of the evaluations
    monitors: list[Change]
    early_stop: EarlyStop | None
    verdict: str
    panels: dict[str, str]  # title -> data URL of a plot
    critic: str | None  # data URL of critic.png
    sheets: list[Sheet]
    pixelated: bool  # small pictures, which are enlarged
    config: str
    written: str


def read_content(run_dir: Path) -> Content:
    """Raises UserError where the folder holds no run."""
    if not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir}: no run there (no config.json); give the folder that a run printed at its start")
    config = load_config(run_dir / "config.json")
    rows, evaluations = read_metrics(run_dir), read_evaluations(run_dir)
    options = config.evaluation.early_stop
    stop = EarlyStop.over(options, evaluations) if options else None
    if stop and not stop.judged:
        stop = None
    sheets = [_sheet(it, evaluations, stop) for it in _spread(evaluations, EVALUATIONS)]
    panels = {title: _data_url(file, "svg+xml") for title, file in reports.panels_as_svg(rows).items()}
    critic = run_dir / "critic.png"
    return Content(
        name=run_dir.resolve().name,
        status=_status(config, rows, stop),
        recipe=describe_recipe(config),
        results=_results(config, evaluations),
        settings=_settings(evaluations),
        monitors=_monitors(rows),
        early_stop=stop,
        verdict=stop.describe(is_kept=(run_dir / "best").is_dir()) if stop else "",
        panels=panels,
        critic=_data_url(critic.read_bytes(), "png") if critic.is_file() else None,
        sheets=sheets,
        pixelated=bool(evaluations) and max(evaluations[0].thumbnails.shape[1:3]) < ENLARGED,
        config=json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False),
        written=_written(),
    )


def _status(config: Config, rows: Sequence[dict], stop: EarlyStop | None) -> str:
    training = config.training
    total = training.value_pretraining_iterations + training.iterations
    done = rows[-1]["iteration"] if rows else 0
    if done >= total:
        return f"Ended after {done} iterations."
    if stop and stop.fired:
        return f"Stopped early, after {done} of {total} iterations."
    return f"{done} of {total} iterations done: still running, or interrupted."


def _results(config: Config, evaluations: Sequence[SavedEvaluation]) -> list[Change]:
    if not evaluations:
        return []
    first, last = evaluations[0].scores, evaluations[-1].scores
    trained, found = [reward.name for reward in config.rewards], []
    for name in (name for name in first if name in last):
        change, error = paired_difference(first[name], last[name])
        note = "trained" if name in trained else "only watched"
        found.append(Change(name, note, first[name].mean(), last[name].mean(), f"{change:+.4f} ± {error:.4f}"))
    return found


def _settings(evaluations: Sequence[SavedEvaluation]) -> str:
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    settings = first.settings
    return (
        f"{len(first.prompts)} held-out prompts ({settings['prompts']}), {settings['num_inference_steps']} ODE steps, "
        f"guidance {settings['guidance_scale']:g}, seed {settings['seed']}; before the run and after iteration "
        f"{last.iteration}. The error is that of the paired differences: prompts and noise are the same."
    )


def _monitors(rows: Sequence[dict]) -> list[Change]:
    found = []
    for name, (unit, meaning) in MONITORS.items():
        values = [row[f"eval/monitor/{name}"] for row in rows if f"eval/monitor/{name}" in row]
        if values:
            first, last = values[0], values[-1]
            change = f"{last / first - 1:+.0%}" if first else "–"
            found.append(Change(name.replace("_", " "), f"{unit}; {meaning}", first, last, change))
    return found


def _spread(evaluations: Sequence[SavedEvaluation], most: int) -> list[SavedEvaluation]:
    """At most so many, evenly from the first to the last."""
    if len(evaluations) <= most:
        return list(evaluations)
    return [evaluations[i] for i in np.linspace(0, len(evaluations) - 1, most).round().astype(int)]


def _sheet(evaluation: SavedEvaluation, all_of_them: Sequence[SavedEvaluation], stop: EarlyStop | None) -> Sheet:
    images = evaluation.thumbnails[:PICTURES]
    marks = evaluation.marks(len(images)) or [None] * len(images)
    shown = zip(images, evaluation.prompts[: len(images)], marks, strict=True)
    notes = ["before training"] if evaluation is all_of_them[0] else []
    notes += ["the best, by the early stop's reward"] if stop and stop.best.iteration == evaluation.iteration else []
    tiles = [Tile(_data_url(_jpeg(image), "jpeg"), prompt, mark) for image, prompt, mark in shown]
    return Sheet(evaluation.iteration, ", ".join(notes), tiles)


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=88, subsampling=0)
    return file.getvalue()


def _data_url(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _written() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "deepspeed"))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{now} by latent-critic {version('latent-critic')} (Python {platform.python_version()}, {versions})"
