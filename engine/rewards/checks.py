"""Scores as they are used: of every picture one finite number, within the range that the reward declares."""

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .protocol import Reward, RewardError, Scores

# Of a bound or 1, whichever is larger: a cosine of float32 vectors with norms that are off by their rounding.
TOLERANCE = 1e-4


def score_all(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """float32 [N, M]: N pictures (uint8 [N, H, W, 3]) judged by M rewards. Raises what `judge` raises."""
    columns = [judge(reward, images, prompts, metadata).values for reward in rewards]
    return torch.stack(columns, dim=1) if columns else torch.empty(len(prompts), 0)


def judge(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Scores:
    """N pictures, uint8 [N, H, W, 3], by one reward, `batch_size` at a time.

    A reward that raises, returns another number of scores than pictures, or a score that is not finite or out of its
    range, is a RewardError naming the reward and the prompt. A UserError of its own passes.
    """
    size = reward.batch_size or max(1, len(prompts))
    cuts = [slice(first, first + size) for first in range(0, len(prompts), size)]
    return join([_judge_batch(reward, images[cut], prompts[cut], metadata[cut]) for cut in cuts])


def join(parts: Sequence[Scores]) -> Scores:
    """Those of several batches, in their order; extras that one of them lacks are NaN there."""
    values = torch.cat([part.values for part in parts]) if parts else torch.empty(0)
    names = dict.fromkeys(name for part in parts for name in part.extras)
    nothing = [torch.full_like(part.values, torch.nan) for part in parts]
    extras = {name: [part.extras.get(name, nan) for part, nan in zip(parts, nothing, strict=True)] for name in names}
    return Scores(values, {name: torch.cat(columns) for name, columns in extras.items()})


def describe(error: Exception) -> str:
    """Kind, message and place of what somebody's code raised, in a line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, at {frame.filename}:{frame.lineno}"


def _judge_batch(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> Scores:
    try:
        result = reward.score(images, prompts, metadata)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {reward.name!r} failed on prompt {_failing(reward, images, prompts, metadata)!r}: "
            f"{describe(error)}"
        ) from error
    values, extras = result, {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        values, extras = result
    scores = Scores(
        _column(reward.name, "", values, prompts),
        {str(name): _column(reward.name, f" as {name!r}", column, prompts) for name, column in extras.items()},
    )
    _check_values(reward, scores, prompts)
    return scores


def _column(reward: str, what: str, result: Any, prompts: Sequence[str]) -> Tensor:
    """float32 [N]."""
    try:
        column = torch.as_tensor(result).detach().to(device="cpu", dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {reward!r} returned {type(result).__name__}{what} for prompt {prompts[0]!r}, not numbers ({error})"
        ) from error
    if column.shape != (len(prompts),):
        raise RewardError(
            f"reward {reward!r} returned shape {list(column.shape)}{what} for {len(prompts)} pictures (the first of "
            f"prompt {prompts[0]!r}); it must return one number a picture"
        )
    return column


def _check_values(reward: Reward, scores: Scores, prompts: Sequence[str]) -> None:
    (low, high), values = reward.value_range, scores.values
    for column, bad, why in (
        (values, ~values.isfinite(), ""),
        (values, values < low - TOLERANCE * max(1.0, abs(low)), f", below its range of {low:g} to {high:g},"),
        (values, values > high + TOLERANCE * max(1.0, abs(high)), f", above its range of {low:g} to {high:g},"),
        *((column, column.isinf(), f" as {name!r}") for name, column in scores.extras.items()),
    ):
        if bad.any():
            index = int(bad.nonzero()[0])
            raise RewardError(
                f"reward {reward.name!r} returned {column[index].item():g}{why} for prompt {prompts[index]!r}"
            )


def _failing(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping]) -> str:
    """The first prompt that fails by itself, or the first of the batch if only the batch does."""
    for i, prompt in enumerate(prompts):
        try:
            reward.score(images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        except Exception:
            return prompt
    return prompts[0]
