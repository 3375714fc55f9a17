"""Sampling with the actor-critic, one denoising step at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.transition import transition_step
from .backbones.base import Conditioning
from .noise import keyed_noise
from .prompt_cache import PromptCache
from .prompts import Prompt
from .trajectory import Trajectory, concatenate

Model = Callable[..., tuple[Tensor, Tensor]]  # as ActorCritic


@torch.no_grad()
def rollout(
    model: Model,
    encode: PromptCache,
    prompts: Sequence[Prompt],
    sample_indices: Tensor,
    *,
    table: Tensor,
    timesteps: Tensor,
    latent_shape: tuple[int, int, int],
    seed: int,
    micro_batch_size: int,
    device: torch.device,
    guided: bool = False,
    finished: Callable[[Trajectory], None] = lambda part: None,
) -> Trajectory:
    """Draws one trajectory per prompt.

    table: float32 [K, 3] of `transitions`; timesteps: float32 [K]; sample_indices: int64 [N], global, which key the
    noise. The update later sees the same micro-batches, so that its probability ratio starts at exactly 1. N must be a
    multiple of micro_batch_size there; here the last batch may be short. `finished` is called with each micro-batch.
    """
    table, timesteps = table.to(device), timesteps.to(device)
    unconditional = encode([""], device) if guided else None
    parts = []
    for start in range(0, len(prompts), micro_batch_size):
        batch = slice(start, start + micro_batch_size)
        chosen, indices = list(prompts[batch]), sample_indices[batch]
        conditioning = encode([prompt.text for prompt in chosen], device)
        z = keyed_noise(seed, indices, 0, latent_shape).to(device)
        latents, log_probs, values = [z], [], []
        for k in range(len(timesteps)):
            v, value = model(z, timesteps[k].expand(len(z)), conditioning, unconditional)
            noise = keyed_noise(seed, indices, k + 1, latent_shape).to(device)
            z, log_prob = transition_step(v, z, noise, table, k)
            latents.append(z)
            log_probs.append(log_prob)
            values.append(value)
        parts.append(
            Trajectory(
                latents=torch.stack(latents, 1),
                log_probs=torch.stack(log_probs, 1),
                values=torch.stack(values, 1),
                timesteps=timesteps,
                table=table,
                conditioning=conditioning,
                prompts=chosen,
                sample_indices=indices,
            )
        )
        finished(parts[-1])
    return concatenate(parts)


def rows(conditioning: Conditioning, batch: slice) -> Conditioning:
    """A micro-batch of a conditioning."""
    return {name: tensor[batch] for name, tensor in conditioning.items()}
