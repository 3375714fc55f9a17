"""SD3's blocks with LayerNorm + modulation and gate + residual as one kernel each.

`fuse` gives modules of a trunk a subclass of their diffusers class with another `forward`: weights, names and hooks
stay, a deep copy is fused with weights of its own, and giving the class back undoes it. All modules that hold weights
are still called as modules, which ZeRO-3 and LoRA rely on. On a CPU outputs and gradients are diffusers' to the bit;
on a GPU the kernels round once where diffusers rounds after each operation.
"""

from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock, _chunked_feed_forward
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from ...kernels.adaln import adaln_modulate, gate_residual
from ...kernels.common import runs_kernels


class FusedAdaLayerNormZero(AdaLayerNormZero):
    def forward(self, x: Tensor, *, emb: Tensor) -> tuple[Tensor, ...]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
        return adaln_modulate(x, scale_msa, shift_msa), gate_msa, shift_mlp, scale_mlp, gate_mlp


class FusedSD35AdaLayerNormZeroX(SD35AdaLayerNormZeroX):
    def forward(self, hidden_states: Tensor, *, emb: Tensor) -> tuple[Tensor, ...]:
        if not runs_kernels(hidden_states):
            # One norm for both modulations: less time without the kernels, and the gradient's last bits.
            return super().forward(hidden_states, emb=emb)
        shift, scale, gate, *mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first, second = adaln_modulate(hidden_states, scale, shift), adaln_modulate(hidden_states, scale2, shift2)
        return first, gate, *mlp, second, gate2


class FusedAdaLayerNormContinuous(AdaLayerNormContinuous):
    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return adaln_modulate(x, scale, shift)


class FusedJointTransformerBlock(JointTransformerBlock):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        attention = joint_attention_kwargs or {}
        # Older releases of diffusers hand the first block a transposed view.
        image, text = hidden_states.contiguous(), encoder_hidden_states
        image_normed, image_gate, *image_mlp = self.norm1(image, emb=temb)
        if self.context_pre_only:
            text_normed = self.norm1_context(text, temb)
        else:
            text_normed, text_gate, *text_mlp = self.norm1_context(text, emb=temb)

        image_attended, text_attended = self.attn(
            hidden_states=image_normed, encoder_hidden_states=text_normed, **attention
        )
        image = gate_residual(image, image_gate, image_attended)
        if self.use_dual_attention:
            *image_mlp, normed2, gate2 = image_mlp
            image = gate_residual(image, gate2, self.attn2(hidden_states=normed2, **attention))
        image = self._add_mlp(self.ff, image, *image_mlp)
        if self.context_pre_only:
            return None, image
        text = gate_residual(text, text_gate, text_attended)
        return self._add_mlp(self.ff_context, text, *text_mlp), image

    def _add_mlp(self, ff: nn.Module, tokens: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        normed = adaln_modulate(tokens, scale, shift)
        if self._chunk_size is None:
            return gate_residual(tokens, gate, ff(normed))
        return gate_residual(tokens, gate, _chunked_feed_forward(ff, normed, self._chunk_dim, self._chunk_size))


# Exactly these classes: a subclass has a forward of its own.
_FUSED = {
    AdaLayerNormZero: FusedAdaLayerNormZero,
    SD35AdaLayerNormZeroX: FusedSD35AdaLayerNormZeroX,
    AdaLayerNormContinuous: FusedAdaLayerNormContinuous,
    JointTransformerBlock: FusedJointTransformerBlock,
}


def fuse(trunk: SD3Transformer2DModel) -> None:
    """Fuses the blocks and the last norm in place; a second time changes nothing."""
    _exchange(trunk, _FUSED)


def unfuse(trunk: SD3Transformer2DModel) -> None:
    """Undoes `fuse`."""
    _exchange(trunk, {fused: stock for stock, fused in _FUSED.items()})


def _exchange(trunk: nn.Module, classes: dict[type, type]) -> None:
    for module in trunk.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
