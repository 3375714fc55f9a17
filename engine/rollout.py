"""Sampling with the actor-critic: trajectories of many prompts, micro-batch by micro-batch."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .actor_critic import ActorCritic
from .backbones.base import Conditioning
from .denoising import DenoisingLoop
from .noise import keyed_noise
from .prompt_cache import PromptCache
from .prompts import Prompt
from .streams import host_buffer
from .trajectory import Trajectory, concatenate
from .transitions import Schedule
from .trunk_clock import TrunkClock

T = TypeVar("T")

LEAST = 4  # samples that share a forward, where there are as many: MKL rounds products of fewer rows otherwise


class _MicroBatch(NamedTuple):
    rows: slice
    noises: Tensor  # [K + 1, B, C, H, W], the initial latents first
    conditioning: Conditioning  # on the device


class Rollout:
    """Draws one trajectory a prompt.

    models: modules over the same weights; with several, as many micro-batches are drawn side by side, a thread each
    (for the cores of a CPU), and are smaller where they would not give each thread one. graph, check_addresses: see
    DenoisingLoop. The update later sees the same micro-batches, so that its probability ratio starts at exactly 1 (on a
    CPU a sample's bits do not depend on the batch it is in).
    """

    def __init__(
        self,
        models: Sequence[ActorCritic],
        encode: PromptCache,
        latent_shape: tuple[int, int, int],
        micro_batch_size: int,
        device: torch.device,
        clock: TrunkClock | None = None,
        graph: str = "off",
        check_addresses: bool = False,
    ):
        self.models, self.encode, self.latent_shape = models, encode, latent_shape
        self.micro_batch_size, self.device, self.clock = micro_batch_size, device, clock
        self.graph, self.check_addresses = graph, check_addresses
        self._loops: dict[tuple, DenoisingLoop] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and graph != "off" else None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sample_indices: Tensor,
        *,
        schedule: Schedule,
        seed: int,
        guidance_scale: float | None = None,
        keep_features: bool = False,
        finished: Callable[[int, Trajectory], None] = lambda start, part: None,
    ) -> Trajectory:
        """schedule: on the device, the same object again for the same sampler, since a loop is kept for it.

        sample_indices: int64 [N], global, which key the noise. guidance_scale: None is the trained one. keep_features:
        what the critic reads stays in the trajectory, for passes of the critic alone. `finished` is called with each
        micro-batch and the number of its first sample, in any order and from several threads.
        """
        guidance = self.models[0].guidance_scale if guidance_scale is None else guidance_scale
        self.encode.prepare([prompt.text for prompt in prompts])
        unconditional = self.encode([""]) if self.models[0].backbone.needs_unconditional(guidance) else None
        share = -(-len(prompts) // len(self.models))
        size = min(self.micro_batch_size, len(prompts), max(share, LEAST))
        starts = range(0, len(prompts), size)
        batches = one_ahead(
            self._prepare(slice(start, start + size), prompts, sample_indices, seed, len(schedule.timesteps))
            for start in starts
        )
        parts: dict[int, Trajectory] = {}
        kept: list[Tensor] = []  # of all samples: they take more memory than all else, and joined would take it twice
        turn, first, stop = threading.Lock(), threading.Lock(), threading.Event()

        def keep(rows: slice, features: Sequence[Tensor]) -> None:
            with first:
                if not kept:
                    kept.extend(host_buffer(tap, len(prompts)) for tap in features)
            for buffer, tap in zip(kept, features, strict=True):
                buffer[rows].copy_(tap, non_blocking=True)

        def draw(worker: int) -> None:
            loop = None
            while not stop.is_set():
                with turn:
                    batch = next(batches, None)
                    if batch is None:
                        return
                    if loop is None:
                        loop = self._loop(
                            worker, schedule, size, batch.conditioning, unconditional, guidance, keep_features
                        )
                with self.clock.span() if self.clock and loop.is_captured else nullcontext():
                    latents, log_probs, values, *features = loop(batch.noises, batch.conditioning)
                keep(batch.rows, features)
                part = Trajectory(
                    latents,
                    log_probs,
                    values,
                    timesteps=schedule.timesteps,
                    table=schedule.table,
                    conditioning=batch.conditioning,
                    prompts=list(prompts[batch.rows]),
                    sample_indices=sample_indices[batch.rows],
                    seed=seed,
                )
                parts[batch.rows.start] = part
                finished(batch.rows.start, part)

        workers = min(len(self.models), len(starts))
        with closing(batches):
            if workers == 1:
                draw(0)
            else:
                with ThreadPoolExecutor(workers, "rollout") as threads:
                    working = [threads.submit(draw, worker) for worker in range(workers)]
                    try:
                        for worker in working:
                            worker.result()
                    finally:
                        stop.set()  # where one has failed the others end with the micro-batch they have
        return replace(concatenate([parts[start] for start in starts]), features=kept)

    def describe(self) -> str:
        """How steps run, for the run's plan."""
        if self.device.type == "cpu":
            count = len(self.models)
            return f"{count} micro-batch{'es side by side, a core each' if count > 1 else ' at a time'}"
        replayed = {"step": "a captured CUDA graph of a step", "loop": "a captured CUDA graph of all steps"}
        return replayed.get(self.graph, "each step from Python")

    def close(self) -> None:
        """Gives back the memory of the loops; the next call makes them anew."""
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()

    def _prepare(self, rows: slice, prompts: Sequence[Prompt], sample_indices: Tensor, seed: int, steps: int):
        conditioning = self.encode([prompt.text for prompt in prompts[rows]])
        noises = [keyed_noise(seed, sample_indices[rows], k, self.latent_shape) for k in range(steps + 1)]
        noises = torch.stack(noises)
        # From pinned memory a copy to the GPU does not hold up the host.
        return _MicroBatch(rows, noises.pin_memory() if self.device.type == "cuda" else noises, conditioning)

    def _loop(
        self, worker, schedule, size, conditioning, unconditional, guidance: float, keep_features: bool
    ) -> DenoisingLoop:
        key = (worker, id(schedule), size, guidance, keep_features)  # the loop keeps the schedule, and so its id
        if key not in self._loops:
            inputs = (self.models[worker], schedule, self.latent_shape, size, conditioning, unconditional, guidance)
            try:
                loop = DenoisingLoop(*inputs, self.graph, self._pool, self.check_addresses, keep_features)
            except RuntimeError as error:
                if self.graph == "off" or isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().splitlines()[0]
                if not dist.is_initialized() or dist.get_rank() == 0:
                    print(f"rollouts run without a CUDA graph: a step cannot be captured: {reason}", file=sys.stderr)
                self.graph = "off"
                loop = DenoisingLoop(*inputs, keep_features=keep_features)
            self._loops[key] = loop
        return self._loops[key]


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread of its own while the one before it is used."""
    with ThreadPoolExecutor(1, "one-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def rows(conditioning: Conditioning, batch: slice) -> Conditioning:
    """A micro-batch of a conditioning."""
    return {name: tensor[batch] for name, tensor in conditioning.items()}
