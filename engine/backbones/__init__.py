"""Model families. `load_backbone` reads `model_index.json` and picks the adapter."""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
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
ADVICE = "A gated model wants its licence accepted on the hub, and `hf auth login`. Without network give a local folder"
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
    folder = find_folder(pretrained, _download, ADVICE)
    family, index = read_index(pretrained, folder)
    check_complete(pretrained, folder, parts_of(index))
    try:
        return family.load(folder, max_sequence_length, resolution, {"vae": torch.float32, "default": dtype})
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.pretrained: {pretrained} is incomplete or damaged: {error}") from error


def backbone_of(pipe: DiffusionPipeline, max_sequence_length: int = 256) -> Backbone:
    """The adapter around a loaded pipeline, whose weights it shares and freezes; at the pipeline's own resolution.

    Raises UserError where the pipeline's class has no adapter, or its scheduler's noise levels cannot be read.
    """
    families = [FAMILIES[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FAMILIES]
    if not families:
        raise UserError(f"{type(pipe).__name__} is not supported; {', '.join(FAMILIES)} are")
    return families[0](copy.copy(pipe), max_sequence_length)  # a copy, since some options of a pipeline are set


def find_folder(pretrained: str, download: Callable[[str], str], advice: str) -> Path:
    """The packaged or local pipeline folder of this name, or else what `download` makes of it as a hub id.

    Raises UserError, which ends with the advice, where that fails.
    """
    if pretrained in ("tiny-dit", "tiny-unet"):
        return EMBEDDED / pretrained
    if Path(pretrained).is_dir():
        return Path(pretrained)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(download(pretrained))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"model.pretrained: {pretrained!r} is no local folder and could not be downloaded as a hub id: {error}"
            f"\n{advice}"
        ) from error


def read_index(pretrained: str, folder: Path) -> tuple[type[Backbone], dict[str, Any]]:
    """The adapter for a pipeline folder, and its model_index.json. Raises UserError where it has none of either."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"model.pretrained: {pretrained} has no model_index.json; give a diffusers pipeline folder")
    try:
        index = json.loads(path.read_text())
        family = index["_class_name"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not the index of a diffusers pipeline ({type(error).__name__}: {error})") from error
    if family not in FAMILIES:
        raise UserError(
            f"model.pretrained: {pretrained} is a {family}; supported are {', '.join(FAMILIES)}, "
            "and an adapter in engine/backbones/ adds a family"
        )
    return FAMILIES[family], index


def parts_of(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts of a model_index.json that we load, [library, class] by name: [null, null] is one that is not there."""
    return {
        name: tuple(kind)
        for name, kind in index.items()
        if isinstance(kind, list) and kind[0] is not None and name not in NOT_LOADED
    }


def check_complete(pretrained: str, folder: Path, parts: Iterable[str]) -> None:
    """Raises UserError unless each part has its folder."""
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"model.pretrained: {pretrained} is incomplete: it has no folder {', '.join(missing)}, of which its "
            "model_index.json speaks"
        )


def _download(pretrained: str) -> str:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.download(pretrained)


__all__ = ["FAMILIES", "Backbone", "Conditioning", "backbone_of", "load_backbone"]
