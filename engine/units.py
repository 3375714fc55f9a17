"""Larger units for ZeRO-3: a block of the trunk, or the critic, is gathered, released and reduced as a whole.

By itself DeepSpeed hooks every submodule in Python: on two CPU cores that makes a training pass of tiny-dit 2.5 times
as long. Its leaf modules have hooks of their own alone, but they ask two things of a call, or they reduce a module's
gradients before these are computed: tensors among the positional arguments, and one of them in need of a gradient.
"""

import inspect
from collections.abc import Iterable

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn


def make_units(modules: Iterable[nn.Module]) -> None:
    """Call it before `deepspeed.initialize`; other ZeRO stages are not touched by it."""
    for module in modules:
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(_arguments(inspect.signature(module.forward)), prepend=True, with_kwargs=True)


def _arguments(signature: inspect.Signature):
    """A hook that makes a call such as leaf modules need it."""

    def arguments(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bound = signature.bind(*args, **kwargs)
        args = bound.args
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
            if not any(args[i].requires_grad for i in tensors):
                first = tensors[0]
                args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
        return args, bound.kwargs

    return arguments
