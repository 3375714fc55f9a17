"""What every kernel file shares: where the kernels run, how they are launched, how an argument is refused."""

import torch
from torch import Tensor

# Without contraction into fused multiply-adds a sum of products has one value wherever it is computed: the importance
# ratio of a fresh batch is exactly 1 because two kernels round alike. These kernels wait for memory; it costs nothing.
EXACT = {"enable_fp_fusion": False}


def runs_kernels(x: Tensor) -> bool:
    """Whether functions of `x` run the Triton kernels (on CUDA and ROCm devices) or the PyTorch references."""
    return x.device.type == "cuda"


def on_device(x: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: makes it that of `x`."""
    return torch.cuda.device_of(x)


def widened(x: Tensor) -> Tensor:
    """`x` in the type it is computed in: float32, or float64 for itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse(name: str, must: str, given: object) -> None:
    raise ValueError(f"{name} must {must}, got {given}")


def check_floating(name: str, x: Tensor, dims: str, ndim: int) -> None:
    """`x` must be floating point with `ndim` dimensions, spelt `dims` in the error."""
    if not x.is_floating_point() or x.ndim != ndim:
        refuse(name, f"be floating point {dims}", f"{x.dtype} {list(x.shape)}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != torch.Size(shape):
        refuse(name, f"be {list(shape)}", list(x.shape))


def check_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor must be on the reference's device."""
    for name, x in tensors.items():
        if x is not None and x.device != reference.device:
            refuse(name, f"be on {reference_name}'s device {reference.device}", x.device)


def check_rows(**tensors: Tensor) -> None:
    """Neighbours in the last dimension must be neighbours in memory; rows may lie anywhere.

    Copying such a tensor would cost more than the kernel, so it is left to the caller, who may know better.
    """
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            refuse(name, "have stride 1 in its last dimension", f"strides {list(x.stride())}")
