"""Where a run writes, and where its result goes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro_grid import Run
from repro_recipe import difference


class Mistake(Exception):
    """What the user can repair: one message, exit code 2."""


@dataclass(frozen=True)
class Places:
    """output: results, to be kept; runs: run folders, each beside its recipe and its log in a folder of its own."""

    output: Path
    runs: Path

    def result(self, run: Run) -> Path:
        return self.output / "runs" / f"{run.name}.json"

    def pictures(self, name: str) -> Path:
        return self.output / "runs" / f"{name}.png"

    def folder(self, run: Run) -> Path:
        return self.runs / run.name

    def run_folder(self, run: Run) -> Path:
        return self.folder(run) / "run"

    def recipe(self, run: Run) -> Path:
        return self.folder(run) / "recipe.json"

    def log(self, run: Run) -> Path:
        return self.folder(run) / "log.txt"


def recipe_of(run: Run, places: Places) -> dict[str, Any]:
    """What `engine/train.py` is given."""
    return {"seed": run.seed, "output_dir": str(places.run_folder(run)), **run.variant.config}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A line for each key, so that a file of long lists stays readable. Whole, or not at all."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("{\n" + lines + "\n}\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise Mistake(f"{path}: not valid JSON (line {error.lineno}); delete it, and its run is repeated") from None


def result_of(run: Run, places: Places) -> dict[str, Any] | None:
    """The result of a finished run; None where there is none yet."""
    path = places.result(run)
    return read_json(path) if path.exists() else None


def other_settings(run: Run, config: dict[str, Any]) -> str:
    """How a configuration that was run differs from the grid's, in words; empty where it does not."""
    now = run.variant.config
    found = difference({k: v for k, v in config.items() if k not in ("seed", "output_dir")}, now)
    return ", ".join(f"{key} {json.dumps(then)} (now {json.dumps(value)})" for key, (then, value) in found.items())


def check_settings(runs: list[Run], places: Places) -> None:
    """Raises Mistake where results or unfinished runs are of other settings than the grid has now."""
    for run in runs:
        result, recipe = places.result(run), places.recipe(run)
        path, config = None, {}
        if result.exists():
            path, config = result, read_json(result)["config"]
        elif recipe.exists():
            path, config = places.folder(run), read_json(recipe)
        if path and (words := other_settings(run, config)):
            raise Mistake(f"{path} was made with other settings: {words}; move it away, or give other folders")
