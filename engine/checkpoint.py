"""Checkpoints for resuming (DeepSpeed's own shards) and exports for everyone else (safetensors, diffusers folders).

A checkpoint is complete or invisible: it is written under a hidden name and renamed when every byte is on disk.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .actor_critic import ActorCritic
from .errors import TrainingError, UserError
from .sharding import World, gather_state

KEPT = 2  # the newest, and the one before it


class CheckpointStore:
    """The `checkpoints` folder of a run. Every rank calls every method."""

    def __init__(self, run_dir: Path, world: World, model: ActorCritic):
        self.folder, self.world = run_dir / "checkpoints", world
        self._shapes = signature(model)

    def latest(self) -> int | None:
        """The iteration of the newest complete checkpoint, None where there is none."""
        found = [int(p.name.removeprefix("iteration-")) for p in self.folder.glob("iteration-*") if p.is_dir()]
        return max(found, default=None)

    def save(self, engine: DeepSpeedEngine, iteration: int, state: dict[str, Tensor]) -> None:
        """Weights, optimizer and `state` (small tensors, the same on every rank) after `iteration` iterations."""
        name, hidden = f"iteration-{iteration:06d}", f".writing-{iteration:06d}"
        if self.world.is_main:
            for left in self.folder.glob(".writing-*"):  # of a run that was killed here
                shutil.rmtree(left)
            (self.folder / hidden).mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag=hidden, save_latest=False)
        dist.barrier()
        if self.world.is_main:
            save_file(state, self.folder / hidden / "run_state.safetensors")
            about = {"iteration": iteration, "world_size": self.world.size, "signature": self._shapes}
            (self.folder / hidden / "run_state.json").write_text(json.dumps(about))
            _sync(self.folder / hidden)
            os.replace(self.folder / hidden, self.folder / name)
            _sync_folder(self.folder)
            for old in sorted(self.folder.glob("iteration-*"))[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, engine: DeepSpeedEngine, iteration: int) -> dict[str, Tensor]:
        """Restores the engine and returns `state`. Raises UserError for a checkpoint of another model or world size."""
        folder = self.folder / f"iteration-{iteration:06d}"
        about = json.loads((folder / "run_state.json").read_text())
        if about["signature"] != self._shapes:
            raise UserError(
                f"{folder} was written by another model (its parameters have other names or shapes); resume with the "
                "model.pretrained, critic and rewards of its run, which stand in config.json beside it"
            )
        if about["world_size"] != self.world.size:
            raise UserError(
                f"{folder} was written by {about['world_size']} processes, this run has {self.world.size}; "
                f"resume with deepspeed --num_gpus {about['world_size']}"
            )
        engine.load_checkpoint(str(self.folder), tag=folder.name)
        return load_file(folder / "run_state.safetensors")


def export(run_dir: Path, model: ActorCritic, world: World) -> None:
    """`pipeline/`, a stock diffusers folder of the trained model, and `critic.safetensors`."""
    trunk, critic = gather_state(model.trunk, world), gather_state(model.critic, world)
    if not world.is_main:
        return
    partial = run_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.backbone.save(trunk, partial)
    shutil.rmtree(run_dir / "pipeline", ignore_errors=True)
    os.replace(partial, run_dir / "pipeline")
    about = {"taps": json.dumps(model.tap_indices), "rewards": json.dumps(model.reward_names)}
    save_file({name: t.contiguous() for name, t in critic.items()}, run_dir / "critic.safetensors", about)


def signature(model: ActorCritic) -> str:
    """A digest of every parameter's name and (unsharded) shape."""
    shapes = [(name, list(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk into one message, whoever meets it. torch's archive writer does not say what hindered it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        archive = isinstance(error, RuntimeError) and any(s in str(error) for s in ("inline_container", "iostream"))
        if not (no_space or archive or "No space left" in str(error)):
            raise
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        raise TrainingError(
            f"the disk is full ({free:.0f} MiB free) while writing to {folder}; earlier checkpoints are untouched. "
            "Free some space and go on with --resume auto"
        ) from error


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
