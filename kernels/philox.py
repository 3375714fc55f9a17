"""Standard normal noise keyed by (seed, sample, step, element), the same whatever the batch or the launch.

Philox 4x32-10 (Salmon et al. 2011), key: the seed; counter: (element // 4, step, low and high half of the sample). The
four words of a block are the elements' uniforms, and two Box-Muller pairs make them normal, as triton.language does.

    seed       [] int64, on the device
    samples    [B] int64, the samples' numbers in the whole run
    noise      [B, n] float32

The float32 logarithm and cosine of two devices may differ in their last bits; the words never do.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_UNIT = 4.6566127342e-10  # 1 / (2^31 + a little): triton's, so that a uniform stays below 1


class NoiseKey(NamedTuple):
    """Names the noise of B samples; `transition_step` takes it in place of the noise and draws inside the kernel."""

    seed: Tensor
    samples: Tensor


def philox_reference(seed: Tensor, *counter: Tensor) -> list[Tensor]:
    """The four 32-bit words of each counter block, as int64. counter: four int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps, and so holds all 64 bits of the product of two words.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (b >> 32) & _LOW ^ c1 ^ k0, b & _LOW, (a >> 32) & _LOW ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return [c0, c1, c2, c3]


def _uniform(word: Tensor) -> Tensor:
    signed = torch.where(word > _LOW // 2, word - (_LOW + 1), word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIT


def keyed_normal(key: NoiseKey, step: int | Tensor, n: int) -> Tensor:
    """The noise [B, n] that `transition_step` draws for `key` in step `step`, in PyTorch, on the key's device."""
    blocks = torch.arange(-(-n // 4), device=key.samples.device)
    samples = key.samples[:, None]
    step = torch.as_tensor(step, dtype=torch.int64, device=key.samples.device)
    words = philox_reference(key.seed, blocks, step, samples & _LOW, (samples >> 32) & _LOW)
    noise = []
    for first, second in (words[:2], words[2:]):
        radius = (-2.0 * _uniform(first).clamp_min(1e-7).log()).sqrt()
        angle = 2.0 * math.pi * _uniform(second)
        noise += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(noise, dim=-1).flatten(1)[:, :n]


@triton.jit
def normal_tile(seed, sample, step, tile, BLOCK: tl.constexpr):
    """Elements tile * BLOCK .. (tile + 1) * BLOCK of a sample's noise, float32 [BLOCK]."""
    block = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32, bitcast=True)
    zero = block * 0
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.uint32), zero + low, zero + high)
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    # [BLOCK / 4, 2, 2] with the words in order: the last dimension of a join is its second argument's.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])
