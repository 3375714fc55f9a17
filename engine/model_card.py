"""The README.md of an exported model: what it is, how it was trained, what it scores, and at which settings."""

import inspect
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .config import Config


def write_model_card(folder: Path, config: Config, run_dir: Path, pipeline: type) -> None:
    """folder: a pipeline, or LoRA's factors for one; pipeline: its class. run_dir: of the run that is told of."""
    model, recipe = config.model, describe_recipe(config)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=model.pretrained if _is_hub_id(model.pretrained) else None,
        tags=["reinforcement-learning", "latent-critic", *(["lora"] if model.lora else [])],
    )
    lines = ["", f"# {recipe['base model']}, post-trained with latent-critic", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in recipe.items()]
    lines += ["", *_scores(run_dir), "## Use", "", "```python", *_usage(config, pipeline), "```", ""]
    ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines)).save(folder / "README.md")


def describe_recipe(config: Config) -> dict[str, str]:
    """How a model was trained, in words, for people."""
    model, rollout, options = config.model, config.rollout, config.optimizer
    trained = f"LoRA, rank {model.lora.rank}, alpha {model.lora.alpha:g}" if model.lora else "all weights"
    return {
        "base model": model.pretrained if _is_hub_id(model.pretrained) else Path(model.pretrained).name,
        "trained": trained + (f", less {', '.join(model.freeze)}" if model.freeze else ""),
        "rewards": ", ".join(f"{reward.name} x {reward.weight:g}" for reward in config.rewards),
        "algorithm": _algorithm(config),
        "iterations": f"{config.training.iterations} of {rollout.samples_per_iteration} images, "
        f"{config.training.updates_per_iteration} updates each"
        + (f", after {config.training.value_pretraining_iterations} of value pretraining" if config.has_critic else ""),
        "sampling in training": f"{rollout.transition}, noise {rollout.noise_level:g}, "
        f"{rollout.num_inference_steps} steps, guidance {rollout.guidance_scale:g}",
        "learning rates": f"policy {options.policy_lr:g}"
        + (f", critic {options.critic_lr:g}" if config.has_critic else ""),
        "weights": f"running average, decay {config.training.ema_decay:g}" if config.training.ema_decay else "the last",
    }


def _is_hub_id(pretrained: str) -> bool:
    return pretrained.count("/") == 1 and not Path(pretrained).exists()


def _algorithm(config: Config) -> str:
    options = config.algorithm
    words = {
        "grpo": f"GRPO (arXiv 2505.05470), groups of {options.group_size}",
        "ddpo": f"DDPO (arXiv 2305.13301), reward statistics: {options.reward_statistics}",
        "ppo": f"PPO with a critic on noisy latents (arXiv 2605.27736), critic trunk {config.critic.trunk}",
    }
    if config.critic.trunk == "pixels":
        words["ppo"] = "PPO with a critic on decoded predictions"
    return words[options.name] + (f", KL {options.kl_coef:g}" if options.kl_coef else "")


def _scores(run_dir: Path) -> list[str]:
    files = sorted((run_dir / "evaluations").glob("*.json"))
    if not files:
        return []
    first, last = (json.loads(files[i].read_text()) for i in (0, -1))
    settings, done = last["settings"], int(files[-1].stem.removeprefix("iteration-"))
    lines = [
        "## Scores",
        "",
        f"{len(last['prompts'])} held-out prompts ({settings['prompts']}), {settings['num_inference_steps']} ODE "
        f"steps, guidance {settings['guidance_scale']:g}, seed {settings['seed']}; draw it at these settings.",
        "",
        f"| reward | before | after {done} iterations |",
        "|---|---|---|",
    ]
    for name, before in first["scores"].items():
        after = last["scores"][name]
        lines.append(f"| {name} | {sum(before) / len(before):.4f} | {sum(after) / len(after):.4f} |")
    return [*lines, ""]


def _usage(config: Config, pipeline: type) -> list[str]:
    settings = config.evaluation
    call = f"num_inference_steps={settings.num_inference_steps}, guidance_scale={settings.guidance_scale:g}"
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        call += f", max_sequence_length={config.model.max_sequence_length}"
    lines = ["from diffusers import DiffusionPipeline", ""]
    if config.model.lora:
        lines += [
            f'pipe = DiffusionPipeline.from_pretrained("{config.model.pretrained}")',
            'pipe.load_lora_weights("path/to/this/folder")',
        ]
    else:
        lines += ['pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")']
    return [*lines, f'pipe("a prompt", {call}).images[0].save("picture.png")']
