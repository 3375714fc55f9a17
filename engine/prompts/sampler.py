"""The endless order of prompts, of one source or of several in proportion to their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from ..errors import UserError
from .prompt import Prompt


@dataclass(frozen=True)
class PromptSource:
    """Prompts that are drawn from together: a share weight / (sum of weights) of all draws. weight > 0."""

    prompts: Sequence[Prompt]
    weight: float = 1.0


class PromptSampler:
    """Endless epochs over each source, every one shuffled anew and without repetition; sources take turns, so that of
    the first n draws each has its share to within less than the number of sources, whatever n.

    The order is a function of (seed, position) alone, so a resumed run needs no saved state, and any position is found
    without those before it.
    """

    def __init__(self, sources: Sequence[PromptSource], seed: int):
        if not sources or not all(source.prompts for source in sources):
            raise UserError("the list of prompts is empty")
        self.prompts = [prompt for source in sources for prompt in source.prompts]
        self.seed = seed
        self._sources = [list(source.prompts) for source in sources]
        # As they are written (0.1 is a tenth) and exact, since rounding would skip or repeat draws.
        total = list(accumulate(Fraction(str(source.weight)) for source in sources))
        self._earlier = [(total[i - 1] / total[i]).as_integer_ratio() if i else (0, 1) for i in range(len(total))]

    def batch(self, iteration: int, n: int) -> list[Prompt]:
        """The `n` prompts of an iteration (counted from 0), where each iteration takes `n`."""
        orders: dict[tuple[int, int], np.ndarray] = {}
        drawn = []
        for position in range(iteration * n, (iteration + 1) * n):
            number, own = self._place(position)
            prompts = self._sources[number]
            epoch, index = divmod(own, len(prompts))
            if (number, epoch) not in orders:
                # numpy fills seeds up with zeros: source 0 has the order that it has by itself, with (seed, epoch).
                rng = np.random.default_rng((self.seed, epoch, number))
                orders[number, epoch] = rng.permutation(len(prompts))
            drawn.append(prompts[orders[number, epoch][index]])
        return drawn

    def _place(self, position: int) -> tuple[int, int]:
        """The source that a position draws from, and how often it was drawn from before.

        From the last source to the first: of p draws from sources 0..i, ceil(p share) are from sources 0..i-1, in even
        steps, and the others from source i.
        """
        for number in range(len(self._sources) - 1, 0, -1):
            numerator, denominator = self._earlier[number]
            before, after = (-(-p * numerator // denominator) for p in (position, position + 1))
            if before == after:
                return number, position - before
            position = before
        return 0, position
