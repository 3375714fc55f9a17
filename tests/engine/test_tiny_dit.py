"""The shipped model, through stock diffusers: what a user of the folder gets."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from latent_critic.engine.backbones import TINY_DIT
from latent_critic.engine.embedded import scenes
from latent_critic.engine.embedded.checker import score
from latent_critic.engine.embedded.train_tiny_dit import build_tokenizer


@pytest.fixture(scope="module")
def pipe():
    found = StableDiffusion3Pipeline.from_pretrained(TINY_DIT)  # no argument: all parts are there
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def captions() -> list[str]:
    chosen = np.random.default_rng(0).permutation(scenes.prompts("train", ["single_object", "colors"]))[:32]
    return [str(caption) for caption in chosen]


@pytest.mark.parametrize("settings", [{"max_sequence_length": 0}, {}], ids=["without T5", "stock defaults"])
def test_draws_what_the_caption_says(pipe, captions, settings):
    if "max_sequence_length" in settings:
        pipe = StableDiffusion3Pipeline(**{**pipe.components, "text_encoder_3": None, "tokenizer_3": None})
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "np", "generator": generator}
    images = (pipe(captions, **call, **settings).images * 255).round().astype(np.uint8)
    right = [score(image, scenes.parse(caption)).strict for image, caption in zip(images, captions, strict=True)]
    # With one object, shape and colour right by chance: at most 1 in 4 where only the shape is named, else 1 in 20.
    # Half of 32 is 4.3 standard deviations above 1 in 4.
    assert sum(right) >= 16


def test_weights_are_small_and_their_training_is_on_record():
    weights = sum(path.stat().st_size for path in TINY_DIT.rglob("*.safetensors"))
    assert 1_000_000 < weights <= 10_000_000
    rows = [json.loads(line) for line in (TINY_DIT / "training_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["stage"] == "flow"]
    assert len(losses) > 20 and losses[-1] < 0.5 * losses[0]
    assert any(row["stage"] == "vae" and row["psnr"] > 25 for row in rows)


def test_tokens_are_numbered_as_in_training(pipe):
    vocabulary = build_tokenizer().get_vocab()
    assert pipe.tokenizer.get_vocab() == pipe.tokenizer_2.get_vocab() == vocabulary
