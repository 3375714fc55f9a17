"""Linear layers on a CPU through oneDNN, where MKL leaves half of the processor unused.

PyTorch gives float32 products to MKL, which has AVX-512 code for Intel's processors alone: on an AMD EPYC of Zen 5 it
reaches 115 GFLOP/s a core, oneDNN 265. PyTorch has no switch for it, but a convolution goes to oneDNN: a linear layer
is one with a filter of a single pixel. Its backward is oneDNN's as well. Zen 4 has AVX-512 in two halves, where both
reach 95 to 102 GFLOP/s on a large product, and MKL takes 7 to 11 % less time for tiny-dit's passes.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# PyTorch keeps two kinds of convolution from oneDNN: single pictures of fewer numbers, and, in one thread, filters of
# one pixel on fewer than 16 pictures, unless they are dilated (which means nothing for one pixel).
_SMALL_PICTURE = 20_480
_DILATION = (1, 2)
ZEN_5 = 0x1A  # AMD's first family of processors with whole AVX-512 units


class OneDNNLinear(nn.Linear):
    """Tokens [B, N, C] in float32 on a CPU; all else as `nn.Linear` does it. A row's result does not depend on B."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        x = x.contiguous()  # tokens in another order would take other kernels, and round otherwise
        if len(x) == 1 and x.numel() <= _SMALL_PICTURE:
            return self._convolve(torch.cat([x, x]))[:1]
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        pictures = x.unsqueeze(2).permute(0, 3, 1, 2)  # [B, C, N, 1], channels last in memory as they are
        filters = self.weight[:, :, None, None]
        return functional.conv2d(pictures, filters, self.bias, dilation=_DILATION).permute(0, 2, 3, 1).squeeze(2)


def use_onednn(trunk: nn.Module) -> None:
    """Gives linear layers `OneDNNLinear`'s forward on processors where that is faster; weights and names stay."""
    if not _mkl_is_slow():
        return
    for module in trunk.modules():
        if type(module) is nn.Linear:  # a subclass has a forward of its own
            module.__class__ = OneDNNLinear


def _mkl_is_slow() -> bool:
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    facts = _processor()
    family = re.search(r"^cpu family\s*: (\d+)$", facts, re.MULTILINE)
    is_zen_5 = "AuthenticAMD" in facts and family is not None and int(family[1]) >= ZEN_5
    return is_zen_5 and backends.cpu.get_cpu_capability().startswith("AVX512")


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    return facts.read_text() if facts.exists() else ""
