"""What runs beside the trunk on a GPU: streams of their own, and copies that nothing waits for."""

from functools import cache

import torch
from torch import Tensor


@cache
def side_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The process's one stream for this purpose.

    Not a new one each time: PyTorch hands out 32 in turn, so the 33rd is one that is in use, and cuBLAS keeps a
    workspace for each stream that it has seen.
    """
    return torch.cuda.Stream(device)


def host_buffer(like: Tensor, rows: int) -> Tensor:
    """Memory of the host for so many rows; what is copied there from a GPU, or back, holds up nobody."""
    return torch.empty(rows, *like.shape[1:], dtype=like.dtype, pin_memory=like.is_cuda)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x of the CPU on the device. To a GPU from pinned memory: from any other the host, and so whoever wants to prepare
    the next thing meanwhile, would wait for all that the stream has yet to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
