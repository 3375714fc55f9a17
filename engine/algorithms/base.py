"""What an algorithm makes of an iteration's rewards. N samples of this rank, M rewards, K steps, of which T trained."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..config import Config
from ..prompts import Prompt


class Algorithm(ABC):
    def __init__(self, config: Config, weights: Tensor):
        """weights: of the rewards, [M]."""
        self.config, self.weights = config.algorithm, weights

    def observe(self, raw: Tensor, prompts: Sequence[Prompt]) -> None:  # noqa: B027
        """Takes an iteration's rewards [N, M] into whatever statistics outlast it; once, and before all else."""

    @abstractmethod
    def advantages(self, raw: Tensor, values: Tensor, trained: slice, prompts: Sequence[Prompt]) -> Tensor:
        """[N, T], of all rewards together: raw [N, M] as they were given, values [N, K, heads] of the rollout."""

    def earned(self, raw: Tensor) -> Tensor:
        """Rewards in the critic's units, [N, heads]; here there is no critic."""
        return raw[:, :0]

    def returns(self, raw: Tensor, values: Tensor, trained: slice) -> Tensor:
        """What the critic is to learn, [N, K, heads]."""
        return values[..., :0]

    def state_dict(self) -> dict[str, Tensor]:
        """What `observe` has learned, for an exact resume; the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restores `state_dict()`."""
