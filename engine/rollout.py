"""Sampling with the actor-critic, one denoising step at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.transition import transition_step
from .backbones.base import Conditioning
from .noise import keyed_noise
from .prompt_cache import PromptCache
from .prompts import Prompt
from .trajectory import Trajectory, concatenate

Model = Callable[..., tuple[Tensor, Tensor]]  # as ActorCritic
T = TypeVar("T")


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
    batches = [slice(start, start + micro_batch_size) for start in range(0, len(prompts), micro_batch_size)]
    draws = range(len(timesteps) + 1)
    noise_of = ([keyed_noise(seed, sample_indices[batch], k, latent_shape) for k in draws] for batch in batches)
    for batch, (initial, *noises) in zip(batches, one_ahead(noise_of), strict=True):
        chosen = list(prompts[batch])
        conditioning = encode([prompt.text for prompt in chosen], device)
        z = initial.to(device)
        latents, log_probs, values = [z], [], []
        for k in range(len(timesteps)):
            v, value = model(z, timesteps[k].expand(len(z)), conditioning, unconditional)
            z, log_prob = transition_step(v, z, noises[k].to(device), table, k)
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
                sample_indices=sample_indices[batch],
            )
        )
        finished(parts[-1])
    return concatenate(parts)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread of its own while the one before it is used."""
    with ThreadPoolExecutor(1, "one-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def rows(conditioning: Conditioning, batch: slice) -> Conditioning:
    """A micro-batch of a conditioning."""
    return {name: tensor[batch] for name, tensor in conditioning.items()}
