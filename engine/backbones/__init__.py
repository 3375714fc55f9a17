"""Model families. `load_backbone` reads `model_index.json` and picks the adapter."""

import json
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from .base import Backbone, Conditioning
from .sd3 import SD3Backbone
from .unet import UNetBackbone

FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusion3Pipeline": SD3Backbone,
    "StableDiffusionPipeline": UNetBackbone,
}
TINY_DIT = Path(__file__).parent.parent / "embedded" / "tiny-dit"


def load_backbone(pretrained: str, max_sequence_length: int) -> Backbone:
    """`pretrained`: "tiny-dit" (packaged), a local diffusers folder, or a hub id (downloaded by diffusers).

    Raises UserError where there is no such model, or its pipeline class has no adapter.
    """
    folder = _folder(pretrained)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.pretrained: {pretrained} has no model_index.json; give a diffusers pipeline folder")
    try:
        family = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{index}: not the index of a diffusers pipeline ({type(error).__name__}: {error})") from error
    if family not in FAMILIES:
        raise UserError(
            f"model.pretrained: {pretrained} is a {family}; supported are {', '.join(FAMILIES)}, "
            "and an adapter in engine/backbones/ adds a family"
        )
    try:
        return FAMILIES[family].load(folder, max_sequence_length)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.pretrained: {pretrained} is incomplete or damaged: {error}") from error


def _folder(pretrained: str) -> Path:
    if pretrained == "tiny-dit":
        return TINY_DIT
    if Path(pretrained).is_dir():
        return Path(pretrained)
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(DiffusionPipeline.download(pretrained))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"model.pretrained: {pretrained!r} is no local folder and could not be downloaded as a hub id: {error}"
        ) from error


__all__ = ["FAMILIES", "Backbone", "Conditioning", "load_backbone"]
