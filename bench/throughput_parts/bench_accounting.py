"""Counting: floating-point operations, what the device could do, launches, host syncs, memory."""

import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bench_pipelines
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 products a second, from NVIDIA's data sheets, by a part of the device's name; the first that fits.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
}
PEAK_SIDE = {"cuda": 8192, "cpu": 2048}  # of the square matrices that measure the peak of another device


def count_flops(
    trunk: nn.Module, latent_shape: Iterable[int], conditioning: dict[str, Iterable[int]]
) -> dict[str, int]:
    """Of a forward and of its backward for one image, by the products and convolutions of a trunk on "meta".

    latent_shape: C, H, W; conditioning: shapes of one prompt's tensors. Twice the multiply-adds, as the peak counts.
    """
    latents = torch.empty(1, *latent_shape, device="meta")
    tensors = {name: torch.empty(1, *shape, device="meta") for name, shape in conditioning.items()}
    # On "meta" attention is two products and their four gradients; a CPU's fused one would not be counted.
    with FlopCounterMode(display=False) as counter:
        prediction = bench_pipelines.predict(trunk, latents, torch.empty(1, device="meta"), tensors)
        forward = counter.get_total_flops()
        prediction.sum().backward()
        return {"forward": forward, "backward": counter.get_total_flops() - forward}


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point operations a second that `device` can do, and where the number is from."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return {"flops_per_s": peak, "source": f"data sheet of {part}, dense bfloat16"}
    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    ways = [lambda: a @ b]
    if device.type == "cpu":  # PyTorch gives products to MKL and convolutions to oneDNN, and either may be the faster
        pictures, filters = a.view(side // 16, 16, 1, side).permute(0, 3, 1, 2), b.t()[:, :, None, None]
        ways.append(lambda: torch.nn.functional.conv2d(pictures, filters))
    best = min(seconds_of(way, device) for way in ways for _ in range(4))
    kind = str(dtype).removeprefix("torch.")
    return {"flops_per_s": 2 * side**3 / best, "source": f"measured here: {side} x {side} product in {kind}"}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, to the end of what it started on the device."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_calls(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """What one call of `run` asks of PyTorch: launches and host syncs on a GPU, operator calls on a CPU."""
    if device.type == "cpu":
        with _OperatorCalls() as calls:
            run()
        return {"operator_calls": calls.count}
    run()
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(device)
    counts = {event.key: event.count for event in profile.key_averages()}
    return {
        "kernel_launches": sum(n for name, n in counts.items() if "LaunchKernel" in name),
        "graph_launches": sum(n for name, n in counts.items() if "GraphLaunch" in name),
        "host_syncs": _count_syncs(run, device),
    }


def _count_syncs(run: Callable[[], object], device: torch.device) -> int:
    synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class _OperatorCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU allocated at most since `reset_peak_memory`, on a CPU this process's largest size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"
