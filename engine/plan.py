"""What a run is going to be, said before it starts."""

import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import nn

from .actor_critic import ActorCritic
from .backbones.cost import no_gradients_kept
from .config import Config
from .errors import UserError
from .gpus import GIB
from .world import World, resolve_dtype


def count(module: nn.Module, trained_only: bool = False) -> int:
    """Parameters of a module, sharded or not."""
    parameters = (p for p in module.parameters() if p.requires_grad or not trained_only)
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


@dataclass(frozen=True)
class Measurement:
    """A micro-batch's way through the unsharded actor-critic, on this machine."""

    # Of micro-batches side by side each has its share of the time.
    rollout: float  # seconds of a denoising step
    critic_only: float  # seconds a denoising step of a pass that trains the critic alone
    training: float  # seconds a denoising step of a forward and its backward
    activations: int  # bytes that the training forwards of a time keep for their backwards
    features: int = 0  # bytes of a picture and denoising step that the rollout keeps for the critic


def measure(
    model: ActorCritic, cores: int, steps_per_forward: int, *inputs, keeps_features: bool = False
) -> Measurement:
    """Times the second pass of each kind and counts what autograd keeps. No gradient is kept, nor all at a time.

    inputs: of one micro-batch, as the model takes them; on a CPU `cores` of them run side by side. keeps_features:
    passes of the critic alone have them from the rollout.
    """

    def forward() -> None:
        with torch.no_grad():
            model(*inputs)[1].sum().item()

    def train() -> None:
        if model.reference is not None:
            model.reference_prediction(*inputs)
        _loss(model(*inputs)).backward()

    rollout = _seconds(forward) / cores
    inputs = [*(_repeat(x, steps_per_forward) for x in inputs[:3]), *inputs[3:]]  # the unconditional prompt is one row
    features: list[torch.Tensor] = []
    if keeps_features:
        with torch.no_grad():
            _, _, *features = model(*inputs, with_features=True)

    def train_critic() -> None:
        if features:
            model(*inputs, features=features)[1].square().sum().backward()
        else:
            forward()

    with no_gradients_kept(model.parameters()):
        critic_only = _seconds(train_critic) / (steps_per_forward * cores)
        training = _seconds(train) / (steps_per_forward * cores)
    kept: dict[int, int] = {}

    def count_bytes(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
        _loss(model(*inputs))
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.data_ptr() in kept)
    activations = cores * max(0, sum(kept.values()) - weights)
    return Measurement(rollout, critic_only, training, activations, sum(tap[0].nbytes for tap in features))


def _repeat(x: torch.Tensor | dict, times: int) -> torch.Tensor | dict:
    if isinstance(x, dict):
        return {name: _repeat(tensor, times) for name, tensor in x.items()}
    return x.repeat_interleave(times, 0)


def _loss(outputs) -> torch.Tensor:
    prediction, values = outputs
    return prediction.square().mean() + values.square().sum()  # of no values, without a critic, 0


def _seconds(run) -> float:
    """Of the second run."""
    for _ in range(2):
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds


def check_host_memory(config: Config, world: World, cost: Measurement) -> None:
    """UserError where the features that this process keeps would not fit beside those of the machine's others."""
    needed = _features_bytes(config, world.size, cost)
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_SIZE", "1"))  # set by the launcher
    if needed > free:
        pictures, steps = config.rollout.samples_per_iteration // world.size, config.rollout.num_inference_steps
        raise UserError(
            f"training.keep_features: what the critic reads of {pictures} pictures x {steps} steps takes "
            f"{needed / GIB:.1f} GiB of a process, and {free / GIB:.1f} GiB of the machine's memory are free for it. "
            "Set training.keep_features to false and critic.feature_dropout to 0, or rollout.samples_per_iteration less"
        )


def _features_bytes(config: Config, processes: int, cost: Measurement) -> int:
    rollout = config.rollout
    return rollout.samples_per_iteration // processes * rollout.num_inference_steps * cost.features


def describe_plan(
    config: Config,
    world: World,
    model: ActorCritic,
    trained_steps: int,
    cost: Measurement,
    attention: str,
    weights: str,
    rollout_runs: str,
) -> str:
    """A few lines: model, batch arithmetic, memory of the training state, predicted time.

    attention, weights, rollout_runs: which implementation runs, where the weights that sample are, and how a rollout
    runs, in words. The time is that of the model alone; decoding, rewards and sharding come on top.
    """
    dtype = resolve_dtype(config.model.dtype, world.device)
    total, trained, policy = count(model), count(model, trained_only=True), count(model.trunk)
    stage = zero_stage(config)
    state = sum(state_bytes(trained, total - trained, dtype, stage, world.size))
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    features = _features_bytes(config, world.size, cost)
    lines = {
        "model": describe_model(config, policy, total - policy, dtype),
        "device": f"{world.size} x {device}, DeepSpeed ZeRO stage {stage}",
        **describe_work(config, trained_steps),
        "rollout": f"{rollout_runs}; weights: {weights}",
        "attention": attention,
        "memory": f"{state / 2**20:,.0f} MiB of weights, gradients and optimizer, "
        f"{cost.activations / 2**20:,.0f} MiB of activations, "
        + (f"{features / 2**20:,.0f} MiB of features on the host, " if features else "")
        + "a process",
        "length": describe_length(config, predict_seconds(config, world.size, trained_steps, cost)),
    }
    return align(lines)


class StateBytes(NamedTuple):
    """What training keeps in each process, whatever it computes."""

    weights: float
    gradients: float
    optimizer: float


def state_bytes(trained: int, frozen: int, dtype: torch.dtype, stage: int, processes: int) -> StateBytes:
    """Of so many parameters: weight, gradient, and AdamW's two float32 moments with a float32 master weight, which ZeRO
    keeps beside a float32 weight too. Stage 1 shards the last, 2 the gradients too, 3 all. What is frozen is a weight
    alone."""

    def share(first: int) -> int:
        """Processes that share what this stage is the first to shard."""
        return processes if stage >= first else 1

    optimizer = 8 if stage == 0 and dtype == torch.float32 else 12
    return StateBytes(
        weights=(trained + frozen) * dtype.itemsize / share(3),
        gradients=trained * dtype.itemsize / share(2),
        optimizer=trained * optimizer / share(1),
    )


class Seconds(NamedTuple):
    """Of an iteration of the policy's training, and of the whole run with its evaluations."""

    iteration: float
    total: float


def predict_seconds(config: Config, processes: int, trained_steps: int, cost: Measurement) -> Seconds:
    """What the model alone takes; decoding, rewards and sharding come on top."""
    rollout, training = config.rollout, config.training
    batches = rollout.samples_per_iteration // (rollout.micro_batch_size * processes)
    steps = rollout.num_inference_steps
    pretraining = batches * steps * (cost.rollout + cost.critic_only * training.value_pretraining_epochs)
    critic_only = steps * training.critic_epochs
    iteration = batches * (cost.rollout * steps + cost.critic_only * critic_only + cost.training * trained_steps)
    length = training.value_pretraining_iterations + training.iterations
    evaluations = 1 + (-(-length // config.evaluation.every) if config.evaluation.every else 1)
    per_evaluation = -(-config.evaluation.num_prompts // (rollout.micro_batch_size * processes))
    evaluation = cost.rollout * per_evaluation * (steps + config.evaluation.num_inference_steps)
    total = (
        training.value_pretraining_iterations * pretraining + training.iterations * iteration + evaluations * evaluation
    )
    return Seconds(iteration, total)


def zero_stage(config: Config) -> int:
    return config.deepspeed.get("zero_optimization", {}).get("stage", 0)


def describe_model(config: Config, policy: int, others: int, dtype: torch.dtype) -> str:
    beside = [*(["critic"] if config.has_critic else []), *(["reference"] if config.algorithm.kl_coef else [])]
    text = f"{config.model.pretrained}: policy {policy:,}" + (f" + {' and '.join(beside)} {others:,}" if beside else "")
    return f"{text} parameters, {_name(dtype)}"


def describe_work(config: Config, trained_steps: int) -> dict[str, str]:
    """Lines on what an iteration does."""
    rollout = config.rollout
    return {
        "sampling": f"{rollout.transition}, {rollout.num_inference_steps} steps of which {trained_steps} are trained, "
        f"guidance {rollout.guidance_scale:g}",
        "iteration": f"{rollout.samples_per_iteration} samples in micro-batches of {rollout.micro_batch_size}, "
        f"{config.training.updates_per_iteration} updates"
        + (f", groups of {config.samples_per_prompt}" if config.samples_per_prompt > 1 else ""),
        "rewards": ", ".join(f"{reward.name} x {reward.weight:g}" for reward in config.rewards),
    }


def describe_length(config: Config, seconds: Seconds) -> str:
    training = config.training
    pretraining = f"{training.value_pretraining_iterations} value-pretraining + " if config.has_critic else ""
    return (
        f"{pretraining}{training.iterations} {config.algorithm.name.upper()} iterations, "
        f"about {_duration(seconds.total)} ({seconds.iteration:.1f} s an iteration)"
    )


def align(lines: dict[str, str]) -> str:
    return "\n".join(f"  {name:<10} {text}" for name, text in lines.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
