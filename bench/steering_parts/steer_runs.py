"""The two models that are steered, and the runs that make them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("base", "trained")
RECIPE = ROOT / "configs" / "zero3_dit.json"
# Critic and policy are trained as the recipe says; of the base model the critic alone, on as many pictures.
CHANGES = {
    "base": ["training.iterations=0", "training.value_pretraining_iterations=40"],
    "trained": [],
}


def find_run(model: str, given: Path | None) -> Path:
    """The run folder, made first if it is not there."""
    if given is not None:
        return given
    folder = ROOT / "runs" / "steering" / model
    if not (folder / "critic.safetensors").is_file():
        changes = [f"output_dir={folder}", "logging.tensorboard=false", *CHANGES[model]]
        sets = [part for change in changes for part in ("--set", change)]
        print(f"training {model} first: {folder}", flush=True)
        command = [sys.executable, str(ROOT / "engine" / "train.py"), "--config", str(RECIPE), "--resume", "auto"]
        subprocess.run([*command, *sets], check=True)
    return folder
