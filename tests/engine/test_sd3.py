"""The SD3 adapter against stock diffusers: prompts, schedule, samples, pictures, and folders both ways."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from latent_critic.engine.backbones import SD3Backbone, load_backbone
from latent_critic.engine.backbones.base import as_uint8
from latent_critic.engine.embedded import train_tiny_dit
from latent_critic.engine.errors import UserError
from latent_critic.engine.noise import keyed_noise
from latent_critic.engine.prompt_cache import PromptCache
from latent_critic.engine.prompts import Prompt
from latent_critic.engine.rollout import Rollout
from latent_critic.engine.transitions import build_table, ode_table

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two blue squares", "a green triangle left of a yellow circle"]
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module", params=[0, 256], ids=["without T5", "with T5"])
def pair(tiny_pipeline, request):
    """The engine's adapter and the stock pipeline on the same folder."""
    length = request.param
    stock = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, **({} if length else WITHOUT_T5))
    stock.set_progress_bar_config(disable=True)
    return load_backbone(str(tiny_pipeline), length), stock, length


def states(pipe):
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {f"{name}.{key}": value for name in names for key, value in getattr(pipe, name).state_dict().items()}


def test_reads_the_folder(pair):
    backbone, _, _ = pair
    assert isinstance(backbone, SD3Backbone)
    assert (backbone.latent_shape, backbone.width, backbone.depth) == ((4, 16, 16), 64, 3)
    assert backbone.default_taps() == [0, 1, 2]
    frozen = (backbone.pipe.vae, backbone.pipe.text_encoder, backbone.pipe.text_encoder_2, backbone.pipe.text_encoder_3)
    assert not any(p.requires_grad or part.training for part in frozen for p in part.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in backbone.trunk.parameters())


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_stock_pipeline(pair):
    backbone, stock, length = pair
    embeds, _, pooled, _ = stock.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    found = backbone.encode_prompts(TEXTS)
    assert found["prompt_embeds"].shape == (3, 12 + length, 96)
    assert torch.equal(found["prompt_embeds"], embeds) and torch.equal(found["pooled_prompt_embeds"], pooled)


def test_schedule_is_the_stock_schedulers(pair):
    backbone, stock, _ = pair
    for steps in (4, 10, 28):
        stock.scheduler.set_timesteps(steps)
        table, timesteps = backbone.schedule("ode", 0.0, steps)
        assert torch.equal(table, ode_table(stock.scheduler.sigmas)) and table.shape == (steps, 3)
        # The pipeline conditions on scheduler.timesteps: 1000 sigma, each rounded on its own.
        torch.testing.assert_close(timesteps, stock.scheduler.timesteps, rtol=2e-7, atol=0)
        trained = backbone.schedule("cps", 0.8, steps, num_trained_steps=2)
        expected = build_table("cps", 0.8, sigmas=stock.scheduler.sigmas, num_trained_steps=2)
        assert torch.equal(trained.table, expected) and torch.equal(trained.timesteps, timesteps)
    with pytest.raises(UserError, match='rollout.transition: "ddim" does not fit a flow-matching model'):
        backbone.schedule("ddim", 1.0, 10)


@torch.no_grad()
def test_ode_rollout_draws_the_stock_pipelines_samples_and_pictures(pair, tiny_config, tiny_model):
    backbone, stock, length = pair
    steps, noise = 5, keyed_noise(7, torch.arange(3), 0, backbone.latent_shape)
    model = tiny_model(tiny_config(model={"max_sequence_length": length}))
    rollout = Rollout([model], PromptCache(backbone, CPU), backbone.latent_shape, 3, CPU)
    ode = backbone.schedule("ode", 0.0, steps)
    trajectory = rollout([Prompt(text) for text in TEXTS], torch.arange(3), schedule=ode, seed=7)
    call = dict(num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=length, latents=noise)
    expected = stock(TEXTS, output_type="latent", **call).images
    assert torch.equal(trajectory.latents[:, 0], noise)
    clean = trajectory.latents[:, -1]
    assert (clean - noise).abs().mean() > 0.5
    # The same forwards, but for prompts encoded in a batch of another size (1e-6 relative) and D rounded once instead
    # of twice (an ulp of the latents a step); the trunk passes on a change about 5 times enlarged (its gain, measured).
    scale = expected.abs().max().item()
    torch.testing.assert_close(clean, expected, rtol=0, atol=1e-5 * scale)

    # Convolutions in another memory order, and latents that differ by 1e-5: a pixel in a thousand may round otherwise.
    pictures = backbone.decode(expected)
    assert pictures.dtype == torch.uint8 and pictures.shape == (3, 64, 64, 3)
    pil = torch.from_numpy(np.stack(stock(TEXTS, output_type="pil", **call).images))
    for ours in (pictures, backbone.decode(clean)):
        difference = (ours.int() - pil.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 5e-3
    assert pictures.float().std() > 20 and pictures.unique().numel() > 200  # pictures, not a grey area


def test_rounding_to_bytes():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 2 * 100.4 / 255 - 1, 2 * 100.6 / 255 - 1])
    found = as_uint8(values.view(1, 1, 1, -1).expand(1, 3, 2, -1))
    assert found.shape == (1, 2, 7, 3)
    assert found[0, 1, :, 2].tolist() == [0, 0, 128, 255, 255, 100, 101]  # 127.5 rounds to even, as numpy rounds


def test_saved_folder_is_a_stock_pipeline_with_the_given_trunk(tiny_pipeline, tmp_path):
    backbone = load_backbone(str(tiny_pipeline), 0)
    trained = {name: p + 0.01 * torch.randn_like(p) for name, p in backbone.trunk.state_dict().items()}
    before = {name: p.clone() for name, p in states(backbone.pipe).items()}
    backbone.save(trained, tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in states(backbone.pipe).items())  # saving changes nothing here

    found = states(StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved"))
    expected = {**before, **{f"transformer.{name}": p for name, p in trained.items()}}
    assert found.keys() == expected.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[name]) for name, p in found.items())
    assert json.loads((tmp_path / "saved/model_index.json").read_text()).keys() == (
        json.loads((tiny_pipeline / "model_index.json").read_text()).keys()
    )
    assert not list((tmp_path / "saved").rglob("*.bin"))

    again = load_backbone(str(tmp_path / "saved"), 0)
    assert again.latent_shape == backbone.latent_shape
    assert again.encode_prompts(TEXTS).keys() == {"prompt_embeds", "pooled_prompt_embeds"}


def test_saved_trunk_keeps_its_dtype(tiny_pipeline, tmp_path):
    backbone = load_backbone(str(tiny_pipeline), 0)
    half = {name: p.to(torch.bfloat16) for name, p in backbone.trunk.state_dict().items()}
    backbone.save(half, tmp_path / "saved")
    found = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).transformer.state_dict()
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, half[name]) for name, p in found.items())


def test_embedded_tokenizers_are_the_same_in_every_call():
    """Text encoders are trained with the numbers of one call and saved with another's."""
    for build in (train_tiny_dit.build_tokenizer, train_tiny_dit.build_t5_tokenizer):
        assert build().get_vocab() == build().get_vocab()
    tokenizer = train_tiny_dit.build_tokenizer()
    found = tokenizer.convert_ids_to_tokens(tokenizer('a red circle and the text "47"').input_ids)
    words = ["a", "red", "circle", "and", "the", "text", '"', "4", "7", '"']
    assert found == ["<|startoftext|>", *(f"{word}</w>" for word in words), "<|endoftext|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 1, 12)


def test_messages_for_folders_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="has no model_index.json"):
        load_backbone(str(tmp_path), 0)
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(UserError, match="is a PixArtAlphaPipeline; supported are StableDiffusion3Pipeline"):
        load_backbone(str(tmp_path), 0)
    index.write_text(
        '{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [null, null]}'
    )
    with pytest.raises(UserError, match="is incomplete: it has no folder vae, of which its model_index.json speaks"):
        load_backbone(str(tmp_path), 0)
