"""Noise keyed by (seed, sample, draw): the same whatever the batch size, the number of ranks or the order of work."""

import numpy as np
import torch
from torch import Tensor


def keyed_noise(seed: int, sample_indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], on the CPU.

    A counter-based generator (Philox, Salmon et al. 2011): key (seed, sample), the draw in the counter's highest word,
    so that no two draws overlap. Draw 0 is the initial latent, draw k + 1 the noise of step k.
    """
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, 0, draw])
    generator, start = np.random.Generator(bits), bits.state
    noise = np.empty((len(sample_indices), *shape), np.float32)
    for row, index in zip(noise, sample_indices.tolist(), strict=True):
        start["state"]["key"][1] = index
        bits.state = start  # a third of the time of a new generator
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)
