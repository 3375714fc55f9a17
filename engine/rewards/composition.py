"""Does the picture show what its caption says? The embedded world's checker as a reward."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..embedded import checker, scenes
from ..errors import UserError


class Composition:
    """The checker's dense score: counts, shapes, colours and positions, with partial credit."""

    name = "composition"
    value_range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> list[float]:
        """images: uint8 [N, 64, 64, 3]; prompts: scene captions. UserError for another size or another text."""
        return [self._value(found) for found in self._judge(images, prompts)]

    def check_prompt(self, prompt: str, metadata: Mapping) -> None:
        scenes.parse(prompt)

    def _value(self, found: checker.Score) -> float:
        return found.dense

    def _judge(self, images: Tensor, prompts: Sequence[str]) -> list[checker.Score]:
        pictures = scene_pictures(images, self.name)
        return [checker.score(picture, scenes.parse(p)) for picture, p in zip(pictures, prompts, strict=True)]


class StrictComposition(Composition):
    """The checker's strict verdict, 0 or 1."""

    name = "composition_strict"

    def _value(self, found: checker.Score) -> float:
        return float(found.strict)


def scene_pictures(images: Tensor, reward: str) -> np.ndarray:
    """The pictures as an array; UserError if they are not of the embedded world's size."""
    pictures = np.asarray(images)
    if pictures.shape[1:] != (scenes.SIZE, scenes.SIZE, 3):
        raise UserError(
            f"reward {reward!r} judges {scenes.SIZE} x {scenes.SIZE} pictures, as the embedded model draws them; "
            f"these are {pictures.shape[1]} x {pictures.shape[2]}"
        )
    return pictures
