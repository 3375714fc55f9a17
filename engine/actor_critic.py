"""The one module that DeepSpeed wraps: prediction and values from a single pass through the trunk."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.common import widened
from .backbones.base import Backbone, Conditioning
from .config import CriticConfig
from .critic import Critic
from .errors import UserError
from .pixels import PixelTrunk, as_input


class ActorCritic(nn.Module):
    """Policy trunk and critic heads over one diffusion model.

    With `critic.trunk` = "shared-detached" the heads read the policy's features without a gradient into the trunk, with
    "shared" the value loss trains the trunk too. With "separate" they read those of `critic_trunk`, a copy that starts
    as the policy's and has its frozen weights in common with it; with "pixels" those of a transformer over the picture
    that the policy predicts.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: CriticConfig,
        reward_names: list[str],
        guidance_scale: float = 1.0,
        with_reference: bool = False,
    ):
        """reward_names: what the critic has a value of each of; without any there is no critic, and values are [B, 0].
        with_reference: keep the policy as it is now, for `reference_prediction`."""
        super().__init__()
        self.backbone = backbone
        self.reward_names = reward_names
        self.guidance_scale = guidance_scale
        self.detach = config.trunk == "shared-detached"
        self.trunk = backbone.trunk
        self.reference = _twin(backbone.trunk).requires_grad_(False) if with_reference else None
        self.critic = self.critic_trunk = self.pixels = None
        self.tap_indices, self._tapped, self._hooks = [], [], []
        if not reward_names:
            return
        if config.trunk == "pixels":
            self.pixels = PixelTrunk(backbone.resolution)
            taps, width = 1, self.pixels.width
        else:
            self.critic_trunk = _twin(backbone.trunk) if config.trunk == "separate" else None
            self.tap_indices, width = _choose_taps(backbone, config)
            self._tapped = [self._tap(index) for index in self.tap_indices]
            taps = len(self.tap_indices)
        self.critic = Critic(
            width, backbone.text_width, taps, len(reward_names), config.dim, config.num_heads, config.timestep_adaln
        )

    def _tap(self, index: int) -> nn.Module:
        block, position = self.backbone.tap(self.critic_trunk or self.trunk, index)

        def keep(block, _inputs, output):
            block.tapped = output if position is None else output[position]

        self._hooks.append(block.register_forward_hook(keep))
        return block

    def untap(self) -> None:
        """Leaves the trunk as it was; there are no values from then on."""
        for hook in self._hooks:
            hook.remove()

    @property
    def trunks(self) -> list[nn.Module]:
        """The policy's, and those beside it."""
        return [trunk for trunk in (self.trunk, self.critic_trunk, self.reference) if trunk is not None]

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """What is trained of the policy."""
        return [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """What is trained of the critic."""
        parts = [part for part in (self.critic_trunk, self.pixels, self.critic) if part is not None]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    @property
    def units(self) -> list[nn.Module]:
        """What ZeRO-3 gathers and reduces as a whole: blocks, and the critic's head and its transformer over pictures.

        Not the last block that a critic's own trunk is read at: a gradient enters it from inside of its call, and the
        unit would wait for one from outside.
        """
        blocks = [block for trunk in self.trunks for block in self.backbone.blocks(trunk)]
        if self.critic_trunk is not None:
            last, _ = self.backbone.tap(self.critic_trunk, max(self.tap_indices))
            blocks = [block for block in blocks if block is not last]
        return [*blocks, *(part for part in (self.pixels, self.critic) if part is not None)]

    def __deepcopy__(self, memo: dict) -> "ActorCritic":
        """Weights of its own, the same frozen parts around them."""
        twin = ActorCritic.__new__(ActorCritic)
        memo |= {id(self): twin, id(self.backbone): self.backbone}
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None = None,
        guidance_scale: float | None = None,
        values_only: bool = False,
        with_features: bool = False,
        features: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, ...]:
        """Prediction [B, C, H, W] and values [B, M], both float32; then, with_features, what the critic read: of each
        tap [B, N, D] of the model's type, or the pictures [B, 3, side, side].

        latents: float32 [B, C, H, W]; timesteps: float32 [B], 0..1000; guidance_scale: None is the trained one. With
        guidance above 1 the unconditional branch runs in the same batch, in front, and the critic reads the
        conditional half (a guidance-distilled model has no such branch).
        values_only: no prediction (None) where the values can be had without one.
        features: as an earlier call gave them. Only the critic runs, and there is no prediction.
        """
        guidance = self.guidance_scale if guidance_scale is None else guidance_scale
        dtype = next(self.trunk.parameters()).dtype
        conditioning = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
        pooled_text = self.backbone.pooled_text(conditioning)
        if features:
            return None, self._critic(features, timesteps, pooled_text)
        if self.critic_trunk is not None:
            # At guidance 1, but for a distilled model: the critic reads the conditional branch alone.
            self.backbone.predict(self.critic_trunk, latents.to(dtype), timesteps, conditioning, guidance)
            values, features = self._values(timesteps, pooled_text)
            if values_only:
                return None, values
        prediction = self._predict(self.trunk, latents, timesteps, conditioning, unconditional, guidance)
        if self.pixels is not None:
            clean = self.backbone.clean(latents, prediction.detach(), timesteps)
            features = [as_input(self.backbone.decode(clean), self.pixels.side, dtype)]
            values = self._critic(features, timesteps, pooled_text)
        elif self.critic is None:
            values = prediction.new_zeros(len(latents), 0)
        elif self.critic_trunk is None:
            values, features = self._values(timesteps, pooled_text)
        return (prediction, values, *features) if with_features else (prediction, values)

    @torch.no_grad()
    def reference_prediction(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, unconditional: Conditioning | None = None
    ) -> Tensor:
        """What the policy predicted when this was made: float32 [B, C, H, W], at the trained guidance."""
        dtype = next(self.trunk.parameters()).dtype
        conditioning = {name: tensor.to(dtype) for name, tensor in conditioning.items()}
        return self._predict(self.reference, latents, timesteps, conditioning, unconditional, self.guidance_scale)

    def _predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance: float,
    ) -> Tensor:
        """float32, or float64 of float64 weights; the conditioning is of the trunk's type."""
        dtype = next(self.trunk.parameters()).dtype
        inputs, steps = latents.to(dtype), timesteps
        with_unconditional = self.backbone.needs_unconditional(guidance)
        if with_unconditional:
            conditioning = {
                name: torch.cat([unconditional[name].to(dtype).expand_as(tensor), tensor])
                for name, tensor in conditioning.items()
            }
            inputs, steps = torch.cat([inputs, inputs]), torch.cat([steps, steps])
        prediction = widened(self.backbone.predict(trunk, inputs, steps, conditioning, guidance))
        if with_unconditional:
            without, with_prompt = prediction.chunk(2)
            prediction = without + guidance * (with_prompt - without)
        return prediction

    def _values(self, timesteps: Tensor, pooled_text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the critic makes of the features that the last forward of its trunk left behind, and these."""
        features = [vars(block).pop("tapped")[-len(timesteps) :] for block in self._tapped]  # with the prompt
        if self.detach:
            features = [tapped.detach() for tapped in features]
        tokens = [self.backbone.tokens(tapped) for tapped in features]
        return self._critic(tokens, timesteps, pooled_text), tokens

    def _critic(self, features: Sequence[Tensor], timesteps: Tensor, pooled_text: Tensor) -> Tensor:
        if self.pixels is not None:
            features = [self.pixels(*features)]
        return self.critic(*features, timesteps=timesteps, pooled_text=pooled_text)


def _choose_taps(backbone: Backbone, config: CriticConfig) -> tuple[list[int], int]:
    """Blocks to read, and their width. UserError unless the model has them and they are of one width."""
    taps = backbone.default_taps() if config.taps == "auto" else list(config.taps)
    if not taps or not all(0 <= i < backbone.depth for i in taps):
        raise UserError(
            f"critic.taps: {taps} - this model has blocks 0 to {backbone.depth - 1}; "
            f'use "auto" ({backbone.default_taps()}) or list some of them'
        )
    widths = [backbone.tap_width(i) for i in taps]
    if len(set(widths)) > 1:
        given = ", ".join(f"block {i} is {d} wide" for i, d in zip(taps, widths, strict=True))
        every = ", ".join(str(backbone.tap_width(i)) for i in range(backbone.depth))
        raise UserError(
            f"critic.taps: {taps} - the critic reads one width, but {given}; "
            f'use "auto" ({backbone.default_taps()}) or list blocks of one width (from block 0: {every})'
        )
    return taps, widths[0]


def _twin(trunk: nn.Module) -> nn.Module:
    """A copy; what is frozen is not copied but shared."""
    frozen = [parameter for parameter in trunk.parameters() if not parameter.requires_grad]
    return copy.deepcopy(trunk, {id(parameter): parameter for parameter in frozen})
