"""torch.compile of a trunk's blocks, below everything that hooks into a block.

`compile_blocks` gives blocks a subclass of their class whose forward is compiled. Hooks stay outside, in Python: ZeRO-3
gathers a block's weights before, taps read its output after, checkpointing runs it again. Blocks of one structure, and
deep copies of them, share what was compiled.
"""

from collections.abc import Iterable
from functools import wraps

import torch
from torch import nn

from ..errors import UserError

_COMPILED: dict[type[nn.Module], type[nn.Module]] = {}


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles the forwards of `blocks` in place, at their first call; a second time changes nothing.

    Call it after `fuse`, on the device of the run. Raises UserError where torch.compile does not work there.
    """
    blocks = list(blocks)
    _try_compiler(next(blocks[0].parameters()).device)
    for block in blocks:
        kind = type(block)
        if kind not in _COMPILED.values():
            if kind not in _COMPILED:
                _COMPILED[kind] = _compiled(kind)
            block.__class__ = _COMPILED[kind]


def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    # What cannot be compiled as a whole, or once more, is an error: no block runs uncompiled in some passes alone.
    # The layout of convolutions stays the model's: torch would choose it with an eye on whether there is a gradient,
    # and the rollout's would round otherwise than the update's.
    options = {"layout_optimization": False}
    compiled = torch.compile(kind.forward, fullgraph=True, dynamic=False, options=options)

    @wraps(kind.forward)
    def forward(self, *args, **kwargs):
        # All blocks and passes count together: structures x (with gradient, without) x sizes of a batch. Set here
        # because newer releases keep settings for each thread.
        config = torch._dynamo.config
        if config.recompile_limit != config.accumulated_recompile_limit:
            config.recompile_limit = config.accumulated_recompile_limit
        return compiled(self, *args, **kwargs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})


def _try_compiler(device: torch.device) -> None:
    """Compiles next to nothing: finds what is missing before a run has begun."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"model.compile = true: torch.compile does not work here: {str(error).strip().splitlines()[0]}. It needs a "
            "C++ compiler (g++, or the one that the environment variable CXX names) and Python's headers (python3-dev);"
            " install them, or set model.compile to false"
        ) from error
