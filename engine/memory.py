"""Memory of a run's processes by part and phase, from the model's outline: bounds and proportions, not measurements."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .actor_critic import ActorCritic
from .backbones.attention import set_attention_backend
from .backbones.cost import Cost, checkpoint_on_gpu, cost_of
from .backbones.outline import META, outline
from .config import Config
from .gpus import GIB
from .plan import count, state_bytes, zero_stage
from .scoring import BATCH
from .sde_window import build_schedules
from .trainable import choose_trained
from .transitions import trained_steps
from .world import resolve_dtype

CONTEXT = 1 * GIB  # CUDA's own, libraries' workspaces, and what the allocator cannot use


def build(config: Config) -> ActorCritic:
    """The actor-critic as the trainer makes it, without weights."""
    options = config.model
    backbone = outline(options.pretrained, options.max_sequence_length, options.resolution)
    trunk = backbone.trunk
    with META:
        choose_trained(trunk, options.lora, backbone.lora_targets(), options.freeze)
        if options.fused:
            backbone.fuse()
        if options.gradient_checkpointing:
            trunk.enable_gradient_checkpointing(checkpoint_on_gpu)
        with_reference = config.algorithm.kl_coef > 0
        guidance = config.rollout.guidance_scale
        model = ActorCritic(backbone, config.critic, config.value_names, guidance, with_reference).eval()
    model.to(META, dtype_of(config))
    for trunk in model.trunks:
        set_attention_backend(trunk, "auto")
    return model


def dtype_of(config: Config) -> torch.dtype:
    return resolve_dtype(config.model.dtype, torch.device("cuda"))


class Passes(NamedTuple):
    """What a denoising step costs for each sample of a pass."""

    sampling: Cost  # a forward without gradient
    critic_only: Cost  # a forward, of the critic alone where its features are kept, and the backward of the critic
    training: Cost  # a forward, and the backward of policy and critic

    features: int = 0  # bytes of what the rollout keeps for the critic

    @classmethod
    def of(cls, model: ActorCritic, samples: int = 2, keeps_features: bool = False) -> "Passes":
        """Counted with so many samples: a single one spares copies that more of them need."""
        new, shapes = partial(torch.empty, device=META), model.backbone.conditioning_shapes()
        latents, timesteps = new(samples, *model.backbone.latent_shape), new(samples)
        conditioning = {name: new(samples, *shape) for name, shape in shapes.items()}
        unconditional = {name: new(1, *shape) for name, shape in shapes.items()}
        inputs = latents, timesteps, conditioning, unconditional
        present = [latents, timesteps, *conditioning.values(), *unconditional.values()]
        present += [*model.parameters(), *model.buffers()]

        def cost(**options: Any) -> Cost:
            return Cost(*(number / samples for number in cost_of(lambda: model(*inputs, **options), present)))

        with torch.no_grad():
            sampling = cost()
            features = list(model(*inputs, with_features=True)[2:]) if keeps_features else []

        def run() -> list[Tensor]:
            reference = [model.reference_prediction(*inputs)] if model.reference is not None else []
            return [*model(*inputs), *reference]

        training = Cost(*(number / samples for number in cost_of(run, present)))
        policy = model.policy_parameters
        for parameter in policy:
            parameter.requires_grad_(False)
        present += features
        critic_only = cost(values_only=True, features=features)
        for parameter in policy:
            parameter.requires_grad_(True)
        return cls(sampling, critic_only, training, sum(tap.nbytes for tap in features) // samples)


@dataclass(frozen=True)
class Sizes:
    """What memory and time are made of, whatever the batch and however many GPUs."""

    # Parameters
    policy: int
    others: int  # a critic's, a reference's
    trained: int  # of both
    trained_policy: int
    tensors: list[int]  # of each
    largest_unit: int  # of what ZeRO-3 gathers as a whole
    # Bytes
    buffers: int
    encoders: int
    autoencoder: int
    decoding: float  # of a picture, while it is decoded
    latent: int
    conditioning: int  # of a prompt
    # Others
    depth: int  # in blocks
    trained_steps: int
    evaluation_factor: int  # branches of an evaluation's forward, for one of a rollout's
    passes: Passes

    @classmethod
    def of(cls, config: Config) -> "Sizes":
        model = build(config)
        backbone, policy = model.backbone, count(model.trunk)
        vae, latents = backbone.pipe.vae, torch.empty(2, *backbone.latent_shape, device=META)
        schedule = build_schedules(backbone, config.rollout)[0]
        guided = [backbone.needs_unconditional(o.guidance_scale) for o in (config.evaluation, config.rollout)]
        weight = dtype_of(config).itemsize
        return cls(
            policy=policy,
            others=count(model) - policy,
            trained=count(model, trained_only=True),
            trained_policy=count(model.trunk, trained_only=True),
            tensors=[parameter.numel() for parameter in model.parameters()],
            largest_unit=max(map(count, model.units)),
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
            encoders=weight * sum(map(count, backbone.encoders)),
            autoencoder=4 * count(vae),
            decoding=cost_of(lambda: [backbone.decode(latents)], [latents, *vae.parameters()]).bytes / len(latents),
            latent=4 * math.prod(backbone.latent_shape),
            conditioning=4 * sum(map(math.prod, backbone.conditioning_shapes().values())),
            depth=backbone.depth,
            trained_steps=int(trained_steps(schedule.table).sum()),
            evaluation_factor=2 if guided == [True, False] else 1,
            passes=Passes.of(model, keeps_features=config.keeps_features),
        )


Parts = dict[str, float]  # bytes by name
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered weights",
    "gradient buckets",
    "weights that sample",
    "running average",
    "text encoders",
    "trajectories",
    "activations",
    "CUDA graph",
    "autoencoder",
    "decoding",
    "CUDA, allocator",
)


class Memory(NamedTuple):
    """Of one process."""

    phases: dict[str, Parts]  # on the GPU
    cpu: Parts  # what DeepSpeed offloads, and what the rollout keeps for the critic

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.fullest].values())


def memory_of(config: Config, processes: int, capacity: float, sizes: Sizes) -> Memory:
    """config: for so many processes. capacity: of a GPU, by which the engine chooses the weights that sample."""
    rollout, training, dtype = config.rollout, config.training, dtype_of(config)
    zero, stage = config.deepspeed.get("zero_optimization", {}), zero_stage(config)
    parameters = sizes.policy + sizes.others
    whole = parameters * dtype.itemsize + sizes.buffers
    around = {"autoencoder": sizes.autoencoder, "CUDA, allocator": CONTEXT}

    state = state_bytes(sizes.trained, parameters - sizes.trained, dtype, stage, processes)._asdict()
    cpu = _offloaded(zero, stage, state)
    state = {part: size - cpu.get(part, 0) for part, size in state.items()}
    state["weights"] += sizes.buffers
    is_sharded = stage == 3 and (processes > 1 or "weights" in cpu)
    buckets = _bucket_bytes(zero, stage, dtype)
    gathered = {"gathered weights": _gathered_bytes(zero, sizes, dtype) if is_sharded else 0}

    micro_batch, steps = rollout.micro_batch_size, rollout.num_inference_steps
    copy = parameters * dtype.itemsize if is_sharded or rollout.weights == "copy" else 0
    free = capacity - sum(state.values()) - sum(around.values()) - buckets
    is_copied = rollout.weights == "copy" or (rollout.weights == "auto" and 2 * copy <= free)  # or shared, for nothing
    sampling = sizes.passes.sampling.bytes * micro_batch * sizes.evaluation_factor
    share = rollout.samples_per_iteration // processes
    loop = micro_batch * ((2 * steps + 1) * sizes.latent + sizes.conditioning + steps * sizes.passes.features)
    if sizes.passes.features:
        cpu["features"] = share * steps * sizes.passes.features
    drawn = {
        "trajectories": share * ((steps + 1) * sizes.latent + sizes.conditioning) + loop,
        "decoding": min(BATCH, micro_batch) * sizes.decoding,
    }
    resident = {
        **state,
        **around,
        "weights that sample": copy if is_copied else 0,
        "running average": _average_bytes(sizes, stage, processes) if training.ema_decay else 0,
        "gradient buckets": buckets if stage == 3 else 0,
        "CUDA graph": sampling if is_copied and rollout.cuda_graph != "off" else 0,
    }
    # The last pictures may be decoded beside an update's first pass: they are asked for after its forward.
    update = resident | gathered | drawn | {"gradient buckets": buckets}

    def activations(cost: Cost, steps_at_once: int) -> Parts:
        return {"activations": cost.bytes * micro_batch * steps_at_once}

    critic_only = activations(
        sizes.passes.critic_only, _steps_at_once(steps, config.critic_steps_per_forward(sizes.depth))
    )
    trained = _steps_at_once(sizes.trained_steps, training.steps_per_forward)
    # Before it shards, the trainer encodes the prompts of a micro-batch, and measures a training pass.
    encoding = {"text encoders": sizes.encoders}
    measuring = activations(sizes.passes.training, training.steps_per_forward)
    phases = {
        "start": {"weights": whole} | around | max(encoding, measuring, key=lambda parts: sum(parts.values())),
        "encoding": resident | encoding,
        "rollout": resident | drawn | {"activations": sampling} | ({} if is_copied else gathered),
        "critic": update | critic_only,
        "update": update | activations(sizes.passes.training, trained),
    }
    if not training.value_pretraining_iterations and not training.critic_epochs:
        del phases["critic"]
    return Memory(phases, cpu)


def _average_bytes(sizes: Sizes, stage: int, processes: int) -> float:
    """float32, of what a process holds of the policy."""
    return 4 * sizes.trained_policy / (processes if stage == 3 else 1)


def _offloaded(zero: dict[str, Any], stage: int, state: Parts) -> Parts:
    """What DeepSpeed keeps away from the GPU; gradients go with the optimizer where they are sharded."""

    def leaves(section: str) -> bool:
        return (zero.get(section) or {}).get("device", "none") != "none"

    parts = ["optimizer", *(["gradients"] if stage > 1 else [])] if leaves("offload_optimizer") else []
    parts += ["weights"] if stage == 3 and leaves("offload_param") else []
    return {part: state[part] for part in parts}


def _bucket_bytes(zero: dict[str, Any], stage: int, dtype: torch.dtype) -> float:
    """Where gradients wait to be reduced: stage 3 has one for good, the others one or two for an update."""
    buckets = 2 if 0 < stage < 3 and zero.get("overlap_comm") else 1
    return buckets * zero.get("reduce_bucket_size", 5e8) * dtype.itemsize if stage else 0


def _gathered_bytes(zero: dict[str, Any], sizes: Sizes, dtype: torch.dtype) -> float:
    """Small weights, which stay gathered; the unit in use and the next one or its gradients; and what is not let go at
    the end of a forward, because its backward is near."""
    small = sum(size for size in sizes.tensors if size <= zero.get("stage3_param_persistence_threshold", 1e5))
    near = zero.get("stage3_max_reuse_distance", 1e9) / 2
    return dtype.itemsize * min(small + 2 * sizes.largest_unit + near, sum(sizes.tensors) + sizes.largest_unit)


def _steps_at_once(steps: int, most: int) -> int:
    """Of as few forwards of nearly as many steps each: `update.parts_of`."""
    return math.ceil(steps / math.ceil(steps / most))
