"""This process among its peers, and what it computes in."""

from dataclasses import dataclass

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    cores: int = 1  # of a CPU, for this process to compute on

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`model.dtype`: "auto" is bfloat16 on GPU and float32 on CPU, where half precision is slow."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]
