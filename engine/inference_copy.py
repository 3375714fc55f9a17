"""The actor-critic a second time, whole and at fixed addresses: what rollouts and evaluations run.

Under ZeRO-3 every forward gathers the weights again, through hooks in Python; sampling takes one forward a denoising
step, all with the same weights. So they are gathered once, into this copy, and the loop is free of hooks.
"""

import copy

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from .actor_critic import ActorCritic

BUCKET_BYTES = 256 * 2**20  # gathered at a time, beside the copy


class InferenceCopy:
    """`model` is the copy, without gradients. Make it before the original is sharded."""

    def __init__(self, original: ActorCritic):
        self.model = copy.deepcopy(original).requires_grad_(False)
        self._buckets: list[list[tuple[torch.nn.Parameter, torch.nn.Parameter]]] = [[]]
        size = 0
        for original_parameter, parameter in zip(original.parameters(), self.model.parameters(), strict=True):
            if size + parameter.nbytes > BUCKET_BYTES and size:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append((original_parameter, parameter))
            size += parameter.nbytes

    @torch.no_grad()
    def refresh(self) -> ActorCritic:
        """The copy, brought up to the original's weights. Every rank calls it at the same point."""
        for bucket in self._buckets:
            sharded = [p for p, _ in bucket if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
            with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
                torch._foreach_copy_([mine for _, mine in bucket], [original.data for original, _ in bucket])
        return self.model
