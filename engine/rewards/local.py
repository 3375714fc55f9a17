"""A reward built in this process, from its name: a scorer of this folder, or anybody's `module:function`."""

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .checks import describe
from .protocol import ANY_VALUE, Reward

# Imported when one of them is asked for: most need a library that the others do not.
BUILT_IN = {
    "composition": ".composition:Composition",
    "composition_strict": ".composition:StrictComposition",
    "background": ".background:Background",
    "ocr": ".ocr:Ocr",
    "jpeg_compressibility": ".jpeg:JpegCompressibility",
    "jpeg_incompressibility": ".jpeg:JpegIncompressibility",
    "pickscore": ".pickscore:PickScore",
    "clipscore": ".clipscore:ClipScore",
    "hpsv2": ".hpsv2:HPSv2",
    "imagereward": ".imagereward:ImageReward",
    "aesthetic": ".aesthetic:Aesthetic",
    "geneval": ".geneval:GenEval",
    "vlm_judge": ".vlm_judge:VlmJudge",
}


def build_here(name: str, params: Mapping[str, Any], device: str = "cpu") -> Reward:
    """The reward of this name, with weight 1. UserError for an unknown name, wrong params, or what its own code
    raises."""
    make = _import_custom(name) if ":" in name else _import_built_in(name)
    options = _options(name, make, params, device)
    if not inspect.isclass(make):
        return _reward(name, make, functools.partial(make, **options))
    try:
        scorer = make(**options)
    except UserError:
        raise
    except ImportError as error:
        raise _more_packages(name, error) from error
    except Exception as error:
        raise UserError(f"reward {name!r} could not be built: {describe(error)}") from error
    return _reward(name, scorer, scorer.score)


def resolve_device(name: str, device: str) -> str:
    """`device` with its number: "cuda" is the one that this process computes on. UserError where it is not there."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f'reward {name!r}: device {device!r} is none of "cpu", "cuda" and "cuda:1"') from None
    if found.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise UserError(f"reward {name!r}: device {device!r} is not there; this machine has {count} GPUs")
    return f"cuda:{torch.cuda.current_device() if found.index is None else found.index}"


def _reward(name: str, about: Any, score: Callable) -> Reward:
    """about: the scorer or the function, which may say more of itself than its score."""
    kind = getattr(about, "images", "uint8")
    if kind not in ("uint8", "pil"):
        raise UserError(f'reward {name!r}: its attribute `images` must be "uint8" or "pil", not {kind!r}')
    check = getattr(about, "check_prompt", None)

    def check_prompts(prompts: Sequence[str], metadata: Sequence[Mapping]) -> None:
        if check is not None:
            for prompt, known in zip(prompts, metadata, strict=True):
                check(prompt, known)

    def score_pil(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Any:
        return score([Image.fromarray(image) for image in images.numpy()], prompts, metadata)

    return Reward(
        name,
        1.0,
        tuple(getattr(about, "value_range", ANY_VALUE)),
        score_pil if kind == "pil" else score,
        check_prompts,
        is_elsewhere=getattr(about, "is_elsewhere", False),
    )


def _import_built_in(name: str) -> type:
    if name not in BUILT_IN:
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
        raise UserError(f"unknown reward {name!r}{hint} built in: {', '.join(BUILT_IN)}; your own: 'module:function'")
    module, _, attribute = BUILT_IN[name].partition(":")
    try:
        return getattr(importlib.import_module(module, __package__), attribute)
    except ImportError as error:
        raise _more_packages(name, error) from error


def _more_packages(name: str, error: ImportError) -> UserError:
    return UserError(f"reward {name!r} needs more packages ({error}): pip install 'latent-critic[rewards]'")


def _import_custom(name: str) -> Callable:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()  # `deepspeed engine/train.py` puts engine/ on the path, not the folder it was called from
    sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"reward {name!r}: cannot import module {module_name!r} ({describe(error)})") from error
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"reward {name!r}: module {module_name!r} ({module.__file__}) has no function or class {attribute!r}"
        )
    return found


def _options(name: str, make: Callable, params: Mapping[str, Any], device: str) -> dict[str, Any]:
    """`params`, and the keyword `device` if there is one. UserError where `make` does not take them."""
    takes, is_class = inspect.signature(make).parameters, inspect.isclass(make)
    if "device" in params:
        raise UserError(f"reward {name!r}: device is no param but a key beside them")
    if ":" not in name and (unknown := [param for param in params if param not in takes]):
        known = ", ".join(param for param in takes if param != "device")
        raise UserError(f"reward {name!r} has no param {unknown[0]!r}; it takes: {known or 'none'}")
    if device != "cpu" and "device" not in takes:
        raise UserError(f"reward {name!r} computes on the CPU; leave its device {device!r} out")
    options = {**params, "device": resolve_device(name, device)} if "device" in takes else dict(params)
    batch, where = ((), "") if is_class else (("images", "prompts", "metadata"), "(images, prompts, metadata) and ")
    attribute = name.partition(":")[2] or name
    try:
        inspect.signature(make).bind(*batch, **options)
    except TypeError as error:
        raise UserError(f"reward {name!r}: {attribute} must take {where}its params as keywords ({error})") from error
    if is_class and not callable(getattr(make, "score", None)):
        raise UserError(f"reward {name!r}: the class {attribute} has no method score(images, prompts, metadata)")
    return options
