"""Running mean and std of the rewards, so that the critic's targets keep unit scale whatever a reward's units."""

import torch
import torch.distributed as dist
from torch import Tensor

from latent_critic.engine.advantages import mean_and_variance
from latent_critic.engine.errors import UserError

# Far below the spread of any real reward (preference models: about 0.01), but it keeps a reward that is the same for
# every sample at 0 instead of blowing rounding errors up to unit scale.
MIN_STD = 1e-4


def critic_units(state: dict[str, Tensor], num_rewards: int) -> dict[str, Tensor]:
    """Mean and std [M] by which a standardizer of this state makes the critic's units; before any reward, 0 and 1."""
    standardizer = RunningStandardizer(num_rewards)
    if state and state["count"] > 0:
        standardizer.load_state_dict(state)
        return {"mean": standardizer.mean, "std": standardizer.std}
    return {"mean": torch.zeros(num_rewards), "std": torch.ones(num_rewards)}


def sum_of_rewards(standardized: Tensor, weights: Tensor) -> Tensor:
    """One reward [..., 1] in place of M [..., M]: their weighted sum, of about unit scale as they are."""
    return standardized @ (weights / weights.norm()).to(standardized)[:, None]


class RunningStandardizer:
    """(reward - mean) / std of M rewards, with statistics that forget.

    Batches are merged with Chan, Golub and LeVeque's update (1979) in float64. Before a batch is merged, the weight of
    all earlier ones is multiplied by `decay`, because the rewards drift as the policy improves and statistics over the
    whole run would leave the critic's targets ever further from mean 0 and std 1; 0.9 remembers about ten updates.
    The state lives on the CPU and is the same on every rank.
    """

    def __init__(self, num_rewards: int, decay: float = 0.9):
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
        self.decay = decay
        self.count = torch.zeros((), dtype=torch.float64)  # decayed number of samples
        self.mean = torch.zeros(num_rewards, dtype=torch.float64)
        self.sum_squared_deviation = torch.zeros(num_rewards, dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, float64 [M], at least MIN_STD."""
        return (self.sum_squared_deviation / self.count).sqrt().clamp_min(MIN_STD)

    def update(self, rewards: Tensor, process_group: dist.ProcessGroup | None = None) -> None:
        """Merges this rank's rewards [N, M] and those of all others, on the device of the process group."""
        self._require_columns(rewards)
        batch_mean, batch_variance, batch_count = mean_and_variance(rewards, (0,), process_group)
        batch_mean, batch_variance = batch_mean.cpu(), batch_variance.cpu()
        old_count = self.decay * self.count
        self.count = old_count + batch_count
        difference = batch_mean - self.mean
        self.mean = self.mean + difference * (batch_count / self.count)
        self.sum_squared_deviation = (
            self.decay * self.sum_squared_deviation
            + batch_variance * batch_count
            + difference.square() * (old_count * batch_count / self.count)
        )

    def standardize(self, rewards: Tensor) -> Tensor:
        """rewards [N, M] -> float32 [N, M] of about mean 0 and std 1, on the same device. Needs one `update` before."""
        self._require_columns(rewards)
        if self.count == 0:
            raise RuntimeError("standardize before the first update: there are no statistics yet")
        standardized = (rewards.to(torch.float64) - self.mean.to(rewards.device)) / self.std.to(rewards.device)
        return standardized.to(torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything `update` has learned, as float64 tensors: loading it continues bit-exactly."""
        return {
            "count": self.count.clone(),
            "mean": self.mean.clone(),
            "sum_squared_deviation": self.sum_squared_deviation.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict()`. UserError if it was saved for another number of rewards."""
        if state["mean"].shape != self.mean.shape:
            raise UserError(
                f"the checkpoint holds statistics of {len(state['mean'])} rewards, the config has {len(self.mean)}: "
                "resume with the rewards the run was started with"
            )
        self.count = state["count"].to("cpu", torch.float64, copy=True)
        self.mean = state["mean"].to("cpu", torch.float64, copy=True)
        self.sum_squared_deviation = state["sum_squared_deviation"].to("cpu", torch.float64, copy=True)

    def _require_columns(self, rewards: Tensor) -> None:
        if rewards.ndim != 2 or rewards.shape[1] != len(self.mean):
            raise ValueError(f"rewards must be [N, {len(self.mean)}], got {list(rewards.shape)}")
