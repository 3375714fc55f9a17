"""What a reward is: a scorer as its author writes it, and what the engine makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..errors import UserError

ANY_VALUE = (float("-inf"), float("inf"))
CONSTANT_LIMIT = 3  # iterations in a row


class RewardError(UserError):
    """A reward that cannot go on, in the middle of a run: the trainer leaves a checkpoint before it ends."""


class Scorer(Protocol):
    """The class behind a reward: built once, from the config's `params` as keywords.

    A function score(images, prompts, metadata, **params) will do too. Everything but `score` may be missing. A
    scorer that takes the keyword `device` is told the config's.
    """

    value_range: tuple[float, float]  # any value, where it is missing
    images: str  # "uint8" (tensor [N, H, W, 3] on the CPU), where it is missing, or "pil" (a list of N)
    is_elsewhere: bool  # False, where it is missing; True if it only waits for others to score

    def score(self, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        """N numbers, higher is better; or a pair of them and extras, a dict of name -> N numbers.

        Extras are only logged, by their means. One that is NaN says nothing of that picture and is left out.
        """

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> Any:
        """Raises UserError for a prompt that it cannot judge, quoting it as `{prompt!r}`."""


class RewardConfig(Protocol):
    """One entry of a config's `rewards`; the keys are explained there."""

    name: str
    weight: float
    params: Mapping[str, Any]
    batch_size: int | None
    device: str
    workers: int
    url: str | None
    timeout_s: float
    stop_if_constant: int | None


@dataclass(frozen=True)
class Reward:
    """One scorer, wherever it runs. `checks.judge` calls it."""

    name: str
    weight: float
    value_range: tuple[float, float]
    score: Callable[[Tensor, Sequence[str], Sequence[Mapping]], Any]  # uint8 [N, H, W, 3] -> as Scorer.score
    # N prompts and their metadata; raises UserError for one that this reward cannot judge.
    check_prompts: Callable[[Sequence[str], Sequence[Mapping]], Any]
    batch_size: int | None = None  # pictures in one call, at most
    is_elsewhere: bool = False  # who calls `score` waits for another process or machine
    stop_if_constant: int | None = CONSTANT_LIMIT  # iterations in a row


class Scores(NamedTuple):
    """What N pictures earned by one reward."""

    values: Tensor  # float32 [N], finite and within the reward's range
    extras: dict[str, Tensor]  # float32 [N] each, NaN where it says nothing
