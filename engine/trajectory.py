"""What a rollout hands to everything after it."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .backbones.base import Conditioning
from .prompts import Prompt


@dataclass
class Trajectory:
    """One rank's rollouts: N samples, K steps, M rewards. Latents and log-probs are always float32."""

    latents: Tensor  # [N, K + 1, C, H, W]; [:, 0] is noise, [:, K] clean
    log_probs: Tensor  # [N, K], of the stored next latents, under the policy that drew them
    values: Tensor  # [N, K, M], in units of the standardised reward; M is 0 without a critic
    timesteps: Tensor  # [K], 0..1000
    table: Tensor  # [K, 3], the transition's (a, b, s)
    conditioning: Conditioning
    prompts: list[Prompt]
    sample_indices: Tensor  # [N] int64, global, which key the noise together with the seed
    seed: int
    # If kept, each tap's [N, K, n, D] or pictures, on the CPU. A GPU may still be copying them there: only what is
    # queued in the same stream, as a copy back is, finds them whole.
    features: list[Tensor] = field(default_factory=list)

    @cached_property
    def trained_steps(self) -> slice:
        """The steps with a likelihood, one after another; the others are deterministic. On a GPU the first call waits
        for it, so that passes of an update do not."""
        stochastic = (self.table[:, 2] > 0).nonzero().flatten().tolist()
        return slice(stochastic[0], stochastic[-1] + 1)


def concatenate(parts: list[Trajectory]) -> Trajectory:
    """Joins the micro-batches of one rollout, their features aside."""
    first = parts[0]
    return Trajectory(
        latents=torch.cat([p.latents for p in parts]),
        log_probs=torch.cat([p.log_probs for p in parts]),
        values=torch.cat([p.values for p in parts]),
        timesteps=first.timesteps,
        table=first.table,
        conditioning={name: torch.cat([p.conditioning[name] for p in parts]) for name in first.conditioning},
        prompts=[prompt for p in parts for prompt in p.prompts],
        sample_indices=torch.cat([p.sample_indices for p in parts]),
        seed=first.seed,
    )
