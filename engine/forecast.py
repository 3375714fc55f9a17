"""What a run would need of GPUs that need not be here: `engine/train.py --plan`.

The model is built and run on the "meta" device, where tensors have sizes and no numbers: its configuration is all that
is read. What comes out of it are bounds and proportions, not measurements.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any, NamedTuple

import torch

from .actor_critic import ActorCritic
from .backbones.attention import set_attention_backend
from .backbones.outline import META, Cost, checkpoint_on_gpu, cost_of, outline
from .config import Config
from .errors import UserError
from .plan import (
    Measurement,
    align,
    count,
    describe_length,
    describe_model,
    describe_work,
    predict_seconds,
    state_bytes,
    zero_stage,
)
from .scoring import BATCH
from .trainable import choose_trained
from .transitions import trained_steps
from .world import resolve_dtype

GIB = 2**30
UTILISATION = 0.4  # of a GPU's peak: an assumption
SPARE = 0.05  # of its memory, to be left
CONTEXT = 1 * GIB  # CUDA's own, libraries' workspaces, and what the allocator cannot use
MOST_GPUS = 1024  # that a plan looks at

# --------------------------------------------------------------------------------------------------------------- GPUs


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    flops: float | None  # dense bfloat16 operations a second, None where that is not known

    def __str__(self) -> str:
        speed = f"{self.flops / 1e12:,.0f} TFLOP/s in bfloat16" if self.flops else "of a speed that is not known"
        return f"{self.name}, {self.memory / GIB:.0f} GiB, {speed}"


# GiB as the driver counts them; dense bfloat16 of the data sheet (of a GeForce: summed in float32).
DEVICES = {
    name: Device(name, gib * GIB, flops)
    for name, gib, flops in (
        ("A100-40GB", 40, 312e12),
        ("A100-80GB", 80, 312e12),
        ("H100", 80, 989.4e12),
        ("H100-PCIe", 80, 756e12),
        ("H200", 140, 989.4e12),
        ("B200", 179, 2250e12),
        ("L40S", 45, 362e12),
        ("RTX4090", 24, 165.2e12),
        ("MI300X", 192, 1307.4e12),
    )
}


def find_devices(text: str) -> tuple[int, Device]:
    """How many of which: "8xH100". Of an empty text the GPUs of this machine, and where it has none 8 x H100."""
    if not text and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        words = here.name.lower().replace(" ", "")
        alike = [device for name, device in DEVICES.items() if all(part in words for part in name.lower().split("-"))]
        flops = max(alike, key=lambda device: len(device.name)).flops if alike else None
        return int(os.environ.get("WORLD_SIZE", torch.cuda.device_count())), Device(here.name, here.total_memory, flops)
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text or "8xH100", re.IGNORECASE)
    names = {name.lower(): name for name in DEVICES}
    processes, name = int(found[1] or 1), names.get(found[2].lower())
    if name is None or not processes:
        raise UserError(f'--plan {text}: give a number of GPUs and one of {", ".join(DEVICES)}, as in "8xH100"')
    return processes, DEVICES[name]


# -------------------------------------------------------------------------------------------------------------- sizes


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
        names = [reward.name for reward in config.rewards]
        model = ActorCritic(backbone, config.critic, names, config.rollout.guidance_scale).eval()
    model.to(META, dtype_of(config))
    for trunk in model.trunks:
        set_attention_backend(trunk, "auto")
    return model


def dtype_of(config: Config) -> torch.dtype:
    return resolve_dtype(config.model.dtype, torch.device("cuda"))


class Passes(NamedTuple):
    """What a denoising step costs for each sample of a pass."""

    sampling: Cost  # a forward without gradient
    critic_only: Cost  # a forward, and the backward of the critic
    training: Cost  # a forward, and the backward of policy and critic

    @classmethod
    def of(cls, model: ActorCritic, samples: int = 2) -> "Passes":
        """Counted with so many samples: a single one spares copies that more of them need."""
        new, shapes = partial(torch.empty, device=META), model.backbone.conditioning_shapes()
        latents, timesteps = new(samples, *model.backbone.latent_shape), new(samples)
        conditioning = {name: new(samples, *shape) for name, shape in shapes.items()}
        unconditional = {name: new(1, *shape) for name, shape in shapes.items()}
        inputs = latents, timesteps, conditioning, unconditional
        present = [latents, timesteps, *conditioning.values(), *unconditional.values()]
        present += [*model.parameters(), *model.buffers()]

        def cost(**options: bool) -> Cost:
            return Cost(*(number / samples for number in cost_of(lambda: model(*inputs, **options), present)))

        with torch.no_grad():
            sampling = cost()
        training = cost()
        policy = model.policy_parameters
        for parameter in policy:
            parameter.requires_grad_(False)
        critic_only = cost(values_only=True)
        for parameter in policy:
            parameter.requires_grad_(True)
        return cls(sampling, critic_only, training)


@dataclass(frozen=True)
class Sizes:
    """What memory and time are made of, whatever the batch and however many GPUs."""

    # Parameters
    policy: int
    critic: int
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
        model, sampler = build(config), config.rollout
        backbone, policy = model.backbone, count(model.trunk)
        vae, latents = backbone.pipe.vae, torch.empty(2, *backbone.latent_shape, device=META)
        schedule = backbone.schedule(
            sampler.transition, sampler.noise_level, sampler.num_inference_steps, sampler.num_trained_steps
        )
        guided = [backbone.needs_unconditional(o.guidance_scale) for o in (config.evaluation, sampler)]
        weight = dtype_of(config).itemsize
        return cls(
            policy=policy,
            critic=count(model) - policy,
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
            passes=Passes.of(model),
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
    cpu: Parts  # where DeepSpeed offloads to

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
    parameters = sizes.policy + sizes.critic
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
    loop = micro_batch * ((2 * steps + 1) * sizes.latent + sizes.conditioning)
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
    measuring["gradients"] = sizes.trained * dtype.itemsize
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


# ------------------------------------------------------------------------------------------------------------ verdict


class Forecaster:
    """Memory and time of variants of one run. What a variant shares with another is counted once."""

    def __init__(self, config: Config, device: Device):
        self.config, self.device = config, device
        self._sizes: dict[str, Sizes] = {}

    def sizes(self, config: Config) -> Sizes:
        key = config.model.model_dump_json()
        if key not in self._sizes:
            self._sizes[key] = Sizes.of(config)
        return self._sizes[key]

    def memory(self, config: Config, processes: int) -> Memory:
        return memory_of(config.for_processes(processes), processes, self.device.memory, self.sizes(config))

    def fits(self, memory: Memory) -> bool:
        return memory.peak <= (1 - SPARE) * self.device.memory

    def remedy(self, processes: int) -> tuple[int, list[str], Memory] | None:
        """GPUs and `--set` texts with which the run fits: fewest GPUs, then fewest settings, then the earlier ones."""
        choices = list(_settings(self.config.for_processes(processes)))
        while processes <= MOST_GPUS:
            for settings in choices:
                try:
                    memory = self.memory(_with(self.config, settings), processes)
                except UserError:
                    continue  # batches that do not divide
                if self.fits(memory):
                    return processes, [f"{key}={_text(value)}" for key, value in settings], memory
            processes = 2 ** processes.bit_length()
        return None


Setting = tuple[str, Any]


def _settings(config: Config) -> Iterator[tuple[Setting, ...]]:
    """Settings that spare memory: none, each alone, each two, ..."""
    zero, micro_batch = config.deepspeed.get("zero_optimization", {}), config.rollout.micro_batch_size
    is_offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    stage, offload = "deepspeed.zero_optimization.stage", "deepspeed.zero_optimization.offload_optimizer.device"
    knobs: list[list[Setting]] = [
        [("model.gradient_checkpointing", True)] if not config.model.gradient_checkpointing else [],
        [("rollout.micro_batch_size", micro_batch >> i) for i in range(1, micro_batch.bit_length())],
        [(stage, 3)] if zero_stage(config) != 3 else [],
        [("rollout.weights", "sharded")] if config.rollout.weights != "sharded" else [],
        [(offload, "cpu")] if not is_offloaded else [],
        [("model.lora", {})] if config.model.lora is None else [],
    ]
    knobs = [knob for knob in knobs if knob]
    for size in range(len(knobs) + 1):
        for chosen in combinations(knobs, size):
            for settings in product(*chosen):
                names = [name for name, _ in settings]
                if zero_stage(config) or offload not in names or stage in names:  # only ZeRO offloads
                    yield settings


def _with(config: Config, settings: Iterable[Setting]) -> Config:
    data = config.model_dump(mode="json")
    for key, value in settings:
        *sections, last = key.split(".")
        node = data
        for section in sections:
            node[section] = node = node.get(section) or {}
        node[last] = value
    return Config.model_validate_json(json.dumps(data))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# --------------------------------------------------------------------------------------------------------------- text


def forecast(config: Config, devices: str) -> str:
    """The plan of a run on `devices` ("8xH100"), a line a subject; UserError as the run itself would raise it."""
    processes, device = find_devices(devices)
    resolved = config.for_processes(processes)
    forecaster = Forecaster(config, device)
    sizes, memory = forecaster.sizes(config), forecaster.memory(config, processes)
    work = describe_work(resolved, sizes.trained_steps)
    trained = "" if sizes.trained == sizes.policy + sizes.critic else f", of which {sizes.trained:,} are trained"
    lines = {
        "planned": f"{processes} x {device}; DeepSpeed ZeRO stage {zero_stage(config)}",
        "model": describe_model(config, sizes.policy, sizes.critic, dtype_of(config)) + trained,
        **work,
        "pictures": _describe_pictures(resolved, processes),
        "compute": f"{sizes.passes.sampling.flops / 1e12:.3g} TFLOP a sample and denoising step, in training "
        f"{sizes.passes.training.flops / 1e12:.3g}",
        "length": _describe_time(resolved, processes, device, sizes),
        "memory": _table(memory),
    }
    if memory.cpu:
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in memory.cpu.items())
        lines["CPU"] = f"GiB of its memory that a process takes: {parts}"
    lines["verdict"] = _verdict(forecaster, memory, processes)
    return align(lines)


def _describe_pictures(config: Config, processes: int) -> str:
    samples, micro_batch = config.rollout.samples_per_iteration, config.rollout.micro_batch_size
    share, iterations = samples // processes, config.training.value_pretraining_iterations + config.training.iterations
    return (
        f"{share} an iteration and process, {share // micro_batch} micro-batches; "
        f"{iterations * samples:,} in the run, evaluations aside"
    )


def _describe_time(config: Config, processes: int, device: Device, sizes: Sizes) -> str:
    if device.flops is None or dtype_of(config) == torch.float32:
        return f"no time: the peak of {device.name} in {config.model.dtype} is not known here"
    speed = UTILISATION * device.flops / config.rollout.micro_batch_size
    cost = Measurement(*(each.flops / speed for each in sizes.passes), activations=0)
    length = describe_length(config, predict_seconds(config, processes, sizes.trained_steps, cost))
    return _lines(length, f"by the model's passes alone, at an assumed {100 * UTILISATION:.0f} % of the peak")


def _table(memory: Memory) -> str:
    """Parts by phase."""
    rows = [("GiB a GPU", *memory.phases)]
    for name in PARTS:
        sizes = [parts.get(name, 0) for parts in memory.phases.values()]
        if any(sizes):
            rows.append((name, *(f"{size / GIB:.2f}" if size else "-" for size in sizes)))
    rows.append(("together", *(f"{sum(parts.values()) / GIB:.2f}" for parts in memory.phases.values())))
    return _lines(*(f"{name:<20}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows))


def _verdict(forecaster: Forecaster, memory: Memory, processes: int) -> str:
    device = forecaster.device
    most = f"{memory.peak / GIB:.1f} of {device.memory / GIB:.0f} GiB ({memory.fullest})"
    if forecaster.fits(memory):
        return f"fits: {most}"
    most = f"does not fit: {most}, and {100 * SPARE:.0f} % must stay free"
    remedy = forecaster.remedy(processes)
    if remedy is None:
        return f"{most}; nor with the settings that a plan tries, on up to {MOST_GPUS} of these GPUs"
    found, settings, smaller = remedy
    gpus = [] if found == processes else [f"on {found} x {device.name}"]
    how = " ".join([*gpus, *(f"--set {setting}" for setting in settings)])
    return _lines(f"{most}. This fits: {smaller.peak / GIB:.1f} GiB ({smaller.fullest})", how)


def _lines(*texts: str) -> str:
    """Below each other, beside one name."""
    return ("\n" + 13 * " ").join(texts)
