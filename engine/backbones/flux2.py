"""FLUX.2 klein (4B and 9B, base and step-distilled): `Flux2KleinPipeline` folders."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from ..errors import UserError
from ..transitions import Schedule
from .base import Backbone, Conditioning, as_uint8, flow_schedule, latent_side


class Flux2Backbone(Backbone):
    """The blocks are the double-stream ones, then the single-stream ones. Latents are patches already: one token each.

    The step-distilled models have no guidance, whatever they are told, as in the stock pipeline.
    """

    pipeline = Flux2KleinPipeline
    scheduler = FlowMatchEulerDiscreteScheduler

    def __init__(self, pipe: Flux2KleinPipeline, max_sequence_length: int, resolution: int | None = None):
        super().__init__(pipe, max_sequence_length)
        if not max_sequence_length:
            raise UserError("model.max_sequence_length = 0: FLUX.2 needs Qwen3's tokens; diffusers' default is 512")
        self.is_guidance_distilled = pipe.config.is_distilled
        config = self.trunk.config
        self.resolution = resolution or pipe.default_sample_size * pipe.vae_scale_factor
        side = latent_side(self.resolution, pipe.vae_scale_factor, 2) // 2
        self.latent_shape = (config.in_channels, side, side)
        self.width = config.num_attention_heads * config.attention_head_dim
        self.text_width = config.joint_attention_dim
        self.depth = config.num_layers + config.num_single_layers
        self.encoders = [pipe.text_encoder]
        self._image_ids = pipe._prepare_latent_ids(torch.empty(1, *self.latent_shape))[0]

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._image_ids = self._image_ids.to(device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """The pooled text is the mean over the text's own tokens, without those that fill up its length."""
        masks: list[Tensor] = []
        encoder = self.pipe.text_encoder
        with encoder.register_forward_pre_hook(
            lambda _encoder, _inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
        ):
            embeds, _ = self.pipe.encode_prompt(
                list(texts), encoder.device, max_sequence_length=self.max_sequence_length
            )
        embeds, mask = embeds.float(), masks[0][..., None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": (embeds * mask).sum(1) / mask.sum(1)}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.trunk.config.joint_attention_dim
        return {"prompt_embeds": (self.max_sequence_length, width), "pooled_prompt_embeds": (width,)}

    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        scheduler = copy.deepcopy(self.pipe.scheduler)  # a pipeline's own may be in the middle of a call
        mu = compute_empirical_mu(len(self._image_ids), num_inference_steps)
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
        text_ids = torch.zeros(embeds.shape[1], 4, device=latents.device, dtype=self._image_ids.dtype)
        text_ids[:, 3] = torch.arange(embeds.shape[1], device=latents.device)
        prediction = trunk(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=timesteps.to(latents.dtype) / 1000,  # rounded as the stock pipeline does
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).reshape(latents.shape)

    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        double = trunk.transformer_blocks
        # A double-stream block returns (text tokens, image tokens), a single-stream one all tokens, text in front.
        return (
            (double[index], 1) if index < len(double) else (trunk.single_transformer_blocks[index - len(double)], None)
        )

    def tokens(self, features: Tensor) -> Tensor:
        return features[:, -len(self._image_ids) :]

    def lora_targets(self) -> list[str]:
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.trunk.config.num_single_layers)]
        return ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj", *single]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return as_uint8(vae.decode(Flux2KleinPipeline._unpatchify_latents(latents).to(vae.dtype)).sample)
