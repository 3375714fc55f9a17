"""Trains tiny-dit, the embedded Stable Diffusion 3 pipeline, from scratch on drawn scenes.

    python -m latent_critic.engine.embedded.train_tiny_dit --output engine/embedded/tiny-dit

Three stages: draw the pictures; fit the autoencoder; fit text encoders and transformer together by flow matching
(rectified flow, logit-normal times: Esser et al. 2024, arXiv 2403.03206). Finished stages are kept in `--work`, and a
later run goes on from them. The folder has the format of `StableDiffusion3Pipeline.save_pretrained`. `--precision bf16`
helps on a GPU; a GPU is used when there is one.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from latent_critic.engine.embedded import scenes

MAX_TOKENS = 12  # the longest caption, with its two special tokens
EMPTY_T5_TOKENS, EVERY = 256, 40  # one step in 40 sees the empty T5 tokens of stock pipelines: see `train_flow`
EMPTY_T5_BATCH = 16  # few samples there: such a step has ten times the tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-dit"), help="drawn scenes and stage checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=60_000, help="pictures to draw")
    parser.add_argument("--vae-steps", type=int, default=1_500)
    parser.add_argument(
        "--steps", type=int, default=2_400, help="transformer steps; few, so that post-training has something to gain"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--minutes", type=float, default=None, help="end the transformer stage early, decay included")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ scenes


def _draw_chunk(seed: tuple[int, int], count: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    drawn = [scenes.random_scene(rng) for _ in range(count)]
    return np.stack([scenes.draw(scene, rng) for scene in drawn]), [scene.caption() for scene in drawn]


def draw_scenes(work: Path, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """uint8 [count, 3, 64, 64] pictures and their captions, kept in `work` between runs."""
    cached = work / f"scenes-{seed}-{count}.npz"
    if not cached.exists():
        chunk = 500
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(_draw_chunk, (seed, i), chunk) for i in range(count // chunk)]
            parts = [job.result() for job in tqdm(jobs, desc="scenes")]
        pictures = np.concatenate([p for p, _ in parts])
        np.savez(cached, pictures=pictures, captions=np.array(sum((c for _, c in parts), [])))
    stored = np.load(cached)
    return torch.from_numpy(stored["pictures"]).permute(0, 3, 1, 2), stored["captions"].tolist()


# ------------------------------------------------------------------------------------------------------- autoencoder


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(pictures: torch.Tensor, steps: int, seed: int, device, autocast, log) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae")
    for step in progress:
        x = _normalised(pictures[torch.randint(len(pictures), (32,))]).to(device)
        with autocast():
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - x
        loss = error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / x[0].numel() * 48
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(stage="vae", step=step, loss=loss.item(), psnr=_psnr(error))
            progress.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{_psnr(error):.1f} dB")
    return vae.eval()


def _normalised(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def _psnr(error: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / error.square().mean()))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, device) -> torch.Tensor:
    """float32 [count, 8, 8, 8] latents, standardised; the two constants go into the autoencoder's config."""
    means = [vae.encode(_normalised(p).to(device)).latent_dist.mean.cpu() for p in tqdm(pictures.split(250), "latents")]
    latents = torch.cat(means)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


# ------------------------------------------------------------------------------------------------ text + transformer


def all_captions() -> list[str]:
    return [scene.caption() for scene in itertools.chain(*scenes.all_scenes().values())]


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer in which every word and digit of the captions is one token; the same in every call.

    Training finds the same tokens each time, but numbers them in the order of a hash table that is seeded at random, so
    they are numbered anew: the text encoders are trained with one call's numbers and shipped with another's.
    """
    trained = CLIPTokenizer().train_new_from_iterator(iter(all_captions()), vocab_size=400)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    special = sorted(trained.all_special_tokens, reverse=True)  # start, end
    tokens = special + sorted(set(model["vocab"]) - set(special))
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=MAX_TOKENS)


def build_t5_tokenizer() -> T5Tokenizer:
    """The captions' words, and digits to spell their numbers."""
    words = sorted({f"▁{word}" for caption in all_captions() for word in caption.split() if word.isalpha()})
    pieces = ["<pad>", "</s>", "<unk>", *words, "▁", '"', *"0123456789"]
    return T5Tokenizer([(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=512)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Fills the pipeline's third slot, which stock loading requires: its final norm is 0, so all its tokens are 0,
    which is what SD3 pipelines take for T5 tokens when they run without T5."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=96, d_kv=32, d_ff=96, num_layers=1, num_heads=1)
    )
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


class FlowModel(torch.nn.Module):
    """Both text encoders and the transformer, joined as `StableDiffusion3Pipeline.encode_prompt` joins them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer, 64, 2)
        self.text_encoder_2 = build_text_encoder(tokenizer, 32, 2)
        self.transformer = build_transformer()

    def forward(self, z: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, t5_tokens: int) -> torch.Tensor:
        encoded = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        context = torch.cat([e.hidden_states[-2] for e in encoded], -1)
        context = F.pad(context, (0, 0, 0, t5_tokens))
        pooled = torch.cat([e.text_embeds for e in encoded], -1)
        return self.transformer(z, context, pooled, sigma * 1000, return_dict=False)[0]


def train_flow(latents: torch.Tensor, captions: list[str], vae, args, device, autocast, log) -> FlowModel:
    """Rectified flow, v = eps - x0. 5 % of captions are dropped, so that guidance above 1 has an unconditional branch.

    Stock pipelines append 256 empty T5 tokens when there is no T5, callers who care for speed none; batches of both
    kinds make the weights good for either.
    """
    torch.manual_seed(args.seed + 1)
    draw = caption_batches(latents, captions, build_tokenizer(), args.batch_size, device)
    model = FlowModel(build_tokenizer()).to(device)
    compiled = torch.compile(model, dynamic=False)

    def loss(step: int) -> torch.Tensor:
        x0, token_ids = draw()
        sigma = torch.sigmoid(torch.randn(args.batch_size)).to(device)
        noise = torch.randn_like(x0)
        mix = sigma[:, None, None, None]
        inputs, target = ((1 - mix) * x0 + mix * noise, sigma, token_ids), noise - x0
        with autocast():
            if (step + 1) % EVERY:
                v = compiled(*inputs, 0)
            else:
                v, target = model(*(x[:EMPTY_T5_BATCH] for x in inputs), EMPTY_T5_TOKENS), target[:EMPTY_T5_BATCH]
        return (v.float() - target).square().mean()

    def snapshot(average: FlowModel) -> None:
        save(average, copy.deepcopy(vae), args.work / "snapshot")

    return fit(model, loss, snapshot, "flow", args, log)


def caption_batches(
    latents: torch.Tensor, captions: list[str], tokenizer: CLIPTokenizer, batch_size: int, device
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that draws latents and the token numbers of their captions, 5 % of which are dropped."""
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    blank = tokenizer("", padding="max_length", return_tensors="pt").input_ids

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(latents), (batch_size,))
        x0 = latents[chosen].to(device)
        return x0, torch.where(torch.rand(batch_size, 1) < 0.05, blank, ids[chosen]).to(device)

    return draw


def fit(
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    snapshot: Callable[[torch.nn.Module], None],
    stage: str,
    args: argparse.Namespace,
    log: Callable,
) -> torch.nn.Module:
    """Minimises `loss_of` (step) over the model's parameters; returns their running average, as a model.

    snapshot: is given a copy of that average now and then, which is its own.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
    begin, done, smooth = time.monotonic(), 0.0, None
    progress = tqdm(range(args.steps), desc=stage)
    for step in progress:
        done = step / args.steps
        if args.minutes:
            done = max(done, (time.monotonic() - begin) / 60 / args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:  # warm up, hold, decay to zero over the last 30 %
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 300, (1 - done) / 0.3)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 100 == 0:
            log(stage=stage, step=step, loss=smooth, seconds=time.monotonic() - begin)
            progress.set_postfix(loss=f"{smooth:.4f}")
        if step % 1000 == 999:
            snapshot(copy.deepcopy(average.module))
    return average.module.eval()


def save(model: FlowModel, vae: AutoencoderKL, folder: Path) -> None:
    """The pipeline folder: transformer and autoencoder in half precision, which diffusers widens as it loads; the text
    encoders, which transformers would leave narrow, in float32."""
    tokenizer, t5_tokenizer = build_tokenizer(), build_t5_tokenizer()
    StableDiffusion3Pipeline(
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        text_encoder_3=build_t5(t5_tokenizer),
        transformer=model.transformer.half(),
        vae=vae.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder)


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    with open(args.output / "training_log.jsonl", "a") as journal:  # a run may go on from a finished stage

        def log(**row):
            journal.write(json.dumps(row) + "\n")
            journal.flush()

        log(stage="arguments", **{name: str(value) for name, value in vars(args).items()}, torch=torch.__version__)
        pictures, captions = draw_scenes(args.work, args.scenes, args.seed)
        stored = args.work / "vae.safetensors"
        if not stored.exists():
            save_file(train_vae(pictures, args.vae_steps, args.seed, device, autocast, log).state_dict(), stored)
        vae = build_vae()  # not from_pretrained, which would leave this machine's path in the shipped config
        vae.load_state_dict(load_file(stored))
        vae = vae.to(device).eval()
        latents = encode(vae, pictures, device)
        model = train_flow(latents, captions, vae, args, device, autocast, log)
    save(model, vae, args.output)
    print(f"pipeline written to {args.output}")


if __name__ == "__main__":
    main()
