"""Pictures of prompts outside of training: as a run's evaluations draw them, or as the stock pipeline does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .actor_critic import ActorCritic
from .backbones import Backbone
from .backbones.onednn import use_onednn
from .config import CriticConfig
from .prompt_cache import PromptCache
from .prompts import Prompt
from .rollout import Rollout
from .scoring import BATCH


def draw_as_evaluated(
    backbone: Backbone,
    texts: Sequence[str],
    device: torch.device,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
) -> Tensor:
    """uint8 [N, H, W, 3]: deterministic (ODE) samples, the n-th from the noise of an evaluation's n-th."""
    use_onednn(backbone.trunk)
    backbone.to(device)
    model = ActorCritic(backbone, CriticConfig(), ["unused"], guidance_scale).eval().requires_grad_(False)
    model.to(device, next(backbone.trunk.parameters()).dtype)
    schedule = backbone.schedule("ode", 0.0, num_inference_steps).to(device)
    rollout = Rollout([model], PromptCache(backbone, device), backbone.latent_shape, batch_size, device)
    with tqdm(total=len(texts), desc="drawing", disable=len(texts) <= batch_size) as progress:
        drawn = rollout(
            [Prompt(text) for text in texts],
            torch.arange(len(texts)),
            schedule=schedule,
            seed=seed,
            finished=lambda _start, part: progress.update(len(part.prompts)),
        )
    return torch.cat([backbone.decode(part).cpu() for part in drawn.latents[:, -1].split(BATCH)])


def draw_by_stock_pipeline(
    backbone: Backbone, texts: Sequence[str], device: torch.device, *, seed: int, batch_size: int, **call: Any
) -> Tensor:
    """uint8 [N, H, W, 3] of the pipeline with its own scheduler. call: its arguments, where not the defaults."""
    pipe = backbone.pipe.to(device)
    pictures = []
    for start in tqdm(range(0, len(texts), batch_size), "drawing", disable=len(texts) <= batch_size):
        part = list(texts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn = pipe(
            prompt=part,
            height=backbone.resolution,
            width=backbone.resolution,
            generator=generators,
            output_type="pt",
            **call,
        ).images
        pictures.append((drawn.float() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(pictures)
