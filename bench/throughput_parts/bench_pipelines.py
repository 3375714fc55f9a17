"""Diffusers pipelines of the models that are measured, built in memory: no download, random weights but for tiny-dit.

The configurations are those of the published checkpoints; text encoders are replaced by random conditioning of the
right shape. Only diffusers is used here: the stock loop's process has no more of this project than it needs.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TINY_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": 2,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TRUNKS = {
    "sd35-medium": (SD3Transformer2DModel, SD35_MEDIUM),
    "sd15": (UNet2DConditionModel, SD15),
    "tiny-unet": (UNet2DConditionModel, TINY_UNET),
}
FULL_SIZE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
AUTOENCODERS = {
    "sd35-medium": FULL_SIZE_VAE
    | {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "sd15": FULL_SIZE_VAE | {"latent_channels": 4, "scaling_factor": 0.18215},
    "tiny-unet": {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 64,
    },
}
CONDITIONING = {  # shapes of a prompt's tensors; a UNet does not read the pooled one, a critic does
    "sd35-medium": {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)},  # CLIP's tokens and T5's
    "sd15": {"prompt_embeds": (77, 768), "pooled_prompt_embeds": (768,)},
    "tiny-unet": {"prompt_embeds": (12, 64), "pooled_prompt_embeds": (64,)},
}


def build_pipeline(
    name: str, tiny_dit: Path, device: torch.device
) -> StableDiffusion3Pipeline | StableDiffusionPipeline:
    """The pipeline in float32 on `device`; tiny-dit from its folder `tiny_dit`, without its T5."""
    if name == "tiny-dit":
        pipe = StableDiffusion3Pipeline.from_pretrained(
            tiny_dit, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
        )
        return pipe.to(device)
    trunk = build_trunk(name, tiny_dit, device)
    with torch.device(device):
        vae = AutoencoderKL(**AUTOENCODERS[name])
    if isinstance(trunk, SD3Transformer2DModel):
        encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return StableDiffusion3Pipeline(
            transformer=trunk, vae=vae, scheduler=scheduler, **dict.fromkeys(encoders, None)
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"), None)
    return StableDiffusionPipeline(unet=trunk, vae=vae, scheduler=scheduler, requires_safety_checker=False, **nothing)


def build_trunk(name: str, tiny_dit: Path, device: torch.device | str) -> nn.Module:
    """The transformer or UNet alone, with random weights, in float32; on "meta" it takes no memory."""
    if name == "tiny-dit":
        kind, config = SD3Transformer2DModel, SD3Transformer2DModel.load_config(tiny_dit / "transformer")
    else:
        kind, config = TRUNKS[name]
    with torch.device(device):
        return kind.from_config(config)


def trunk_of(pipe: StableDiffusion3Pipeline | StableDiffusionPipeline) -> nn.Module:
    return pipe.transformer if isinstance(pipe, StableDiffusion3Pipeline) else pipe.unet


def random_conditioning(name: str, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Conditioning of B prompts, float32 [B, ...]; the same text gives the same numbers on one kind of device."""
    rows: dict[str, list[Tensor]] = {key: [] for key in CONDITIONING[name]}
    for text in texts:
        generator = torch.Generator(device).manual_seed(zlib.crc32(text.encode()))
        for key, shape in CONDITIONING[name].items():
            rows[key].append(torch.randn(shape, generator=generator, device=device))
    return {key: torch.stack(tensors) for key, tensors in rows.items()}


def predict(trunk: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    """The trunk called as diffusers' pipelines call it: [B, C, H, W] in its own type."""
    if isinstance(trunk, UNet2DConditionModel):
        return trunk(latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]
    return trunk(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
