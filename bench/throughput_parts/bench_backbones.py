"""The engine's adapters around the pipelines of `bench_pipelines`."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from bench_pipelines import CONDITIONING, build_pipeline, random_conditioning
from bench_work import Work
from torch import nn

from latent_critic.engine.backbones import TINY_DIT, Backbone, Conditioning, load_backbone
from latent_critic.engine.backbones.sd3 import SD3Backbone
from latent_critic.engine.backbones.unet import UNetBackbone


def build_backbone(work: Work, device: torch.device) -> Backbone:
    """tiny-dit as it is packaged; of the others the parts that this work needs, with random weights."""
    if not work.is_random:
        return load_backbone(work.model, max_sequence_length=0)
    pipe = build_pipeline(work.model, TINY_DIT, device)
    latent_side = work.resolution // pipe.vae_scale_factor
    if work.transition == "flow-sde":
        return RandomSD3(pipe, work.model, latent_side)
    pipe.text_encoder = _NoEncoder(CONDITIONING[work.model]["pooled_prompt_embeds"][0])
    return RandomUNet(pipe, work.model, latent_side)


class _NoEncoder(nn.Module):
    """Tells its width, and cannot encode."""

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)


class _RandomConditioning:
    """A text's conditioning is random: it has the right shape, and that is all that time depends on."""

    def __init__(self, pipe, name: str, latent_side: int):
        super().__init__(pipe, 0)
        self.encoders = []
        self.latent_shape = (self.trunk.config.in_channels, latent_side, latent_side)
        self._name = name

    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        return random_conditioning(self._name, texts, torch.device("cpu"))


class RandomSD3(_RandomConditioning, SD3Backbone):
    """At any resolution that its table of positions holds."""


class RandomUNet(_RandomConditioning, UNetBackbone):
    """At any resolution."""
