"""What a value function costs a denoising step, by where it looks: latents, a trunk of its own, or pictures."""

from collections.abc import Callable

import torch
from bench_accounting import seconds_of
from bench_work import PIXELS, SEPARATE, SHARED, TRUNK
from torch import Tensor, nn

from latent_critic.engine.actor_critic import ActorCritic
from latent_critic.engine.backbones import Backbone, Conditioning
from latent_critic.engine.pixels import PixelTrunk, as_input
from latent_critic.engine.transitions import Schedule

WARM_UP = 3


class PixelCritic(nn.Module):
    """A value of the picture that a step predicts: autoencoder, then a vision transformer."""

    def __init__(self, backbone: Backbone, num_rewards: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.backbone, self.dtype = backbone, dtype
        self.trunk = PixelTrunk(backbone.resolution).to(device, dtype)
        self.head = nn.Linear(self.trunk.width, num_rewards, dtype=dtype, device=device)

    def forward(self, clean: Tensor) -> Tensor:
        """float32 latents [B, C, H, W] to values [B, M]."""
        pictures = as_input(self.backbone.decode(clean), self.trunk.side, self.dtype)
        return self.head(self.trunk(pictures)[:, 0]).float()


@torch.no_grad()
def measure_critics(
    model: ActorCritic, schedule: Schedule, conditioning: Conditioning, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward with each critic, taking turns; on a GPU as replayed graphs, which is how rollouts run."""
    backbone, device = model.backbone, schedule.table.device
    dtype = next(model.trunk.parameters()).dtype
    batch = len(next(iter(conditioning.values())))
    conditioning = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
    z = torch.randn(batch, *backbone.latent_shape, device=device)
    timesteps = schedule.timesteps[len(schedule.timesteps) // 2].repeat(batch)
    pixels = PixelCritic(backbone, len(model.reward_names), dtype, device)

    def trunk() -> Tensor:
        return backbone.predict(model.trunk, z.to(dtype), timesteps, conditioning).float()

    def shared() -> None:
        model(z, timesteps, conditioning)

    def separate() -> None:
        trunk()
        shared()

    def pixel() -> None:
        pixels(backbone.clean(z, trunk(), timesteps))

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
