"""What the engine asks of a model family. An adapter is the only code that knows the family's diffusers classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from ..errors import UserError
from ..transitions import Schedule, build_table

MOST_PER_SCORE = 10.0  # of a flow, whose prediction would follow a score at pure noise without bound

Conditioning = dict[str, Tensor]  # per-sample tensors, first dimension = sample; float32, kept on the CPU in the cache


class Backbone(ABC):
    """A frozen pipeline around one trainable trunk.

    The trunk is what DeepSpeed shards; autoencoder and text encoders stay outside, frozen. Shapes below:
    B samples, C x H x W latents, N image tokens of width D.
    """

    pipeline: type[DiffusionPipeline]  # the family's, in diffusers
    load_options: dict[str, Any] = {}
    trunk_name = "transformer"  # of the trunk among the pipeline's components
    encoders: list[nn.Module]  # of text; on the CPU but while they encode
    latent_shape: tuple[int, int, int]  # C, H, W
    resolution: int  # pixels a side of the pictures
    width: int  # D of the default taps
    text_width: int
    depth: int  # number of blocks that can be tapped
    scheduler: type[SchedulerMixin] | None = None  # the one whose noise levels the adapter reads; None: any
    # The trunk takes the guidance scale as an input and needs no unconditional branch (FLUX.1-dev).
    is_guidance_distilled = False

    def __init__(self, pipe: DiffusionPipeline, max_sequence_length: int):
        """Freezes all but the trunk. max_sequence_length: of prompts, where the family lets one choose (T5's)."""
        self.pipe, self.max_sequence_length = pipe, max_sequence_length
        if self.scheduler is not None and not isinstance(pipe.scheduler, self.scheduler):
            raise UserError(
                f"{type(pipe).__name__} has a {type(pipe.scheduler).__name__}; give it a {self.scheduler.__name__}: "
                f"pipe.scheduler = {self.scheduler.__name__}.from_config(pipe.scheduler.config)"
            )
        self.trunk = pipe.components[self.trunk_name]
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.trunk:
                part.eval().requires_grad_(False)
        pipe.vae.to(memory_format=torch.channels_last)  # its convolutions are faster so
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls, folder: Path, max_sequence_length: int, resolution: int | None, dtype: dict[str, torch.dtype]
    ) -> "Backbone":
        """Reads a diffusers pipeline folder. resolution: pixels a side, None is its own. dtype: of its parts, by name.

        Raises UserError where the family cannot have that resolution.
        """
        pipe = cls.pipeline.from_pretrained(folder, torch_dtype=dtype, **cls.load_options)
        return cls(pipe, max_sequence_length, resolution)

    def to(self, device: torch.device) -> None:
        """Moves the autoencoder; the trunk moves with the actor-critic, the encoders when they are needed."""
        self.pipe.vae.to(device)

    def fuse(self) -> None:  # noqa: B027
        """Lets the trunk's blocks run fused kernels, if the family has any: the same weights under the same names, on
        a CPU the same bits."""

    def needs_unconditional(self, guidance_scale: float) -> bool:
        """Whether a prediction takes the empty prompt's beside it (classifier-free guidance)."""
        return guidance_scale > 1 and not self.is_guidance_distilled

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, as the family's own pipeline computes it at guidance 1."""

    @abstractmethod
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one prompt's conditioning, known without encoding one."""

    def pooled_text(self, conditioning: Conditioning) -> Tensor:
        """One vector a prompt, [B, text_width], for the critic."""
        return conditioning["pooled_prompt_embeds"]

    @abstractmethod
    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        """The sampler `transition` ("ode" is the deterministic one) over the family's own scheduler's K timesteps.

        UserError if the family has no such sampler, or not with that noise level.
        """

    @abstractmethod
    def predict(
        self,
        trunk: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The trunk's prediction [B, C, H, W] at `timesteps` [B] (0..1000).

        guidance_scale: for a trunk that is guidance-distilled; others ignore it.
        """

    def clean(self, latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction amounts to, float32 [B, C, H, W]; here of a flow, x0 = z - sigma v."""
        sigma = (timesteps / 1000.0).view(-1, *[1] * (latents.ndim - 1))
        return latents - sigma * prediction

    def per_score(self, timesteps: Tensor) -> Tensor:
        """What a prediction changes by where the score, grad log p(z), changes by 1: [K] of timesteps [K].

        Here of a flow, v = -(z + sigma score) / (1 - sigma): without bound at pure noise, so bounded by MOST_PER_SCORE.
        """
        sigma = timesteps / 1000.0
        return -(sigma / (1.0 - sigma).clamp_min(1e-6)).clamp_max(MOST_PER_SCORE)

    @abstractmethod
    def tap(self, trunk: nn.Module, index: int) -> tuple[nn.Module, int | None]:
        """The block whose features a critic reads, and where they stand in its output tuple (None: they are it all)."""

    def tap_width(self, index: int) -> int:
        """D of that block's tokens."""
        return self.width

    def tokens(self, features: Tensor) -> Tensor:
        """A block's features as image tokens [B, N, D], neighbours in D being neighbours in memory."""
        return features

    def blocks(self, trunk: nn.Module) -> list[nn.Module]:
        """The blocks, in order."""
        return [self.tap(trunk, index)[0] for index in range(self.depth)]

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [B, height, width, 3] pictures of clean float32 latents."""

    @abstractmethod
    def lora_targets(self) -> list[str]:
        """Layers of the trunk that LoRA changes, by the ends of their names."""

    def save(self, trunk_state: dict[str, Tensor], folder: Path) -> None:
        """Writes a complete pipeline folder of the family with the given trunk weights, as safetensors.

        LoRA's factors are merged into the weights beside them.
        """
        trunk = self._merged(trunk_state)
        self.pipe.vae.to(memory_format=torch.contiguous_format)  # safetensors takes no other
        self.with_parts(**{self.trunk_name: trunk}).save_pretrained(folder)
        self.pipe.vae.to(memory_format=torch.channels_last)

    def save_trunk(self, trunk_state: dict[str, Tensor], folder: Path) -> None:
        """Writes a trunk alone, LoRA merged, for `from_pretrained` of its class."""
        self._merged(trunk_state).save_pretrained(folder)

    def save_lora(self, trunk_state: dict[str, Tensor], folder: Path) -> None:
        """Writes LoRA's factors alone, for `load_lora_weights` of the stock pipeline, with their rank and alpha."""
        trunk = self._trunk_of(trunk_state)
        layers = get_peft_model_state_dict(trunk)
        about = {f"{self.trunk_name}_lora_adapter_metadata": trunk.peft_config["default"].to_dict()}
        type(self.pipe).save_lora_weights(folder, **{f"{self.trunk_name}_lora_layers": layers}, **about)

    def _merged(self, trunk_state: dict[str, Tensor]) -> nn.Module:
        trunk = self._trunk_of(trunk_state)
        if hasattr(trunk, "peft_config"):
            trunk.fuse_lora()
            trunk.unload_lora()
        return trunk

    def _trunk_of(self, state: dict[str, Tensor]) -> nn.Module:
        """A trunk with these weights, of their dtype."""
        with torch.device("meta"):
            trunk = type(self.trunk).from_config(self.trunk.config)
            if hasattr(self.trunk, "peft_config"):
                trunk.add_adapter(self.trunk.peft_config["default"])
        trunk.load_state_dict(state, assign=True)
        return trunk

    def with_parts(self, **parts) -> DiffusionPipeline:
        """A stock pipeline of these components; the others and its options are as they are here."""
        _, options = self.pipe._get_signature_keys(type(self.pipe))
        kept = {name: self.pipe.config[name] for name in options if name in self.pipe.config}
        return type(self.pipe)(**{**self.pipe.components, **kept, **parts})

    def default_taps(self) -> list[int]:
        """Blocks of one width. Three depths, as SD3.5-M's blocks 7, 15 and 23 of 24 (arXiv 2605.27736): a third, two
        thirds, the end."""
        return sorted({round(self.depth * part / 3) - 1 for part in (1, 2, 3)} - {-1})


def latent_side(resolution: int, vae_scale_factor: int, patch_size: int = 1) -> int:
    """H = W of the latents of square pictures; UserError unless they are whole patches of `patch_size`."""
    unit = vae_scale_factor * patch_size
    if resolution % unit:
        below = max(unit, resolution // unit * unit)
        raise UserError(
            f"model.resolution = {resolution}: must be a multiple of {unit}, the pixels of this model's "
            f"{'patch' if patch_size > 1 else 'latent'}; nearest: {below} or {below + unit}"
        )
    return resolution // vae_scale_factor


def flow_schedule(sigmas: Tensor, transition: str, noise_level: float, num_trained_steps: int | None) -> Schedule:
    """Of a flow model, whose noise levels are float32 [K + 1], descending to 0; it is conditioned on 1000 sigma."""
    table = build_table(transition, noise_level, sigmas=sigmas, num_trained_steps=num_trained_steps)
    return Schedule(table, sigmas[:-1] * 1000.0)


def as_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, height, width] in -1..1 to uint8 [B, height, width, 3], rounded as diffusers rounds."""
    scaled = (pictures.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1)
