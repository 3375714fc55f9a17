"""Trains tiny-unet, the embedded Stable Diffusion 2 pipeline, from scratch on drawn scenes.

    python -m latent_critic.engine.embedded.train_tiny_unet --output engine/embedded/tiny-unet

Pictures and captions are those of `train_tiny_dit`, and the autoencoder is tiny-dit's as it is packaged; text encoder
and UNet are fitted together to predict v (Salimans and Ho 2022, arXiv 2202.00512) over Stable Diffusion's noise levels.
The folder has the format of `StableDiffusionPipeline.save_pretrained`.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from latent_critic.engine.embedded.train_tiny_dit import (
    build_text_encoder,
    build_tokenizer,
    caption_batches,
    draw_scenes,
    encode,
    fit,
)

TINY_DIT = Path(__file__).parent / "tiny-dit"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-dit"), help="drawn scenes, also tiny-dit's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=60_000, help="pictures to draw")
    parser.add_argument("--steps", type=int, default=2_400, help="few, so that post-training has something to gain")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=None, help="end early, decay included")
    return parser.parse_args()


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels; few steps are to begin at the noisiest of them."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 80),
        layers_per_block=1,
        attention_head_dim=4,  # the number of heads, in fact
        cross_attention_dim=96,
        norm_num_groups=8,
    )


def tiny_dits_vae() -> AutoencoderKL:
    """Not from_pretrained, which would leave this machine's path in the config."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(TINY_DIT / "vae"))
    vae.load_state_dict(load_file(TINY_DIT / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae


class Denoiser(torch.nn.Module):
    """Text encoder and UNet, joined as `StableDiffusionPipeline.encode_prompt` joins them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = CLIPTextModel(build_text_encoder(tokenizer, 96, 2).config)
        self.unet = build_unet()

    def forward(self, z: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        context = self.text_encoder(ids).last_hidden_state
        return self.unet(z, timesteps, context, return_dict=False)[0]


def train(latents: torch.Tensor, captions: list[str], vae: AutoencoderKL, args, device, log) -> Denoiser:
    torch.manual_seed(args.seed + 1)
    draw = caption_batches(latents, captions, build_tokenizer(), args.batch_size, device)
    model = Denoiser(build_tokenizer()).to(device)
    compiled, scheduler = torch.compile(model, dynamic=False), build_scheduler()
    trained = scheduler.config.num_train_timesteps

    def loss(_step: int) -> torch.Tensor:
        x0, token_ids = draw()
        timesteps, noise = torch.randint(trained, (args.batch_size,), device=device), torch.randn_like(x0)
        v = compiled(scheduler.add_noise(x0, noise, timesteps), timesteps, token_ids)
        return (v - scheduler.get_velocity(x0, noise, timesteps)).square().mean()

    return fit(model, loss, lambda average: save(average, vae, args.work / "unet-snapshot"), "unet", args, log)


def save(model: Denoiser, vae: AutoencoderKL, folder: Path) -> None:
    """The pipeline folder. The UNet is in half precision, which diffusers widens as it loads; the text encoder, which
    transformers would leave narrow, in float32."""
    StableDiffusionPipeline(
        text_encoder=model.text_encoder,
        unet=model.unet.half(),
        vae=vae.half(),
        scheduler=build_scheduler(),
        tokenizer=build_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(args.output / "training_log.jsonl", "w") as journal:

        def log(**row):
            journal.write(json.dumps(row) + "\n")
            journal.flush()

        log(stage="arguments", **{name: str(value) for name, value in vars(args).items()}, torch=torch.__version__)
        pictures, captions = draw_scenes(args.work, args.scenes, args.seed)
        vae = tiny_dits_vae().to(device).eval()
        latents = encode(vae, pictures, device)
        # StableDiffusionPipeline knows no shift.
        latents += vae.config.shift_factor * vae.config.scaling_factor
        vae.register_to_config(shift_factor=None)
        model = train(latents, captions, vae, args, device, log)
    save(model, vae, args.output)
    print(f"pipeline written to {args.output}")


if __name__ == "__main__":
    main()
