"""The actor-critic a second time, whole and at fixed addresses: what rollouts and evaluations run.

Under ZeRO-3 every forward gathers the weights again, through hooks in Python; sampling takes one forward a denoising
step, all with the same weights. So sampling has modules of its own, free of hooks. Where a process holds all of a
weight, they read the storage that is trained; elsewhere a copy, gathered from the shards after each update.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.comm import all_gather_into_tensor
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

from .actor_critic import ActorCritic
from .errors import UserError
from .world import World

BUCKET_BYTES = 256 * 2**20  # gathered in one call; what is kept on the CPU takes a share of it on the GPU meanwhile


@dataclass
class _Weight:
    """A parameter of the original and its twin in the copy."""

    original: nn.Parameter
    twin: nn.Parameter
    is_trained: bool
    owned: Tensor | None = None  # all shards, one after the other; None where the twin has the original's storage

    @property
    def is_sharded(self) -> bool:
        return hasattr(self.original, "ds_id")

    @property
    def group(self) -> dist.ProcessGroup | None:
        return self.original.ds_process_group if self.is_sharded else None

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group) if self.is_sharded else 1

    @property
    def here(self) -> Tensor:
        """What this process holds: a flat shard, or all of it. DeepSpeed's steps and loads write to it in place."""
        return self.original.ds_tensor if self.is_sharded else self.original.data

    @property
    def nbytes(self) -> int:
        return self.ranks * self.here.nbytes

    def share(self) -> None:
        self.twin.data = self._whole(self.here)

    def own(self, device: torch.device) -> None:
        """Leaves the values to `_gather`."""
        if self.is_sharded:
            self.owned = self.here.new_empty(self.ranks * self.here.numel(), device=device)
        else:
            self.owned = torch.empty_like(self.here, device=device)  # memory format included
        self.twin.data = self._whole(self.owned)

    def _whole(self, tensor: Tensor) -> Tensor:
        """The last shard may be padded."""
        return tensor[: self.original.ds_numel].view(self.original.ds_shape) if self.is_sharded else tensor


class InferenceCopy:
    """Weights for sampling that follow the original's, and modules over them.

    Make it before the original is sharded, with everything frozen that is not going to be trained; `attach` it after;
    `refresh` it before the weights are used. Every rank does so at the same point.

    is_static: the weights stay where they are, and a CUDA graph can be captured over them.
    generation: counts the times they moved all the same, and a graph must be captured anew.
    description: where they live, for the printed plan.
    """

    is_static: bool
    description: str

    def __init__(self, original: ActorCritic):
        """Takes no memory: the weights are empty as yet, the buffers are the original's."""
        self._weights = [
            _Weight(parameter, nn.Parameter(parameter.new_empty(0), requires_grad=False), parameter.requires_grad)
            for parameter in original.parameters()
        ]
        twins = {id(weight.original): weight.twin for weight in self._weights}
        self._pristine = copy.deepcopy(original, twins | {id(buffer): buffer for buffer in original.buffers()})
        self._shared: list[_Weight] = []
        self._refreshed: list[list[_Weight]] = []
        self._sharded: ActorCritic | None = None
        self.generation = 0

    @torch.no_grad()
    def attach(self, engine: DeepSpeedEngine, mode: Literal["auto", "copy", "sharded"], world: World) -> None:
        """Decides where the weights live and brings them there. What is frozen is read now and never again.

        mode: `rollout.weights`. "auto" shares what a process holds all of and copies the rest if it fits, "copy" copies
        everything, "sharded" runs the engine's own module, as "auto" does where there can be no copy.
        Raises UserError where "copy" cannot be had.
        """
        owned = [weight for weight in self._weights if mode == "copy" or not _can_share(weight, world.device)]
        needed = sum(weight.nbytes for weight in owned)
        reason = _obstacle(engine, self._weights)
        if mode == "sharded":
            reason = 'rollout.weights = "sharded"'
        elif mode == "copy" and reason:
            raise UserError(f'rollout.weights = "copy": {reason}; use "sharded"')
        elif mode == "auto" and not reason and needed:
            reason = _lack_of_memory(needed, world)
        self.is_static = reason is None
        if reason:
            self._sharded = engine.module
            self.description = f"sharded forward: {reason}"
            return

        for name, module in engine.module.named_modules():  # DeepSpeed may have cast them
            self._pristine.get_submodule(name)._buffers.update(module._buffers)
        for weight in owned:
            weight.own(world.device)
        self._shared = [weight for weight in self._weights if weight.owned is None]
        for weight in self._shared:
            weight.share()
        for bucket in _buckets(owned):
            _gather(bucket)
        self._refreshed = _buckets(weight for weight in owned if weight.is_trained)
        if owned:
            size = sum(weight.nbytes for bucket in self._refreshed for weight in bucket)
            self.description = f"copy of {_mib(needed)}, of which {_mib(size)} refreshed after each update"
        else:
            self.description = f"shares the {'shards (1 process)' if world.size == 1 else 'weights'}, 0 MiB more"

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the weights up to the original's. Every rank calls it at the same point."""
        for bucket in self._refreshed:
            _gather(bucket)
        moved = [weight for weight in self._shared if weight.twin.data_ptr() != weight.here.data_ptr()]
        for weight in moved:
            weight.share()
        self.generation += bool(moved)

    @property
    def trained(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter of the original that is trained, and the one that all modules here have in its place."""
        return [(weight.original, weight.twin) for weight in self._weights if weight.is_trained]

    def module(self) -> ActorCritic:
        """A module over these weights, without gradients: another one at each call, for a thread to call its own.

        Where the forward is sharded it is the engine's own module, whose hooks gather, and there is no second.
        """
        if self.is_static:
            tensors = (*self._pristine.parameters(), *self._pristine.buffers())
            return copy.deepcopy(self._pristine, {id(tensor): tensor for tensor in tensors})
        if self._sharded is None:
            raise RuntimeError("the sharded forward is for one caller")
        module, self._sharded = self._sharded, None
        return module


def _can_share(weight: _Weight, device: torch.device) -> bool:
    return weight.ranks == 1 and weight.here.device == device


def _obstacle(engine: DeepSpeedEngine, weights: Sequence[_Weight]) -> str | None:
    """The setting of DeepSpeed under which the shards at hand are not what its own forward computes with."""
    sharded = [weight for weight in weights if weight.is_sharded]
    section = "deepspeed.zero_optimization"
    if any(weight.here.final_location == OffloadDeviceEnum.nvme for weight in sharded):
        return f'{section}.offload_param.device = "nvme" keeps weights on disk'
    for setting in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if sharded and getattr(engine, setting)():
            return f"{section}.{setting} = true trains with rounded weights"
    if any(weight.here.numel() != -(-weight.original.ds_numel // weight.ranks) for weight in sharded):
        return f"{section}.mics_shard_size shards over some of the processes"
    return None


def _lack_of_memory(needed: int, world: World) -> str | None:
    """None if a copy fits, on every rank. As much again must stay free: for a training pass's activations, gathered
    weights and decoded pictures, none of which is allocated yet, and which grow with the model as its copy does."""
    free = torch.tensor(_free_bytes(world), dtype=torch.int64, device=world.device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if 2 * needed <= free.item():
        return None
    return f"a copy needs {_mib(needed)} and as much for the rest, {_mib(free.item())} are free (rollout.weights)"


def _free_bytes(world: World) -> int:
    """Memory that this process can still have."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
        return torch.cuda.mem_get_info(world.device)[0]
    return psutil.virtual_memory().available // world.size  # processes on a CPU share a machine


def _buckets(weights: Iterable[_Weight]) -> list[list[_Weight]]:
    """In the same order on each rank; a coalesced collective is of one type and one process group."""
    kinds = defaultdict(list)
    for weight in weights:
        kinds[weight.group, weight.here.dtype].append(weight)
    buckets: list[list[_Weight]] = []
    for kind in kinds.values():
        size = math.inf
        for weight in kind:
            if size + weight.nbytes > BUCKET_BYTES:
                buckets.append([])
                size = 0
            buckets[-1].append(weight)
            size += weight.nbytes
    return buckets


def _gather(bucket: Sequence[_Weight]) -> None:
    """Straight from the shards to where the copy keeps them."""
    group = bucket[0].group
    if bucket[0].ranks == 1:
        torch._foreach_copy_([weight.owned for weight in bucket], [weight.here for weight in bucket])
        return
    shards = [weight.here.to(weight.owned.device, non_blocking=True) for weight in bucket]
    # DeepSpeed's own all_gather_coalesced asks gloo for what it does not have.
    with _coalescing_manager(group):
        for weight, shard in zip(bucket, shards, strict=True):
            all_gather_into_tensor(weight.owned, shard, group=group)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
