"""Base recipes, changes to them by dotted key, and what an iteration costs in forwards of the trunk."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {"tiny-dit": "zero3_dit.json", "tiny-unet": "zero3_unet.json"}
WATCHED = ("composition_strict", "background", "jpeg_compressibility")

# Of every run, whatever its variant: what is measured, and nothing that only a reader of a single run would look at.
MEASURED = {
    "evaluation.every": 10,
    "evaluation.num_prompts": 512,
    "evaluation.rewards": [{"name": name} for name in WATCHED],
    "logging.tensorboard": False,
}


# A critic-only pass on features that the rollout kept - forward and backward of the head alone - in forwards of the
# trunk: tiny-dit on one core of an AMD EPYC, 0.16 ms a sample and step (a fifth of it for what is dropped) and 1.85.
HEAD_PASS = 0.1


def base(model: str) -> dict[str, Any]:
    """The recipe of an embedded model as a nested dict, with the evaluation that all runs share."""
    recipe = json.loads((CONFIGS / RECIPES[model]).read_text())
    recipe["optimizer"].setdefault("lr_warmup_iterations", 0)  # tuned for one of the models, so spelt out for both
    return changed(recipe, MEASURED)


def changed(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy with each `section.key` set to its value."""
    result = copy.deepcopy(config)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = copy.deepcopy(value)
    return result


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key; lists stay whole."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values; None where a key is missing."""
    one, other = flat(one), flat(other)
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


# ---- cost -----------------------------------------------------------------------------------------------------------


class Forwards(NamedTuple):
    """Passes of the whole iteration's samples through the trunk at one denoising step; a backward counts as two."""

    pretraining: float  # an iteration
    training: float  # an iteration
    evaluation: float  # a held-out evaluation

    def total(self, config: dict[str, Any]) -> float:
        """Of a run, its evaluations included."""
        first, then = config["training"]["value_pretraining_iterations"], config["training"]["iterations"]
        every = config["evaluation"]["every"]
        evaluations = 1 + ((first + then) // every if every else 1)
        return first * self.pretraining + then * self.training + evaluations * self.evaluation


def forwards(config: dict[str, Any]) -> Forwards:
    """The trunk's work, with guidance counted twice. A critic's own trunk, or one on pictures, comes on top of it."""
    rollout, training, evaluation = config["rollout"], config["training"], config["evaluation"]
    steps, guided = rollout["num_inference_steps"], 2 if rollout["guidance_scale"] > 1 else 1
    trained = rollout["num_trained_steps"]
    if window := rollout.get("sde_window"):
        trained = window["size"]
    has_critic = config["algorithm"]["name"] == "ppo"
    keeps = training.get("keep_features", True)
    of_trunk = {"shared-detached": HEAD_PASS, "pixels": 0} if keeps else {}
    critic_passes = steps * of_trunk.get(config["critic"]["trunk"], 1) if has_critic else 0
    evaluated = evaluation["num_inference_steps"] * (2 if evaluation["guidance_scale"] > 1 else 1) + steps * guided
    return Forwards(
        pretraining=guided * (steps + critic_passes * training["value_pretraining_epochs"]),
        training=guided * (steps + 3 * trained + critic_passes * training["critic_epochs"]),
        evaluation=evaluated * evaluation["num_prompts"] / rollout["samples_per_iteration"],
    )


def iterations_at_equal_compute(config: dict[str, Any], other: dict[str, Any]) -> int:
    """Iterations without pretraining that give `other` as many forwards of training as `config` has."""
    cost, training = forwards(config), config["training"]
    total = training["value_pretraining_iterations"] * cost.pretraining + training["iterations"] * cost.training
    return round(total / forwards(other).training)
