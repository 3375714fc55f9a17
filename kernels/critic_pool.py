"""Attention pooling of the trunk's tokens by one learned query per head: what the critic reads of a block.

    x      = LayerNorm(h) (1 + scale) + shift                            no affine weights, eps 1e-6
    k, v   = x key_weight^T, x value_weight^T                            split into heads of size d
    output = concat over heads of softmax(query k^T / sqrt(d)) v

    argument                   shape              dtype
    h                          [B, N, D]          any floating type
    query                      [heads, d]         any floating type
    key_weight, value_weight   [heads * d, D]     any floating type
    scale, shift               [B, D]             any floating type
    output                     [B, heads * d]     float32 (float64 when h is)

The tokens stay as they are in memory; statistics, softmax and products are computed in float32. AdaLN modulation: DiT
(arXiv 2212.09748); pooling by learned queries: the PMA of Set Transformer (arXiv 1810.00825).

`critic_pool` computes the same without a matrix product over N tokens: with one query per head, query k^T is x times
key_weight^T query, where the shift cancels in the softmax and the scale folds into that vector; and value_weight is
applied to the pooled token, and to the shift. What is left of N is `pool_tokens`: one read of the tokens.
"""

import torch
from torch import Tensor

from .common import check_device, check_floating, check_rows, check_shape
from .pool_tokens import LAYER_NORM_EPS, pool_tokens


def critic_pool_reference(
    h: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    dtype = torch.promote_types(h.dtype, torch.float32)
    h, query, key_weight, value_weight, scale, shift = (
        t.to(dtype) for t in (h, query, key_weight, value_weight, scale, shift)
    )
    heads, head_dim = query.shape
    x = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
    x = x * (1.0 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    keys = (x @ key_weight.T).unflatten(-1, (heads, head_dim))
    values = (x @ value_weight.T).unflatten(-1, (heads, head_dim))
    attention = (torch.einsum("hd,bnhd->bhn", query, keys) * head_dim**-0.5).softmax(dim=-1)
    return torch.einsum("bhn,bnhd->bhd", attention, values).flatten(1)


def critic_pool_folded(
    h: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    dtype = torch.promote_types(h.dtype, torch.float32)
    query, key_weight, value_weight, scale, shift = (
        t.to(dtype) for t in (query, key_weight, value_weight, scale, shift)
    )
    heads, head_dim = query.shape
    key_weight, by_head = key_weight.unflatten(0, (heads, head_dim)), value_weight.unflatten(0, (heads, head_dim))
    folded = (query.unsqueeze(1) @ key_weight).squeeze(1) * head_dim**-0.5  # [heads, D]
    scale = 1.0 + scale.unsqueeze(1)  # [B, 1, D]
    pooled = pool_tokens(h, scale * folded) * scale  # [B, heads, D]
    values = pooled.transpose(0, 1) @ by_head.transpose(1, 2)  # [heads, B, d]
    return torch.addmm(values.transpose(0, 1).flatten(1), shift, value_weight.T)  # the weights sum to 1


def critic_pool(
    h: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Pools tokens `h` [B, N, D] into [B, heads * d], as described at the top of this file; differentiable in all.

    Channels of h, scale and shift must be neighbours in memory; their rows may lie anywhere. The gradient of h is
    computed only if h requires it. ValueError names the argument that does not fit.
    """
    check_floating("h", h, "[B, N, D]", 3)
    check_floating("query", query, "[heads, d]", 2)
    batch, _, dim = h.shape
    weights, modulation = {"key_weight": key_weight, "value_weight": value_weight}, {"scale": scale, "shift": shift}
    for given, dims, shape in (
        (weights, "[heads * d, D]", (query.numel(), dim)),
        (modulation, "[B, D]", (batch, dim)),
    ):
        for name, x in given.items():
            check_floating(name, x, dims, 2)
            check_shape(name, x, shape)
    check_device("h", h, query=query, **weights, **modulation)
    check_rows(h=h, scale=scale, shift=shift)
    return critic_pool_folded(h, query, key_weight, value_weight, scale, shift)
