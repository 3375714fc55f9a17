"""A pipeline without its weights: the family's adapter around parts on the "meta" device, made from their configs."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UserError
from . import FAMILIES, find_folder, is_needed, read_index
from .base import Backbone
from .known import KNOWN

CONFIGS = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]  # of a pipeline on the hub


def outline(pretrained: str, max_sequence_length: int, resolution: int | None = None) -> Backbone:
    """The adapter as `load_backbone` gives it, in float32, but nothing of it can be computed: only shapes are there.

    A model of `KNOWN` takes neither network nor licence; of another hub id the configurations alone are downloaded.
    Raises UserError as `load_backbone` does.
    """
    if pretrained in KNOWN and not Path(pretrained).is_dir():
        known = KNOWN[pretrained]
        family, index = FAMILIES[known["model_index"]["_class_name"]], known["model_index"]
        parts = {name: _part(name, index[name], known[name]) for name in known if name != "model_index"}
    else:
        folder = find_folder(pretrained, _download, f"A plan knows without a download: {', '.join(KNOWN)}")
        family, index = read_index(pretrained, folder, lambda name: _has_config(name) or (folder / name).is_dir())
        try:
            parts = {name: _read(folder / name, kind) for name, kind in index.items() if is_needed(name, kind)}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"model.pretrained: {pretrained} is incomplete or damaged: {error}") from error
    options, _ = family.pipeline._get_signature_keys(family.pipeline)
    raise NotImplementedError
