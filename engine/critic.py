"""The latent critic: value heads on the trunk's own features (arXiv 2605.27736).

Per tapped block the image tokens are normalised, modulated by timestep and prompt (AdaLN, as the trunk's own blocks
are) and pooled by learned queries; the pooled tokens of all taps go through one MLP per reward. The prompt is there
because a policy's pictures do not tell two prompts apart where it fails at what tells these apart. Legend: T taps,
B samples, N tokens, D trunk width, d critic width, M rewards. LayerNorms have no weights of their own: what follows
each of them is linear.
"""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.common import widened
from ..kernels.critic_pool import critic_pool


class TapPools(nn.Module):
    """Every tap: LayerNorm -> modulation -> attention pooling; T x [B, N, D] -> [B, T d].

    The taps' weights are stacked: sharding costs by the tensor, whatever its size.
    """

    def __init__(self, num_taps: int, width: int, dim: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_taps, num_heads, dim // num_heads))
        bound = (6.0 / (dim + width)) ** 0.5  # Xavier's
        self.key_weight = nn.Parameter(torch.empty(num_taps, dim, width).uniform_(-bound, bound))
        self.value_weight = nn.Parameter(torch.empty(num_taps, dim, width).uniform_(-bound, bound))
        self.modulation = nn.Linear(dim, num_taps * 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, features: Sequence[Tensor], condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).unflatten(1, (2, len(features), -1)).permute(1, 2, 0, 3)
        weights = (self.query, self.key_weight, self.value_weight, scale, shift)
        pooled = [critic_pool(*tap) for tap in zip(features, *weights, strict=True)]
        return torch.cat(pooled, dim=-1).to(features[0].dtype)


class Critic(nn.Module):
    """V(z_t, t, y) for M rewards: float32 [B, M] from the tapped features (float64 of float64 weights); starts at zero
    everywhere.

    timestep_adaln=False leaves the timestep out of the head (the paper's ablation).
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        num_taps: int,
        num_rewards: int,
        dim: int,
        num_heads: int,
        timestep_adaln: bool,
    ):
        super().__init__()
        self.timestep_adaln = timestep_adaln
        self.condition = CombinedTimestepTextProjEmbeddings(dim, text_width)
        self.taps = TapPools(num_taps, width, dim, num_heads)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(num_taps * dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, 1))
            for _ in range(num_rewards)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, *features: Tensor, timesteps: Tensor, pooled_text: Tensor) -> Tensor:
        """features: one [B, N, D] per tap; timesteps: float32 [B]; pooled_text: [B, text_width], of their type."""
        steps = timesteps if self.timestep_adaln else torch.zeros_like(timesteps)
        condition = functional.silu(self.condition(steps, pooled_text))
        pooled = self.taps(features, condition)
        pooled = functional.layer_norm(pooled, pooled.shape[-1:])
        return widened(torch.cat([head(pooled) for head in self.heads], dim=-1))
