"""The evaluations of a run, read back from its folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SavedEvaluation:
    """One evaluation of P prompts: `iteration-NNNNNN.json`, with pictures and the critic's numbers beside it."""

    iteration: int
    settings: dict[str, Any]  # that repeat it
    prompts: list[str]
    scores: dict[str, np.ndarray]  # float64 [P] by reward; of the same prompts and noise in all evaluations of a run
    path: Path

    @property
    def arrays(self) -> Any:
        """`images` uint8 [S, H, W, 3] of the first S prompts, and with a critic `values` [P, K] and `rewards` [P]."""
        return np.load(self.path.with_suffix(".npz"))

    @property
    def thumbnails(self) -> np.ndarray:
        """uint8 [S, h, w, 3]: the pictures, large ones shrunk; no full ones are read then."""
        with self.arrays as arrays:
            return arrays["thumbnails" if "thumbnails" in arrays else "images"]

    def marks(self, count: int) -> list[bool] | None:
        """Are the first `count` samples strictly right? None where nobody judged that."""
        return strictly_right(self.scores, count)


def strictly_right(scores: dict[str, Sequence[float]], count: int) -> list[bool] | None:
    """The same of scores by reward."""
    strict = scores.get("composition_strict")
    return None if strict is None else [bool(score == 1.0) for score in strict[:count]]


def read_evaluations(run_dir: Path, last: int | None = None) -> list[SavedEvaluation]:
    """In order of their iterations; last: the iteration after which none is wanted, as where a run goes on."""
    paths = sorted((run_dir / "evaluations").glob("iteration-*.json"))
    return [_read(path) for path in paths if last is None or _iteration(path) <= last]


def drop_evaluations(run_dir: Path, after: int) -> None:
    """Of a run that goes on from this iteration: what it evaluated later comes again, and may end before that."""
    for path in (run_dir / "evaluations").glob("iteration-*"):
        if _iteration(path) > after:
            path.unlink()


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Mean of after - before, and its standard error, of scores [P] of the same prompts and noise.

    What differs between prompts cancels in the pairs, so the error is that of the change alone.
    """
    change = after - before
    return float(change.mean()), float(change.std(ddof=1) / len(change) ** 0.5)


def _read(path: Path) -> SavedEvaluation:
    content = json.loads(path.read_text())
    scores = {name: np.array(column, dtype=np.float64) for name, column in content["scores"].items()}
    return SavedEvaluation(_iteration(path), content["settings"], content["prompts"], scores, path)


def _iteration(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("iteration-"))
