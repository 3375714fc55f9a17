"""GRPO (arXiv 2402.03300), as Flow-GRPO (arXiv 2505.05470) has it for flow models: a sample is compared with the others
of its prompt, A = (R - mean of the group) / std of the group, and all steps of a sample have the same advantage.

Dividing by a group's own std weights prompts: those whose samples differ little count as much as the others. With
`global_std` the std is that of all samples, and every prompt counts by what there is to gain."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..advantages import mean_and_variance
from ..prompts import Prompt
from .base import Algorithm

EPSILON = 1e-4  # beside a std, as in Flow-GRPO


class GRPO(Algorithm):
    """Groups are `group_size` neighbours. With several rewards each is normalised by itself before they are weighted,
    as PPO does here: otherwise the one with the largest numbers would decide."""

    def advantages(self, raw: Tensor, values: Tensor, trained: slice, prompts: Sequence[Prompt]) -> Tensor:
        size, clip = self.config.group_size, self.config.advantage_clip
        groups = raw.to(torch.float64).unflatten(0, (-1, size))
        deviation = groups - groups.mean(1, keepdim=True)
        if self.config.global_std:
            variance = mean_and_variance(raw, (0,))[1]
        else:
            variance = deviation.square().mean(1, keepdim=True)
        standardized = deviation / (variance.sqrt() + EPSILON)
        weighted = standardized.clamp(-clip, clip).flatten(0, 1) @ self.weights.to(standardized)
        return weighted.to(values.dtype)[:, None].repeat(1, trained.stop - trained.start)
