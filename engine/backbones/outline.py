"""A pipeline without its weights: the family's adapter around parts on the "meta" device, made from their configs.

Of such a model sizes can be had and what it costs to run it, on any machine and in no memory, but not a number.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ...kernels import adaln, pool_tokens
from ..errors import UserError
from . import ADVICE, FAMILIES, check_complete, find_folder, parts_of, read_index, sd3_fused
from .base import Backbone
from .known import KNOWN

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CONFIGS = ["model_index.json", "*/config.json", "scheduler/scheduler_config.json"]  # of a pipeline on the hub
OR_KNOWN = f"{ADVICE}, or one of the models that are known here: {', '.join(KNOWN)}"
META = torch.device("meta")


def outline(pretrained: str, max_sequence_length: int, resolution: int | None = None) -> Backbone:
    """`load_backbone`'s adapter in float32, around parts without weights; scheduler and tokenizers are real.

    A model that is `KNOWN` takes neither network nor licence; of any other hub id the configurations are downloaded.
    Raises UserError as `load_backbone` does.
    """
    if pretrained in KNOWN and not Path(pretrained).is_dir():
        index = KNOWN[pretrained]["model_index"]
        family = FAMILIES[index["_class_name"]]
        parts = {name: _of_config(*kind, KNOWN[pretrained].get(name)) for name, kind in parts_of(index).items()}
    else:
        folder = find_folder(pretrained, _download_configs, OR_KNOWN)
        family, index = read_index(pretrained, folder)
        kinds = parts_of(index)
        check_complete(pretrained, folder, (name for name in kinds if not name.startswith("tokenizer")))
        try:
            parts = {name: _of_folder(*kind, folder / name) for name, kind in kinds.items()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise UserError(
                f"model.pretrained: {pretrained} is incomplete or damaged: {type(error).__name__}: {error}"
            ) from error
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    given = {**options, **parts, **family.load_options}
    arguments = inspect.signature(family.pipeline).parameters
    # What a pipeline must be given and does not have is None, as in diffusers.
    pipe = family.pipeline(
        **{name: given.get(name) for name, known in arguments.items() if name in given or known.default is known.empty}
    )
    backbone = family(pipe, max_sequence_length, resolution)
    backbone.to(META)
    return backbone


def _of_folder(library: str, name: str, folder: Path) -> Any:
    kind = getattr(LIBRARIES[library], name)
    if issubclass(kind, nn.Module):
        return _of_config(library, name, json.loads((folder / "config.json").read_text()))
    return kind.from_pretrained(folder) if folder.is_dir() else None  # tokenizers are not downloaded


def _of_config(library: str, name: str, config: dict[str, Any] | None) -> Any:
    """A part without weights, or a scheduler; None without a config."""
    if config is None:
        return None
    kind = getattr(LIBRARIES[library], name)
    with META if issubclass(kind, nn.Module) else nullcontext():
        if library == "diffusers":
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


def _download_configs(pretrained: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(pretrained, allow_patterns=CONFIGS)


# ------------------------------------------------------------------------------------------------ what running it costs


class Cost(NamedTuple):
    flops: int  # floating-point operations of products and convolutions, two a multiply-add
    bytes: int  # of tensors, alive at a time


def cost_of(forward: Callable[[], Iterable[Tensor | None]], present: Iterable[Tensor]) -> Cost:
    """Of a forward on "meta", and of a backward from those of its results that have one, as on a GPU.

    present: all tensors that are there before; they do not count as memory, and weights' gradients do not either.
    """
    present = list(present)
    learning = [tensor for tensor in present if tensor.requires_grad and torch.is_grad_enabled()]
    hooks = [tensor.register_post_accumulate_grad_hook(_drop_gradient) for tensor in learning]
    try:
        with _kernels(), _Meter(present) as meter:
            with _OnGPU():
                losses = [result.mean() for result in forward() if result is not None and result.requires_grad]
            if losses:
                sum(losses).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(meter.flops, meter.peak)


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
        self.flops = self.alive = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if formula := flop_registry.get(operation._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

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
