"""From a config's `rewards` to rewards that score."""

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
    places: dict[str, str] = {}
    for prompt in prompts:
        places.setdefault(prompt.text, prompt.source)
    for reward in rewards:
        try:
            reward.check_prompts(list(places))
        except UserError as error:  # it quotes the prompt, unless it is not about one
            place = next((place for text, place in places.items() if place and repr(text) in str(error)), None)
            raise type(error)(f"{place}: {error}" if place else str(error)) from error


def _build(config: RewardConfig) -> Reward:
    if config.workers:
        return build_pool(config.name, config.params, config.device, config.batch_size, config.workers)
    if config.url:
        reward = build_remote(config.name, config.url, config.timeout_s)
    else:
        reward = build_here(config.name, config.params, config.device)
    return replace(reward, batch_size=config.batch_size)
