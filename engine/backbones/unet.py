"""Stable Diffusion 1.x and 2.x: `StableDiffusionPipeline` folders."""

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor, nn

from ..errors import UserError
from ..transitions import Schedule, build_table
from .base import Backbone, Conditioning, as_uint8, latent_side


class UNetBackbone(Backbone):
    """The blocks are numbered as the UNet runs them: down, mid, up (SD1.x and SD2.x: 0-3, 4, 5-8)."""

    pipeline = StableDiffusionPipeline
    load_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    trunk_name = "unet"
    steps_offset: int | None = 1  # of the timesteps, as the stock pipeline has it in any scheduler; None: as it is

    def __init__(self, pipe: DiffusionPipeline, max_sequence_length: int = 0, resolution: int | None = None):
        """Prompts have the tokenizer's own length, whatever max_sequence_length is."""
        super().__init__(pipe, max_sequence_length)
        self.encoders = [pipe.text_encoder]
        config = self.trunk.config
        side = latent_side(resolution, pipe.vae_scale_factor) if resolution else config.sample_size
        self.latent_shape, self.resolution = (config.in_channels, side, side), side * pipe.vae_scale_factor
        channels = config.block_out_channels
        self._widths = [*channels, channels[-1], *reversed(channels)]
        self.width = channels[-1]
        self.depth = len(self._widths)
        self.text_width = pipe.text_encoder.config.hidden_size
        self._scheduler = _ddim(pipe.scheduler, self.steps_offset)
        self._alphas_cumprod = self._scheduler.alphas_cumprod.float()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._alphas_cumprod = self._alphas_cumprod.to(device)

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """The pooled text is CLIP's own: what its text encoder says at the end of the text."""
        pooled: list[Tensor] = []
        encoder = self.pipe.text_encoder
        # The pipeline drops that part of the encoder's output.
        with encoder.register_forward_hook(lambda _encoder, _inputs, output: pooled.append(output.pooler_output)):
            embeds, _ = self.pipe.encode_prompt(list(texts), encoder.device, 1, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds.float(), "pooled_prompt_embeds": pooled[0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.pipe.text_encoder.config.max_position_embeddings
        return {
            "prompt_embeds": (tokens, self.trunk.config.cross_attention_dim),
            "pooled_prompt_embeds": (self.text_width,),
        }

    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        scheduler, trained = self._scheduler, self._scheduler.config.num_train_timesteps
        if num_inference_steps >= trained:  # some spacings then ask for a timestep that does not exist
            raise UserError(
                f"rollout.num_inference_steps, evaluation.num_inference_steps: {num_inference_steps} is too many; "
                f"this model has {trained} timesteps, so choose {trained - 1} at most"
            )
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps
        timesteps = timesteps[timesteps >= 0]  # for some K "trailing" ends with one more, -1, by a rounding error
        table = build_table(
            transition,
            noise_level,
            alphas_cumprod=scheduler.alphas_cumprod,
            timesteps=timesteps,
            # DDIMScheduler steps down by T // K, even where its timesteps lie otherwise.
            next_timesteps=timesteps - trained // num_inference_steps,
            prediction_type=scheduler.config.prediction_type,
            final_alpha_cumprod=scheduler.final_alpha_cumprod.item(),
            num_trained_steps=num_trained_steps,
        )
        return Schedule(table, timesteps.float())

    def predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        return trunk(
            sample=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]

    def clean(self, latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        ab = self._alphas_cumprod.to(latents.device)[timesteps.long()].view(-1, *[1] * (latents.ndim - 1))
        if self._scheduler.config.prediction_type == "epsilon":
            return (latents - (1.0 - ab).sqrt() * prediction) / ab.sqrt()
        return ab.sqrt() * latents - (1.0 - ab).sqrt() * prediction

    def per_score(self, timesteps: Tensor) -> Tensor:
        """Of the noise eps = -sqrt(1 - ab) score; v = (eps - sqrt(1 - ab) z) / sqrt(ab)."""
        ab = self._alphas_cumprod.to(timesteps.device)[timesteps.long()]
        eps = -(1.0 - ab).sqrt()
        return eps if self._scheduler.config.prediction_type == "epsilon" else eps / ab.sqrt()

    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        block = [*trunk.down_blocks, trunk.mid_block, *trunk.up_blocks][index]
        return block, 0 if index < len(trunk.down_blocks) else None  # a down block returns its residuals too

    def tap_width(self, index: int) -> int:
        return self._widths[index]

    def tokens(self, features: Tensor) -> Tensor:
        # One copy, which brings a pixel's channels together in memory; none if the features are channels_last.
        return features.flatten(2).transpose(1, 2).contiguous()

    def default_taps(self) -> list[int]:
        """The mid block and the up blocks as wide as it, where a UNet holds what the picture shows (arXiv 2210.10960,
        arXiv 2306.03881). In SD1.x and SD2.x: 4, 5 and 6, of 1280 channels."""
        return [index for index in range(self.depth // 2, self.depth) if self._widths[index] == self.width]

    def lora_targets(self) -> list[str]:
        return ["to_q", "to_k", "to_v", "to_out.0"]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return as_uint8(vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample)


def _ddim(found: SchedulerMixin, steps_offset: int | None) -> DDIMScheduler:
    """DDIM over the noise levels and timesteps of a pipeline's scheduler, of whatever kind that is."""
    if "beta_schedule" not in found.config:
        raise UserError(
            f"model.pretrained: its scheduler is {type(found).__name__}, whose noise levels are not Stable Diffusion's "
            "(no beta_schedule), and DDIM has none for them"
        )
    # Its clip_sample does not matter: we never do that.
    changes = {} if steps_offset is None else {"steps_offset": steps_offset}
    scheduler = DDIMScheduler.from_config(found.config, **changes)
    if scheduler.config.thresholding:
        raise UserError(
            "model.pretrained: its scheduler has thresholding = true, which has no likelihood; it is not meant for "
            "latents, so set it to false in scheduler/scheduler_config.json"
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f'model.pretrained: its scheduler has prediction_type = "{scheduler.config.prediction_type}"; supported '
            "are epsilon and v_prediction"
        )
    return scheduler
