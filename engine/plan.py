"""What a run is going to be, said before it starts."""

import time

import torch
from torch import nn

from .actor_critic import ActorCritic
from .config import Config
from .rollout import Model
from .sharding import World, resolve_dtype


def count(module: nn.Module) -> int:
    """Parameters of a module, sharded or not."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def time_forward(model: Model, *inputs) -> float:
    """Seconds of one forward without gradient, the second of two."""
    for _ in range(2):
        begin = time.perf_counter()
        with torch.no_grad():
            model(*inputs)[1].sum().item()  # waits for the device
        seconds = time.perf_counter() - begin
    return seconds


def describe_plan(config: Config, world: World, model: ActorCritic, trained_steps: int, forward: float) -> str:
    """A few lines: model, batch arithmetic, memory of the training state, predicted time.

    forward: seconds of one micro-batch forward. A training step is taken as three forwards.
    """
    rollout, training = config.rollout, config.training
    dtype = resolve_dtype(config.model.dtype, world.device)
    policy, critic = count(model.trunk), count(model.critic)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    # AdamW in mixed precision: weight 2, gradient 2, and float32 master weight and moments 12; in float32 4 + 4 + 8.
    state = 16 * (policy + critic) / (world.size if stage == 3 else 1)
    batches = rollout.samples_per_iteration // (rollout.micro_batch_size * world.size)
    steps = rollout.num_inference_steps
    pretraining = forward * batches * (steps + trained_steps * training.value_pretraining_epochs)
    iteration = forward * batches * (steps + trained_steps * (3 + training.critic_epochs))
    evaluations = 2 + (training.iterations // config.evaluation.every if config.evaluation.every else 0)
    per_evaluation = -(-config.evaluation.num_prompts // (rollout.micro_batch_size * world.size))
    evaluation = forward * per_evaluation * (steps + config.evaluation.num_inference_steps)
    total = (
        training.value_pretraining_iterations * pretraining + training.iterations * iteration + evaluations * evaluation
    )
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    lines = {
        "model": f"{config.model.pretrained}: policy {policy:,} + critic {critic:,} parameters, {_name(dtype)}",
        "device": f"{world.size} x {device}, DeepSpeed ZeRO stage {stage}",
        "sampling": f"{rollout.transition}, {steps} steps of which {trained_steps} are trained, "
        f"guidance {rollout.guidance_scale:g}",
        "iteration": f"{rollout.samples_per_iteration} samples in micro-batches of {rollout.micro_batch_size}, "
        f"{training.updates_per_iteration} updates",
        "rewards": ", ".join(f"{reward.name} x {reward.weight:g}" for reward in config.rewards),
        "memory": f"{state / 2**20:,.0f} MiB of weights, gradients and optimizer a process, and activations",
        "length": f"{training.value_pretraining_iterations} value-pretraining + {training.iterations} PPO iterations, "
        f"about {_duration(total)} ({iteration:.1f} s an iteration)",
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
