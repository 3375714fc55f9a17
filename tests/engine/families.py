"""SDXL, FLUX.1 and FLUX.2 klein in small: complete pipeline folders in float32, of random weights.

Weights are in kind those of `conftest.tiny_pipeline`, so that what the parts return depends on all they are given. All
autoencoders have 4 x 4 pixels a latent. FLUX pipelines know no size but 128 latents a side: ask for another.
"""

from pathlib import Path

import torch

from ..conftest import CHANNELS, SIDE, _randomize, _vae

# scheduler_config.json of the models' own folders, but for the version.
SDXL_BASE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
FLUX_DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FLUX_SCHNELL = {**FLUX_DEV, "shift": 1.0, "use_dynamic_shifting": False}
FLUX2_KLEIN = {
    **FLUX_DEV,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

WIDTH, HEADS = 48, 3  # of FLUX trunks, two double-stream and two single-stream blocks
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def sdxl(folder: Path) -> None:
    """A StableDiffusionXLPipeline of blocks 16, 24 or 32 wide."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from latent_critic.engine.embedded import train_tiny_dit as tiny

    tokenizer, size_width = tiny.build_tokenizer(), 8
    parts = {
        "text_encoder": CLIPTextModel(tiny.build_text_encoder(tokenizer, 64, 2).config),
        "text_encoder_2": tiny.build_text_encoder(tokenizer, 32, 2),
        "vae": _vae(),
        "unet": UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 24, 32),
            layers_per_block=1,
            attention_head_dim=2,  # the number of heads, in fact
            cross_attention_dim=64 + 32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=size_width,
            projection_class_embeddings_input_dim=32 + 6 * size_width,
            norm_num_groups=4,
        ),
    }
    _randomize_all(parts)
    parts["vae"].register_to_config(scaling_factor=0.7)
    StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_BASE),
        add_watermarker=False,
    ).save_pretrained(folder)


def flux(folder: Path, guidance_embeds: bool = True) -> None:
    """A FluxPipeline: FLUX.1-dev, or without guidance_embeds FLUX.1-schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from latent_critic.engine.embedded import train_tiny_dit as tiny

    tokenizer, t5_tokenizer = tiny.build_tokenizer(), tiny.build_t5_tokenizer()
    parts = {
        "text_encoder": CLIPTextModel(tiny.build_text_encoder(tokenizer, 64, 2).config),
        "text_encoder_2": tiny.build_t5(t5_tokenizer),
        "vae": _vae(use_quant_conv=False, use_post_quant_conv=False),
        "transformer": FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=96,
            pooled_projection_dim=64,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    }
    torch.nn.init.ones_(parts["text_encoder_2"].encoder.final_layer_norm.weight)  # tiny-dit's T5 says nothing
    _randomize_all(parts)
    parts["vae"].register_to_config(shift_factor=0.2, scaling_factor=1.4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX_DEV if guidance_embeds else FLUX_SCHNELL)
    FluxPipeline(**parts, tokenizer=tokenizer, tokenizer_2=t5_tokenizer, scheduler=scheduler).save_pretrained(folder)


def flux2(folder: Path) -> None:
    """A Flux2KleinPipeline. Its tokens are the prompt's bytes, between a start and an end."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2TokenizerFast(vocabulary, [], extra_special_tokens=special[1:], chat_template=CHAT)
    parts = {
        "text_encoder": Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=28,  # the pipeline reads what goes into layers 9, 18 and 27
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
        ),
        "vae": AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 32),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=4,
            sample_size=4 * SIDE,
        ),
        "transformer": Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=3 * 32,
            timestep_guidance_channels=64,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    }
    generator = _randomize_all(parts)
    statistics = parts["vae"].bn
    statistics.running_mean.normal_(std=0.5, generator=generator)
    statistics.running_var.uniform_(0.5, 2.0, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLUX2_KLEIN)
    Flux2KleinPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler).save_pretrained(folder)


def _randomize_all(parts: dict[str, torch.nn.Module]) -> torch.Generator:
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        _randomize(part, generator)
    return generator
