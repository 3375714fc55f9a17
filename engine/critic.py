"""The latent critic: value heads on the trunk's own features (arXiv 2605.27736).

Per tapped block the image tokens are normalised, modulated by the timestep (AdaLN) and pooled by learned queries; the
pooled tokens of all taps go through one MLP per reward.  Legend: B samples, N tokens, D trunk width, d critic width,
M rewards.
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ..kernels.critic_pool import critic_pool


class TapPool(nn.Module):
    """One tap: LayerNorm -> timestep modulation -> attention pooling -> feed-forward; [B, N, D] -> [B, d]."""

    def __init__(self, width: int, dim: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_heads, dim // num_heads))
        self.key_weight = nn.Parameter(torch.empty(dim, width))
        self.value_weight = nn.Parameter(torch.empty(dim, width))
        nn.init.xavier_uniform_(self.key_weight)
        nn.init.xavier_uniform_(self.value_weight)
        self.modulation = nn.Linear(dim, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )

    def forward(self, tokens: Tensor, time_embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(time_embedding).chunk(2, dim=-1)
        pooled = critic_pool(tokens, self.query, self.key_weight, self.value_weight, scale, shift)
        pooled = pooled.to(tokens.dtype)
        return pooled + self.feed_forward(pooled)


class Critic(nn.Module):
    """V(z_t, t, y) for M rewards: float32 [B, M] from the tapped features; starts at zero everywhere.

    timestep_adaln=False leaves the timestep out of the head (the paper's ablation).
    """

    def __init__(self, width: int, num_taps: int, num_rewards: int, dim: int, num_heads: int, timestep_adaln: bool):
        super().__init__()
        self.timestep_adaln = timestep_adaln
        self.sinusoid = Timesteps(128, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(128, dim)
        self.taps = nn.ModuleList(TapPool(width, dim, num_heads) for _ in range(num_taps))
        self.norm = nn.LayerNorm(num_taps * dim)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(num_taps * dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, 1))
            for _ in range(num_rewards)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, *features: Tensor, timesteps: Tensor) -> Tensor:
        """features: one [B, N, D] per tap; timesteps: float32 [B]."""
        steps = timesteps if self.timestep_adaln else torch.zeros_like(timesteps)
        time = nn.functional.silu(self.time_embedding(self.sinusoid(steps).to(features[0].dtype)))
        pooled = torch.cat([tap(tokens, time) for tap, tokens in zip(self.taps, features, strict=True)], dim=-1)
        pooled = self.norm(pooled)
        return torch.cat([head(pooled) for head in self.heads], dim=-1).float()
