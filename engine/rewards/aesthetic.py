"""LAION's aesthetic predictor: how people would rate a picture's looks from 1 to 10, by CLIP ViT-L's embedding."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .clip import crop, load_clip
from .hub import build, find_file, place, read_checkpoint

WIDTHS = (1024, 128, 64, 16, 1)
NUMBERS = (0, 2, 4, 6, 7)  # of the linear layers; 1, 3 and 5 were dropout


class Aesthetic:
    """The head sac+logos+ava1-l14-linearMSE on CLIP's normalised picture embedding, as in DDPO and flow_grpo.

    The prompt does not matter. model: a local folder or a hub id of the CLIP. head, file: a local folder or a hub id,
    and the name in it of the head's weights.
    """

    name = "aesthetic"
    value_range = (float("-inf"), float("inf"))

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        file: str = "aesthetic-model.pth",
        device: str = "cpu",
        dtype: str = "auto",
    ):
        self._device, self._dtype = place(self.name, device, dtype)
        path = find_file(self.name, head, file)
        state = {name.removeprefix("layers."): x for name, x in read_checkpoint(self.name, path).items()}
        clip = load_clip(self.name, model)
        self._side, width = clip.config.vision_config.image_size, clip.config.projection_dim
        self._head = build(self.name, path, lambda: linear_head(width), state).to(self._device)
        self._tower = clip.vision_model.to(self._device, self._dtype)
        self._projection = clip.visual_projection.to(self._device, self._dtype)

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        pixels = crop(images, self._side).to(self._device, self._dtype)
        embeddings = self._projection(self._tower(pixel_values=pixels).pooler_output)
        return self._head(normalize(embeddings.float()))[:, 0].tolist()


def linear_head(width: int) -> nn.Sequential:
    """[N, width] -> [N, 1] by five linear layers with nothing between them, numbered as in LAION's checkpoints."""
    sizes = zip(NUMBERS, pairwise((width, *WIDTHS)), strict=True)
    return nn.Sequential(OrderedDict((str(number), nn.Linear(*size)) for number, size in sizes))
