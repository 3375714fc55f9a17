"""GPUs that a plan can be made for, and those of this machine."""

import os
import re
from dataclasses import dataclass

import torch

from .errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    name: str
    memory: float  # bytes
    flops: float | None  # dense bfloat16 operations a second, None where that is not known

    def __str__(self) -> str:
        speed = f"{self.flops / 1e12:,.0f} TFLOP/s in bfloat16" if self.flops else "of a speed that is not known"
        return f"{self.name}, {self.memory / GIB:.0f} GiB, {speed}"


# GiB as the driver counts them; dense bfloat16 of the data sheet (of a GeForce: summed in float32).
DEVICES = {
    name: Device(name, gib * GIB, flops)
    for name, gib, flops in (
        ("A100-40GB", 40, 312e12),
        ("A100-80GB", 80, 312e12),
        ("H100", 80, 989.4e12),
        ("H100-PCIe", 80, 756e12),
        ("H200", 140, 989.4e12),
        ("B200", 179, 2250e12),
        ("L40S", 45, 362e12),
        ("RTX4090", 24, 165.2e12),
        ("MI300X", 192, 1307.4e12),
    )
}


def find_devices(text: str) -> tuple[int, Device]:
    """How many of which: "8xH100". Of an empty text the GPUs of this machine, and where it has none 8 x H100."""
    if not text and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        words = here.name.lower().replace(" ", "")
        alike = [device for name, device in DEVICES.items() if all(part in words for part in name.lower().split("-"))]
        flops = max(alike, key=lambda device: len(device.name)).flops if alike else None
        return int(os.environ.get("WORLD_SIZE", torch.cuda.device_count())), Device(here.name, here.total_memory, flops)
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(.+)", text or "8xH100", re.IGNORECASE)
    names = {name.lower(): name for name in DEVICES}
    processes, name = int(found[1] or 1), names.get(found[2].lower())
    if name is None or not processes:
        raise UserError(f'--plan {text}: give a number of GPUs and one of {", ".join(DEVICES)}, as in "8xH100"')
    return processes, DEVICES[name]
