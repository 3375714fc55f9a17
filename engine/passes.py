"""Forwards and backwards of an optimizer step: from parts of the work to gradients that DeepSpeed holds."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from .actor_critic import ActorCritic
from .inference_copy import InferenceCopy
from .trunk_clock import TrunkClock


class Part(NamedTuple):
    """Samples at denoising steps that share a forward."""

    samples: slice
    steps: slice
    weight: float  # of its mean in the mean over all (sample, step) pairs of the optimizer step


class Pass(NamedTuple):
    """What a forward of a part found. loss: already weighted."""

    prediction: Tensor | None
    loss: Tensor
    statistics: Tensor


Forward = Callable[[nn.Module, Part], Pass]  # the module takes what ActorCritic takes


class Passes(Protocol):
    """Runs passes, so many at a time, and leaves the sum of their losses' gradients where `engine.step` takes them."""

    at_once: int

    def run(self, parts: Sequence[Part], forward: Forward) -> list[Tensor]:
        """The statistics of each part."""


class EnginePasses:
    """Through DeepSpeed's own forward and backward, which gather weights and reduce gradients as they go."""

    at_once = 1

    def __init__(self, engine: DeepSpeedEngine, clock: TrunkClock):
        self._engine, self._clock = engine, clock

    def run(self, parts: Sequence[Part], forward: Forward) -> list[Tensor]:
        statistics = []
        for part in parts:
            self._engine.set_gradient_accumulation_boundary(part is parts[-1])
            found = forward(self._engine, part)
            self._clock.watch_backward(found.prediction)
            self._engine.backward(found.loss)
            self._clock.backward_done()
            statistics.append(found.statistics)
        return statistics


class SideBySidePasses:
    """For the cores of a CPU: a thread each, with a module of its own over the weights that sample.

    Threads inside an operation wait for each other at the end of every one of some hundred operations a pass, and
    beside another busy program for milliseconds; passes side by side share nothing. Their gradients are added in the
    order of `models`, so that they do not depend on which thread is faster, and are reduced once.

    models: modules over `weights`, which are the engine's.
    """

    def __init__(
        self, engine: DeepSpeedEngine, weights: InferenceCopy, models: Sequence[ActorCritic], clock: TrunkClock
    ):
        self.at_once = len(models)
        self._engine, self._weights, self._models, self._clock = engine, weights, models, clock

    def run(self, parts: Sequence[Part], forward: Forward) -> list[Tensor]:
        self._weights.refresh()  # the optimizer may have stepped since they were used
        trained = [(mine, twin) for mine, twin in self._weights.trained if mine.requires_grad]
        twins = [twin.requires_grad_() for _, twin in trained]

        def work(number: int) -> tuple[list[Tensor], list[Tensor]]:
            sums, statistics = [torch.zeros_like(twin) for twin in twins], []
            for part in parts[number :: self.at_once]:
                found = forward(self._models[number], part)
                self._backward(found, twins, sums)
                statistics.append(found.statistics)
            return sums, statistics

        try:
            with ThreadPoolExecutor(self.at_once, "passes") as threads:
                results = list(threads.map(work, range(self.at_once)))
        finally:
            for twin in twins:
                twin.requires_grad_(False)
        total = results[0][0]
        for sums, _ in results[1:]:
            torch._foreach_add_(total, sums)
        self._hand_over([mine for mine, _ in trained], total)
        return [results[number % self.at_once][1][number // self.at_once] for number in range(len(parts))]

    def _backward(self, found: Pass, twins: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        self._clock.watch_backward(found.prediction)
        gradients = torch.autograd.grad(found.loss, twins, materialize_grads=True)
        self._clock.backward_done(1 / self.at_once)
        torch._foreach_add_(sums, gradients)

    def _hand_over(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        engine = self._engine
        engine.set_gradient_accumulation_boundary(True)
        # A parameter takes no gradient of another shape, and one that is sharded is empty until it is gathered.
        with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_partition_weights()):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        if engine.zero_optimization():
            with engine.coalesce_grad_reduction():
                pass  # what it reduces at its end is there already
        else:
            engine.allreduce_gradients()
