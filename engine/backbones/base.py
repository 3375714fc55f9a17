"""What the engine asks of a model family. An adapter is the only code that knows the family's diffusers classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..transitions import Schedule, build_table
from .attention import set_attention_backend

Conditioning = dict[str, Tensor]  # per-sample tensors, first dimension = sample; float32, kept on the CPU in the cache


class Backbone(ABC):
    """A frozen pipeline around one trainable trunk.

    The trunk is what DeepSpeed shards; autoencoder and text encoders stay outside, frozen, in float32. Shapes below:
    B samples, C x H x W latents, N image tokens of width D.
    """

    trunk: nn.Module
    encoders: list[nn.Module]  # of text; on the CPU but while they encode
    latent_shape: tuple[int, int, int]  # C, H, W
    width: int  # D of the default taps
    text_width: int
    depth: int  # number of blocks that can be tapped

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, max_sequence_length: int) -> "Backbone":
        """Reads a diffusers pipeline folder. Raises UserError where a part is missing."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Moves the autoencoder; the trunk moves with the actor-critic, the encoders when they are needed."""

    @abstractmethod
    def fuse(self) -> None:
        """Lets the trunk's blocks run fused kernels: the same weights under the same names, on a CPU the same bits."""

    def set_attention_backend(self, name: str) -> str:
        """Which implementation of attention the trunk runs: see `attention.set_attention_backend`."""
        return set_attention_backend(self.trunk, name)

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, as the family's own pipeline computes it at guidance 1."""

    @abstractmethod
    def pooled_text(self, conditioning: Conditioning) -> Tensor:
        """One vector a prompt, [B, text_width], for the critic."""

    @abstractmethod
    def schedule(
        self, transition: str, noise_level: float, num_inference_steps: int, num_trained_steps: int | None = None
    ) -> Schedule:
        """The sampler `transition` ("ode" is the deterministic one) over the family's own scheduler's K timesteps.

        UserError if the family has no such sampler, or not with that noise level.
        """

    @abstractmethod
    def predict(self, trunk: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The trunk's prediction [B, C, H, W] at `timesteps` [B] (0..1000)."""

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
    def save(self, trunk_state: dict[str, Tensor], folder: Path) -> None:
        """Writes a complete pipeline folder of the family with the given trunk weights, as safetensors."""

    def default_taps(self) -> list[int]:
        """Blocks of one width. Three depths, as SD3.5-M's blocks 7, 15 and 23 of 24 (arXiv 2605.27736): a third, two
        thirds, the end."""
        return sorted({round(self.depth * part / 3) - 1 for part in (1, 2, 3)} - {-1})


def flow_schedule(sigmas: Tensor, transition: str, noise_level: float, num_trained_steps: int | None) -> Schedule:
    """Of a flow model, whose noise levels are float32 [K + 1], descending to 0; it is conditioned on 1000 sigma."""
    table = build_table(transition, noise_level, sigmas=sigmas, num_trained_steps=num_trained_steps)
    return Schedule(table, sigmas[:-1] * 1000.0)


def freeze(*modules: nn.Module | None) -> None:
    for module in modules:
        if module is not None:
            module.eval().requires_grad_(False)


def as_uint8(pictures: Tensor) -> Tensor:
    """[B, 3, height, width] in -1..1 to uint8 [B, height, width, 3], rounded as diffusers rounds."""
    scaled = (pictures.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1)
