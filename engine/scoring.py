"""Pictures and rewards of finished samples, in threads of their own while the next samples are denoised."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from .backbones.base import Backbone
from .errors import UserError
from .prompts import Prompt
from .rewards import ConstantGuard, Reward, RewardError, Scores, join, judge
from .streams import side_stream
from .trajectory import Trajectory

BATCH = 16  # pictures at a time: larger batches leave a CPU's caches, and share the last work less evenly


def _thread(name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, name, initializer=_compute_alone)


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes on the number that the process has at its first use


# One for the process: each thread plans its first convolutions anew (cuDNN).
_DECODER = _thread("scoring")


class Scoring:
    """Scores the micro-batches of one rollout.

    PyTorch leaves Python free while it computes, so decoding and scoring run beside the trunk, on a GPU in a stream of
    their own. Once the trunk rests, its thread decodes too: the last pictures are all that an iteration waits for.
    Each reward is called by one thread only: those that compute in this process by the one that decodes, the others,
    of which a thread only awaits the answers, by one each.
    """

    def __init__(self, backbone: Backbone, rewards: Sequence[Reward], guard: ConstantGuard | None = None):
        """guard: is shown what was earned, over all ranks."""
        self._backbone, self._rewards, self._guard = backbone, rewards, guard
        self._judges = [_thread(f"reward-{m}") if r.is_elsewhere else _DECODER for m, r in enumerate(rewards)]
        self._undecoded: deque[tuple[Future, Tensor, torch.cuda.Event | None]] = deque()
        # Pictures, and scores by each reward, by the number of their first sample.
        self._scored: dict[int, tuple[Future, list[Future]]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._found: tuple[Tensor, Tensor] | None = None
        self._failure: RewardError | None = None
        self._broken: UserError | None = None  # what the first batch raised that a reward failed on
        self.extras: dict[str, float] = {}  # after `result`: "reward/extra" -> mean over all ranks' pictures

    def submit(self, start: int, part: Trajectory) -> None:
        """A micro-batch, whose first sample has the number `start`; in any order, from any thread."""
        latents = part.latents[:, -1]
        sampled = None
        if latents.is_cuda:
            self._stream = side_stream("scoring", latents.device)
            sampled = torch.cuda.Event()
            sampled.record()
        for first in range(0, len(part.prompts), BATCH):
            batch = slice(first, first + BATCH)
            pictures = Future()
            self._undecoded.append((pictures, latents[batch], sampled))
            _DECODER.submit(self._decode_next)
            scores = [
                thread.submit(self._judge, reward, pictures, part.prompts[batch])
                for thread, reward in zip(self._judges, self._rewards, strict=True)
            ]
            self._scored[start + first] = pictures, scores

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits for all: uint8 [N, H, W, 3] pictures, float32 [N, M] raw rewards.

        Where a reward fails on one rank, or the guard objects, every rank raises the same RewardError, so that they can
        leave a checkpoint together. So all ranks must ask; whoever asks again is told the same.
        """
        if self._failure is None and self._found is None:
            try:
                self._finish()
            except RewardError as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure
        return self._found

    def _finish(self) -> None:
        while self._undecoded:
            self._decode_next()
        wait([future for decoded, judged in self._scored.values() for future in (decoded, *judged)])
        for thread in {*self._judges} - {_DECODER}:
            thread.shutdown()
        ordered = [self._scored[start] for start in sorted(self._scored)]
        pictures = torch.cat([decoded.result() for decoded, _ in ordered])
        failure, scores, extras = None, torch.empty(len(pictures), len(self._rewards)), {}
        try:
            for m, reward in enumerate(self._rewards):
                found = join([judged[m].result() for _, judged in ordered])
                scores[:, m] = found.values
                extras |= {f"{reward.name}/{name}": _sum_and_count(column) for name, column in found.extras.items()}
        except UserError as error:
            failure = str(error)
        self._agree(failure, scores, extras)
        self._found = pictures, scores

    def _agree(self, failure: str | None, scores: Tensor, extras: dict[str, tuple[float, int]]) -> None:
        """Exchanges with all ranks how it went. extras: sums over this rank's pictures, and of how many."""
        here = failure, scores.amin(0).tolist(), scores.amax(0).tolist(), len(scores), extras
        ranks: list = [here]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, here)
        failures, lows, highs, counts, sums = zip(*ranks, strict=True)
        if failed := next(filter(None, failures), None):
            raise RewardError(failed)
        for name in dict.fromkeys(name for of in sums for name in of):
            parts = [of[name] for of in sums if name in of]
            if count := sum(count for _, count in parts):
                self.extras[name] = sum(total for total, _ in parts) / count
        if self._guard is not None:
            low = [min(of) for of in zip(*lows, strict=True)]
            self._guard.observe(low, [max(of) for of in zip(*highs, strict=True)], sum(counts))

    def _decode_next(self) -> None:
        try:
            pictures, latents, sampled = self._undecoded.popleft()
        except IndexError:
            return  # the other thread was faster
        try:
            pictures.set_result(self._decode(latents, sampled))
        except BaseException as error:  # raised where the pictures are asked for
            pictures.set_exception(error)

    def _decode(self, latents: Tensor, sampled: torch.cuda.Event | None) -> Tensor:
        if sampled is None:
            return self._backbone.decode(latents)
        with self._beside():
            self._stream.wait_event(sampled)
            latents.record_stream(self._stream)
            return self._backbone.decode(latents).cpu()

    def _beside(self) -> AbstractContextManager:
        """What this thread then computes on a GPU neither waits for the trunk nor holds it up; and is on this device,
        where a thread of its own starts at device 0."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _judge(self, reward: Reward, pictures: Future, prompts: Sequence[Prompt]) -> Scores:
        if self._broken is not None:
            raise self._broken  # each batch might wait as long for a server as the one before
        texts, metadata = zip(*((p.text, p.metadata) for p in prompts), strict=True)
        try:
            decoded = pictures.result()
            with self._beside():
                return judge(reward, decoded, texts, metadata)
        except UserError as error:
            self._broken = error
            raise


def _sum_and_count(column: Tensor) -> tuple[float, int]:
    """Of the pictures that it says something of."""
    known = column[~column.isnan()].double()
    return known.sum().item(), len(known)
