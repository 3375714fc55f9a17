"""JPEG size, the two toy rewards of DDPO (Black et al., arXiv 2305.13301): easy to learn, easy to see, no model."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

QUALITY = 95


def _kilobytes(image: np.ndarray) -> float:
    with io.BytesIO() as buffer:
        Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
        return buffer.tell() / 1000


class JpegCompressibility:
    """Minus the size in kB (1000 bytes) at quality 95: flat pictures win."""

    name = "jpeg_compressibility"
    value_range = (float("-inf"), 0.0)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, H, W, 3]."""
        return [-_kilobytes(image) for image in np.asarray(images)]


class JpegIncompressibility(JpegCompressibility):
    """The size in kB: detailed or noisy pictures win."""

    name = "jpeg_incompressibility"
    value_range = (0.0, float("inf"))

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        return [-value for value in super().score(images, prompts, metadata)]
