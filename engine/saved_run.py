"""A run folder read back: its configuration, and the policy that it trained."""

from pathlib import Path

import torch

from .backbones import Backbone, load_backbone
from .config import Config, load_config
from .errors import UserError


class SavedRun:
    """A folder that the trainer wrote. Raises UserError where it holds no run."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no run there (no config.json); give the folder that a run printed at its start")
        self.folder = folder
        self.config: Config = load_config(folder / "config.json")

    def checkpoint(self, iteration: int | None = None) -> Path:
        """The folder of a checkpoint; None is the newest."""
        found = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if not found:
            raise UserError(f"{self.folder}: no checkpoint there yet")
        if iteration is None:
            return found[-1]
        chosen = self.folder / "checkpoints" / f"iteration-{iteration:06d}"
        if chosen not in found:
            kept = ", ".join(str(int(path.name.removeprefix("iteration-"))) for path in found)
            raise UserError(f"--iteration {iteration}: {self.folder} has checkpoints of iterations {kept}")
        return chosen

    def backbone(self, dtype: torch.dtype, resolution: int | None = None) -> Backbone:
        """With the trained weights: those of `pipeline/`, or the base model's with `lora/`.

        resolution: in place of the run's own.
        """
        model = self.config.model
        trained, lora = self.folder / "pipeline", self.folder / "lora"
        if not trained.is_dir() and not lora.is_dir():
            raise UserError(
                f"{self.folder}: the run has not ended, so there is no pipeline/ or lora/ yet; "
                f"python engine/export.py {self.folder} makes one of its newest checkpoint"
            )
        source = str(trained) if trained.is_dir() else model.pretrained
        found = load_backbone(source, model.max_sequence_length, resolution or model.resolution, dtype)
        if not trained.is_dir():
            found.pipe.load_lora_weights(lora)
        return found
