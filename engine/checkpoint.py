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
from .config import Config
from .critic_file import describe_critic
from .errors import TrainingError, UserError
from .model_card import write_model_card
from .reward_stats import critic_units
from .sharding import gather_state
from .world import World

KEPT = 2  # the newest, and the one before it


class CheckpointStore:
    """The `checkpoints` folder of a run. Every rank calls every method."""

    def __init__(self, run_dir: Path, world: World, model: ActorCritic):
        self.folder, self.world = run_dir / "checkpoints", world
        self._shapes = signature(model)
        self._dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self._own = f"run_state_rank{world.rank}.safetensors"

    def latest(self) -> int | None:
        """The iteration of the newest complete checkpoint, None where there is none."""
        found = [int(p.name.removeprefix("iteration-")) for p in self.folder.glob("iteration-*") if p.is_dir()]
        return max(found, default=None)

    def save(
        self, engine: DeepSpeedEngine, iteration: int, state: dict[str, Tensor], here: dict[str, Tensor] | None = None
    ) -> None:
        """Weights, optimizer, `state` (small tensors, the same on every rank) and `here` (each rank's own) after
        `iteration` iterations."""
        name, hidden = f"iteration-{iteration:06d}", f".writing-{iteration:06d}"
        if self.world.is_main:
            for left in self.folder.glob(".writing-*"):  # of a run that was killed here
                shutil.rmtree(left)
            (self.folder / hidden).mkdir(parents=True)
        dist.barrier()
        # A policy that rests just now would count as frozen. What is frozen is the base model's and stays there.
        for parameter in engine.policy_parameters:
            parameter.requires_grad_()
        engine.save_checkpoint(str(self.folder), tag=hidden, save_latest=False, exclude_frozen_parameters=True)
        if here:
            save_file(here, self.folder / hidden / self._own)
        dist.barrier()
        if self.world.is_main:
            save_file(state, self.folder / hidden / "run_state.safetensors")
            about = {
                "iteration": iteration,
                "world_size": self.world.size,
                "signature": self._shapes,
                "dtype": self._dtype,
            }
            (self.folder / hidden / "run_state.json").write_text(json.dumps(about))
            _sync(self.folder / hidden)
            os.replace(self.folder / hidden, self.folder / name)
            _sync_folder(self.folder)
            for old in sorted(self.folder.glob("iteration-*"))[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, engine: DeepSpeedEngine, iteration: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Restores the engine and returns `state` and `here`.

        Raises UserError for a checkpoint of another model or world size.
        """
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
        engine.load_checkpoint(
            str(self.folder), tag=folder.name, load_module_strict=False
        )  # what is frozen is not there
        own = folder / self._own
        return load_file(folder / "run_state.safetensors"), load_file(own) if own.exists() else {}


def export(
    folder: Path,
    model: ActorCritic,
    config: Config,
    run_dir: Path,
    merge: bool = False,
    state: dict[str, Tensor] | None = None,
) -> None:
    """The trained policy with a model card, and the critic: `critic.safetensors`, its own trunk `critic_trunk/`.

    `pipeline/` is a stock diffusers folder; of a LoRA run `lora/` is what `load_lora_weights` takes, unless `merge`
    asks for a pipeline. state: the algorithm's, for the critic's units. Every rank calls it, or one process with the
    whole model.
    """
    trunk, critic = gather_state(model.trunk), {}
    if model.critic is not None:
        critic = gather_state(model.critic)
    if model.pixels is not None:
        critic |= {f"pixels.{name}": tensor for name, tensor in gather_state(model.pixels).items()}
    critic_trunk = None if model.critic_trunk is None else gather_state(model.critic_trunk)
    if not trunk:
        return  # another rank writes
    backbone = model.backbone
    if config.model.lora and not merge:
        name, save = "lora", backbone.save_lora
    else:
        name, save = "pipeline", backbone.save
    with _new_folder(folder / name) as partial:
        save(trunk, partial)
        write_model_card(partial, config, run_dir, type(backbone.pipe))
    if critic_trunk is not None:
        with _new_folder(folder / "critic_trunk") as partial:
            backbone.save_trunk(critic_trunk, partial)
    if critic:
        units = critic_units(state or {}, len(config.rewards))
        about = describe_critic(config, model.tap_indices, model.reward_names, units)
        save_file({name: t.contiguous() for name, t in critic.items()}, folder / "critic.safetensors", about)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write to that takes the name in the end; what had the name stays until then."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


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
