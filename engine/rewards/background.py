"""How natural is the background? The quality that composition-only training is free to damage.

Six statistics of the pixels that belong to no object and no text - brightness, tint, spread of colour, and contrast at
three scales - are compared with those of really drawn scenes. A background like one of them scores about 1; a flat,
noisy, blotchy or tinted one scores low, and so does a picture that leaves no background to judge.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import Tensor

from ..embedded import scenes
from .composition import scene_pictures

# What counts as one step of each statistic: 8-bit levels for the first three, logarithms of levels for the contrasts.
UNITS = np.array([8.0, 3.0, 3.0, 0.3, 0.3, 0.3])
HALF_DISTANCE = 2.0  # steps beyond the usual distance between drawn scenes at which the score is a half
MIN_SHARE = 0.4  # of the picture; drawn backgrounds cover at least 0.48, borders of the objects not counted

_SATURATED = 30  # levels; the tint of drawn backgrounds stays below 14
_DARK = 110  # levels; backgrounds stay above 140, the text is at 16
_BORDER = 3  # pixels around objects and text that are left out
_SCALES = (1.0, 3.0)  # pixels: standard deviations of the Gaussians that part fine, middle and coarse contrast
_DRAWN = 256  # scenes to compare with


class Background:
    """1 / (1 + (d / 2)^2), d = distance to the nearest drawn scene beyond the usual one between drawn scenes."""

    name = "background"
    value_range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> np.ndarray:
        """images: uint8 [N, 64, 64, 3]. Dark pixels are background too, unless the prompt asks for a quoted text."""
        pictures = scene_pictures(images, self.name)
        found, share = statistics(pictures, np.array(['"' in prompt for prompt in prompts]))
        drawn, usual = _reference()
        beyond = np.maximum(0, cdist(found / UNITS, drawn / UNITS).min(axis=1) - usual)
        return np.minimum(1, share / MIN_SHARE) / (1 + (beyond / HALF_DISTANCE) ** 2)


def statistics(pictures: np.ndarray, with_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The six statistics [N, 6] and the share of the picture they are about [N], of uint8 [N, H, W, 3] pictures.

    with_text: bool [N], whether dark pixels are text.
    """
    pixels = pictures.astype(np.float32)
    light = pixels.mean(axis=-1)
    tint = pixels - light[..., None]
    content = np.linalg.norm(tint, axis=-1) > _SATURATED
    content |= (light < _DARK) & with_text[:, None, None]
    for axis in (1, 2):
        content = ndimage.maximum_filter1d(content.view(np.uint8), 2 * _BORDER + 1, axis=axis)
    mask = 1 - content.astype(np.float32)
    count = np.maximum(mask.sum(axis=(1, 2)), 1)

    def mean(values):
        return (values * mask).sum(axis=(1, 2)) / count

    def log_contrast(values):
        centred = values - mean(values)[:, None, None]
        return np.log(0.5 + np.sqrt(mean(centred**2)))  # half a level: what rounding to 8 bits hides

    def smooth(sigma):  # over background pixels only
        weight = ndimage.gaussian_filter(mask, (0, sigma, sigma), truncate=2)
        return ndimage.gaussian_filter(light * mask, (0, sigma, sigma), truncate=2) / np.maximum(weight, 1e-3)

    fine, coarse = map(smooth, _SCALES)
    mean_tint = np.stack([mean(tint[..., c]) for c in range(3)], axis=-1)
    spread = np.sqrt(mean(((tint - mean_tint[:, None, None]) ** 2).sum(axis=-1)))
    contrasts = [log_contrast(light - fine), log_contrast(fine - coarse), log_contrast(coarse)]
    return np.stack([mean(light), np.linalg.norm(mean_tint, axis=-1), spread, *contrasts], axis=-1), mask.mean((1, 2))


@lru_cache(maxsize=1)
def _reference() -> tuple[np.ndarray, float]:
    """Statistics of drawn scenes [256, 6], and the median distance from one of them to the nearest other."""
    rng = np.random.default_rng(0)
    drawn = [scenes.random_scene(rng) for _ in range(_DRAWN)]
    pictures = np.stack([scenes.draw(scene, rng) for scene in drawn])
    found, _ = statistics(pictures, np.array([scene.text is not None for scene in drawn]))
    distances = cdist(found / UNITS, found / UNITS)
    np.fill_diagonal(distances, np.inf)
    return found, float(np.median(distances.min(axis=1)))
