"""A critic on pictures: the clean latent of a prediction, the transformer, and whose gradient goes where."""

import pytest
import torch
from diffusers import DDIMScheduler

from latent_critic.engine.backbones import load_backbone
from latent_critic.engine.pixels import PixelTrunk, as_input

SHAPE = (3, 4, 16, 16)
TIMESTEPS = torch.tensor([960.0, 480.0, 20.0])


def drawn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- what is predicted


def test_clean_latents_of_a_flow(tiny_pipeline):
    """z = (1 - sigma) x0 + sigma eps and v = eps - x0: x0 = z - sigma v. Sums of float32 numbers up to 4."""
    backbone, clean, noise = load_backbone(str(tiny_pipeline), 0), drawn(0), drawn(1)
    sigma = (TIMESTEPS / 1000)[:, None, None, None]
    z = (1 - sigma) * clean + sigma * noise
    found = backbone.clean(z, noise - clean, TIMESTEPS)
    torch.testing.assert_close(found, clean, rtol=0, atol=2e-6)
    # At pure noise, where z holds nothing of it.
    torch.testing.assert_close(backbone.clean(noise, noise - clean, torch.full((3,), 1000.0)), clean, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_latents_of_a_diffusion_model(tiny_unet_pipeline, kind):
    """z = sqrt(ab) x0 + sqrt(1 - ab) eps, and eps or v = sqrt(ab) eps - sqrt(1 - ab) x0."""
    backbone, clean, noise = load_backbone(str(tiny_unet_pipeline), 0), drawn(0), drawn(1)
    config = backbone._scheduler.config
    backbone._scheduler = DDIMScheduler.from_config(config, prediction_type=kind)
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64) ** 2
    ab = (1 - betas).cumprod(0)[TIMESTEPS.long()][:, None, None, None]
    z = ab.sqrt() * clean + (1 - ab).sqrt() * noise
    prediction = noise if kind == "epsilon" else (ab.sqrt() * noise - (1 - ab).sqrt() * clean).float()
    found = backbone.clean(z.float(), prediction, TIMESTEPS)
    # Rounding of numbers up to 4, divided by sqrt(ab) of an eps-prediction: 0.08 at timestep 960.
    assert 0.07 < ab[0].sqrt().item() < 0.09
    torch.testing.assert_close(found, clean, rtol=0, atol=2e-6 / (0.08 if kind == "epsilon" else 1))


# ----------------------------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("resolution, side, width, tokens", [(64, 64, 128, 65), (512, 224, 768, 197)])
def test_the_trunk_makes_a_token_of_each_patch(resolution, side, width, tokens):
    """Of 8 or 16 pixels a side, with one for the whole."""
    torch.manual_seed(0)
    trunk = PixelTrunk(resolution)
    assert (trunk.side, trunk.width) == (side, width)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(1, 3, side, side, generator=generator)
    with torch.no_grad():
        found = trunk(pictures)
        assert found.shape == (1, tokens, width)
        assert torch.equal(found, trunk.vit(2 * pictures - 1).last_hidden_state)


def test_pictures_as_the_trunk_takes_them():
    pictures = torch.arange(2 * 4 * 4 * 3).view(2, 4, 4, 3).to(torch.uint8)
    found = as_input(pictures, 4, torch.float32)
    assert found.shape == (2, 3, 4, 4) and found[1, 2, 3, 1] == pictures[1, 3, 1, 2] / 255
    assert as_input(pictures, 4, torch.bfloat16).dtype == torch.bfloat16
    # Twice as large with each pixel four times: bilinear halving averages equals, and gives it back.
    larger = pictures.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(as_input(larger, 4, torch.float32), found)
    assert as_input(pictures[:, :2], 4, torch.float32).shape == found.shape
    assert as_input(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8), 1, torch.float32).flatten().tolist() == (
        pytest.approx([0, 1, 0.2])
    )


# ---------------------------------------------------------------------------------------------------------- the critic


@pytest.fixture
def make(tiny_config, tiny_model):
    """make(**rollout) -> actor-critic with a critic on pictures, and its inputs."""

    def build(**rollout):
        model = tiny_model(tiny_config(critic={"trunk": "pixels"}, rollout=rollout))
        conditioning = model.backbone.encode_prompts(["a red circle", "two blue squares", "a green triangle"])
        return model, (drawn(2), TIMESTEPS, conditioning)

    return build


def test_values_are_of_the_picture_that_is_predicted(make):
    model, (z, timesteps, conditioning) = make()
    with torch.no_grad():
        prediction, values = model(z, timesteps, conditioning)
        pictures = model.backbone.decode(model.backbone.clean(z, prediction, timesteps))
        text = conditioning["pooled_prompt_embeds"]
        given = {"timesteps": timesteps, "pooled_text": text}
        assert torch.equal(values, model.critic(model.pixels(as_input(pictures, 64, torch.float32)), **given))
        assert values.shape == (3, 2) and values.std() > 0.02
        black = model.critic(model.pixels(torch.zeros(3, 3, 64, 64)), **given)
        assert (black - values).abs().max() > 0.02
    assert pictures.float().std() > 10 and model.tap_indices == []


def test_values_of_pictures_that_were_kept_are_the_same(make):
    model, inputs = make()
    with torch.no_grad():
        prediction, values, picture = model(*inputs, with_features=True)
    assert picture.shape == (3, 3, 64, 64)
    nothing, again = model(*inputs, features=[picture])
    assert prediction is not None and nothing is None and torch.equal(again, values)
    again.square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in model.pixels.parameters())


def test_the_policy_is_the_one_without_a_critic(make, tiny_config, tiny_model):
    model, inputs = make(guidance_scale=2.0)
    plain = tiny_model(tiny_config(algorithm={"name": "grpo"}, rollout={"guidance_scale": 2.0}))
    empty = model.backbone.encode_prompts([""])
    with torch.no_grad():
        (prediction, _), (expected, values) = model(*inputs, empty), plain(*inputs, empty)
    assert torch.equal(prediction, expected) and values.shape == (3, 0)
    assert plain.critic is None and plain.critic_parameters == [] and plain.trunks == [plain.trunk]


def test_no_gradient_of_the_values_reaches_the_policy(make):
    model, inputs = make()
    _, values = model(*inputs)
    values.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.trunk.parameters())
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(bool(parameter.grad.any()) for parameter in model.pixels.parameters())
    pixels = {f"pixels.{name}" for name, _ in model.pixels.named_parameters()}
    assert pixels < learned and learned - pixels == {f"critic.{name}" for name, _ in model.critic.named_parameters()}
    assert {id(p) for p in model.critic_parameters} == {
        id(p) for part in (model.pixels, model.critic) for p in part.parameters()
    }
    assert not any(parameter.requires_grad for parameter in model.backbone.pipe.vae.parameters())


def test_no_gradient_of_the_policy_reaches_the_critic(make):
    model, inputs = make()
    model(*inputs)[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in model.critic_parameters)
    assert all(bool(p.grad.any()) for n, p in model.trunk.named_parameters() if n.startswith("proj_out"))
