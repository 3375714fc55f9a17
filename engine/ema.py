"""An exponential moving average of the policy's trained weights, sharded as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn


class WeightAverage:
    """Keeps float32 averages of what this process holds of each parameter: its shard, or all of it.

    The weights of half precision that are averaged move in steps of their own rounding; the average does not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        """parameters: as DeepSpeed left them; those that are sharded have a `ds_tensor`."""
        self.decay, self._parameters = decay, list(parameters)
        self.restart()

    def restart(self) -> None:
        """From the weights as they are."""
        self._average = [here.float().clone() for here in self._here]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: average <- decay average + (1 - decay) weight."""
        torch._foreach_lerp_(self._average, [here.float() for here in self._here], 1 - self.decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold their average. No optimizer step may be taken."""
        kept = [here.clone() for here in self._here]
        self._write(self._average)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._here, values)
        for parameter in self._parameters:
            # ZeRO-3 keeps small ones gathered, as they were; it gathers them again when they are used.
            if getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE:
                parameter.partition()

    @property
    def _here(self) -> list[Tensor]:
        return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in self._parameters]

    def state_dict(self) -> dict[str, Tensor]:
        return {f"average.{number}": tensor for number, tensor in enumerate(self._average)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for number, tensor in enumerate(self._average):
            tensor.copy_(state[f"average.{number}"])
