"""FLUX.1 (dev and schnell): `FluxPipeline` folders. Flow matching on latents that the transformer takes as tokens."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from ..errors import UserError
from ..transitions import Schedule
from .base import Backbone, Conditioning, as_uint8, flow_schedule, latent_side


class FluxBackbone(Backbone):
    """The blocks are the double-stream ones, then the single-stream ones. A token is 2 x 2 latents.

    FLUX.1-dev is guidance-distilled: the guidance scale is an input, and there is no unconditional branch.
    """

    pipeline = FluxPipeline
    scheduler = FlowMatchEulerDiscreteScheduler

    def __init__(self, pipe: FluxPipeline, max_sequence_length: int, resolution: int | None = None):
        super().__init__(pipe, max_sequence_length)
        if not max_sequence_length:
            raise UserError("model.max_sequence_length = 0: FLUX.1 needs T5's tokens; diffusers' default is 512")
        config = self.trunk.config
        self.is_guidance_distilled = config.guidance_embeds
        side = latent_side(resolution, pipe.vae_scale_factor, 2) if resolution else pipe.default_sample_size
        self.latent_shape, self.resolution = (config.in_channels // 4, side, side), side * pipe.vae_scale_factor
        self.width = config.num_attention_heads * config.attention_head_dim
        self.text_width = config.pooled_projection_dim
        self.depth = config.num_layers + config.num_single_layers
        self.encoders = [pipe.text_encoder, pipe.text_encoder_2]
        self._image_ids = pipe._prepare_latent_image_ids(1, side // 2, side // 2, torch.device("cpu"), torch.float32)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._image_ids = self._image_ids.to(device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        embeds, pooled, _ = self.pipe.encode_prompt(
            list(texts), None, self.encoders[0].device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled.float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.trunk.config
        return {
            "prompt_embeds": (self.max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        scheduler = copy.deepcopy(self.pipe.scheduler)  # a pipeline's own may be in the middle of a call
        options = scheduler.config
        mu = calculate_shift(
            len(self._image_ids),
            options.base_image_seq_len,
            options.max_image_seq_len,
            options.base_shift,
            options.max_shift,
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
        return flow_schedule(scheduler.sigmas.float().cpu(), transition, noise_level, num_trained_steps)

    def predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        count, channels, height, width = latents.shape
        tokens = FluxPipeline._pack_latents(latents, count, channels, height, width)
        prediction = trunk(
            hidden_states=tokens,
            timestep=timesteps.to(latents.dtype) / 1000,  # rounded as the stock pipeline does
            guidance=timesteps.new_full((count,), guidance_scale) if self.is_guidance_distilled else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=self._image_ids.new_zeros(embeds.shape[1], 3),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return (
            prediction.unflatten(1, (height // 2, width // 2))
            .unflatten(3, (channels, 2, 2))
            .permute(0, 3, 1, 4, 2, 5)
            .reshape(latents.shape)
        )

    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        return [*trunk.transformer_blocks, *trunk.single_transformer_blocks][index], 1  # (text tokens, image tokens)

    def lora_targets(self) -> list[str]:
        return [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_q_proj",
            "attn.add_k_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return as_uint8(vae.decode(latents.to(vae.dtype)).sample)
