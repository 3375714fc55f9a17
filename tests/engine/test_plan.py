"""The plan's numbers, worked out by hand."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from latent_critic.engine.errors import UserError
from latent_critic.engine.plan import (
    Measurement,
    check_host_memory,
    count,
    describe_plan,
    measure,
    state_bytes,
)
from latent_critic.engine.world import World

CPU = torch.device("cpu")
COST = Measurement(rollout=0.5, critic_only=0.25, training=2.0, activations=3 * 2**20)
WORDS = "native, as ever", "shares the shards", "a graph"
SECTIONS = {
    "rollout": {"num_inference_steps": 10, "samples_per_iteration": 48, "micro_batch_size": 4},
    "training": {
        "iterations": 30,
        "updates_per_iteration": 3,
        "value_pretraining_iterations": 5,
        "value_pretraining_epochs": 3,
        "critic_epochs": 2,
    },
    "evaluation": {"every": 10, "num_prompts": 50, "num_inference_steps": 20},
}


@pytest.fixture
def model(tiny_model, tiny_config):
    return tiny_model(tiny_config())


@pytest.fixture
def plan(tiny_config, model):
    """plan(ranks=2, section={...}): the plan's lines by name."""

    def plan(ranks=1, trained_steps=9, **changes):
        sections = {name: {**section, **changes.pop(name, {})} for name, section in SECTIONS.items()}
        config = tiny_config(**sections, **changes)
        text = describe_plan(config, World(0, ranks, CPU), model, trained_steps, COST, *WORDS)
        return {line[2:12].strip(): line[13:] for line in text.splitlines()}

    return plan


def test_parameters_are_counted(plan, model):
    # Critic of width 32 with 2 taps on 64 wide tokens, 2 rewards: per tap query 32, keys and values 2 (32 x 64),
    # modulation 32 -> 128; MLPs of time 256 -> 32 -> 32 and of pooled text 96 -> 32 -> 32; per reward an MLP
    # taps x 32 -> 32 -> 1.
    taps = len(model.tap_indices)
    tap = 32 + 2 * 32 * 64 + (32 * 128 + 128)
    condition = (256 * 32 + 32 + 32 * 32 + 32) + (96 * 32 + 32 + 32 * 32 + 32)
    heads = 2 * ((taps * 32 * 32 + 32) + (32 + 1))
    critic = taps * tap + condition + heads
    assert count(model.critic) == critic
    policy = sum(parameter.numel() for parameter in model.trunk.parameters())
    assert count(model.trunk) == policy > 50_000
    assert plan()["model"].endswith(f": policy {policy:,} + critic {critic:,} parameters, float32")


def test_shards_count_whole():
    """A ZeRO-3 parameter is empty between its uses; its size stands in ds_numel."""
    module = torch.nn.Linear(3, 2)
    module.weight.ds_numel, module.weight.data = 6, torch.empty(0)
    assert count(module) == 6 + 2


def test_batch_arithmetic(plan):
    lines = plan(ranks=2)
    assert lines["device"] == "2 x CPU, DeepSpeed ZeRO stage 3"
    assert lines["sampling"] == "flow-sde, 10 steps of which 9 are trained, guidance 1"
    assert lines["iteration"] == "48 samples in micro-batches of 4, 3 updates"
    assert lines["rollout"] == "a graph; weights: shares the shards" and lines["attention"] == "native, as ever"
    assert lines["rewards"] == "jpeg_compressibility x 1, composition x 1"


@pytest.mark.parametrize(
    "stage, ranks, dtype, bytes_a_parameter",
    [
        # weight + gradient + master weight and two moments; DeepSpeed's ZeRO optimizers keep the master in float32 too
        (3, 1, "float32", 4 + 4 + 12),
        (3, 2, "float32", (4 + 4 + 12) / 2),
        (3, 8, "bfloat16", (2 + 2 + 12) / 8),
        (2, 4, "bfloat16", 2 + (2 + 12) / 4),
        (1, 4, "bfloat16", 2 + 2 + 12 / 4),
        (0, 4, "bfloat16", 2 + 2 + 12),
        (0, 4, "float32", 4 + 4 + 8),  # plain AdamW
    ],
)
def test_memory_of_the_training_state(plan, model, monkeypatch, stage, ranks, dtype, bytes_a_parameter):
    # 1000 times as many parameters, so that the rounding to MiB hides nothing.
    monkeypatch.setattr("latent_critic.engine.plan.count", lambda module, **only: 1000 * count(module, **only))
    parameters = 1000 * (count(model.trunk) + count(model.critic))
    sections = {"model": {"dtype": dtype}, "deepspeed": {"zero_optimization": {"stage": stage}}}
    expected = f"{parameters * bytes_a_parameter / 2**20:,.0f} MiB of weights, gradients and optimizer, "
    lines = plan(ranks, rollout={"samples_per_iteration": 96}, **sections)
    assert lines["memory"] == f"{expected}3 MiB of activations, a process"


def test_what_is_frozen_has_neither_gradient_nor_optimizer(plan, model, monkeypatch):
    monkeypatch.setattr("latent_critic.engine.plan.count", lambda module, **only: 1000 * count(module, **only))
    model.trunk.requires_grad_(False)
    frozen, trained = 1000 * count(model.trunk), 1000 * count(model.critic)
    expected = (4 * frozen + (4 + 4 + 12) * trained) / 2
    assert plan(2)["memory"].startswith(f"{expected / 2**20:,.0f} MiB of weights, gradients and optimizer, ")
    assert state_bytes(trained, frozen, torch.bfloat16, 3, 2) == (trained + frozen, trained, 6 * trained)


def test_a_trunk_of_its_own_is_the_critics(tiny_config, tiny_model):
    config = tiny_config(critic={"trunk": "separate"})
    separate = tiny_model(config)
    text = describe_plan(config, World(0, 1, CPU), separate, 3, COST, *WORDS)
    policy = count(separate.trunk)
    assert f": policy {policy:,} + critic {policy + count(separate.critic):,} parameters" in text


def plan_of(config, model):
    text = describe_plan(config, World(0, 1, CPU), model, 3, COST, *WORDS)
    return {line[2:12].strip(): line[13:] for line in text.splitlines()}


def test_a_plan_without_a_critic_speaks_of_none(tiny_config, tiny_model):
    """Groups in its place. 8 samples are 4 micro-batches: 4 x (0.5 x 4 + 2 x 3) = 32 s, no pass of a critic with them;
    evaluations at 0 and at the end: 1 prompt each, 0.5 x (4 + 10) = 7 s, and so 30 x 32 + 2 x 7 = 974 s."""
    sections = {
        "training": {"iterations": 30, "updates_per_iteration": 2},
        "evaluation": {"num_prompts": 2, "every": 0},
    }
    config = tiny_config(algorithm={"name": "grpo", "group_size": 4}, **sections).for_processes(1)
    model = tiny_model(config)
    lines, policy = plan_of(config, model), count(model.trunk)
    assert lines["model"].endswith(f": policy {policy:,} parameters, float32") and count(model) == policy
    assert lines["iteration"] == "8 samples in micro-batches of 2, 2 updates, groups of 4"
    assert lines["length"] == "30 GRPO iterations, about 16 min (32.0 s an iteration)"
    ddpo = plan_of(tiny_config(algorithm={"name": "ddpo"}, **sections).for_processes(1), model)
    assert ddpo["iteration"] == "8 samples in micro-batches of 2, 2 updates"
    assert ddpo["length"] == lines["length"].replace("GRPO", "DDPO") and ddpo["model"] == lines["model"]


def test_a_reference_is_counted_beside_the_policy(tiny_config, tiny_model):
    """Frozen: a weight of 4 bytes, where what is trained has 4 + 4 + 12."""
    config = tiny_config(algorithm={"name": "grpo", "kl_coef": 0.04, "group_size": 4})
    model = tiny_model(config)
    lines, policy = plan_of(config, model), count(model.trunk)
    assert lines["model"].endswith(f": policy {policy:,} + reference {policy:,} parameters, float32")
    assert lines["memory"].startswith(f"{(24 * policy) / 2**20:,.0f} MiB of weights, gradients and optimizer, ")
    config = tiny_config(algorithm={"kl_coef": 0.04})
    model = tiny_model(config)
    others = policy + count(model.critic)
    assert f": policy {policy:,} + critic and reference {others:,} parameters" in plan_of(config, model)["model"]


def test_a_critic_on_pictures_is_counted_with_its_transformer(tiny_config, tiny_model):
    """Of 4 blocks 128 wide: a block has 4 x (128^2 + 128) of attention, 2 x 128 x 512 + 512 + 128 of the MLP and two
    norms; patches of 8 x 8 x 3, a token and 65 positions of 128, and a last norm."""
    config = tiny_config(critic={"trunk": "pixels"})
    model = tiny_model(config)
    block = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 2 * 2 * 128
    transformer = 4 * block + (8 * 8 * 3 * 128 + 128) + 128 + 65 * 128 + 2 * 128
    assert count(model.pixels) == transformer
    policy, others = count(model.trunk), transformer + count(model.critic)
    assert f": policy {policy:,} + critic {others:,} parameters" in plan_of(config, model)["model"]
    assert len(model.units) == 3 + 2  # blocks, and each part of the critic as a whole


@pytest.mark.parametrize(
    "ranks, changes, length",
    [
        # 12 micro-batches. Pretraining: 12 x 10 x (0.5 + 0.25 x 3) = 150 s, 5 times. PPO: 12 x (0.5 x 10
        # + 0.25 x 10 x 2 + 2 x 9) = 336 s, 30 times. Evaluations at 0, 10, 20, 30, 35: 13 x 0.5 x (10 + 20) = 195 s.
        # Together 750 + 10080 + 975 = 11805 s.
        (1, {}, "5 value-pretraining + 30 PPO iterations, about 3 h 17 min (336.0 s an iteration)"),
        # Half the micro-batches; 50 prompts are 7 of 8. 375 + 5040 + 5 x 105 = 5940 s.
        (2, {}, "5 value-pretraining + 30 PPO iterations, about 1 h 39 min (168.0 s an iteration)"),
        # No pretraining; evaluated at 0 and at the end only: 10080 + 2 x 195 = 10470 s.
        (
            1,
            {"training": {"value_pretraining_iterations": 0}, "evaluation": {"every": 0}},
            "0 value-pretraining + 30 PPO iterations, about 2 h 54 min (336.0 s an iteration)",
        ),
        # 30 is a multiple of 10: evaluated at 0, 10, 20, 30. 10080 + 4 x 195 = 10860 s.
        (
            1,
            {"training": {"value_pretraining_iterations": 0}},
            "0 value-pretraining + 30 PPO iterations, about 3 h 1 min (336.0 s an iteration)",
        ),
    ],
)
def test_predicted_time(plan, ranks, changes, length):
    assert plan(ranks, **changes)["length"] == length


def test_features_that_are_kept_must_fit_into_the_hosts_memory(plan, tiny_config, tiny_model, monkeypatch):
    config = tiny_config(**SECTIONS, critic={"feature_dropout": 0.1})
    model = tiny_model(config)
    inputs = torch.zeros(3, 4, 16, 16), torch.full((3,), 500.0), model.backbone.encode_prompts(["a red circle"] * 3)
    cost = measure(model, 1, 2, *inputs, keeps_features=True)
    assert cost.features == len(model.tap_indices) * 64 * 64 * 4  # tokens of 64 numbers in float32
    world = World(0, 2, CPU)
    needed = 48 // 2 * 10 * cost.features
    words = describe_plan(config, world, model, 9, cost, *WORDS)
    assert f"MiB of activations, {needed / 2**20:,.0f} MiB of features on the host, a process" in words
    monkeypatch.setenv("LOCAL_SIZE", "2")
    memory = SimpleNamespace(available=2 * needed)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    check_host_memory(config, world, cost)
    memory.available -= 2
    with pytest.raises(UserError, match="keep_features: what the critic reads of 24 pictures x 10 steps takes"):
        check_host_memory(config, world, cost)


def test_a_model_without_values_is_measured(tiny_config, tiny_model):
    model = tiny_model(tiny_config(algorithm={"name": "grpo"}))
    inputs = torch.zeros(2, 4, 16, 16), torch.full((2,), 500.0), model.backbone.encode_prompts(["a red circle"] * 2)
    cost = measure(model, 1, 1, *inputs)
    assert all(0 < seconds < 60 for seconds in (cost.rollout, cost.critic_only, cost.training))
    assert cost.activations > 2 * 64 * 64 * 4 * 3  # a block's tokens at the least, in float32
    assert all(parameter.grad is None for parameter in model.parameters())


def test_measure_counts_what_autograd_keeps_and_leaves_nothing_behind():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = torch.nn.Linear(50, 50, bias=False)
            self.critic = torch.nn.Linear(50, 1)
            self.reference = None

        def forward(self, x):
            prediction = self.trunk(x)
            return prediction, self.critic(prediction.detach())

    model = Model()
    for steps in (1, 3):
        cost = measure(model, 1, steps, torch.randn(200, 50, requires_grad=False))
        # Kept: the input and the prediction (200 x 50), which critic and square share, and the values (200): float32.
        assert cost.activations == steps * 4 * (2 * 200 * 50 + 200)
        assert 0 < cost.rollout < 1 and 0 < cost.critic_only < 1 and 0 < cost.training < 1
    assert all(parameter.grad is None for parameter in model.parameters())
