"""Rewards: what training maximises. `build_rewards` makes scorers from a config, `score_all` runs and checks them."""

import difflib
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from .background import Background
from .composition import Composition, StrictComposition
from .jpeg import JpegCompressibility, JpegIncompressibility
from .ocr import Ocr

BUILT_IN = {
    "composition": Composition,
    "composition_strict": StrictComposition,
    "background": Background,
    "ocr": Ocr,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
}
ANY_VALUE = (float("-inf"), float("inf"))


class RewardConfig(Protocol):
    """One entry of a config's `rewards`; `name` is a built-in's name or "module:function"."""

    name: str
    weight: float
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Reward:
    """One scorer. score(images uint8 [N, H, W, 3], prompts, metadata) -> N numbers, higher is better."""

    name: str
    weight: float
    value_range: tuple[float, float]
    score: Callable[[Tensor, Sequence[str], Sequence[dict]], Any]
    check_prompt: Callable[[str], Any]  # raises UserError for a prompt that this reward cannot judge


def build_rewards(configs: Iterable[RewardConfig]) -> list[Reward]:
    """The rewards of a config, in its order. UserError for an unknown name, a name given twice, or wrong params."""
    rewards: list[Reward] = []
    for config in configs:
        if config.name in (reward.name for reward in rewards):
            raise UserError(f"reward {config.name!r} is listed twice; give it once, with the sum of the weights")
        build = _custom if ":" in config.name else _built_in
        rewards.append(build(config.name, config.weight, config.params))
    return rewards


def check_prompts(rewards: Sequence[Reward], prompts: Iterable[str]) -> None:
    """UserError for the first prompt that one of the rewards cannot judge: before a run, not in its middle."""
    for prompt in prompts:
        for reward in rewards:
            reward.check_prompt(prompt)


def score_all(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """float32 [N, M]: N pictures (uint8 [N, H, W, 3]) judged by M rewards.

    A reward that raises, returns another number of scores than pictures, or a score that is not finite, is a UserError
    naming the reward and the prompt.
    """
    columns = [_checked(reward, images, prompts, metadata) for reward in rewards]
    return torch.stack(columns, dim=1) if columns else torch.empty(len(prompts), 0)


# ---------------------------------------------------------------------------------------------------------- building


def _built_in(name: str, weight: float, params: Mapping[str, Any]) -> Reward:
    if name not in BUILT_IN:
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
        raise UserError(f"unknown reward {name!r}{hint} built in: {', '.join(BUILT_IN)}; your own: 'module:function'")
    known = list(inspect.signature(BUILT_IN[name]).parameters)
    for param in params:
        if param not in known:
            raise UserError(f"reward {name!r} has no param {param!r}; it takes: {', '.join(known) or 'none'}")
    scorer = BUILT_IN[name](**params)
    return Reward(name, weight, scorer.value_range, scorer.score, scorer.check_prompt)


def _custom(name: str, weight: float, params: Mapping[str, Any]) -> Reward:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()  # `deepspeed engine/train.py` puts engine/ on the path, not the folder it was called from
    sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"reward {name!r}: cannot import module {module_name!r} ({_what(error)})") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward {name!r}: module {module_name!r} ({module.__file__}) has no function {attribute!r}")
    try:
        inspect.signature(function).bind("images", "prompts", "metadata", **params)
    except TypeError as error:
        raise UserError(
            f"reward {name!r}: {attribute} must take (images, prompts, metadata) and its params as keywords ({error})"
        ) from error
    return Reward(name, weight, ANY_VALUE, functools.partial(function, **params), lambda prompt: None)


# ---------------------------------------------------------------------------------------------------------- checking


def _checked(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    try:
        result = reward.score(images, prompts, metadata)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reward {reward.name!r} failed on prompt {_failing(reward, images, prompts, metadata)!r}: {_what(error)}"
        ) from error
    try:
        scores = torch.as_tensor(result).detach().to(device="cpu", dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"reward {reward.name!r} returned {type(result).__name__} for prompt {prompts[0]!r}, not numbers ({error})"
        ) from error
    if scores.shape != (len(prompts),):
        raise UserError(
            f"reward {reward.name!r} returned shape {list(scores.shape)} for {len(prompts)} pictures (the first of "
            f"prompt {prompts[0]!r}); it must return one number a picture"
        )
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise UserError(f"reward {reward.name!r} returned {scores[index].item()} for prompt {prompts[index]!r}")
    return scores


def _failing(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> str:
    """The first prompt that fails by itself, or the first of the batch if only the batch does."""
    for i, prompt in enumerate(prompts):
        try:
            reward.score(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        except Exception:
            return prompt
    return prompts[0]


def _what(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, at {frame.filename}:{frame.lineno}"
