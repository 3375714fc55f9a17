"""A trained critic beside a pipeline: `critic.safetensors`, which says of itself how to build it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .actor_critic import ActorCritic
from .backbones.base import Backbone
from .config import Config, CriticConfig, RewardConfig, RolloutConfig
from .errors import UserError
from .reward_stats import sum_of_rewards

KEPT = {"name", "weight", "params"}  # of a reward: not where it was scored
CALLS_OUT = {"base_url", "api_key_env"}  # parameters by which pictures leave the machine


def describe_critic(config: Config, taps: list[int], names: list[str], units: dict[str, Tensor]) -> dict[str, str]:
    """What stands beside the weights. units: the critic's of each reward, {"mean", "std"} [M]."""
    return {
        "taps": json.dumps(taps),
        "values": json.dumps(names),
        "critic": config.critic.model_dump_json(),
        "rewards": json.dumps([reward.model_dump(mode="json", include=KEPT) for reward in config.rewards]),
        "rollout": config.rollout.model_dump_json(),
        "units": json.dumps({name: numbers.tolist() for name, numbers in units.items()}),
        "model": config.model.pretrained,
        "max_sequence_length": str(config.model.max_sequence_length),
    }


@dataclass
class TrainedCritic:
    """A critic on a backbone's trunk. M values; R rewards, which are as many unless there is one for their sum."""

    model: ActorCritic  # frozen, and with a gradient from values to latents
    names: list[str]  # of the values
    rewards: list[RewardConfig]
    rollout: RolloutConfig  # how it was trained
    mean: Tensor  # float64 [R], of the rewards whose standardised form it foretells
    std: Tensor
    is_sum: bool  # one value for the sum of the rewards

    def weights(self, given: dict[str, float] | None = None) -> Tensor:
        """float32 [M]: those of the training, or of the values that are named. UserError where it has no such value."""
        if given is None:
            trained = {reward.name: reward.weight for reward in self.rewards}
            given = {name: trained.get(name, 1.0) for name in self.names}
        if unknown := [name for name in given if name not in self.names]:
            raise UserError(f"weights: this critic has no value of {unknown[0]}; it has {', '.join(self.names)}")
        return torch.tensor([given.get(name, 0.0) for name in self.names], dtype=torch.float32)

    def harmless_rewards(self) -> list[RewardConfig]:
        """Those that may be built because a file names them, whoever made it. UserError for one that would run code or
        send pictures away."""
        for reward in self.rewards:
            if ":" in reward.name or CALLS_OUT & reward.params.keys():
                raise UserError(
                    f"this critic's file names the reward {reward.name}, which runs code or calls a server that the "
                    "file chose; give the rewards yourself (rewards=..., or sample.py --run with the run's own critic)"
                )
        return self.rewards

    def standardize(self, raw: Tensor) -> Tensor:
        """Rewards [N, R] in the critic's units, float32 [N, M]."""
        rewards = ((raw.double() - self.mean.to(raw.device)) / self.std.to(raw.device)).float()
        if self.is_sum:
            return sum_of_rewards(rewards, torch.tensor([reward.weight for reward in self.rewards]))
        return rewards


def prompt_length(path: Path) -> int:
    """`model.max_sequence_length` of the run: a critic on prompts of another length reads other features."""
    return int(_header(path).get("max_sequence_length", 256))


def load_critic(path: Path, backbone: Backbone) -> TrainedCritic:
    """Builds the critic of a `critic.safetensors` on the backbone's trunk, which is frozen and tapped.

    A trunk of its own is read from `critic_trunk/` beside it. Raises UserError where the file is of another model.
    """
    about, weights = _header(path), load_file(path)
    config = CriticConfig.model_validate_json(about["critic"])
    if config.trunk == "pixels":
        raise UserError(f"{path}: a critic on pixels has no gradient to latents; train one with critic.trunk another")
    names, taps = json.loads(about["values"]), json.loads(about["taps"])
    rollout = RolloutConfig.model_validate_json(about["rollout"])
    backbone.trunk.requires_grad_(False)
    try:
        config = config.model_copy(update={"taps": taps})
        model = ActorCritic(backbone, config, names, rollout.guidance_scale)
    except UserError as error:
        raise UserError(f"{path}: trained on {about['model']}, which this model is not like: {error}") from error
    mine = model.critic.state_dict()
    wrong = [name for name in mine if name not in weights or weights[name].shape != mine[name].shape]
    if wrong or len(mine) != len(weights):
        name = wrong[0] if wrong else next(name for name in weights if name not in mine)
        found, wanted = (list(each[name].shape) if name in each else "nothing" for each in (weights, mine))
        raise UserError(
            f"{path}: trained on {about['model']}, which this model is not like: {name} is {found}, and {wanted} fits "
            "this model"
        )
    model.critic.load_state_dict(weights)
    if model.critic_trunk is not None:
        folder = path.parent / "critic_trunk"
        if not folder.is_dir():
            raise UserError(f"{folder}: not there; this critic has a trunk of its own, which belongs beside its file")
        model.critic_trunk.load_state_dict(type(model.critic_trunk).from_pretrained(folder).state_dict())
    model.detach = False
    model.eval().requires_grad_(False)
    units = json.loads(about["units"])
    return TrainedCritic(
        model,
        names,
        [
            RewardConfig.model_validate({key: value for key, value in reward.items() if key in KEPT})
            for reward in json.loads(about["rewards"])
        ],
        rollout,
        *(torch.tensor(units[name], dtype=torch.float64) for name in ("mean", "std")),
        is_sum=config.heads == "sum",
    )


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a run with a critic (algorithm.name ppo) writes critic.safetensors at its end, "
            "engine/export.py before it"
        )
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
    if missing := [key for key in ("critic", "taps", "values", "rollout", "units") if key not in about]:
        raise UserError(
            f"{path}: not a critic of this engine (its header has no {missing[0]}); engine/export.py makes one"
        )
    return about
