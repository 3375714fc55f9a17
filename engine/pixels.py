"""A critic's trunk on pictures: the field's usual critic, to compare the one on latents with."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 64,
    "patch_size": 8,
}
LEAST_PIXELS = 224  # a side, below which pictures get a small transformer


class PixelTrunk(nn.Module):
    """A vision transformer of random weights: ViT-base at 224 pixels, or a small one at 64 for small pictures."""

    def __init__(self, resolution: int):
        super().__init__()
        config = ViTConfig(**(SMALL if resolution < LEAST_PIXELS else {}))
        self.vit = ViTModel(config, add_pooling_layer=False).eval()
        self.side, self.width = config.image_size, config.hidden_size

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures in 0..1, [B, 3, side, side] of the weights' type, to tokens [B, N, D]."""
        return self.vit(2 * pictures - 1).last_hidden_state


def as_input(pictures: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    """uint8 [B, height, width, 3], as they are decoded, to what the trunk takes."""
    pictures = pictures.permute(0, 3, 1, 2).to(dtype) / 255
    return functional.interpolate(pictures, (side, side), mode="bilinear")
