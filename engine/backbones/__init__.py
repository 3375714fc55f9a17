"""Model families. `load_backbone` reads `model_index.json` and picks the adapter."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..errors import UserError
from .base import Backbone, Conditioning
from .flux import FluxBackbone
from .flux2 import Flux2Backbone
from .sd3 import SD3Backbone
from .sdxl import SDXLBackbone
from .unet import UNetBackbone

FAMILIES: dict[str, type[Backbone]] = {
    "StableDiffusion3Pipeline": SD3Backbone,
    "StableDiffusionPipeline": UNetBackbone,
    "StableDiffusionXLPipeline": SDXLBackbone,
    "FluxPipeline": FluxBackbone,
    "Flux2KleinPipeline": Flux2Backbone,
}
NOT_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
EMBEDDED = Path(__file__).parent.parent / "embedded"
TINY_DIT, TINY_UNET = EMBEDDED / "tiny-dit", EMBEDDED / "tiny-unet"


def load_backbone(
    pretrained: str, max_sequence_length: int, resolution: int | None = None, dtype: torch.dtype = torch.float32
) -> Backbone:
    """`pretrained`: "tiny-dit" or "tiny-unet" (packaged), a local diffusers folder, or a hub id (downloaded by
    diffusers). resolution: pixels a side, None is the model's own. dtype: of trunk and text encoders; the autoencoder,
    which may overflow in less, is float32.

    Raises UserError where there is no such model, its pipeline class has no adapter, or it cannot be had at that
    resolution.
    """
    folder = _folder(pretrained)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.pretrained: {pretrained} has no model_index.json; give a diffusers pipeline folder")
    try:
        parts = json.loads(index.read_text())
        family = parts["_class_name"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{index}: not the index of a diffusers pipeline ({type(error).__name__}: {error})") from error
    if family not in FAMILIES:
        raise UserError(
            f"model.pretrained: {pretrained} is a {family}; supported are {', '.join(FAMILIES)}, "
            "and an adapter in engine/backbones/ adds a family"
        )
    missing = [name for name, kind in parts.items() if _is_needed(name, kind) and not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"model.pretrained: {pretrained} is incomplete: it has no folder {', '.join(missing)}, of which its "
            "model_index.json speaks"
        )
    try:
        return FAMILIES[family].load(folder, max_sequence_length, resolution, {"vae": torch.float32, "default": dtype})
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.pretrained: {pretrained} is incomplete or damaged: {error}") from error


def _is_needed(name: str, kind: object) -> bool:
    """Whether this entry of a model_index.json is a part that we load: [library, class], [null, null] if it is not
    there."""
    return isinstance(kind, list) and kind[0] is not None and name not in NOT_LOADED


def _folder(pretrained: str) -> Path:
    if pretrained in ("tiny-dit", "tiny-unet"):
        return EMBEDDED / pretrained
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
