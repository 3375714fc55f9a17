"""A checkpoint's weights, whole, out of the shards that DeepSpeed saved: without its engine and its processes."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from .actor_critic import ActorCritic
from .backbones import load_backbone
from .errors import UserError
from .saved_run import SavedRun
from .trainable import choose_trained
from .world import resolve_dtype


def load_checkpoint(run: SavedRun, checkpoint: Path, averaged: bool = True, dtype: str | None = None) -> ActorCritic:
    """The run's actor-critic on the CPU. averaged: the policy's running average, if the run keeps one.

    dtype: None is the training's. Raises UserError where the checkpoint does not fit the run's configuration.
    """
    about = json.loads((checkpoint / "run_state.json").read_text())
    config, options = run.config, run.config.model
    kind = resolve_dtype(dtype or about["dtype"], torch.device("cpu"))
    backbone = load_backbone(options.pretrained, options.max_sequence_length, options.resolution, kind)
    choose_trained(backbone.trunk, options.lora, backbone.lora_targets(), options.freeze)
    model = ActorCritic(backbone, config.critic, config.value_names)
    state = _weights(checkpoint)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := [name for name in trained if name not in state]:
        raise UserError(f"{checkpoint} lacks {missing[0]} and {len(missing) - 1} more: it is of another configuration")
    if averaged and config.training.ema_decay:
        names = [f"trunk.{name}" for name, p in model.trunk.named_parameters() if p.requires_grad]
        state |= _average(checkpoint, names, [trained[name].shape for name in names], about["world_size"])
    model.load_state_dict(state, strict=False)  # what is frozen is not in it
    return model.to(kind)


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    """Of what is trained, in float32."""
    if not list(checkpoint.glob("*zero_pp_rank_*optim_states.pt")):  # ZeRO stage 0: whole
        return torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    with contextlib.redirect_stdout(io.StringIO()):  # it says at length what it does
        return get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, checkpoint.name)


def _average(checkpoint: Path, names: Sequence[str], shapes: Sequence[torch.Size], ranks: int) -> dict[str, Tensor]:
    """The running averages by name, of which each rank has a shard, or all has each."""
    parts = [load_file(checkpoint / f"run_state_rank{rank}.safetensors") for rank in range(ranks)]
    found = {}
    for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        mine = [part[f"average.{number}"] for part in parts]
        whole = mine[0] if mine[0].shape == shape else torch.cat(mine)[: shape.numel()]
        found[name] = whole.view(shape)
    return found
