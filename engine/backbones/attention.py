"""Which implementation of attention a trunk runs, chosen by diffusers' dispatcher.

diffusers' own `set_attention_backend` has no effect on Stable Diffusion, whose processors call torch's attention
directly. They are replaced here by processors that compute the same and ask the dispatcher: with the backend "native"
outputs and gradients are diffusers' to the bit. A deep copy of the trunk keeps the choice. Projections are still called
as modules, which ZeRO-3 and LoRA rely on.
"""

import difflib

import torch
from diffusers import AttentionBackendName, attention_backend
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError

AUTO = "native"  # runs everywhere, and nothing was measured to be faster
TOKENS = 141, 1101, 4173  # of pictures of 128, 512 and 1024 pixels beside a prompt of 77


class DispatchedJointAttnProcessor(JointAttnProcessor2_0):
    """SD3's: image and text tokens attend to each other, or (`attn2`) the image tokens among themselves."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # ignored, as by diffusers
    ) -> Tensor | tuple[Tensor, Tensor]:
        image_weights = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        query, key, value = _project(attn, hidden_states, hidden_states, *image_weights)
        if encoder_hidden_states is None:
            return _leave(attn, _attend(self._attention_backend, query, key, value))
        text, text_norms = encoder_hidden_states, (attn.norm_added_q, attn.norm_added_k)
        added = _project(attn, text, text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, *text_norms)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), added, strict=True))
        attended = _attend(self._attention_backend, query, key, value)
        image, text = attended[:, : hidden_states.shape[1]], attended[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return _leave(attn, image), text


class DispatchedAttnProcessor(AttnProcessor2_0):
    """The UNet's: tokens, or a feature map, attend to themselves or to the prompt."""

    _attention_backend: AttentionBackendName | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, context = hidden_states, encoder_hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attention_mask is not None:
            batch, length, _ = (hidden_states if context is None else context).shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if context is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        weights = attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k
        projected = _project(attn, hidden_states, context, *weights)
        attended = _leave(attn, _attend(self._attention_backend, *projected, attention_mask))
        if residual.ndim == 4:
            attended = attended.transpose(-1, -2).reshape(residual.shape)
        if attn.residual_connection:
            attended = attended + residual
        return attended / attn.rescale_output_factor


# Exactly these classes: a subclass has a call of its own.
_DISPATCHED = {
    JointAttnProcessor2_0: DispatchedJointAttnProcessor,
    AttnProcessor2_0: DispatchedAttnProcessor,
}


def set_attention_backend(trunk: nn.Module, name: str) -> str:
    """Lets every attention of the trunk run the backend `name` of diffusers, or "auto"; says in words what that is.

    Call it when the trunk, whole, has its device and dtype: the backend is tried there, forward and backward. Raises
    UserError where there is no such backend, or it does not run.
    """
    names = [backend.value for backend in AttentionBackendName]
    if name not in ("auto", *names):
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(
            f'model.attention_backend = "{name}": unknown to the installed diffusers'
            + (f'; did you mean "{near[0]}"?' if near else "")
            + f' Allowed are "auto" and {", ".join(names)}'
        )
    attentions = [module for module in trunk.modules() if getattr(module, "processor", None) is not None]
    processors = [attention.processor for attention in attentions]
    fixed = {type(p) for p in processors if type(p) not in _DISPATCHED and not hasattr(p, "_attention_backend")}
    own = ", ".join(sorted(kind.__name__ for kind in fixed))
    if own and name != "auto":
        raise UserError(f'model.attention_backend = "{name}": this model\'s {own} takes no backend; use "auto"')
    chosen = AUTO if name == "auto" else name
    parameter = next(trunk.parameters())
    heads = sorted({(attention.heads, attention.inner_dim // attention.heads) for attention in attentions})
    if reason := _why_not(chosen, heads, parameter.device, parameter.dtype):
        others = [n for n in names if not n.endswith("_hub")]  # those would be downloaded
        running = [n for n in others if not _why_not(n, heads, parameter.device, parameter.dtype)]
        raise UserError(
            f'model.attention_backend = "{name}": cannot train this model on {parameter.device} in {parameter.dtype}: '
            f'{reason}. These can: "auto", {", ".join(running)}'
        )
    for attention in attentions:
        if type(attention.processor) in _DISPATCHED:
            attention.set_processor(_DISPATCHED[type(attention.processor)]())
        if hasattr(attention.processor, "_attention_backend"):
            # The trunk's own method would also make it the default of every model in the process.
            attention.processor._attention_backend = AttentionBackendName(chosen)
    if own:
        return f"the model's own ({own})"
    said = f"{name}, as asked"
    if name == "auto":
        said = f"{AUTO} (auto): torch chooses among its flash, memory-efficient, cuDNN and math kernels"
    if chosen == AUTO and parameter.is_cuda and not _rounds_alike(heads, parameter.device, parameter.dtype):
        torch.backends.cuda.enable_cudnn_sdp(False)
        said += "; not cuDNN's, which round otherwise where a gradient is to follow, and then the ratio is not 1"
    return said


def _project(attn, queries: Tensor, context: Tensor, to_q, to_k, to_v, norm_q, norm_k) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, heads, N, width of a head], normalised where the model does that.

    In diffusers' order: a gradient is a sum, and its last bit depends on which term comes first.
    """
    projected = to_q(queries), to_k(context), to_v(context)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
    query = query if norm_q is None else norm_q(query)
    return query, key if norm_k is None else norm_k(key), value


def _attend(
    backend: AttentionBackendName | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """[B, N, D] of [B, heads, N, width of a head]. The dispatcher takes and gives [B, N, heads, width of a head]."""
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    attended = dispatch_attention_fn(*tokens, attn_mask=mask, backend=backend)
    return attended.flatten(2).to(query.dtype)


def _leave(attn: Attention, attended: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(attended))


def _rounds_alike(heads: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's attention gives the same bits to a rollout, without gradients, and to an update.

    cuDNN is asked for the softmax's statistics only where a gradient is to follow, and may choose another kernel then.
    """
    generator = torch.Generator(device).manual_seed(0)
    for count, width in heads:
        for tokens in TOKENS:
            x = torch.randn(1, count, tokens, width, device=device, dtype=dtype, generator=generator)
            updated = functional.scaled_dot_product_attention(*(x.clone().requires_grad_() for _ in range(3)))
            if not torch.equal(functional.scaled_dot_product_attention(x, x, x), updated):
                return False
    return True


def _why_not(name: str, heads: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot train a model with such heads; None if it can."""
    try:
        with attention_backend(name), torch.enable_grad():  # checks the packages it needs, downloads its kernels
            for count, width in heads:
                shape = (1, 77, count, width)  # as many tokens as a prompt: not a round number
                tokens = [torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
                attended = dispatch_attention_fn(*tokens)
                torch.autograd.grad(attended.sum(), tokens)
    except Exception as error:  # of whatever class: packages, downloads and kernels have their own
        download = "its kernels are downloaded from the Hugging Face Hub: " if name.endswith("_hub") else ""
        return f"{download}{type(error).__name__}: {error}".rstrip(".")
    return None
