"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline` folders."""

import copy
from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from ..errors import UserError
from ..transitions import Schedule
from .base import Backbone, Conditioning, as_uint8, flow_schedule, latent_side
from .sd3_fused import fuse


class SD3Backbone(Backbone):
    pipeline = StableDiffusion3Pipeline
    scheduler = FlowMatchEulerDiscreteScheduler

    def __init__(self, pipe: StableDiffusion3Pipeline, max_sequence_length: int, resolution: int | None = None):
        super().__init__(pipe, max_sequence_length)
        without_t5 = {} if max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
        self._prompt_encoder = self.with_parts(**without_t5)
        config = self.trunk.config
        side = latent_side(resolution, pipe.vae_scale_factor, config.patch_size) if resolution else config.sample_size
        if side > config.patch_size * config.pos_embed_max_size:
            raise UserError(
                f"model.resolution = {resolution}: at most "
                f"{config.patch_size * config.pos_embed_max_size * pipe.vae_scale_factor}, "
                "which this model's table of positions holds"
            )
        self.latent_shape, self.resolution = (config.in_channels, side, side), side * pipe.vae_scale_factor
        self.width = config.num_attention_heads * config.attention_head_dim
        self.text_width = config.pooled_projection_dim
        self.depth = config.num_layers
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3 if max_sequence_length else None)
        self.encoders = [encoder for encoder in encoders if encoder is not None]

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

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.trunk.config
        tokens = self.pipe.tokenizer_max_length + self.max_sequence_length  # CLIP's and T5's
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        scheduler = copy.deepcopy(self.pipe.scheduler)  # a pipeline's own may be in the middle of a call
        options = scheduler.config
        shift = {}
        if options.use_dynamic_shifting:
            tokens = (self.latent_shape[1] // self.trunk.config.patch_size) ** 2
            shift["mu"] = calculate_shift(
                tokens, options.base_image_seq_len, options.max_image_seq_len, options.base_shift, options.max_shift
            )
        scheduler.set_timesteps(num_inference_steps, **shift)
        return flow_schedule(scheduler.sigmas.float().cpu(), transition, noise_level, num_trained_steps)

    def predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        return trunk(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        return trunk.transformer_blocks[index], 1  # a joint block returns (text tokens, image tokens)

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
        ]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return as_uint8(vae.decode(latents.to(vae.dtype)).sample)
