"""From a config's `rewards` to rewards that score."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import UserError
from ..prompts import Prompt
from .local import build_here
from .pool import build_pool
from .protocol import Reward, RewardConfig
from .remote import build_remote


def build_rewards(configs: Iterable[RewardConfig]) -> list[Reward]:
    """The rewards of a config, in its order. UserError for an unknown name, a name given twice, or wrong params."""
    rewards: list[Reward] = []
    for config in configs:
        if config.name in (reward.name for reward in rewards):
            raise UserError(f"reward {config.name!r} is listed twice; give it once, with the sum of the weights")
        rewards.append(replace(_build(config), weight=config.weight, stop_if_constant=config.stop_if_constant))
    return rewards


def check_prompts(rewards: Sequence[Reward], prompts: Iterable[Prompt]) -> None:
    """UserError for the first prompt that one of the rewards cannot judge, and where it is written: before a run, not
    in its middle."""
    different: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        different.setdefault((prompt.text, json.dumps(prompt.metadata, sort_keys=True)), prompt)
    for reward in rewards:
        try:
            _check(reward, different.values())
        except UserError as error:  # it quotes the prompt, unless it is not about one
            quoted = [prompt for prompt in different.values() if prompt.source and repr(prompt.text) in str(error)]
            place = next((prompt.source for prompt in quoted if _refuses(reward, prompt)), None)
            raise type(error)(f"{place}: {error}" if place else str(error)) from error


def _check(reward: Reward, prompts: Iterable[Prompt]) -> None:
    reward.check_prompts([prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])


def _refuses(reward: Reward, prompt: Prompt) -> bool:
    """The same text may be judged with other metadata."""
    try:
        _check(reward, [prompt])
    except UserError:
        return True
    return False


def _build(config: RewardConfig) -> Reward:
    if config.workers:
        return build_pool(config.name, config.params, config.device, config.batch_size, config.workers)
    if config.url:
        reward = build_remote(config.name, config.url, config.timeout_s)
    else:
        reward = build_here(config.name, config.params, config.device)
    return replace(reward, batch_size=config.batch_size)
