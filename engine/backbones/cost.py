"""What it costs to run a model: operations and memory, counted on the "meta" device, where tensors have no numbers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ...kernels import adaln, pool_tokens
from . import sd3_fused


class Cost(NamedTuple):
    flops: int  # floating-point operations of products and convolutions, two a multiply-add
    bytes: int  # of tensors, alive at a time


def cost_of(forward: Callable[[], Iterable[Tensor | None]], present: Iterable[Tensor]) -> Cost:
    """Of a forward on "meta", and of a backward from those of its results that have one, as on a GPU.

    present: all tensors that are there before; they do not count as memory, and weights' gradients do not either.
    """
    present = list(present)
    with _kernels(), no_gradients_kept(present), _Meter(present) as meter:
        with _OnGPU():
            losses = [result.mean() for result in forward() if result is not None and result.requires_grad]
        if losses:
            sum(losses).backward()
    return Cost(meter.flops, meter.peak)


@contextmanager
def no_gradients_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Backwards within drop each gradient of these as soon as it is there."""
    hooks = [x.register_post_accumulate_grad_hook(_drop_gradient) for x in tensors if x.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checkpoint_on_gpu(block: nn.Module, *args: Any) -> Any:
    """For `enable_gradient_checkpointing`: what `cost_of` needs in place of diffusers' own."""
    # The backward, which runs a block again, is outside of the mode: to autograd's own functions a mode is deaf.
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _OnGPU()))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Meter(TorchDispatchMode):
    def __init__(self, present: Iterable[Tensor]):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in present}
        self._found: dict[tuple, tuple[Any, int]] = {}
        self.flops = self.alive = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, flops = self._run(operation, args, kwargs or {})
        self.flops += flops
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _run(self, operation: OpOverload, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int]:
        """What it returns, and its floating-point operations. Those of earlier inputs of the same sizes, unless memory
        is shared with these: a model's blocks are alike, and torch takes its time over an operation on "meta"."""
        key = operation, _sizes(args), _sizes(tuple(kwargs.items()))
        if key in self._found:
            result, flops = self._found[key]
            return _another(result), flops
        result = operation(*args, **kwargs)
        formula = flop_registry.get(operation._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        if not _memory(result) & _memory((args, tuple(kwargs.values()))):
            self._found[key] = _sizes(result), flops
        return result, flops

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


class _Size(NamedTuple):
    """All that there is to a tensor on "meta"."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _sizes(value: Any) -> Any:
    """The same with sizes in place of tensors, hashable; numbers with their types, since 1 is not 1.0 to torch."""
    if isinstance(value, Tensor):
        return _Size(value.shape, value.stride(), value.dtype)
    if isinstance(value, tuple | list):
        return type(value), *map(_sizes, value)
    return type(value), value


def _another(sizes: Any) -> Any:
    """New tensors of such sizes."""
    if isinstance(sizes, _Size):
        return torch.empty_strided(*sizes[:2], dtype=sizes.dtype, device="meta")
    kind, *rest = sizes
    return kind(map(_another, rest)) if issubclass(kind, tuple | list) else rest[0]


def _memory(value: Any) -> set[int]:
    if isinstance(value, Tensor):
        return {value.untyped_storage()._cdata}
    return set().union(*map(_memory, value)) if isinstance(value, tuple | list) else set()


class _OnGPU(TorchFunctionMode):
    """What a GPU does in one kernel is one operation, where "meta" would go step by step and keep what is in between:
    of attention a matrix of N x N, of an RMSNorm float32 copies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _KERNELS.get(function, function)(*args, **(kwargs or {}))


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
    """Keeps query, key, value, output and logsumexp. 4 B H Nq Nk d operations, and 2.5 times as many in the backward,
    which computes the matrix again."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number a row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _rms_norm(x: Tensor, _shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(x, weight)


_KERNELS = {functional.scaled_dot_product_attention: _flash_attention, functional.rms_norm: _rms_norm}


@contextmanager
def _kernels() -> Iterator[None]:
    """The project's own kernels too: their fakes know what they return and keep."""
    stand_ins = {(module, "runs_kernels"): lambda x: True for module in (adaln, pool_tokens, sd3_fused)}
    stand_ins[pool_tokens, "_widest"] = lambda itemsize, device: 6144 // itemsize  # Hopper's
    before = {place: getattr(*place) for place in stand_ins}
    try:
        for place, function in stand_ins.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)
