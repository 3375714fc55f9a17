"""The shipped UNet pipeline, through stock diffusers: what a user of the folder gets."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from latent_critic.engine.backbones import TINY_DIT, TINY_UNET
from latent_critic.engine.embedded import scenes
from latent_critic.engine.embedded.checker import score
from latent_critic.engine.embedded.train_tiny_dit import build_tokenizer

VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe():
    found = StableDiffusionPipeline.from_pretrained(TINY_UNET)  # no argument: all parts are there
    found.set_progress_bar_config(disable=True)
    return found


def test_draws_what_the_caption_says(pipe):
    chosen = np.random.default_rng(0).permutation(scenes.prompts("train", ["single_object", "colors"]))[:32]
    captions = [str(caption) for caption in chosen]
    call = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "np"}
    images = pipe(captions, generator=torch.Generator().manual_seed(0), **call).images
    images = (images * 255).round().astype(np.uint8)
    right = [score(image, scenes.parse(caption)).strict for image, caption in zip(images, captions, strict=True)]
    # As for tiny-dit: right by chance at most 1 in 4, and half of 32 is 4.3 standard deviations above that.
    assert sum(right) >= 16


def test_weights_are_small_and_their_training_is_on_record():
    weights = sum(path.stat().st_size for path in TINY_UNET.rglob("*.safetensors"))
    assert 1_000_000 < weights <= 10_000_000
    rows = [json.loads(line) for line in (TINY_UNET / "training_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["stage"] == "unet"]
    assert len(losses) > 10 and losses[-1] < 0.5 * losses[0]


def test_autoencoder_is_tiny_dits_without_its_shift(pipe):
    ours, theirs = (load_file(folder / VAE) for folder in (TINY_UNET, TINY_DIT))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert pipe.vae.config.shift_factor is None  # this pipeline would not add it


def test_tokens_are_numbered_as_in_training(pipe):
    assert pipe.tokenizer.get_vocab() == build_tokenizer().get_vocab()
