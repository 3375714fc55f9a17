"""Stable Diffusion XL: `StableDiffusionXLPipeline` folders."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from .base import Conditioning
from .unet import UNetBackbone


class SDXLBackbone(UNetBackbone):
    """A UNet with two text encoders and the picture's size as a condition (down 0-2, mid 3, up 4-6)."""

    pipeline = StableDiffusionXLPipeline
    load_options = {"add_watermarker": False}
    steps_offset = None  # its stock pipeline leaves the scheduler's

    def __init__(self, pipe: StableDiffusionXLPipeline, max_sequence_length: int = 0, resolution: int | None = None):
        super().__init__(pipe, max_sequence_length, resolution)
        self.encoders = [pipe.text_encoder, pipe.text_encoder_2]
        self.text_width = pipe.text_encoder_2.config.projection_dim
        size = (self.resolution, self.resolution)
        # As the stock pipeline says it: a picture of that size, not scaled, not cropped.
        self._time_ids = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, self.text_width)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """The empty prompt, guidance's other side, is all zeros where the folder asks for it, as SDXL's does."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(texts), device=self.encoders[0].device, do_classifier_free_guidance=False
        )
        embeds, pooled = embeds.float(), pooled.float()
        if self.pipe.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([text != "" for text in texts], device=pooled.device)
            embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
        time_ids = self._time_ids.to(pooled.device).expand(len(texts), -1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": time_ids}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().conditioning_shapes(), "time_ids": (self._time_ids.shape[1],)}

    def predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": conditioning["time_ids"]}
        return trunk(
            sample=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
