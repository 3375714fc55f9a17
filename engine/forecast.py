"""What a run would need of GPUs that need not be here: `engine/train.py --plan`.

The model is built and run on the "meta" device, where tensors have sizes and no numbers: its configuration is all that
is read. What comes out of it are bounds and proportions, not measurements.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

import torch

from .config import Config
from .errors import UserError
from .gpus import GIB, Device, find_devices
from .memory import PARTS, Memory, Sizes, dtype_of, memory_of
from .plan import Measurement, align, describe_length, describe_model, describe_work, predict_seconds, zero_stage

UTILISATION = 0.4  # of a GPU's peak: an assumption
SPARE = 0.05  # of its memory, to be left
MOST_GPUS = 1024  # that a plan looks at

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
    trained = "" if sizes.trained == sizes.policy + sizes.others else f", of which {sizes.trained:,} are trained"
    lines = {
        "planned": f"{processes} x {device}; DeepSpeed ZeRO stage {zero_stage(config)}",
        "model": describe_model(config, sizes.policy, sizes.others, dtype_of(config)) + trained,
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
    passes = sizes.passes
    costs = (cost.flops / speed for cost in (passes.sampling, passes.critic_only, passes.training))
    cost = Measurement(*costs, activations=0)
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
