"""What a value function costs a denoising step, by where it looks: latents, a trunk of its own, or pictures."""

from collections.abc import Callable

import torch
from bench_accounting import seconds_of
from bench_work import PIXELS, SEPARATE, SHARED, TRUNK
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones import Conditioning
from latent_critic.engine.transitions import Schedule

WARM_UP = 3
TINY_VIT = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 64,
    "patch_size": 8,
}


class PixelCritic(nn.Module):
    """A value of the picture that a step predicts: autoencoder, then a vision transformer of random weights.

    ViT-base at 224 pixels, or a small one at 64 for small pictures. The autoencoder computes in float32, as everywhere.
    """

    def __init__(self, vae: nn.Module, resolution: int, num_rewards: int, dtype: torch.dtype):
        super().__init__()
        config = ViTConfig(**(TINY_VIT if resolution < 224 else {}))
        with torch.device(vae.device):
            self.vit = ViTModel(config, add_pooling_layer=False).to(dtype).eval()
            self.head = nn.Linear(config.hidden_size, num_rewards, dtype=dtype)
        self.vae, self.side = vae, config.image_size

    def forward(self, clean: Tensor) -> Tensor:
        """float32 latents [B, C, H, W] to values [B, M]."""
        config = self.vae.config
        latents = clean / config.scaling_factor + (config.shift_factor or 0.0)
        pictures = functional.interpolate(self.vae.decode(latents).sample, (self.side, self.side), mode="bilinear")
        return self.head(self.vit(pictures.to(self.head.weight.dtype)).last_hidden_state[:, 0]).float()


@torch.no_grad()
def measure_critics(
    model: ActorCritic, schedule: Schedule, conditioning: Conditioning, resolution: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward with each critic, taking turns; on a GPU as replayed graphs, which is how rollouts run."""
    backbone, device = model.backbone, schedule.table.device
    dtype = next(model.trunk.parameters()).dtype
    batch = len(next(iter(conditioning.values())))
    conditioning = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
    z = torch.randn(batch, *backbone.latent_shape, device=device)
    timesteps = schedule.timesteps[len(schedule.timesteps) // 2].repeat(batch)
    pixels = PixelCritic(backbone.pipe.vae, resolution, len(model.reward_names), dtype)

    def trunk() -> Tensor:
        return backbone.predict(model.trunk, z.to(dtype), timesteps, conditioning).float()

    def shared() -> None:
        model(z, timesteps, conditioning)

    def separate() -> None:
        trunk()
        shared()

    def pixel() -> None:
        # The clean latent of a flow; a UNet's has other factors and takes as long.
        pixels(z - timesteps[0] / 1000.0 * trunk())

    runs = {TRUNK: trunk, SHARED: shared, SEPARATE: separate, PIXELS: pixel}
    if device.type == "cuda":
        runs = {name: _captured(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + WARM_UP):
        for name, run in runs.items():
            taken = seconds_of(run, device)
            if number >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay
