"""Mean and spread of gradients that come one chunk of samples at a time, too large to be kept."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Of a chunk's gradient g with mean m: variance is E |g - m|^2, the trace of its covariance; mean_squared |m|^2,
    less what noise adds to the square of a mean, and so below 0 now and then."""

    variance: float
    mean_squared: float


class GradientMoments:
    """Sums over chunks in blocks of them, so that the jackknife tells how sure the moments are."""

    def __init__(self, blocks: int):
        self._counts = [0] * blocks
        self._sums: list[Tensor | None] = [None] * blocks
        self._squares = [0.0] * blocks

    def add(self, block: int, gradient: Tensor) -> None:
        """gradient: a vector; its numbers may be changed."""
        self._counts[block] += 1
        self._squares[block] += gradient.double().square().sum().item()
        sums = self._sums[block]
        self._sums[block] = gradient.clone() if sums is None else sums.add_(gradient)

    def spread(self, without: int | None = None) -> Spread:
        """Of all blocks, or of all but one. Needs two chunks or more."""
        used = [block for block in range(len(self._counts)) if block != without and self._counts[block]]
        count = sum(self._counts[block] for block in used)
        if count < 2:
            raise ValueError(f"{count} chunks tell no variance")
        mean_square = sum(self._squares[block] for block in used) / count
        total = torch.stack([self._sums[block] for block in used]).sum(0, dtype=torch.float64)
        square_of_mean = (total / count).square().sum().item()
        variance = (mean_square - square_of_mean) * count / (count - 1)
        return Spread(variance, square_of_mean - variance / count)


def jackknife(values: Sequence[float]) -> float:
    """Standard error of a number of all blocks, from the numbers of all blocks but one each."""
    found = torch.tensor(values, dtype=torch.float64)
    return ((len(found) - 1) * found.var(correction=0)).sqrt().item()
