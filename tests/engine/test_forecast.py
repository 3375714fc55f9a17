"""`--plan`: memory and time of runs that do not take place, by hand or on a CPU; and what is said of them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latent_critic.engine import forecast as module
from latent_critic.engine import memory as memory_module
from latent_critic.engine.backbones.cost import Cost
from latent_critic.engine.config import load_config
from latent_critic.engine.errors import UserError
from latent_critic.engine.forecast import SPARE, Forecaster, forecast
from latent_critic.engine.gpus import DEVICES, GIB, Device, find_devices
from latent_critic.engine.memory import CONTEXT, Passes, Sizes, build, memory_of
from latent_critic.engine.plan import count, measure
from latent_critic.engine.update import parts_of

from . import tiny_runs

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))
H100 = DEVICES["H100"]
HUGE = 1e15  # bytes
BFLOAT16 = 2
# Round numbers in place of a model's: 1000 parameters of a policy, 100 of a critic.
SIZES = Sizes(
    policy=1000,
    others=100,
    trained=1100,
    trained_policy=1000,
    tensors=[10, 90, 400, 600],
    largest_unit=600,
    buffers=7,
    encoders=5000,
    autoencoder=400,
    decoding=30,
    latent=16,
    conditioning=40,
    depth=16,
    trained_steps=9,
    evaluation_factor=1,
    passes=Passes(sampling=Cost(1e12, 50), critic_only=Cost(1e12, 60), training=Cost(3e12, 1000)),
)
NO_BUCKETS = {"reduce_bucket_size": 0, "stage3_max_reuse_distance": 0}


@pytest.fixture
def config(tiny_config):
    """config(section={...}): 10 steps; 64 samples in 2 updates and micro-batches of 4."""

    def make(**changes):
        rollout = {"num_inference_steps": 10, "samples_per_iteration": 64, "micro_batch_size": 4}
        zero = {"stage": 3, "stage3_param_persistence_threshold": 50, **NO_BUCKETS, **changes.pop("zero", {})}
        sections = {"rollout": rollout | changes.pop("rollout", {}), "deepspeed": {"zero_optimization": zero}}
        return tiny_config(**sections, **changes)

    return make


@pytest.fixture
def memory(config):
    """memory(processes, sizes={...}, section={...}) of round numbers."""

    def of(processes=1, capacity=HUGE, sizes=None, **changes):
        sizes = SIZES if sizes is None else SimpleNamespace(**{**vars(SIZES), **sizes})
        return memory_of(config(**changes).for_processes(processes), processes, capacity, sizes)

    return of


# ------------------------------------------------------------------------------------------------------------- devices


def test_devices_by_name():
    assert find_devices("8xH100") == (8, H100)
    assert find_devices("16 x mi300x") == (16, DEVICES["MI300X"])
    assert find_devices("RTX4090") == (1, DEVICES["RTX4090"])
    assert str(H100) == "H100, 80 GiB, 989 TFLOP/s in bfloat16"
    assert {"A100-40GB", "A100-80GB", "H100", "H200", "B200", "L40S", "RTX4090", "MI300X"} <= DEVICES.keys()


@pytest.mark.parametrize("text", ["8xH10", "xH100", "0xH100", "8x", "8"])
def test_unknown_devices_are_refused_with_those_that_are_known(text):
    with pytest.raises(UserError) as error:
        find_devices(text)
    assert f"--plan {text}: " in str(error.value) and all(name in str(error.value) for name in DEVICES)


@pytest.mark.parametrize(
    "name, alike",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("Somebody's GPU", None),
    ],
)
def test_this_machines_devices(monkeypatch, name, alike):
    here = SimpleNamespace(name=name, total_memory=50 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = Device(name, 50 * GIB, alike and DEVICES[alike].flops)
    assert find_devices("") == (4, device)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert find_devices("") == (16, device)
    assert find_devices("2xH200") == (2, DEVICES["H200"])


def test_without_a_device_it_is_eight_of_one_kind(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices("") == (8, H100)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_sizes_are_the_models(tiny_config, tiny_model):
    config = tiny_config(model={"dtype": "float32"})
    sizes, model = Sizes.of(config), tiny_model(config)
    backbone = model.backbone
    assert (sizes.policy, sizes.others) == (count(model.trunk), count(model.critic))
    assert sizes.trained == sum(sizes.tensors) == count(model)
    assert sizes.largest_unit == max(count(unit) for unit in model.units)
    assert sizes.buffers == sum(b.numel() for b in model.buffers()) * 4 > 0  # of positions
    assert sizes.encoders == 4 * sum(map(count, backbone.encoders))
    assert sizes.autoencoder == 4 * count(backbone.pipe.vae)
    assert (sizes.latent, sizes.depth) == (4 * 4 * 16 * 16, 3)
    encoded = backbone.encode_prompts(["a red circle"])
    assert sizes.conditioning == sum(tensor.nbytes for tensor in encoded.values())
    assert sizes.trained_steps == 3


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"name": "grpo", "group_size": 4}},
        {"algorithm": {"name": "grpo", "group_size": 4, "kl_coef": 0.04}},
        {"algorithm": {"kl_coef": 0.04}},
        {"critic": {"trunk": "pixels"}},
        {"critic": {"heads": "sum"}},
    ],
    ids=str,
)
def test_sizes_of_other_ways_to_train(tiny_config, tiny_model, sections):
    """A model on no device has the parameters of the one that is trained; a reference is not trained."""
    config = tiny_config(model={"dtype": "float32"}, **sections)
    sizes, model = Sizes.of(config), tiny_model(config)
    policy, reference = count(model.trunk), count(model.trunk) if config.algorithm.kl_coef else 0
    critic = sum(count(part) for part in (model.critic, model.pixels) if part is not None)
    assert (sizes.policy, sizes.others) == (policy, critic + reference)
    assert (critic > 0) == config.has_critic
    assert (sizes.trained, sizes.trained_policy) == (policy + critic, policy)
    assert sorted(sizes.tensors) == sorted(parameter.numel() for parameter in model.parameters())


def test_a_reference_is_a_forward_of_each_training_pass(tiny_config):
    """And none of a rollout; it keeps no activation."""
    grpo = {"name": "grpo", "group_size": 4}
    options = {"model": {"dtype": "float32"}}
    plain, kl = (Passes.of(build(tiny_config(algorithm=grpo | more, **options))) for more in ({}, {"kl_coef": 0.04}))
    assert kl.sampling == plain.sampling
    assert kl.training.flops == pytest.approx(plain.training.flops + plain.sampling.flops, rel=1e-9)
    # What stays besides is the prediction, 4 x 16 x 16 float32 numbers.
    assert 0 <= kl.training.bytes - plain.training.bytes <= 2 * 4 * 16 * 16 * 4


def test_a_window_trains_as_many_steps_as_it_has(tiny_config):
    assert Sizes.of(tiny_config(rollout={"sde_window": {"size": 2}})).trained_steps == 2


def test_activations_are_those_that_a_cpu_keeps(tiny_config, tiny_model):
    """`plan.measure` on the real model. On top come what a pass returns and, at its end, gradients of the widest
    layers; what the critic pools is kept as it is, where a CPU keeps a normalised copy."""
    config = tiny_config(model={"dtype": "float32", "fused": False})
    passes, model = Passes.of(build(config)), tiny_model(config)
    samples = 4
    conditioning = model.backbone.encode_prompts(["a red circle"] * samples)
    inputs = torch.zeros(samples, *model.backbone.latent_shape), torch.full((samples,), 500.0), conditioning
    kept = measure(model, 1, 1, *inputs).activations / samples
    assert passes.training.bytes == pytest.approx(kept, rel=0.06)


def test_kernels_keep_less_than_the_steps_they_stand_for(tiny_config):
    """Two norms a stream and block: the normalised tokens, which the steps keep beside the modulated ones."""
    fused, plain = (
        Passes.of(build(tiny_config(model={"fused": fused, "dtype": "bfloat16"}))) for fused in (True, False)
    )
    assert fused.training.flops == plain.training.flops
    tokens = 8 * 8 + 12
    assert plain.training.bytes - fused.training.bytes > 3 * 1.5 * tokens * 64 * BFLOAT16


@pytest.mark.parametrize(
    "model, resolution",
    [("stabilityai/stable-diffusion-3.5-medium", 512), ("stable-diffusion-v1-5/stable-diffusion-v1-5", 256)],
)
def test_costs_grow_in_proportion_to_the_samples(tiny_config, model, resolution):
    made = build(tiny_config(model={"pretrained": model, "resolution": resolution, "dtype": "bfloat16"}))
    two, four = (Passes.of(made, samples) for samples in (2, 4))
    for few, many in zip(two[:3], four[:3], strict=True):
        assert few.flops == pytest.approx(many.flops, rel=1e-4)
        assert few.bytes == pytest.approx(many.bytes, rel=0.01)


def test_guidance_runs_two_branches(tiny_config):
    plain, guided = (Passes.of(build(tiny_config(rollout={"guidance_scale": guidance}))) for guidance in (1.0, 4.0))
    assert guided.sampling.flops == pytest.approx(2 * plain.sampling.flops, rel=0.01)
    assert guided.training.bytes == pytest.approx(2 * plain.training.bytes, rel=0.05)
    # Evaluated with guidance alone, the rollouts of an evaluation are the larger ones.
    assert Sizes.of(tiny_config(evaluation={"guidance_scale": 4.0})).evaluation_factor == 2
    both = tiny_config(evaluation={"guidance_scale": 4.0}, rollout={"guidance_scale": 4.0})
    assert Sizes.of(both).evaluation_factor == 1


def test_the_critic_alone_takes_no_backward_through_the_policy(tiny_config):
    shared = Passes.of(build(tiny_config()))
    assert shared.critic_only.flops == pytest.approx(shared.sampling.flops, rel=0.01)
    assert shared.critic_only.bytes < shared.training.bytes / 3
    kept = Passes.of(build(tiny_config()), keeps_features=True)  # then the trunk does not run at all
    taps, tokens, width = 3, 64, 64
    assert kept.features == taps * tokens * width * 2 and kept.critic_only.flops < shared.critic_only.flops / 3
    assert kept[:1] + kept[2:3] == shared[:1] + shared[2:3]
    separate = Passes.of(build(tiny_config(critic={"trunk": "separate"})))
    assert separate.sampling.flops == pytest.approx(2 * shared.sampling.flops, rel=0.01)
    assert separate.critic_only.flops == pytest.approx(shared.training.flops, rel=0.1)


def test_factors_of_low_rank_cost_no_gradient_of_the_weights_beside_them(tiny_config):
    full, lora = (Sizes.of(tiny_config(model=model)) for model in ({}, {"lora": {"rank": 2}}))
    assert lora.trained < full.trained / 5 and lora.policy > full.policy
    assert lora.passes.training.flops < 0.8 * full.passes.training.flops
    assert lora.passes.training.bytes < full.passes.training.bytes


def test_checkpoints_spare_activations_and_cost_a_forward(tiny_config):
    plain, spared = (
        Passes.of(build(tiny_config(model={"gradient_checkpointing": wanted}))) for wanted in (False, True)
    )
    assert spared.training.bytes < 0.6 * plain.training.bytes  # of three blocks one is there at a time
    extra = spared.training.flops - plain.training.flops
    assert 0.8 * plain.sampling.flops < extra < plain.sampling.flops
    assert spared.sampling == plain.sampling


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "stage, processes, weights, gradients, optimizer",
    [
        # 1100 parameters in bfloat16, 12 bytes of optimizer each
        (0, 4, 2200, 2200, 13200),
        (1, 4, 2200, 2200, 3300),
        (2, 4, 2200, 550, 3300),
        (3, 4, 550, 550, 3300),
        (3, 1, 2200, 2200, 13200),
    ],
)
def test_training_state_by_stage(memory, stage, processes, weights, gradients, optimizer):
    parts = memory(processes, zero={"stage": stage}).phases["update"]
    buffers = SIZES.buffers
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [weights + buffers, gradients, optimizer]


def test_what_is_frozen_is_a_weight_alone(memory):
    parts = memory(2, sizes={"trained": 200, "trained_policy": 100}, training={"ema_decay": 0.9}).phases["update"]
    assert (parts["weights"], parts["gradients"]) == (1100 + SIZES.buffers, 200)
    assert (parts["optimizer"], parts["running average"]) == (1200, 4 * 50)


def test_what_is_offloaded_is_on_the_cpu(memory):
    offload = {"offload_optimizer": {"device": "cpu"}}
    found = memory(4, zero=offload)
    assert found.cpu == {"optimizer": 3300, "gradients": 550}
    assert found.phases["update"]["optimizer"] == found.phases["update"]["gradients"] == 0
    assert memory(4, zero={"stage": 1, **offload}).cpu == {"optimizer": 3300}  # its gradients are whole
    both = memory(4, zero={**offload, "offload_param": {"device": "cpu"}})
    assert both.cpu == {"optimizer": 3300, "gradients": 550, "weights": 550}
    assert both.phases["update"]["weights"] == SIZES.buffers
    assert memory(4).cpu == {}


def test_gathered_weights(memory):
    # The small tensor of 10, twice the unit of 600; and up to half the reuse distance.
    assert memory(2).phases["update"]["gathered weights"] == BFLOAT16 * (10 + 1200)
    far = memory(2, zero={"stage3_max_reuse_distance": 200}).phases
    assert far["update"]["gathered weights"] == far["critic"]["gathered weights"] == BFLOAT16 * (10 + 1200 + 100)
    assert "gathered weights" not in far["rollout"]  # whole weights sample
    most = memory(2, zero={"stage3_max_reuse_distance": 1e9}).phases
    assert most["update"]["gathered weights"] == BFLOAT16 * (1100 + 600)
    for options in ({"processes": 1}, {"processes": 2, "zero": {"stage": 2}}):
        assert memory(**options).phases["update"]["gathered weights"] == 0


def test_gradient_buckets(memory):
    bucket = {"reduce_bucket_size": 300}
    by_phase = [memory(2, zero={"stage": s, **bucket}).phases for s in (0, 2, 3)]
    assert [phases["update"]["gradient buckets"] for phases in by_phase] == [0, 600, 600]
    assert [phases["rollout"]["gradient buckets"] for phases in by_phase] == [0, 0, 600]
    double = memory(2, zero={"stage": 2, "overlap_comm": True, **bucket}).phases
    assert double["update"]["gradient buckets"] == 1200


@pytest.mark.parametrize(
    "weights, processes, stage, capacity, copied, graph",
    [
        ("auto", 2, 3, HUGE, 2200, 200),
        ("auto", 1, 3, HUGE, 0, 200),  # a process holds all
        ("auto", 2, 2, HUGE, 0, 200),
        ("auto", 2, 3, CONTEXT + 10_000, 0, 0),  # no room for a copy twice
        ("copy", 2, 3, CONTEXT + 10_000, 2200, 200),
        ("copy", 2, 2, HUGE, 2200, 200),
        ("sharded", 2, 3, HUGE, 0, 0),
    ],
)
def test_weights_that_sample(memory, weights, processes, stage, capacity, copied, graph):
    phases = memory(processes, capacity, zero={"stage": stage}, rollout={"weights": weights}).phases
    for phase in ("rollout", "update"):
        assert (phases[phase]["weights that sample"], phases[phase]["CUDA graph"]) == (copied, graph)
    is_sharded = (processes, stage) == (2, 3)
    assert bool(phases["rollout"].get("gathered weights")) == (is_sharded and not copied)
    off = memory(processes, zero={"stage": stage}, rollout={"weights": weights, "cuda_graph": "off"}).phases
    assert off["rollout"]["CUDA graph"] == 0


def test_phases(memory):
    """One process: 64 samples, micro-batches of 4, 10 steps of which 9 are trained, 16 blocks."""
    phases = memory(1, training={"steps_per_forward": 2}).phases
    assert list(phases) == ["start", "encoding", "rollout", "critic", "update"]
    around = {"autoencoder": 400, "CUDA, allocator": CONTEXT}
    assert phases["start"] == around | {"weights": 2207, "activations": 4 * 2 * 1000}
    assert phases["encoding"]["text encoders"] == 5000 and "activations" not in phases["encoding"]
    drawn = 64 * (11 * 16 + 40) + 4 * (21 * 16 + 40)
    for name, activations in (
        ("rollout", 4 * 50),
        ("critic", 4 * 10 * 60),  # all ten steps of a sample at once, as they are fewer than blocks
        ("update", 4 * 2 * 1000),
    ):
        parts = phases[name]
        assert (parts["activations"], parts["trajectories"], parts["decoding"]) == (activations, drawn, 4 * 30), name
        assert "text encoders" not in parts
        assert around.items() <= parts.items()
    # Without weights to train beside them, the text encoders are what a start must hold.
    frozen = memory(1, sizes={"trained": 1, "passes": Passes(*[Cost(1, 1)] * 3)}).phases["start"]
    assert frozen == around | {"weights": 2207, "text encoders": 5000}
    assert "critic" not in memory(1, training={"critic_epochs": 0, "value_pretraining_iterations": 0}).phases


def test_features_are_kept_on_the_host(memory):
    """32 samples of 10 steps and 9 bytes in each of two processes; and a micro-batch's until they are copied."""
    plain, kept = (memory(2, sizes={"passes": SIZES.passes._replace(features=size)}) for size in (0, 9))
    assert plain.cpu == {} and kept.cpu == {"features": 32 * 10 * 9}
    for phase in ("rollout", "critic", "update"):
        assert kept.phases[phase]["trajectories"] - plain.phases[phase]["trajectories"] == 4 * 10 * 9


def test_large_micro_batches_are_decoded_in_part(memory):
    phases = memory(1, rollout={"micro_batch_size": 32}).phases
    assert phases["rollout"]["decoding"] == 16 * 30


def test_the_fullest_phase(memory):
    found = memory(1)
    sums = {name: sum(parts.values()) for name, parts in found.phases.items()}
    assert sums["update"] > max(sum_ for name, sum_ in sums.items() if name != "update")
    assert (found.fullest, found.peak) == ("update", sums["update"])


@pytest.mark.parametrize("most", [1, 3, 16, 57])
def test_steps_that_share_a_forward_are_the_updaters(most):
    parts = parts_of([slice(0, 4)], slice(0, 40), most, 1)
    assert memory_module._steps_at_once(40, most) == max(part.steps.stop - part.steps.start for part in parts)


# ------------------------------------------------------------------------------------------------------------- verdict


@pytest.fixture
def heavy(tiny_pipeline, tmp_path):
    """File of a run on the tiny pipeline that has knobs to turn, and its config."""
    path = tmp_path / "config.json"
    sections = {
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained": str(tiny_pipeline), "max_sequence_length": 0},
        "rollout": {"num_inference_steps": 4, "samples_per_iteration": 256, "micro_batch_size": 64},
        "critic": {"dim": 32, "num_heads": 2},
        "rewards": [{"name": "jpeg_compressibility"}],
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    path.write_text(json.dumps(sections))
    return path


def _needed(path: Path, processes: int, *overrides: str) -> float:
    """Least memory of a GPU, the context aside, with which the run fits."""
    device = Device("any", HUGE, 1e15)
    return Forecaster(config := load_config(path, overrides), device).memory(config, processes).peak


@pytest.mark.parametrize(
    "enough",
    [
        ["model.gradient_checkpointing=true"],
        ["rollout.micro_batch_size=16"],
        ["model.gradient_checkpointing=true", "rollout.micro_batch_size=4"],
    ],
    ids=" ".join,
)
def test_what_is_advised_fits(heavy, monkeypatch, enough):
    """The memory is what `enough` leaves free of it: the plan finds this, or something earlier in its order."""
    monkeypatch.setattr(memory_module, "CONTEXT", 0)
    memory = 1.0001 * _needed(heavy, 1, *enough) / (1 - SPARE)
    monkeypatch.setitem(DEVICES, "Tiny", Device("Tiny", memory, 1e12))
    text = forecast(load_config(heavy), "1xTiny")
    found = re.search(r"  verdict    does not fit: .*, and 5 % must stay free\. This fits: .*\n +(--set .*)$", text)
    assert found, text
    advised = found[1].split("--set ")[1:]
    assert len(advised) <= len(enough)
    config = load_config(heavy, [override.strip() for override in advised])
    assert "  verdict    fits: " in forecast(config, "1xTiny")
    assert not any(
        "  verdict    fits: " in forecast(load_config(heavy, rest), "1xTiny")
        for rest in ([a for a in map(str.strip, advised) if a != left.strip()] for left in advised)
    )


def test_every_setting_that_is_tried_is_one_that_can_be_pasted(heavy):
    config = load_config(heavy)
    tried = list(module._settings(config.for_processes(1)))
    assert tried[:3] == [(), (("model.gradient_checkpointing", True),), (("rollout.micro_batch_size", 32),)]
    alone = list(dict.fromkeys(settings[0][0] for settings in tried if len(settings) == 1))
    assert alone == [
        "model.gradient_checkpointing",
        "rollout.micro_batch_size",
        "deepspeed.zero_optimization.stage",
        "rollout.weights",
        "model.lora",
    ]  # nor is anything offloaded without ZeRO
    for settings in tried:
        pasted = load_config(heavy, [f"{key}={module._text(value)}" for key, value in settings])
        assert module._with(config, settings) == pasted
        zero = pasted.deepspeed["zero_optimization"]
        assert zero["stage"] or "offload_optimizer" not in zero


def test_more_gpus_are_the_last_resort(heavy, monkeypatch):
    """Of the sharded state alone, and with nothing but GPUs to change."""
    monkeypatch.setattr(memory_module, "CONTEXT", 0)
    monkeypatch.setattr(module, "_settings", lambda config: iter([()]))
    sharded = ["deepspeed.zero_optimization.stage=3", "rollout.micro_batch_size=1", "rollout.weights=sharded"]
    eight, four = (_needed(heavy, n, *sharded) for n in (8, 4))
    assert eight < four
    monkeypatch.setitem(DEVICES, "Tiny", Device("Tiny", 1.0001 * eight / (1 - SPARE), 1e12))
    config = load_config(heavy, sharded)
    assert forecast(config, "2xTiny").endswith("\n" + 13 * " " + "on 8 x Tiny")
    monkeypatch.setitem(DEVICES, "Tiny", Device("Tiny", 1000, 1e12))
    assert forecast(config, "2xTiny").endswith("nor with the settings that a plan tries, on up to 1024 of these GPUs")


# ---------------------------------------------------------------------------------------------------------------- text


def test_time_is_operations_over_the_speed(config, monkeypatch):
    """1 TFLOP a sampling or critic-only pass of a sample, 3 a training pass, at 0.4 of 10 TFLOP/s: 0.25 s and 0.75 s a
    sample and step. 64 samples: 10 x 0.25 + 2 x 10 x 0.25 + 9 x 0.75 = 14.25 s each, on 2 GPUs 456 s together."""
    monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, config: SIZES))
    monkeypatch.setitem(DEVICES, "Slow", Device("Slow", HUGE, 10e12))
    made = config(training={"iterations": 30, "value_pretraining_iterations": 5, "critic_epochs": 2})
    lines = forecast(made, "2xSlow").splitlines()
    assert lines[0] == "  planned    2 x Slow, 931323 GiB, 10 TFLOP/s in bfloat16; DeepSpeed ZeRO stage 3"
    about = {line[2:12].strip(): line[13:] for line in lines}
    assert about["compute"] == "1 TFLOP a sample and denoising step, in training 3"
    assert about["length"].endswith("(456.0 s an iteration)")
    assert about["length"].startswith("5 value-pretraining + 30 PPO iterations, about ")
    assert about["pictures"] == "32 an iteration and process, 8 micro-batches; 2,240 in the run, evaluations aside"
    assert "at an assumed 40 % of the peak" in "\n".join(lines)
    assert lines[-1].startswith("  verdict    fits: 1.0 of 931323 GiB (")
    monkeypatch.setitem(DEVICES, "Slow", Device("Slow", HUGE, None))
    assert "\n  length     no time: the peak of Slow in auto is not known here\n" in forecast(made, "2xSlow")


def test_the_table_adds_up(config, monkeypatch):
    monkeypatch.setattr(Sizes, "of", classmethod(lambda cls, config: SIZES))
    monkeypatch.setattr(module, "GIB", 1)
    monkeypatch.setattr(memory_module, "CONTEXT", 0)
    text = forecast(config(zero={"offload_optimizer": {"device": "cpu"}}), "2xH100")
    table = [line[13:] for line in text.splitlines() if re.search(r"  (-|[\d.]+)$", line)]
    columns = list(zip(*([float(cell.replace("-", "0")) for cell in line[20:].split()] for line in table), strict=True))
    assert len(columns) == 5 and all(whole == pytest.approx(sum(parts)) for *parts, whole in columns)
    assert "\n  CPU        GiB of its memory that a process takes: optimizer 6600.0, gradients 1100.0\n" in text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path):
    processes = "1xH100" if path.stem.endswith("1gpu") else "8xH100"
    text = forecast(load_config(path), processes)
    assert text.startswith(
        f"  planned    {processes[0]} x H100, 80 GiB, 989 TFLOP/s in bfloat16; DeepSpeed ZeRO stage "
    )
    assert text.count("\n  verdict    ") == 1 and "\n             together " in text
    assert max(map(len, text.splitlines())) <= 160


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_plans_and_does_no_more(tiny_pipeline, tmp_path):
    """As a person calls it, in a process that has imported nothing."""
    folder = tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline))
    before = sorted(path.name for path in folder.iterdir())
    words = (str(tiny_runs.TRAIN), "--config", "config.json", "--set", "rollout.micro_batch_size=1", "--plan", "2xH100")
    done = subprocess.run([sys.executable, *words], cwd=folder, text=True, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("  planned    2 x H100, 80 GiB, ")
    assert "in micro-batches of 1, 1 updates\n" in done.stdout and "\n  verdict    fits: " in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--plan", "2xGTX"], r"--plan 2xGTX: give a number of GPUs and one of A100-40GB, .*MI300X, as in \"8xH100\"$"),
        (["--plan", "3xH100"], r"rollout\.samples_per_iteration = 4: must be a multiple of 3 = .* x 3 processes; "),
        (
            ["--plan", "2xH100", "--set", "model.pretrained=somebody/model"],
            r"(?s)^error: model\.pretrained: 'somebody/model' is no local folder and could not be downloaded as a hub ",
        ),
    ],
    ids=["GPU", "batches", "no network"],
)
def test_mistakes_are_told_as_a_runs(tiny_pipeline, tmp_path, flags, expected):
    run = tiny_runs.train(tiny_runs.prepare(tmp_path, tiny_runs.run_config(tiny_pipeline)), *flags)
    assert run.wait() == [2]
    assert re.search(expected, run.stderr().rstrip("\n")) and run.stderr().count("error: ") == 1
    assert "Traceback" not in run.stderr() and run.stdout() == ""
    assert not (tmp_path / "run").exists()
