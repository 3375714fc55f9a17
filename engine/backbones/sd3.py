"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline` folders."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from ..transitions import Schedule
from .base import Backbone, Conditioning, as_uint8, flow_schedule, freeze
from .sd3_fused import fuse


class SD3Backbone(Backbone):
    def __init__(self, pipe: StableDiffusion3Pipeline, max_sequence_length: int):
        self.pipe = pipe
        self.trunk = pipe.transformer
        self.max_sequence_length = max_sequence_length
        without_t5 = {} if max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
        self._prompt_encoder = StableDiffusion3Pipeline(**{**pipe.components, **without_t5})
        config = pipe.transformer.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.width = config.num_attention_heads * config.attention_head_dim
        self.text_width = config.pooled_projection_dim
        self.depth = config.num_layers
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3 if max_sequence_length else None)
        self.encoders = [encoder for encoder in encoders if encoder is not None]
        freeze(pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        pipe.vae.to(memory_format=torch.channels_last)  # its convolutions are faster so
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(cls, folder: Path, max_sequence_length: int) -> "SD3Backbone":
        return cls(StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32), max_sequence_length)

    def to(self, device: torch.device) -> None:
        self.pipe.vae.to(device)

    def fuse(self) -> None:
        fuse(self.trunk)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        embeds, _, pooled, _ = self._prompt_encoder.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.encoders[0].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}

    def pooled_text(self, conditioning: Conditioning) -> Tensor:
        return conditioning["pooled_prompt_embeds"]

    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        self.pipe.scheduler.set_timesteps(num_inference_steps)
        return flow_schedule(self.pipe.scheduler.sigmas.float().cpu(), transition, noise_level, num_trained_steps)

    def predict(self, trunk: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return trunk(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        return trunk.transformer_blocks[index], 1  # a joint block returns (text tokens, image tokens)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return as_uint8(vae.decode(latents.to(vae.dtype)).sample)

    def save(self, trunk_state: dict[str, Tensor], folder: Path) -> None:
        trunk = SD3Transformer2DModel.from_config(self.trunk.config)
        trunk.load_state_dict(trunk_state, assign=True)  # with their dtype
        self.pipe.vae.to(memory_format=torch.contiguous_format)  # safetensors takes no other
        StableDiffusion3Pipeline(**{**self.pipe.components, "transformer": trunk}).save_pretrained(folder)
