"""What a run leaves for everyone else: a stock pipeline folder and the critic, whole though weights were sharded."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file

from latent_critic.engine.critic import Critic
from latent_critic.engine.noise import keyed_noise

from . import tiny_runs

TRUNK = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def run(tiny_pipeline, tmp_path_factory):
    """A run of two ranks, of which each held half of every parameter."""
    return tiny_runs.look("two", tiny_pipeline, tmp_path_factory.mktemp("two"), ranks=2).finish()


@pytest.fixture(scope="module")
def seen(run):
    return tiny_runs.seen(run)


@pytest.fixture(scope="module")
def exported(run):
    return run.folder / "run" / "pipeline"


def test_trunk_is_whole_and_the_trained_one(exported, seen, tiny_pipeline):
    before, after = load_file(tiny_pipeline / TRUNK), load_file(exported / TRUNK)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(tensor.numel() > 0 for tensor in after.values())
    for name, tensor in after.items():
        assert torch.equal(tensor, seen["final"][f"trunk.{name}"]), name
        assert tiny_runs.UNTRAINED.search(name) or not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
def test_frozen_parts_are_those_of_the_base(exported, tiny_pipeline, part):
    (path,) = (tiny_pipeline / part).glob("*.safetensors")
    before, after = load_file(path), load_file(exported / part / path.name)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_folder_is_that_of_a_stock_pipeline(exported, tiny_pipeline):
    for name in ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (tiny_pipeline, exported))
        before.pop("_name_or_path", None), after.pop("_name_or_path", None)
        assert before == after
    assert [path.name for path in exported.parent.iterdir()].count(".pipeline.partial") == 0


def test_stock_diffusers_draws_what_the_engine_draws(exported, seen):
    pipe = StableDiffusion3Pipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    noise = keyed_noise(7, torch.arange(2), 0, (4, 16, 16))
    latents = []

    def keep(_pipe, _step, _time, tensors):
        latents.append(tensors["latents"].clone())
        return {}

    pictures = pipe(
        seen["prompts"],
        latents=noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=tiny_runs.T5_TOKENS,
        callback_on_step_end=keep,
        output_type="np",
    ).images
    assert torch.equal(seen["ode"][:, 0], noise)
    # The same numbers in the same order, but for a z + b v against z + D v: rounding errors of four steps.
    torch.testing.assert_close(torch.stack(latents, 1), seen["ode"][:, 1:], rtol=0, atol=1e-5)
    difference = torch.from_numpy(pictures * 255).round().int() - seen["pictures"].int()
    assert difference.abs().max() <= 1 and difference.bool().float().mean() < 1e-3  # that rounded the other way
    assert (latents[-1] - noise).abs().mean() > 0.1


def test_critic_is_whole_and_loads(run, seen):
    path = run.folder / "run" / "critic.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    names = ["tiny_rewards:brightness", "tiny_rewards:redness"]
    assert json.loads(about["taps"]) == [0, 1, 2] and json.loads(about["values"]) == names
    assert [(r["name"], r["weight"]) for r in json.loads(about["rewards"])] == list(zip(names, [2.0, 1.0], strict=True))
    critic = Critic(width=64, text_width=96, num_taps=3, num_rewards=2, dim=16, num_heads=2, timestep_adaln=True)
    state = load_file(path)
    critic.load_state_dict(state)
    assert all(tensor.numel() > 0 for tensor in state.values())
    assert all(torch.equal(tensor, seen["final"][f"critic.{name}"]) for name, tensor in state.items())
    timesteps = torch.tensor([1000.0, 700.0, 300.0, 10.0])
    values = critic(*torch.randn(3, 4, 64, 64), timesteps=timesteps, pooled_text=torch.randn(4, 96))
    assert values.shape == (4, 2) and bool((values != 0).all())  # it began at 0 everywhere
