"""Noise keyed by (seed, sample, draw): the same whatever the batch size, the number of ranks or the order of work."""

import numpy as np
import torch
from torch import Tensor


def keyed_noise(seed: int, sample_indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], on the CPU.

    A counter-based generator (Philox, Salmon et al. 2011) per sample: key (seed, sample), the draw in the counter's
    highest word, so that no two draws overlap. Draw 0 is the initial latent, draw k + 1 the noise of step k.
    """
    rows = []
    for index in sample_indices.tolist():
        bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, draw], np.uint64))
        rows.append(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))
