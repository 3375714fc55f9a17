"""A pipeline without its weights: the family's adapter around parts on the "meta" device, made from their configs.

Of such a model sizes can be had, on any machine and in no memory, but not a number; `cost` has what it takes to run it.
"""

import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ..errors import UserError
from . import ADVICE, FAMILIES, check_complete, find_folder, parts_of, read_index
from .base import Backbone
from .known import KNOWN

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CONFIGS = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]  # of a pipeline on the hub
OR_KNOWN = f"{ADVICE}, or one of the models that are known here: {', '.join(KNOWN)}"
META = torch.device("meta")


def outline(pretrained: str, max_sequence_length: int, resolution: int | None = None) -> Backbone:
    """`load_backbone`'s adapter in float32, around parts without weights; scheduler and tokenizers are real.

    A model that is `KNOWN` takes neither network nor licence; of any other hub id the configurations are downloaded.
    Raises UserError as `load_backbone` does.
    """
    if pretrained in KNOWN and not Path(pretrained).is_dir():
        index = KNOWN[pretrained]["model_index"]
        family = FAMILIES[index["_class_name"]]
        parts = {name: _of_config(*kind, KNOWN[pretrained].get(name)) for name, kind in parts_of(index).items()}
    else:
        folder = find_folder(pretrained, _download_configs, OR_KNOWN)
        family, index = read_index(pretrained, folder)
        kinds = parts_of(index)
        check_complete(pretrained, folder, (name for name in kinds if not name.startswith("tokenizer")))
        try:
            parts = {name: _of_folder(*kind, folder / name) for name, kind in kinds.items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(
                f"model.pretrained: {pretrained} is incomplete or damaged: {type(error).__name__}: {error}"
            ) from error
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    given = {**options, **parts, **family.load_options}
    arguments = inspect.signature(family.pipeline).parameters
    # What a pipeline must be given and does not have is None, as in diffusers.
    pipe = family.pipeline(
        **{name: given.get(name) for name, known in arguments.items() if name in given or known.default is known.empty}
    )
    backbone = family(pipe, max_sequence_length, resolution)
    backbone.to(META)
    return backbone


def _of_folder(library: str, name: str, folder: Path) -> Any:
    kind = getattr(LIBRARIES[library], name)
    if issubclass(kind, nn.Module):
        return _of_config(library, name, json.loads((folder / "config.json").read_text()))
    return kind.from_pretrained(folder) if folder.is_dir() else None  # tokenizers are not downloaded


def _of_config(library: str, name: str, config: dict[str, Any] | None) -> Any:
    """A part without weights, or a scheduler; None without a config."""
    if config is None:
        return None
    kind = getattr(LIBRARIES[library], name)
    with META if issubclass(kind, nn.Module) else nullcontext():
        if library == "diffusers":
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


def _download_configs(pretrained: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(pretrained, allow_patterns=CONFIGS)
