"""That a step, its gradients and an update stay on their device and ask the host nothing: on a GPU the one is an error,
the other a wait, or a graph that cannot be captured. Seen without one: tensors of the "meta" device have no numbers to
ask for, and an operation that meets them together with the CPU's is told.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.denoising import DenoisingLoop
from latent_critic.engine.passes import Part
from latent_critic.engine.sde_window import build_schedules
from latent_critic.engine.steering.guidance import Guidance
from latent_critic.engine.steering.loop import SteeredLoop
from latent_critic.engine.steering.particles import SMC, BestOfN
from latent_critic.engine.trajectory import Trajectory
from latent_critic.engine.update import Updater
from latent_critic.engine.world import World

from . import families

META = torch.device("meta")
COPIES = {"aten::copy_", "aten::_to_copy"}  # from one device to another
BATCH = 4
BUILDERS = {"sdxl": families.sdxl, "flux": families.flux, "flux2": families.flux2}
TOKENS = {"sd3": 0, "sd3 with T5": 16, "flux": 16, "flux2": 48}
CASES = [
    ("sd3", "flow-sde", 1.0),
    ("sd3 with T5", "flow-sde", 2.0),
    ("sd1", "ddim", 1.0),
    ("sd1", "ddim", 2.0),
    ("sdxl", "ddim", 2.0),
    ("flux", "dance-sde", 1.0),
    ("flux2", "cps", 1.0),
]


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes tensors of the CPU and of the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        name = func._schema.name
        assert len(devices) < 2 or name in COPIES, f"{name} takes tensors of {' and '.join(sorted(devices))}"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """folder(family): of a pipeline."""
    made = {}

    def build(name):
        if name not in made:
            if name in BUILDERS:
                BUILDERS[name](path := tmp_path_factory.mktemp(name) / name)
            else:
                path = request.getfixturevalue("tiny_unet_pipeline" if name == "sd1" else "tiny_pipeline")
            made[name] = path
        return made[name]

    return build


class Away:
    """A model, its schedule and prompts on the meta device."""

    def __init__(self, folder, config, name="sd3", transition="flow-sde", guidance=1.0, **changes):
        rollout = {"transition": transition, "guidance_scale": guidance, "micro_batch_size": BATCH}
        self.config = config(rollout=rollout, **changes)
        backbone = load_backbone(str(folder(name)), TOKENS.get(name, 0), None, torch.bfloat16)
        if self.config.model.fused:
            backbone.fuse()
        prompts = backbone.encode_prompts(["a red circle"] * BATCH)
        empty = backbone.encode_prompts([""]) if backbone.needs_unconditional(guidance) else None
        self.conditioning, self.unconditional = away(prompts), empty and away(empty)
        schedule = build_schedules(backbone, self.config.rollout)[0]
        self.noisy, self.on_host = schedule.table[:, 2] > 0, schedule
        self.schedule = schedule.to(META)
        backbone.to(META)
        options = self.config.value_names, guidance, self.config.algorithm.kl_coef > 0
        self.model = ActorCritic(backbone, self.config.critic, *options).eval()
        self.model.to(META, torch.bfloat16)
        self.noises = torch.empty(len(schedule.timesteps) + 1, BATCH, *backbone.latent_shape)

    def sample(self, keep_features=True):
        inputs = self.model, self.schedule, self.model.backbone.latent_shape, BATCH
        prompts = self.conditioning, self.unconditional, self.model.guidance_scale
        return DenoisingLoop(*inputs, *prompts, keep_features=keep_features)(self.noises, self.conditioning)


def away(conditioning):
    return {name: tensor.to(META) for name, tensor in conditioning.items()}


def test_what_it_looks_for_is_seen():
    here, there = torch.ones(2), torch.ones(2, device=META)
    with OneDevice():
        there.copy_(here)
        with pytest.raises(AssertionError, match="aten::mul takes tensors of cpu and meta"):
            there * here
        with pytest.raises(RuntimeError):
            there.sum().item()
        with pytest.raises(NotImplementedError):
            there.nonzero()


@pytest.mark.parametrize(("name", "transition", "guidance"), CASES)
def test_rollout_decoding_and_backward(folder, tiny_config, name, transition, guidance):
    run = Away(folder, tiny_config, name, transition, guidance, critic={"dim": 32, "num_heads": 2, "trunk": "shared"})
    with OneDevice():
        latents, log_probs, values = run.sample(keep_features=False)
        pictures = run.model.backbone.decode(latents[:, -1])
        timesteps = run.schedule.timesteps[:1].expand(BATCH)
        prediction, again = run.model(latents[:, 0], timesteps, run.conditioning, run.unconditional)
        (prediction.square().mean() + again.square().mean()).backward()
    assert {x.device for x in (latents, log_probs, values, pictures)} == {META}
    assert all(p.grad is not None for p in run.model.parameters() if p.requires_grad and p.ndim > 1)


UPDATES = {
    "two steps a forward": {"training": {"steps_per_forward": 2, "updates_per_iteration": 1}},
    "KL, GRPO-Guard": {"algorithm": {"kl_coef": 0.1, "ratio_normalization": True}},
    "a trunk of the critic's own": {"critic": {"dim": 32, "num_heads": 2, "trunk": "separate"}},
    "pixels": {"critic": {"dim": 32, "num_heads": 2, "trunk": "pixels"}},
    "gradient checkpointing, guided": {"model": {"gradient_checkpointing": True}, "rollout": {"guidance_scale": 2.0}},
}


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("name", ["sd3", "sd1"])
def test_passes_of_an_update(folder, tiny_config, name, case):
    changes = dict(UPDATES[case])
    guidance = changes.pop("rollout", {}).get("guidance_scale", 1.0)
    run = Away(folder, tiny_config, name, "flow-sde" if name == "sd3" else "ddim", guidance, **changes)
    if run.config.model.gradient_checkpointing:
        run.model.trunk.enable_gradient_checkpointing()
    latents, log_probs, values, *features = run.sample(run.config.keeps_features)
    drawn = Trajectory(
        latents,
        log_probs,
        values,
        run.schedule.timesteps,
        run.on_host.table,
        run.conditioning,
        prompts=[],
        sample_indices=torch.arange(BATCH),
        seed=0,
        features=features,
    )
    trained, drawn.table = drawn.trained_steps, run.schedule.table  # the one thing that is asked for, once
    outcome = SimpleNamespace(advantages=log_probs[:, trained], returns=values)
    engine = SimpleNamespace(module=run.model)
    updater = Updater(engine, SimpleNamespace(at_once=1), run.config, World(0, 1, META))
    part = Part(slice(0, BATCH), slice(trained.start, trained.start + run.config.training.steps_per_forward), 1.0)
    with OneDevice():
        updater._policy_pass(drawn, outcome, run.unconditional, run.model, part).loss.backward()
        of_policy = gradients(run.model.trunk)
        run.model.zero_grad()
        updater._critic_pass(drawn, outcome, run.unconditional, 0, run.model, part).loss.backward()
        of_critic = gradients(run.model.critic)
    assert of_policy and of_critic and {x.device for x in of_policy + of_critic} == {META}


def gradients(module: nn.Module):
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("particles", [BestOfN(2), SMC(2)], ids=["best of 2", "SMC of 2"])
@pytest.mark.parametrize("guidance", [None, Guidance(2.0, normalize=True)], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", ["sd3", "sd1"])
def test_steered_steps(folder, tiny_config, name, guidance, particles):
    run = Away(folder, tiny_config, name, "flow-sde" if name == "sd3" else "ddim")
    run.model.requires_grad_(False)
    run.model.detach = False
    particles.begin(BATCH // 2, run.noisy, META)
    weights = torch.ones(len(run.config.value_names), device=META)
    loop = SteeredLoop(
        run.model,
        run.schedule,
        BATCH,
        run.conditioning,
        run.unconditional,
        1.0,
        weights=weights,
        guidance=guidance,
        particles=particles,
        count=2,
    )
    with OneDevice():
        latents, _, values = loop(run.noises, run.conditioning)
    assert {x.device for x in (latents, values, loop.potentials, loop.ancestors)} == {META}
    assert (loop.backwards > 0) == (guidance is not None)
